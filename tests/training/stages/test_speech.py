import copy
import dataclasses
import json
from importlib import resources

import jax
import librosa
import numpy as np
import optax
import pytest

from jax_avatar.data.talking_people import speech, utterances, voices
from jax_avatar.data.talking_people.speech import Phone, Utterance
from jax_avatar.models.network import Network
from jax_avatar.models.speech.mel import SpeechConfig, SpeechEncoder
from jax_avatar.training.stages.speech import (
    SpeechTask,
    SpeechTaskConfig,
    correlations,
    load_corpus,
    target_units,
)
from jax_avatar.training.stages.task import Task
from jax_avatar.weights.files import load_weights

MODEL = SpeechConfig(
    bands=24, width=16, dilations=(1, 2), kernel=3, units=("jawOpen", "mouthPucker")
)
PITCH_HZ = {"pau": 0, "aa": 400, "m": 800, "uw": 1600}
SPOKEN = []


def _whistle(text, voice, *unused, **speeds):
    """A voice whose phones are pure tones, so that no speech program is needed."""
    SPOKEN.append(text)
    rng = np.random.default_rng([len(text), ord(text[0])])
    names = ["pau", *rng.choice(["aa", "m", "uw"], 12), "pau"]
    ends = 0.2 * np.arange(1, len(names) + 1)
    phones = tuple(
        Phone(str(n), float(e - 0.2), float(e)) for n, e in zip(names, ends, strict=True)
    )
    hz = np.repeat([PITCH_HZ[name] for name in names], 3200)
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(len(hz)) / 16000)
    return Utterance(wave.astype(np.float32), phones, text, voice)


def _patch(patch):
    patch.setattr(speech, "synthesise", _whistle)
    patch.setattr(voices, "hibari", _whistle)
    patch.setattr(voices, "kokoro", _whistle)
    patch.setattr(voices, "check_installed", lambda: None)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        _patch(patch)
        cache = str(tmp_path_factory.mktemp("corpus"))
        return SpeechTask(
            MODEL,
            SpeechTaskConfig(
                cache=cache, flite=8, hibari=2, kokoro=21, num_checks=3, clip_frames=17, batch=4
            ),
        )


def test_batches_depend_on_the_step_alone(task):
    assert isinstance(task, Task)
    again, other = task.batches(3), task.batches(4)
    for name, array in task.batches(3).items():
        np.testing.assert_array_equal(array, again[name])
        assert np.any(array != other[name])


def test_corpus_is_synthesised_once(task):
    spoken = len(SPOKEN)
    corpus, checks = load_corpus(task.task)
    assert len(SPOKEN) == spoken
    assert corpus.texts() == task.corpus.texts()
    assert not corpus.texts() & {u.text for group in checks.values() for u in group}
    held_out = {f"flite/{speech.HELD_OUT_VOICE}", "kokoro/tebukuro"}
    assert {u.voice for u in checks["new_voice"]} == held_out
    assert not held_out & set(corpus.voices)


def test_corpus_and_clips_are_as_many_and_as_long_as_told(task, tmp_path_factory):
    assert len(task.corpus) == 8 + 2 + 21
    assert {len(group) for group in task.checks.values()} == {3}
    assert {voice.split("/")[0] for voice in task.corpus.voices} == set(utterances.SYNTHESISERS)
    (folder,) = tmp_path_factory.getbasetemp().glob("corpus[0-9]")
    assert len(list(folder.glob("*.npz"))) == 3 + 2 + 4
    batch = task.batches(0)
    assert batch["wave"].shape == (4, 1, task.config.sample_range(0, 17)[1])
    assert batch["units"].shape == (4, 1, 16 * 4 + 1, 2)


def test_another_seed_makes_other_sentences_and_other_clips(task, tmp_path, monkeypatch):
    _patch(monkeypatch)
    other = dataclasses.replace(task.task, seed=1, cache=str(tmp_path))
    corpus, _ = load_corpus(other)
    assert corpus.texts() != task.corpus.texts()
    drawn = copy.copy(task)
    drawn.task = other
    assert np.any(drawn.batches(3)["wave"] != task.batches(3)["wave"])


def test_dense_targets_pass_through_those_of_the_frames(task):
    utterance = task.corpus.all()[0]
    dense = target_units(utterance, MODEL, 20, dense=True)
    np.testing.assert_allclose(dense[::4], target_units(utterance, MODEL, 20), atol=1e-6)


def test_a_few_steps_teach_the_lips_of_whistled_speech(task, tmp_path):
    params = task.init(jax.random.key(0))
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch):
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(
            params, batch, jax.random.key(0)
        )
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimiser.init(params)
    for i in range(40):
        params, state, _ = step(params, state, task.batches(i))
    after = task.evaluate(params, 40)
    assert after["new_voice/jawOpen"] > 0.6

    task.export(params, tmp_path, {"step": 40})
    loaded, config, metadata = load_weights(tmp_path, "speech")
    config = SpeechConfig(**config)
    assert config == task.config and len(config.mel_mean) == MODEL.bands
    assert metadata["pearson_r"]["new_voice/jawOpen"] == round(after["new_voice/jawOpen"], 3)
    encoder = Network.abstract(SpeechEncoder, config).bind(loaded)
    scores = correlations(encoder, task.checks["new_voice"])
    assert scores["jawOpen"] == pytest.approx(after["new_voice/jawOpen"], abs=1e-5)


def test_units_that_speech_does_not_move_are_refused(task):
    with pytest.raises(ValueError, match="eyeBlinkLeft"):
        SpeechTask(dataclasses.replace(MODEL, units=("eyeBlinkLeft",)), task.task)


def test_shipped_weights_read_the_lips_of_a_real_voice():
    assets = resources.files("jax_avatar") / "assets"
    params, config, _ = load_weights(str(assets / "small"), "speech")
    config = SpeechConfig(**config)
    encoder = Network.abstract(SpeechEncoder, config).bind(params)
    wave, _ = librosa.load(str(assets / "demo.flac"), sr=None)
    aligned = json.loads((assets / "demo_phones.json").read_text())
    phones = tuple(Phone(*phone) for phone in aligned["phones"])
    scores = correlations(encoder, [Utterance(wave, phones, aligned["text"], "reader")])
    assert scores["jawOpen"] > 0.65
    assert scores["mouthStretchLeft"] > 0.5
