"""Tracks of speech and motion, without a person and without pictures.

seed, split, index -> voice -> utterances, pauses -> one augmented wave -> prosody -+
                                     phones -> mouth ----------------------------------+-> curves
                                     motion of head, brows, lids, gaze <--------------+
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from jax_avatar.data.talking_people import head_motion, speech
from jax_avatar.data.talking_people import mesh as mesh_lib
from jax_avatar.data.talking_people.clips import LOOKAHEAD_SAMPLES, combine_units
from jax_avatar.data.talking_people.motion import Action
from jax_avatar.data.talking_people.prosody import Prosody, listen, phone_sizes
from jax_avatar.data.talking_people.speaking import draw_style, make_speaking_motion
from jax_avatar.data.talking_people.speech import SAMPLE_RATE, Phone, Utterance
from jax_avatar.data.talking_people.utterances import (
    SPLITS,
    UtterancesConfig,
    load_utterances,
    number_of,
)

__all__ = ["Speakers", "Track", "TrackConfig", "TrackJob", "make_track", "track_from"]

LEVER, FOCAL = (0.0, -0.397, 0.435), 4.94
"""Of the mean of many people, see `head_motion.Camera`."""

_LEAD_FRAMES = 12  # that are heard before and after a track, so that lips move ahead of sounds
_PAUSES = (((0.3, 0.8), 0.6), ((0.8, 1.5), 0.28), ((1.5, 3.0), 0.12))  # seconds, probability
_QUIET_PAUSE = (3.0, 9.0)


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Settings of tracks.

    Attributes:
        seconds: length, rounded to whole latents.
        fps: video frames per second.
        movement: scale of the head's movements.
        actions: chance that a track has timed actions.
        quiet: share of the tracks that are mostly silence.
        seed: of everything.
    """

    seconds: float = 20.0
    fps: int = 25
    movement: float = 0.6
    actions: float = 0.0
    quiet: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if SAMPLE_RATE % self.fps:
            raise ValueError(
                f"fps {self.fps}: must divide the sample rate {SAMPLE_RATE}; take 16, 20, 25"
            )
        if not 2 <= self.seconds <= 600:
            raise ValueError(f"seconds {self.seconds}: expected a track of 2 to 600 s.")
        if not (0 <= self.actions <= 1 and 0 <= self.quiet <= 1 and 0 <= self.movement <= 3):
            raise ValueError(
                f"actions {self.actions}, quiet {self.quiet}, movement {self.movement}: expected "
                "shares within 0..1 and a movement within 0..3."
            )

    @property
    def latents(self) -> int:
        """Latents of a track, that of frame 0 included."""
        return 1 + round(self.seconds * self.fps / 4)

    @property
    def frames(self) -> int:
        """Frames of a track: 0 and four for each latent."""
        return 1 + 4 * (self.latents - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """Some seconds of speech or silence, and the motion that goes with them."""

    wave: np.ndarray  # [samples] float32 from frame 0 on, with the look-ahead
    curves: np.ndarray  # [3 + T c] float32, `head_motion.CURVES`; frames -3 to T - 1
    units: np.ndarray  # [3 + T q] float32, of the mesh
    pose: np.ndarray  # [3 + T 6] float32, of the renderer, see `motion.Motion`
    phones: tuple[Phone, ...]  # times from the start of the wave
    prosody: Prosody  # the same
    actions: tuple[Action, ...]  # the same
    text: str
    voice: str
    voice_number: int


@runtime_checkable
class Speakers(Protocol):
    """Sources of the speech of tracks."""

    def draw_voice(self, rng: np.random.Generator) -> str:
        """A voice, as `number_of` knows it."""

    def draw(self, rng: np.random.Generator, voice: str) -> Utterance:
        """A sentence in that voice."""


@dataclasses.dataclass(frozen=True)
class TrackJob:
    """One track to make."""

    config: TrackConfig
    utterances: UtterancesConfig
    folder: str
    split: str
    index: int


def make_track(job: TrackJob) -> Track:
    """Makes one track, always the same for the same arguments.

    Raises:
        ValueError: the folder of utterances lacks some.
    """
    utterances = load_utterances(job.utterances, job.folder, job.split)
    rng = np.random.default_rng([job.config.seed, SPLITS.index(job.split), job.index])
    return track_from(rng, utterances, job.config)


def track_from(rng: np.random.Generator, speakers: Speakers, config: TrackConfig) -> Track:
    """Draws a track."""
    fps, per_frame = config.fps, SAMPLE_RATE // config.fps
    lead = _LEAD_FRAMES
    total = config.frames + 2 * lead
    needed_s = total / fps + LOOKAHEAD_SAMPLES / SAMPLE_RATE
    voice = speakers.draw_voice(rng)
    spoken, texts, questions = _talk(rng, speakers, voice, needed_s, rng.random() < config.quiet)
    # A rate for the whole track, as it is one person.
    changed = speech.augment(spoken, rng, rate_range=(0.88, 1.14))
    stretch = changed.duration_s / spoken.duration_s
    start_s = float(rng.uniform(0, changed.duration_s - needed_s))
    heard = speech.crop(changed, start_s, needed_s)
    start_s = round(start_s * SAMPLE_RATE) / SAMPLE_RATE
    prosody = listen(heard, [end * stretch - start_s for end in questions])
    mouth = speech.mouth_units(
        heard.phones,
        total / fps,
        float(fps),
        rng,
        amplitude=rng.uniform(0.82, 1.1) * phone_sizes(prosody, heard),
    )
    motion = make_speaking_motion(
        rng, prosody, total, fps, style=draw_style(rng), movement=config.movement,
        actions=config.actions,
    )  # fmt: skip
    names = mesh_lib.load_face_mesh().unit_names
    kept = [names.index(name) for name in head_motion.UNITS]
    units = combine_units(mouth, motion.units)
    head = head_motion.head_curves(motion.pose, np.array(LEVER), FOCAL)
    curves = np.concatenate([units[:, kept], head, motion.gaze], 1)
    lead_s, shown = lead / fps, slice(lead - 3, lead + config.frames)
    length = (total - 2 * lead) * per_frame + LOOKAHEAD_SAMPLES
    cut = speech.crop(heard, lead_s, length / SAMPLE_RATE)
    return Track(
        wave=cut.wave,
        curves=curves[shown].astype(np.float32),
        units=units[shown],
        pose=motion.pose[shown],
        phones=cut.phones,
        prosody=prosody.later(-lead_s),
        actions=tuple(
            dataclasses.replace(a, start_s=a.start_s - lead_s, end_s=a.end_s - lead_s)
            for a in motion.actions
        ),
        text=" ".join(texts),
        voice=voice,
        voice_number=number_of(voice),
    )


def _talk(
    rng: np.random.Generator, speakers: Speakers, voice: str, needed_s: float, is_quiet: bool
) -> tuple[Utterance, list[str], list[float]]:
    """Sentences of a voice with pauses between them; where questions end, in seconds."""
    parts: list[Utterance] = []
    texts, questions, now = [], [], 0.0

    def add(part: Utterance) -> None:
        nonlocal now
        parts.append(part)
        now += part.duration_s

    add(_silence(rng, voice, is_quiet))
    while now < needed_s * 1.25:
        said = speakers.draw(rng, voice)
        level = np.sqrt(np.mean(np.square(said.wave))) + 1e-5
        loud = 0.1 / level * 10 ** (rng.normal(0, 2) / 20)
        add(dataclasses.replace(said, wave=said.wave * np.float32(loud)))
        texts.append(said.text)
        if said.text.endswith("?"):
            last = max(p.end_s for p in said.phones if not speech.is_silence(p.name))
            questions.append(now - said.duration_s + last)
        add(_silence(rng, voice, is_quiet))
    return _joined(parts, voice), texts, questions


def _silence(rng: np.random.Generator, voice: str, is_quiet: bool) -> Utterance:
    bounds, shares = zip(*_PAUSES, strict=True)
    low, high = _QUIET_PAUSE if is_quiet else bounds[rng.choice(len(bounds), p=shares)]
    samples = round(rng.uniform(low, high) * SAMPLE_RATE)
    pause = Phone("pau", 0.0, samples / SAMPLE_RATE)
    return Utterance(np.zeros(samples, np.float32), (pause,), "", voice)


def _joined(parts: Sequence[Utterance], voice: str) -> Utterance:
    starts = [0.0, *itertools.accumulate(part.duration_s for part in parts)]
    phones = [
        Phone(p.name, p.start_s + start, p.end_s + start)
        for part, start in zip(parts, starts[:-1], strict=True)
        for p in part.phones
    ]
    words = [
        end + start
        for part, start in zip(parts, starts[:-1], strict=True)
        for end in part.word_ends
    ]
    wave = np.concatenate([part.wave for part in parts])
    return Utterance(wave, tuple(phones), "", voice, tuple(words))
