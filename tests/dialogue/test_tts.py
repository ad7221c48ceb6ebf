import io
import json
import shutil
import wave

import httpx2
import numpy as np
import pytest

from jax_avatar.dialogue.packages import check_weights
from jax_avatar.dialogue.tts import SpeechEndpoint, find_speech, flite, hibari


@pytest.mark.skipif(not shutil.which("flite"), reason="apt-get install flite")
def test_flite_speaks_words_and_refuses_what_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples, rate = flite("Good morning.")
    longer, _ = flite("-o words.wav Good morning, and how are you today?\n\0Well, I hope.")
    assert 0.5 < len(samples) / rate < 2 < len(longer) / rate < 8
    assert samples.dtype == np.int16 and np.abs(samples).max() > 1000
    assert not list(tmp_path.iterdir())  # a text is no option of the program
    for nothing in ("", "...", "\0"):
        with pytest.raises(ValueError, match="give words"):
            flite(nothing)


def test_another_function_takes_its_place(monkeypatch):
    assert find_speech("") is None
    assert find_speech("json:dumps").__name__ == "dumps"
    for wrong in ("nowhere:speak", "json", "json:nothing", "json:__name__"):
        with pytest.raises(ValueError, match="text -> "):
            find_speech(wrong)
    monkeypatch.setenv("PATH", "")
    assert find_speech("flite") is None
    with pytest.raises(ValueError, match="apt-get install flite"):
        flite("Good morning.")


def test_hibari_speaks_and_is_preferred():
    pytest.importorskip("hibari", reason='pip install ".[talk]"')
    assert find_speech("auto") is find_speech("hibari") is hibari
    samples, rate = hibari("Good morning.\0")
    assert rate == 24_000 and 0.5 < len(samples) / rate < 2 and np.abs(samples).max() < 1
    np.testing.assert_array_equal(samples, hibari("Good morning.")[0])
    for nothing in ("", "\0"):
        with pytest.raises(ValueError, match="give words"):
            hibari(nothing)


def test_weights_that_nobody_knows_are_refused(tmp_path):
    path = tmp_path / "hibari.onnx"
    with pytest.raises(ValueError, match=r"lacks hibari\.onnx"):
        check_weights(path, "hibari-tts")
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-256 d9298a10d1b07358, expected 5f70741d4e900f4e"):
        check_weights(path, "hibari-tts")


def test_an_endpoint_speaks_wav():
    def wav(channels=1, samples=24_000):
        data = io.BytesIO()
        with wave.open(data, "wb") as file:
            file.setnchannels(channels), file.setsampwidth(2), file.setframerate(24_000)
            file.writeframes(bytes(2 * channels * samples))
        return data.getvalue()

    asked, good = [], wav()
    streamed = good[:40] + b"\xff" * 4 + good[44:]  # its length was not known
    answers = [(200, good), (200, streamed), (200, wav(2)), (200, b"RIFF"), (200, wav(samples=0)),
               (500, b"")]  # fmt: skip

    def answer(request):
        asked.append((request.url.path, json.loads(request.content)))
        status, content = answers.pop(0)
        return httpx2.Response(status, content=content)

    transport = httpx2.MockTransport(answer)
    speak = SpeechEndpoint("http://x/v1", "m", "v", transport=transport)
    for _ in range(2):
        samples, rate = speak("Hello.")
        assert (len(samples), rate) == (24_000, 24_000)
    assert asked[0] == ("/v1/audio/speech", {"model": "m", "voice": "v", "input": "Hello.",
                                             "response_format": "wav"})  # fmt: skip
    for wrong in ("2 channels", "no WAV", "no sound", "HTTP 500"):
        with pytest.raises(ValueError, match=wrong):
            speak("Hello.")
    with pytest.raises(ValueError, match="--tts"):
        find_speech("ftp://x")
