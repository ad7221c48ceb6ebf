"""Sentences of many voices, synthesised once and kept in a folder.

    grammar -> sentences, held-out ones apart --synthesiser, voice--> Utterance -> files

Synthesis is slow, so data sets draw from the same few hours again and again, changed by
`speech.augment`.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from jax_avatar.data.talking_people import sentences, speech
from jax_avatar.data.talking_people import voices as natural
from jax_avatar.data.talking_people.speech import Phone, Utterance
from jax_avatar.weights.files import load_json, save_json

__all__ = [
    "SPLITS",
    "Utterances",
    "UtterancesConfig",
    "is_held_out",
    "left_to_do",
    "load_utterances",
    "make_utterances",
    "number_of",
    "prepare_utterances",
]

SPLITS = ("train", "held_out_person", "held_out_voice")
"""Known sentences and voices; other sentences in known voices; other sentences, other voices."""

_SETTINGS = "utterances.json"
_PER_FILE = 20
_HELD_OUT_PART = 5  # training sentences for each held-out one


@dataclasses.dataclass(frozen=True)
class Synthesiser:
    """Voices of one program, and how it speaks."""

    voices: tuple[str, ...]
    held_out: tuple[str, ...]
    share: float
    """Of the tracks that are made of utterances, relative to the other synthesisers."""
    speak: Callable[[str, str, np.random.Generator], Utterance]
    """Text, voice, source of pitch and speed."""


def _flite(text: str, voice: str, rng: np.random.Generator) -> Utterance:
    pitch, speed = rng.uniform(0.92, 1.08), rng.uniform(0.88, 1.15)
    return speech.synthesise(text, voice, pitch=pitch, speed=speed)


def _hibari(text: str, voice: str, rng: np.random.Generator) -> Utterance:
    return natural.hibari(text, voice, rng, speed=rng.uniform(0.8, 1.25))


def _kokoro(text: str, voice: str, rng: np.random.Generator) -> Utterance:
    return natural.kokoro(text, voice, rng, speed=rng.uniform(0.9, 1.15))


SYNTHESISERS = {
    "flite": Synthesiser(speech.TRAINING_VOICES, (speech.HELD_OUT_VOICE,), 0.2, _flite),
    "hibari": Synthesiser(natural.HIBARI, (), 0.4, _hibari),
    "kokoro": Synthesiser(natural.KOKORO, natural.KOKORO_HELD_OUT, 0.4, _kokoro),
}


@dataclasses.dataclass(frozen=True)
class UtterancesConfig:
    """Amounts of a folder of utterances.

    Attributes:
        flite: training sentences spoken by Flite, about 3 s each; 0 leaves it out.
        hibari: the same by hibari.
        kokoro: the same by Kokoro, which takes 0.6 s of a core for a second of speech.
        seed: of the sentences, and of pitch and speed.
    """

    flite: int = 700
    hibari: int = 800
    kokoro: int = 120
    seed: int = 0

    def __post_init__(self):
        if min(vars(self).values()) < 0 or not any(getattr(self, n) for n in SYNTHESISERS):
            raise ValueError(
                f"{self}: expected numbers from 0, and a synthesiser with more than 0 sentences."
            )


@dataclasses.dataclass(frozen=True)
class UtterancesJob:
    """A file of utterances to make."""

    folder: str
    synthesiser: str
    split: str
    number: int
    count: int
    seed: int

    @property
    def path(self) -> Path:
        """Path of the file, once it is whole."""
        name = f"{self.synthesiser}-{self.split}-{self.number:03}-of-{self.count:02}.npz"
        return Path(self.folder) / name


def is_held_out(text: str) -> bool:
    """True if a sentence is only spoken in the held-out splits, whatever the amounts."""
    return zlib.crc32(text.encode()) % 8 == 0


def number_of(voice: str) -> int:
    """Number of a voice among all, the held-out ones included."""
    known = [
        f"{name}/{one}"
        for name, kind in SYNTHESISERS.items()
        for one in (*kind.voices, *kind.held_out)
    ]
    return known.index(voice)


def left_to_do(config: UtterancesConfig, folder: str | Path) -> list[UtterancesJob]:
    """The files that the folder lacks.

    Raises:
        ValueError: the folder was begun with another seed.
    """
    path = Path(folder) / _SETTINGS
    if not path.exists():
        save_json(path, {"seed": config.seed})
    if (found := load_json(path)["seed"]) != config.seed:
        raise ValueError(
            f"{str(folder)!r} holds utterances of seed {found}, {config.seed} came; pass that seed "
            "or another folder."
        )
    return [job for job in _jobs(config, folder) if not job.path.exists()]


def make_utterances(job: UtterancesJob) -> int:
    """Speaks the sentences of one file and writes it; returns their number."""
    kind = SYNTHESISERS[job.synthesiser]
    key = (zlib.crc32(job.synthesiser.encode()), SPLITS.index(job.split), job.number)
    rng = np.random.default_rng([job.seed, *key])
    voices = kind.held_out if job.split == "held_out_voice" else kind.voices
    first = job.number * _PER_FILE
    spoken = []
    for i, text in enumerate(_texts(rng, job.count, job.split != "train")):
        voice = voices[(first + i) % len(voices)]
        utterance = kind.speak(text, voice, rng)
        spoken.append(dataclasses.replace(utterance, voice=f"{job.synthesiser}/{voice}"))
    job.path.parent.mkdir(parents=True, exist_ok=True)
    _write(job.path, spoken)
    return len(spoken)


def prepare_utterances(config: UtterancesConfig, folder: str | Path) -> None:
    """Makes what the folder lacks, in this process."""
    left = left_to_do(config, folder)
    if any(job.synthesiser != "flite" for job in left):
        natural.check_installed()
    for job in left:
        make_utterances(job)


class Utterances:
    """Utterances of a split by voice, kept as they are stored."""

    def __init__(self, config: UtterancesConfig, folder: str | Path, split: str):
        self.split, digest = split, hashlib.sha256()
        self._spoken: dict[str, list[tuple[np.ndarray, dict]]] = {}
        for job in _jobs(config, folder):
            if job.split != split:
                continue
            if not job.path.exists():
                raise ValueError(
                    f"{job.path} is missing; make it with `python launch/prepare_data.py "
                    f"utterances --out {folder}` and the same amounts."
                )
            digest.update(job.path.name.encode() + job.path.read_bytes())
            for wave, note in _read(job.path):
                self._spoken.setdefault(note["voice"], []).append((wave, note))
        self.content_hash = digest.hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self._spoken.values()))

    @property
    def voices(self) -> tuple[str, ...]:
        """`synthesiser/voice` of all of them."""
        return tuple(sorted(self._spoken))

    @property
    def seconds(self) -> float:
        """Length of all of them."""
        waves = (wave for spoken in self._spoken.values() for wave, _ in spoken)
        return sum(map(len, waves)) / speech.SAMPLE_RATE

    def texts(self) -> set[str]:
        """All that is said."""
        return {note["text"] for spoken in self._spoken.values() for _, note in spoken}

    def draw_voice(self, rng: np.random.Generator) -> str:
        """A voice: first the synthesiser by its share, then one of its voices."""
        kinds = sorted({voice.split("/")[0] for voice in self.voices})
        shares = np.array([SYNTHESISERS[kind].share for kind in kinds])
        kind = str(rng.choice(kinds, p=shares / shares.sum()))
        return str(rng.choice([voice for voice in self.voices if voice.startswith(f"{kind}/")]))

    def draw(self, rng: np.random.Generator, voice: str) -> Utterance:
        """One of the utterances of a voice."""
        return self._utterance(*self._spoken[voice][rng.integers(len(self._spoken[voice]))])

    def all(self) -> list[Utterance]:
        """All of them."""
        return [self._utterance(*one) for voice in self.voices for one in self._spoken[voice]]

    @staticmethod
    def _utterance(wave: np.ndarray, note: dict) -> Utterance:
        phones = tuple(Phone(*phone) for phone in note["phones"])
        words = tuple(note["word_ends"])
        return Utterance(
            wave.astype(np.float32) / 32767, phones, note["text"], note["voice"], words
        )


@functools.lru_cache(maxsize=len(SPLITS))
def load_utterances(config: UtterancesConfig, folder: str, split: str) -> Utterances:
    """Reads a split once in a process.

    Raises:
        ValueError: a file is missing.
    """
    return Utterances(config, folder, split)


def _jobs(config: UtterancesConfig, folder: str | Path) -> Iterable[UtterancesJob]:
    for name, kind in SYNTHESISERS.items():
        for split in SPLITS:
            count = getattr(config, name)
            if split != "train":
                count = -(-count // _HELD_OUT_PART)
            if split == "held_out_voice" and not kind.held_out:
                continue
            for number, first in enumerate(range(0, count, _PER_FILE)):
                size = min(_PER_FILE, count - first)
                yield UtterancesJob(str(folder), name, split, number, size, config.seed)


def _texts(rng: np.random.Generator, count: int, held_out: bool) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        text = sentences.sentence(rng)
        if is_held_out(text) == held_out:
            found[text] = None
    return list(found)


def _write(path: Path, utterances: list[Utterance]) -> None:
    notes = [
        dict(text=u.text, voice=u.voice, phones=u.phones, word_ends=u.word_ends) for u in utterances
    ]
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(
        unfinished,
        wave=np.concatenate([np.round(u.wave * 32767).astype(np.int16) for u in utterances]),
        ends=np.cumsum([len(u.wave) for u in utterances]),
        notes=np.array(json.dumps(notes)),
    )
    unfinished.rename(path)


def _read(path: Path) -> list[tuple[np.ndarray, dict]]:
    with np.load(path, allow_pickle=False) as file:
        waves = np.split(file["wave"], file["ends"][:-1])
        return list(zip(waves, json.loads(str(file["notes"])), strict=True))
