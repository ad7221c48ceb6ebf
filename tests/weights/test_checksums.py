"""Damage to weights is found when they load, and named."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_avatar.testing import save_orbax
from jax_avatar.weights.checkpoint_writer import ResumableCheckpointWriter
from jax_avatar.weights.checksums import CHECKSUMS, keep_checksums, recorded
from jax_avatar.weights.files import (
    load_header,
    load_weights,
    save_json,
    save_weights,
)
from jax_avatar.weights.finite import all_finite, check_finite
from jax_avatar.weights.folder import SMALL, load_model
from jax_avatar.weights.orbax import StoredWeights
from jax_avatar.weights.whole_file import BrokenFile

PARAMS = {"head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "bias": np.ones(3)}
PARAMS = jax.tree.map(np.float32, PARAMS)
FLOATS = (
    np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    keep_checksums(tmp_path)
    return tmp_path


def damaged(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << place % 8
    path.write_bytes(data)


def test_every_byte_of_a_file_counts(folder):
    path = save_weights(folder, "net", PARAMS, {"width": 3}, {"step": 7})
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged(path, place)
        with pytest.raises(ValueError, match=r"net\.safetensors"):
            load_weights(folder, "net")
        path.write_bytes(whole)
    load_weights(folder, "net")


def test_every_file_of_an_orbax_folder_counts(folder):
    save_orbax(folder / "net", PARAMS, {"width": 3})
    files = [f for f in folder.glob("net/*/**/*") if f.is_file() and f.suffix != ".txt"]
    assert len(files) >= 5
    for path in files:
        whole = path.read_bytes()
        damaged(path, len(whole) // 2)
        with pytest.raises(BrokenFile, match=path.name):
            load_weights(folder, "net")
        path.unlink()  # an array without its file would be zeros
        with pytest.raises(ValueError, match="net"):
            load_weights(folder, "net")
        path.write_bytes(whole)
    load_weights(folder, "net")


def test_one_leaf_read_alone_is_checked_too(folder):
    save_orbax(folder / "net", PARAMS, {"width": 3})
    damaged(folder / "net/params/head.kernel/0.0", 9)
    stored = StoredWeights(folder / "net")
    np.testing.assert_array_equal(stored.read("bias"), 1)
    with pytest.raises(BrokenFile, match=r"head\.kernel"):
        stored.read("head/kernel")
    assert stored.restore(only=["bias"]).keys() == {"bias"}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_and_infinity_are_found_wherever_they_are(dtype, value):
    array = np.linspace(-3, 3, 300_000).astype(dtype)
    assert all_finite(array) and all_finite(array[::2].reshape(3, -1).T)
    check_finite("here", {"x": jax.numpy.asarray(array[:9], jax.dtypes.canonicalize_dtype(dtype))})
    for place in (0, 299_999):
        other = array.copy()
        other[place] = value
        if not np.isfinite(other[place].astype(np.float32)):  # e4m3 has no infinity of its own
            assert not all_finite(other)
    with pytest.raises(BrokenFile, match="here: tensor y holds NaN"):
        check_finite(
            "here",
            {"x": array, "y": jax.numpy.full(3, np.nan, jax.dtypes.canonicalize_dtype(dtype))},
        )


def test_large_numbers_and_integers_are_finite():
    assert all_finite(np.full(9, 3e38, np.float32)) and all_finite(np.full(9, -1, np.int8))


@pytest.mark.parametrize("kind", ["file", "orbax", "orbax on devices"])
def test_an_older_folder_loads_and_its_nan_is_named(tmp_path, kind):
    def save(params):
        if kind == "file":
            return save_weights(tmp_path, "net", params, {}, dtype="bfloat16")
        return save_orbax(tmp_path / "net", params, {})

    def load():
        if kind != "orbax on devices":
            return load_weights(tmp_path, "net")
        one = jax.sharding.SingleDeviceSharding(jax.devices()[1])
        return StoredWeights(tmp_path / "net").restore(jax.tree.map(lambda _: one, PARAMS))

    save(PARAMS)
    load()
    save(PARAMS | {"bias": np.array([1, np.nan, 1], np.float32)})
    assert not (tmp_path / CHECKSUMS).exists()
    with pytest.raises(BrokenFile, match=r"net(\.safetensors)?: tensor bias holds NaN"):
        load()


def test_checksums_follow_what_is_written(folder):
    save_weights(folder, "net", PARAMS, {})
    first = recorded(folder, "net")
    save_weights(folder, "net", PARAMS, {"width": 3})
    assert recorded(folder, "net").keys() == first.keys() != set()
    assert recorded(folder, "net") != first
    with pytest.raises(TypeError):
        save_weights(folder, "net", PARAMS, {"bad": object()})
    save_orbax(folder / "other", PARAMS, {})
    leaves = {"a": np.zeros((2, 3), np.float32)}
    writer = ResumableCheckpointWriter(folder / "third", leaves, {}, {})
    writer.write("a", {("a", (i,)): np.ones(3, np.float32) for i in range(2)})
    writer.finish()
    for name in ("net", "other", "third"):
        load_weights(folder, name)
        assert any("a" in file or name in file for file in recorded(folder, name))
    damaged(next((folder / "third/params/a").glob("[0-9]*")), 9)
    with pytest.raises(BrokenFile, match="third/params/a"):
        load_weights(folder, "third")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": 3}', '{"sha256": {"a": 3}}'])
def test_broken_checksums_are_named(folder, text):
    save_weights(folder, "net", PARAMS, {})
    (folder / CHECKSUMS).write_text(text)
    with pytest.raises(BrokenFile, match=r"checksums\.json"):
        load_weights(folder, "net")


def test_a_transformer_of_another_model_is_found(tmp_path):
    folder, params = shutil.copytree(SMALL, tmp_path / "m"), load_weights(SMALL, "dit")
    (tmp_path / "other").mkdir()
    save_weights(tmp_path / "other", "dit", jax.tree.map(np.negative, params[0]), params[1])
    shutil.copy(tmp_path / "other" / "dit.safetensors", folder)
    with pytest.raises(BrokenFile, match=r"dit\.safetensors differs from .*of another"):
        load_model(folder)


STREAM = json.loads((SMALL / "config.json").read_text())["stream"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dit": ["wan_s2v"]}, r"\['dit'\] is no string"),
        ({"stream": []}, "'?stream'? is no object"),
        ({"stream": {}}, "stream lacks sigmas, fps, size"),
        ({"stream": {**STREAM, "fps": 0}}, "fps 0 and size"),
        ({"stream": {**STREAM, "fps": None}}, r"config\.json: stream\.fps: None came.*int"),
        ({"stream": {**STREAM, "sigmas": 5}}, r"stream\.sigmas: 5 came"),
        ({"stream": {**STREAM, "sigmas": [[1, 0]]}}, r"stream\.sigmas: \(\[1, 0\],\) came"),
        ({"stream": {**STREAM, "size": [96]}}, r"stream\.size: \(96,\) came"),
        ({"lora": "lora"}, "no weights of 'lora'"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, change, message):
    folder = shutil.copytree(SMALL, tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    save_json(folder / "config.json", content | change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("network", "changes"),
    [("vae", {"encoder_blocks": None}), ("vae", {"latent_width": -1}), ("dit", {"num_heads": 0}),
     ("dit", {"dtype": "none"}), ("dit", {"ring_blocks": -1}),
     ("speech", {"lookahead_ms": "x"}), ("speech", {"mel_mean": float("nan")})],
)  # fmt: skip
def test_damaged_sizes_of_a_network_are_named(tmp_path, network, changes):
    folder = shutil.copytree(SMALL, tmp_path / "m")
    params, config, _ = load_weights(folder, network)
    save_weights(folder, network, params, config | changes)
    with pytest.raises(ValueError, match=f"weights of '{network}' in .*are not those of"):
        load_model(folder)


def test_weights_of_another_type_are_named(tmp_path):
    folder = shutil.copytree(SMALL, tmp_path / "m")
    params, config, _ = load_weights(folder, "vae")
    save_weights(folder, "vae", jax.tree.map(np.int32, params), config)
    with pytest.raises(ValueError, match=r"'vae'.*do not fit(.|\n)*int32, expected .*float"):
        load_model(folder)


def test_an_adapter_of_another_size_is_named(tmp_path):
    folder = shutil.copytree(SMALL, tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    save_json(folder / "config.json", content | {"lora": "lora"})
    factors = {"a": np.ones((6, 5, 1), np.float32), "b": np.ones((6, 1, 768), np.float32)}
    save_weights(folder, "lora", {"blocks": {"ffn_in": {"kernel": factors}}}, {"scaling": 1.0})
    with pytest.raises(ValueError, match=r"kernel/a is \(6, 5, 1\) float, expected \(6, 192, 1\)"):
        load_model(folder)
    save_weights(folder, "lora", {"blocks": {"ffn_in": {"kernel": factors}}}, {"rank": 1})
    with pytest.raises(ValueError, match="no scaling"):
        load_model(folder)


def test_the_model_that_ships_has_checksums():
    sums = recorded(SMALL)
    assert set(sums) == {path.name for path in SMALL.glob("*.safetensors")}
    for name in ("dit", "vae", "speech"):
        load_weights(SMALL, name)
        load_header(SMALL, name)
