"""Measures how far phone times lie from the sound: energy against phone boundaries.

    python benchmarks/phone_timing.py
    python benchmarks/phone_timing.py --utterances data/utterances --sentences 200

A row for every synthesiser and one for the phones of the demo. Synthesisers speak, or utterances
are read that `launch/prepare_data.py utterances` made. A boundary's place in the sound is where
the energy of a band crosses the middle, in dB, between what it is on both sides: all of it where
a voice starts after a pause, that above 3.5 kHz between vowels and s or sh, all of it where a
vowel ends in p, t, k. A positive lag says that the sound comes after the phone's time. `whole_ms`
is the shift at which the energy correlates best with the phones' sonority, which uses all phones.
"""

import itertools
import json
import pathlib
import sys

import numpy as np
import scipy.signal

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.common import emit, environment
from jax_avatar.data.talking_people import sentences, speech, utterances
from jax_avatar.data.talking_people.speech import SAMPLE_RATE, Phone, Utterance
from launch import cli

ASSETS = pathlib.Path(__file__).parents[1] / "jax_avatar" / "assets"
_REACH_S, _HOP = 0.12, 16  # around a boundary; samples between values
_WINDOW = 160
_LEAST_DB = 12  # between both sides


def energy_db(wave: np.ndarray) -> np.ndarray:
    """Energy in centred windows of 10 ms, every millisecond."""
    power = np.convolve(np.pad(wave.astype(np.float64), _WINDOW // 2) ** 2, np.hanning(_WINDOW))
    return 10 * np.log10(power[_WINDOW - 1 :: _HOP][: len(wave) // _HOP] + 1e-9)


def crossing(level: np.ndarray, at_s: float, rises: bool) -> float | None:
    """Seconds from a boundary to where the level crosses the middle; None if it hardly does."""
    rate = SAMPLE_RATE / _HOP
    first, last = round((at_s - _REACH_S) * rate), round((at_s + _REACH_S) * rate)
    if first < 0 or last > len(level):
        return None
    part = level[first:last] if rises else level[first:last][::-1]
    half = len(part) // 4
    low, high = np.median(part[:half]), np.max(part[half:])
    if high - low < _LEAST_DB:
        return None
    above = part > (low + high) / 2
    # The last time it comes from below before it is at its highest.
    top = int(np.argmax(np.where(np.arange(len(part)) >= half, part, -np.inf)))
    below = np.flatnonzero(~above[:top])
    if not len(below):
        return None
    found = (below[-1] + 1) / rate - _REACH_S
    return found if rises else -found


def lags(spoken: Utterance) -> dict[str, list[float]]:
    """Lags in seconds by kind of boundary."""
    all_of_it = energy_db(spoken.wave)
    filtered = scipy.signal.sosfiltfilt(
        scipy.signal.butter(4, 3500, "high", fs=SAMPLE_RATE, output="sos"), spoken.wave
    )
    high = energy_db(filtered)
    found: dict[str, list[float]] = {}
    phones = [p for p in spoken.phones if p.end_s > p.start_s]
    for before, after in itertools.pairwise(phones):
        names = before.name.lower(), after.name.lower()
        vowels = [speech.is_vowel(name) for name in names]
        hiss = [name in ("s", "sh") for name in names]
        quiet = [speech.is_silence(name) for name in names]
        if quiet[0] and before.end_s - before.start_s > 0.1 and not quiet[1]:
            kind = "vowel after pause" if vowels[1] else "plosive after pause"
            if vowels[1] or names[1] in "bdgptk":
                found.setdefault(kind, []).append(crossing(all_of_it, after.start_s, True))
        elif vowels[0] and hiss[1]:
            found.setdefault("s after vowel", []).append(crossing(high, after.start_s, True))
        elif hiss[0] and vowels[1]:
            found.setdefault("vowel after s", []).append(crossing(high, after.start_s, False))
        elif vowels[0] and names[1] in ("p", "t", "k"):
            found.setdefault("p, t, k after vowel", []).append(
                crossing(all_of_it, after.start_s, False)
            )
    return {kind: [lag for lag in row if lag is not None] for kind, row in found.items()}


def whole_lag(spoken: list[Utterance]) -> float:
    """Seconds by which the energy follows the phones' sonority: 1 vowels, 0 pauses."""
    shifts = np.arange(-120, 121, 2)  # ms
    scores = np.zeros(len(shifts))
    for one in spoken:
        level = np.maximum(energy_db(one.wave), energy_db(one.wave).max() - 45)
        times = np.arange(len(level)) / (SAMPLE_RATE / _HOP)
        ends = np.array([p.end_s for p in one.phones])
        loud = np.array([_sonority(p.name.lower()) for p in one.phones])
        for i, shift in enumerate(shifts):
            at = np.searchsorted(ends, times - shift / 1000).clip(0, len(ends) - 1)
            scores[i] += np.corrcoef(loud[at], level)[0, 1]
    return float(shifts[scores.argmax()]) / 1000


def _sonority(name: str) -> float:
    if speech.is_vowel(name):
        return 1.0
    if speech.is_silence(name):
        return 0.0
    return {"l": 0.85, "r": 0.85, "w": 0.8, "y": 0.8, "m": 0.75, "n": 0.75, "ng": 0.75}.get(
        name, 0.45
    )


def summary(name: str, spoken: list[Utterance]) -> dict:
    rows: dict[str, list[float]] = {}
    for one in spoken:
        for kind, found in lags(one).items():
            rows.setdefault(kind, []).extend(found)
    table = {
        kind: {
            "n": len(row),
            "median_ms": round(1000 * float(np.median(row)), 1),
            "iqr_ms": round(1000 * float(np.subtract(*np.percentile(row, [75, 25]))), 1),
        }
        for kind, row in sorted(rows.items())
        if row
    }
    every = [row["median_ms"] for row in table.values()]
    return {
        "of": name,
        "onsets": sum(row["n"] for row in table.values()),
        "mean_of_medians_ms": round(float(np.mean(every)), 1),
        "whole_ms": round(1000 * whole_lag(spoken), 1),
        "kinds": table,
    }


def demo() -> list[Utterance]:
    import librosa

    wave, _ = librosa.load(str(ASSETS / "demo.flac"), sr=SAMPLE_RATE)
    aligned = json.loads((ASSETS / "demo_phones.json").read_text())
    phones = tuple(Phone(*phone) for phone in aligned["phones"])
    return [Utterance(wave, phones, "", "demo")]


def synthesised(name: str, count: int) -> list[Utterance]:
    kind, rng = utterances.SYNTHESISERS[name], np.random.default_rng(0)
    lines = sentences.sentences(count, seed=77)
    voices = itertools.cycle(kind.voices)
    return [kind.speak(text, voice, rng) for text, voice in zip(lines, voices, strict=False)]


def stored(folder: str, name: str, count: int) -> list[Utterance]:
    amounts = {other: count if other == name else 0 for other in utterances.SYNTHESISERS}
    config = utterances.UtterancesConfig(**amounts)
    return utterances.load_utterances(config, folder, "train").all()


def main(argv=None) -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    voices = list(utterances.SYNTHESISERS)
    parser.add_argument("--voices", nargs="*", default=voices, help="synthesisers")
    parser.add_argument("--sentences", type=int, default=60, help="of each")
    parser.add_argument("--utterances", default="", help="folder to read instead; multiples of 20")
    parser.add_argument("--out", default="", help="file for the record")
    arguments = parser.parse_args(argv)
    record = environment() | {"benchmark": "phone_timing", "rows": [summary("demo", demo())]}
    for name in arguments.voices:
        if arguments.utterances:
            spoken = stored(arguments.utterances, name, arguments.sentences)
        else:
            spoken = synthesised(name, arguments.sentences)
        record["rows"].append(summary(name, spoken))
    emit(record, arguments.out)
    return 0


if __name__ == "__main__":
    cli.run(main)
