import shutil

import numpy as np
import pytest

from jax_avatar.dialogue.tts import find_speech, flite


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
