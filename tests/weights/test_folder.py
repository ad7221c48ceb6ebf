import shutil

import jax
import numpy as np
import pytest

from jax_avatar.models.lora import add_adapter, init_adapter
from jax_avatar.models.network import flatten
from jax_avatar.testing import save_model, save_orbax
from jax_avatar.weights.files import load_weights, save_json, save_weights
from jax_avatar.weights.folder import export_model, load_model, load_settings
from jax_avatar.weights.networks import kind_of, load_network
from jax_avatar.weights.settings import add_to_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def nbytes(params):
    return sum(np.asarray(leaf).nbytes for leaf in flatten(params).values())


def adapter_of(params, scale=0.1):
    adapter = init_adapter(params, 2, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.asarray(leaf) + scale, adapter)


def test_an_adapter_in_the_folder_is_added(folder):
    plain = load_model(folder).dit.params
    adapter = adapter_of(plain)
    save_orbax(folder / "lora", adapter, {"rank": 2, "scaling": 0.5})
    add_to_config(folder, {"lora": "lora"})
    expected = flatten(add_adapter(plain, adapter, 0.5))
    for path, leaf in flatten(load_model(folder).dit.params).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_weights_are_rounded_when_asked(folder, weights):
    exact, rounded = load_model(folder).dit, load_model(folder, weights=weights).dit
    assert rounded.config.weights == weights and exact.config.weights == ""
    path = "blocks/ffn_in/kernel"
    assert flatten(rounded.params)[path].dtype.itemsize == 1
    nbytes = [
        sum(np.asarray(a).nbytes for a in flatten(d.params).values()) for d in (exact, rounded)
    ]
    assert nbytes[1] < nbytes[0]


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_rounded_weights_are_stored_as_they_are(folder, weights):
    rounded = load_model(folder, weights=weights).dit
    fields = load_weights(folder, "dit")[1]
    (folder / "dit.safetensors").unlink()
    save_orbax(folder / "dit", rounded.params, fields | {"weights": weights})
    again = flatten(load_model(folder).dit.params.restore())
    for path, leaf in flatten(rounded.params).items():
        np.testing.assert_array_equal(np.asarray(leaf), again[path])
    other = "fp8" if weights == "int8" else "int8"
    with pytest.raises(ValueError, match=f"stored in {weights} and cannot become {other}"):
        load_model(folder, weights=other)
    adapter = adapter_of(rounded.params)
    save_orbax(folder / "lora", adapter, {"rank": 2, "scaling": 0.5})
    add_to_config(folder, {"lora": "lora"})
    with pytest.raises(ValueError, match=rf"cannot be added to {weights} weights.*--merge"):
        load_model(folder)


@pytest.mark.parametrize(
    ("stored", "changed", "message"),
    [
        ({}, {"sigmas": (1.0, 0.5, 0.0)}, r"sigmas \(1.0, 0.75.*has sigmas \(1.0, 0.5, 0.0\)"),
        ({}, {"sampler": "renoise"}, "trained with sampler euler; this stream has sampler renoise"),
        ({"refresh": "clean"}, {"refresh": "none"}, "trained with refresh clean; .* refresh none"),
        ({}, {"refresh": "fixed"}, "trained with refresh none; .* refresh fixed"),
        ({"cache": "exit_only"}, {"cache": "per_step"}, "cache exit_only; .* cache per_step"),
        (
            {"audio_context": "clip"},
            {"audio_context": "block_reset"},
            "context clip; .* block_reset",
        ),
        ({"refresh_sigma": 0.5}, {"refresh_sigma": 0.6}, "refresh_sigma 0.5; .* refresh_sigma 0.6"),
    ],
)
def test_a_stream_unlike_the_training_is_refused_unless_it_is_forced(
    tmp_path, stored, changed, message
):
    stream = {"fps": 16, "size": [64, 64], "sigmas": [1.0, 0.75, 0.5, 0.0], **stored}
    content = {"name": "n", "dit": "wan_s2v", "vae": "light", "speech": "mel", "stream": stream}
    save_json(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match=f"{message}.*--force_sampler"):
        load_settings(tmp_path, **changed)
    forced = load_settings(tmp_path, force_sampler=True, **changed)
    assert {name: getattr(forced, name) for name in changed} == changed
    same = load_settings(tmp_path, sink_distance=(3, 3), **stored)  # nothing that was trained
    assert same.sigmas == (1.0, 0.75, 0.5, 0.0) and same.sink_distance == (3, 3)


def test_a_network_alone_is_known_by_its_fields_and_exported_by_its_kind(folder, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    alone.mkdir()
    for part in ("vae", "speech"):
        shutil.move(folder / f"{part}.safetensors", alone)
    assert (kind_of(alone, "vae"), kind_of(alone, "speech")) == ("light", "mel")
    # The folder's own networks were of other kinds.
    add_to_config(folder, {"vae": "wan", "speech": "wav2vec2"})
    dit, others = load_network(folder, "dit", "wan_s2v"), {"vae": alone, "speech": alone}
    export_model(out, folder, dit.params, dit.config, {}, stream={"fps": 16}, others=others)
    assert load_model(out).settings == load_settings(folder)
    save_weights(alone, "vae", {"w": np.ones(2, np.float32)}, {"nose": 1})
    with pytest.raises(
        ValueError, match=f"vae in {alone} is none of light, wan, anchored; pass the folder"
    ):
        kind_of(alone, "vae")


def test_a_network_is_not_streamed_below_its_smallest_level(tmp_path):
    save_model(tmp_path, sigmas=[1.0, 0.05, 0.0])
    load_model(tmp_path)
    add_to_config(tmp_path, {"dit": "portrait"})
    with pytest.raises(ValueError, match=r"stream\.sigmas asks PortraitDiT for noise level 0\.05"):
        load_model(tmp_path)


def test_a_folder_that_lacks_something_says_what(folder):
    (folder / "vae.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights of 'vae'"):
        load_model(folder)
    (folder / "config.json").write_text('{"name": "x", "dit": "wan_s2v"}')
    with pytest.raises(ValueError, match=r"lacks \['vae', 'speech', 'stream'\]"):
        load_settings(folder)
