import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.io.prompt import Tokenizer
from jax_avatar.layout import parse_layout
from jax_avatar.streaming import prompts
from jax_avatar.streaming.prompts import prompt_states
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import NANO, save_model, save_orbax
from jax_avatar.weights.files import load_header, load_json, load_weights, save_weights
from jax_avatar.weights.folder import SMALL, has_text_encoder, load_model, load_text_encoder
from tests.prompts import PROMPTS, save_text_encoder, save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_text_encoder(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def loads(monkeypatch):
    """Folders whose encoder was loaded."""
    seen = []

    def load(folder):
        seen.append(folder)
        return load_text_encoder(folder)

    monkeypatch.setattr(prompts, "load_text_encoder", load)
    return seen


def lengthen(folder, rows):
    """Gives the transformer's config another number of prompt rows."""
    params, config, metadata = load_weights(folder, "dit")
    save_weights(folder, "dit", params, config | {"text_len": rows}, metadata)


def test_states_are_those_of_the_cleaned_prompt_without_padding(tmp_path):
    folder = save_text_encoder(save_model(tmp_path))
    lengthen(folder, 90)
    states = prompt_states(folder, f"  {PROMPTS[0]}\n ")
    ids, mask = Tokenizer(folder / "text_tokenizer")(PROMPTS[0], 90)
    count = int(mask.sum())
    assert states.shape == (1, count, 4) and 3 < count < 64
    encoder = load_text_encoder(folder)
    encode = jax.jit(lambda params, *inputs: encoder.bind(params)(*inputs))
    whole = encode(encoder.params, ids[None], mask[None])
    np.testing.assert_allclose(states, whole[:, :count], atol=1e-5)


def test_a_long_prompt_is_cut_to_the_rows_of_the_transformer(folder):
    assert prompt_states(folder, PROMPTS[0]).shape == (1, NANO.text_len, 4)


def test_the_second_time_no_encoder_is_loaded(folder, tmp_path, loads):
    first = prompt_states(folder, PROMPTS[0], cache=tmp_path)
    again = prompt_states(folder, PROMPTS[0] + "  ", cache=tmp_path)
    assert len(loads) == 1
    np.testing.assert_array_equal(first, again)
    assert first.dtype == again.dtype
    other = prompt_states(folder, PROMPTS[2], cache=tmp_path)
    assert len(loads) == 2 and np.abs(other - first).max() > 1e-3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_entry_is_made_anew(folder, tmp_path, loads):
    first = prompt_states(folder, PROMPTS[0], cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-3])
    np.testing.assert_array_equal(prompt_states(folder, PROMPTS[0], cache=tmp_path), first)
    prompt_states(folder, PROMPTS[0], cache=tmp_path)
    assert len(loads) == 2 and list(tmp_path.iterdir()) == [entry]


@pytest.mark.parametrize("change", ["weights", "tokenizer", "rows"])
def test_another_model_gets_other_entries(tmp_path, loads, change):
    folder = save_text_encoder(save_model(tmp_path / "model"))
    prompt_states(folder, PROMPTS[0], cache=tmp_path / "cache")
    if change == "weights":
        params, config, _ = load_weights(folder, "text")
        save_weights(folder, "text", params, config)
    elif change == "tokenizer":
        path = folder / "text_tokenizer" / "tokenizer.json"
        path.write_text(path.read_text() + "\n")
    else:
        lengthen(folder, 2)
    prompt_states(folder, PROMPTS[0], cache=tmp_path / "cache")
    assert len(loads) == 2 and len(list((tmp_path / "cache").iterdir())) == 2


def test_bfloat16_weights_stay_so_and_an_orbax_folder_works(tmp_path):
    folder = save_text_encoder(save_model(tmp_path))
    params, config, _ = load_weights(folder, "text")
    expected = prompt_states(folder, PROMPTS[0])
    half = config | {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    save_weights(folder, "text", params, half, dtype="bfloat16")
    stored = load_text_encoder(folder).params
    assert stored["embedding"].dtype == jnp.bfloat16
    states = prompt_states(folder, PROMPTS[0], cache=tmp_path / "cache")
    again = prompt_states(folder, PROMPTS[0], cache=tmp_path / "cache")
    assert states.dtype == again.dtype == jnp.bfloat16
    assert 0 < np.abs(states.astype(jnp.float32) - expected).max() < 0.2
    (folder / "text.safetensors").unlink()
    save_orbax(folder / "text", stored, half)
    assert load_header(folder, "text")[0] == half
    np.testing.assert_array_equal(prompt_states(folder, PROMPTS[0]), states)
    with pytest.raises(ValueError, match=r"prompt cache .* cannot be made"):
        prompt_states(folder, PROMPTS[0], cache=folder / "config.json" / "x")


def test_networks_that_do_not_fit_are_refused(tmp_path):
    folder = save_text_encoder(save_model(tmp_path), width=6)
    with pytest.raises(ValueError, match=r"states of 6 channels.*expects 4"):
        prompt_states(folder, "x")
    save_text_encoder(folder, vocab_size=5)
    with pytest.raises(ValueError, match=r"makes id \d+, the encoder knows 5"):
        prompt_states(folder, PROMPTS[2])
    save_text_encoder(folder)
    (folder / "text_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"neither tokenizer.json nor"):
        prompt_states(folder, PROMPTS[0])
    save_tokenizer(folder / "text_tokenizer", "sentencepiece")
    assert prompt_states(folder, PROMPTS[0]).shape == (1, NANO.text_len, 4)
    config = load_json(folder / "config.json") | {"text": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of kind 'bert', known are \['umt5'\]"):
        prompt_states(folder, PROMPTS[0])


def test_the_small_model_has_no_prompt_encoder():
    assert not has_text_encoder(SMALL)
    with pytest.raises(ValueError, match="has no prompt encoder"):
        load_text_encoder(SMALL)


def test_a_prompt_changes_the_video(folder):
    model = load_model(folder)
    rng = np.random.default_rng(0)
    portrait = rng.uniform(-1, 1, (1, 1, *model.settings.size, 3)).astype(np.float32)
    samples = 0.1 * rng.normal(size=8000).astype(np.float32)

    def video(prompt):
        text = None if prompt is None else prompt_states(folder, prompt)
        session = AvatarSession(model, portrait, parse_layout("1", 4), text=text)
        return np.concatenate([*session.push(samples), *session.finish()])

    videos = [video(prompt) for prompt in (None, PROMPTS[0], PROMPTS[2])]
    for one, other in itertools.combinations(videos, 2):
        assert one.shape == other.shape and (one != other).any()


def test_an_encoder_that_is_kept_is_loaded_once(folder, tmp_path, loads):
    load = functools.cache(prompts.prompt_encoder)
    states = [prompt_states(folder, prompt, cache=tmp_path, load=load) for prompt in PROMPTS]
    assert len(loads) == 1
    np.testing.assert_array_equal(states[0], prompt_states(folder, PROMPTS[0]))
