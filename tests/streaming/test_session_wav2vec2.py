"""A session whose front end looks ahead, and hears files as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.layout import parse_layout
from jax_avatar.streaming.features import DROPPED_FRAMES
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import save_model
from jax_avatar.weights.folder import load_model, load_settings
from tests.streaming.test_session import frames_of, portrait, voice  # noqa: F401

FPS, PER_FRAME, LOOK_AHEAD = 25, 640, 3840


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), speech="wav2vec2")


@pytest.fixture(scope="module")
def session(folder, portrait):  # noqa: F811
    return AvatarSession(load_model(folder), portrait, parse_layout("1", 4))


@pytest.fixture(scope="module")
def whole(folder, portrait):  # noqa: F811
    model = load_model(folder, audio_window="whole", speech_device="vae")
    return AvatarSession(model, portrait, parse_layout("1", 4))


@pytest.mark.parametrize("seconds", [0.05, 0.36, 1.03])
def test_the_video_is_as_long_as_the_audio(session, whole, seconds):
    for one in (session, whole):
        assert len(frames_of(one, voice(seconds))) == int(np.ceil(round(seconds * 16_000) / 640))


def test_pieces_of_any_length_make_the_same_video(session, whole):
    samples = voice(1.5)
    for one in (session, whole):
        at_once = frames_of(one, samples, len(samples))
        np.testing.assert_array_equal(frames_of(one, samples, 777), at_once)


def test_sound_beyond_the_look_ahead_never_changes_earlier_frames(session):
    samples, block = voice(2.4), session.format.block_frames
    for shown in (1, 2):  # blocks
        last = (shown * block - DROPPED_FRAMES) * PER_FRAME + LOOK_AHEAD
        changed, reached = samples.copy(), samples.copy()
        changed[last:] = voice(2.4, seed=9)[last:]
        reached[last - PER_FRAME :] = changed[last - PER_FRAME :] + 0.3
        frames = shown * block - DROPPED_FRAMES
        plain, later = frames_of(session, samples), frames_of(session, changed)
        np.testing.assert_array_equal(plain[:frames], later[:frames])
        assert (plain[frames:] != later[frames:]).any()
        assert (plain[:frames] != frames_of(session, reached)[:frames]).any()


def test_a_whole_recording_is_heard_as_by_the_official_pipelines(whole, monkeypatch):
    heard, push = [], whole.stream.push
    monkeypatch.setattr(whole.stream, "push", lambda x: heard.append(x) or push(x))
    samples = voice(1.1)
    whole.reset()
    assert not list(whole.push(samples)) and not heard
    frames = np.concatenate(list(whole.finish()))
    speech = whole.model.speech
    encoder = speech.bind(jax.device_put(speech.params))
    expected = jax.jit(encoder.encode, static_argnums=1)(jnp.asarray(samples)[None, None], 28)
    given = np.concatenate(heard, axis=2)
    np.testing.assert_allclose(
        given[:, :, DROPPED_FRAMES : DROPPED_FRAMES + 28], expected, atol=1e-4
    )
    np.testing.assert_array_equal(given[:, :, :DROPPED_FRAMES], given[:, :, [DROPPED_FRAMES] * 3])
    assert len(frames) == 28 and (given[:, :, DROPPED_FRAMES + 28 :] == 0).all()


@pytest.mark.parametrize("change", [{"audio_window": "long"}, {"speech_device": "gpu"}])
def test_unknown_settings_are_refused(folder, change):
    with pytest.raises(ValueError, match=r"must be (rolling or whole|host or vae)"):
        load_settings(folder, **change)
