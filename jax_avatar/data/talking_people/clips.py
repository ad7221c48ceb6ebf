"""Clips of talking people from seeds: who, what is said, how it moves, and the shards of a set.

```
seed, split, index -> person, voice -> speech -> mouth units -+
                                    -> motion ----------------+-> frames + truth -> ClipRecord
```
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jax_avatar.data import records
from jax_avatar.data.records import ClipRecord
from jax_avatar.data.talking_people import mesh as mesh_lib
from jax_avatar.data.talking_people import motion as motion_lib
from jax_avatar.data.talking_people import speech
from jax_avatar.data.talking_people.person import Person, change_scene, make_person
from jax_avatar.data.talking_people.render import render, render_portrait, unit_weights

LOOKAHEAD_SAMPLES = 1280
"""Samples of the wave after the end of a clip, for a speech encoder that looks 80 ms ahead."""

_FIRST_HELD_OUT = 5_000
_SEED_STRIDE = 10_000


@dataclasses.dataclass(frozen=True)
class PeopleConfig:
    """Contents of a data set of talking people."""

    people: int = 320
    """Training people."""
    clips_per_person: int = 5
    held_out_people: int = 24
    held_out_clips: int = 40
    """Clips in each of the three held-out splits."""
    cartoon_clips: int = 24
    size: int = 96
    """Edge of the square pictures in pixels."""
    num_frames: int = 49
    """Frames of a clip: 1 + 4n, one for the first latent and four for each further one."""
    fps: int = 16
    texture_size: int = 512
    movement: float = 1.0
    """Scale of the head's movements; a third of them is still a person talking."""
    people_per_shard: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.num_frames % 4 != 1:
            raise ValueError(
                f"num_frames {self.num_frames}: a clip has 1 + 4n frames; "
                f"take {self.num_frames // 4 * 4 + 1}"
            )
        for name in ("clips_per_person", "held_out_clips", "cartoon_clips", "movement", "seed"):
            least = 1 if name == "clips_per_person" else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")
        if not 16 <= self.size <= 4096:
            raise ValueError(f"size {self.size}: expected 16 to 4096 pixels")
        if self.fps < 1 or speech.SAMPLE_RATE % self.fps:
            raise ValueError(
                f"fps {self.fps}: must divide the sample rate {speech.SAMPLE_RATE}; take 16, 20, 25"
            )
        if not 1 <= self.people <= _FIRST_HELD_OUT:
            raise ValueError(f"people {self.people}: expected 1 to {_FIRST_HELD_OUT}")
        if not 1 <= self.held_out_people <= _SEED_STRIDE - _FIRST_HELD_OUT:
            raise ValueError(f"held_out_people {self.held_out_people}: expected 1 to 5000")

    def num_clips(self, split: str) -> int:
        """Clips of one split."""
        if split == "train":
            return self.people * self.clips_per_person
        return self.cartoon_clips if split == "cartoon" else self.held_out_clips

    def clips_per_shard(self, split: str) -> int:
        """Clips of one shard of one split."""
        if split == "train":
            return self.people_per_shard * self.clips_per_person
        return max(1, self.num_clips(split))

    def shards(self, split: str) -> list[range]:
        """Indices of the clips of every shard of one split."""
        count, step = self.num_clips(split), self.clips_per_shard(split)
        return [range(i, min(i + step, count)) for i in range(0, count, step)]


def person_seed(config: PeopleConfig, split: str, index: int) -> int:
    """Seed of the person in a clip; training and held-out people never meet."""
    base = config.seed * _SEED_STRIDE
    if split == "train":
        return base + index // config.clips_per_person
    if split == "held_out_voice":
        return base + index * 7 % config.people
    return base + _FIRST_HELD_OUT + index % config.held_out_people


def voices(split: str) -> tuple[str, ...]:
    """Voices allowed in a split."""
    if split in ("held_out_voice", "held_out_both"):
        return (speech.HELD_OUT_VOICE,)
    return speech.TRAINING_VOICES


@functools.lru_cache(maxsize=4)
def _person(seed: int, texture_size: int) -> Person:
    return make_person(seed, texture_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Talk:
    """Speech cut to a clip."""

    wave: np.ndarray  # [samples] float32, with the look-ahead
    phones: tuple[speech.Phone, ...]  # times from the start of the wave
    mouth: dict[str, np.ndarray]  # face-unit name -> [T] float32
    voice: str


def make_talk(
    rng: np.random.Generator, split_voices: tuple[str, ...], num_frames: int, fps: int
) -> Talk:
    """Speaks sentences and cuts a window out of them, mostly speech, with some pauses.

    Args:
        rng: source of the words, the voice, the cut.
        split_voices: voices to choose from.
        num_frames: frames of the clip.
        fps: frames per second; must divide the sample rate.
    """
    rate = speech.SAMPLE_RATE
    voice = str(rng.choice(split_voices))
    length = num_frames * rate // fps + LOOKAHEAD_SAMPLES
    wave, phones, starts_at_rest = _speak_for(rng, voice, length)
    start = 0 if starts_at_rest else int(rng.integers(0, len(wave) - length + 1))
    start_s, end_s = start / rate, (start + length) / rate
    cut = tuple(
        speech.Phone(p.name, p.start_s - start_s, p.end_s - start_s)
        for p in phones
        if p.end_s > start_s - 0.3 and p.start_s < end_s + 0.3
    )
    # The mouth is computed with the neighbours on both sides, so that lips move ahead of a sound.
    lead_frames = fps // 4
    lead_s = lead_frames / fps
    shifted = [(p.name, max(0.0, p.start_s + lead_s), p.end_s + lead_s) for p in cut]
    mouth = speech.mouth_units(
        [p for p in shifted if p[2] > 0],
        (num_frames + 2 * lead_frames) / fps,
        float(fps),
        rng,
        amplitude=float(rng.uniform(0.85, 1.15)),
    )
    return Talk(
        wave=wave[start : start + length].astype(np.float32),
        phones=tuple(p for p in cut if p.end_s > 0 and p.start_s < end_s - start_s),
        mouth={k: v[lead_frames : lead_frames + num_frames] for k, v in mouth.items()},
        voice=voice,
    )


def _speak_for(
    rng: np.random.Generator, voice: str, length: int
) -> tuple[np.ndarray, list[speech.Phone], bool]:
    """Sentences and pauses for more than `length` samples.

    Returns:
        Wave, phones, and True if it begins with a pause.
    """
    rate = speech.SAMPLE_RATE
    pieces, phones = [], []
    now = 0

    def pause(seconds: float) -> None:
        nonlocal now
        samples = int(seconds * rate)
        pieces.append(np.zeros(samples, np.float32))
        phones.append(speech.Phone("pau", now / rate, (now + samples) / rate))
        now += samples

    # One clip in six starts before the first word, with the mouth closed.
    pause(rng.uniform(0.3, 0.9) if rng.random() < 1 / 6 else 0.0)
    starts_at_rest = now > 0
    while now < length * 1.15:
        spoken = speech.speak(rng, voices=(voice,))
        pieces.append(spoken.wave)
        offset = now / rate
        phones += [
            speech.Phone(p.name, p.start_s + offset, p.end_s + offset) for p in spoken.phones
        ]
        now += len(spoken.wave)
        pause(rng.uniform(0.05, 0.35))
    wave = np.concatenate(pieces)
    # A quiet room instead of digital silence between the sentences.
    wave = wave + rng.normal(0, 1e-4, len(wave)).astype(np.float32)
    return wave, phones, starts_at_rest


def combine_units(mouth: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> np.ndarray:
    """Adds mouth and motion curves: [T q] float32 in [0, 1], in the order of the mesh."""
    num_frames = len(next(iter(mouth.values())))
    names = mesh_lib.load_face_mesh().unit_names
    units = np.zeros((num_frames, len(names)), np.float32)
    for curves in (mouth, other):
        for name, curve in curves.items():
            units[:, names.index(name)] += curve
    return units.clip(0, 1)


def make_clip(config: PeopleConfig, split: str, index: int) -> ClipRecord:
    """Makes one clip, always the same for the same arguments.

    Args:
        config: of the data set.
        split: one of `records.SPLITS`.
        index: of the clip in its split.
    """
    if not 0 <= index < config.num_clips(split):
        raise ValueError(f"clip {index}: split {split!r} has {config.num_clips(split)} clips")
    key = [config.seed, records.SPLITS.index(split), index]
    rng = np.random.default_rng(key)
    talk = make_talk(rng, voices(split), config.num_frames, config.fps)
    motion = motion_lib.make_motion(rng, config.num_frames, config.fps).scaled(config.movement)
    units = combine_units(talk.mouth, motion.units)
    scene_seed = int(rng.integers(1 << 31))
    if split == "cartoon":
        from jax_avatar.data.talking_people import cartoon

        person_id = index
        figure = cartoon.make_cartoon(scene_seed)
        drawings = [
            cartoon.draw(figure, units[i], motion.pose_at(i), motion.gaze_at(i), config.size)
            for i in range(config.num_frames)
        ]
        portrait = cartoon.draw(figure, unit_weights({}), size=config.size).image
    else:
        person_id = person_seed(config, split, index)
        person = change_scene(_person(person_id, config.texture_size), scene_seed)
        drawings = [
            render(person, units[i], motion.pose_at(i), motion.gaze_at(i), config.size)
            for i in range(config.num_frames)
        ]
        portrait = render_portrait(person, config.size)
    return ClipRecord(
        frames=np.stack([d.image for d in drawings]),
        portrait=portrait,
        wave=np.round(talk.wave.clip(-1, 1) * 32767).astype(np.int16),
        units=units.astype(np.float16),
        lip_gap=np.array([d.lip_gap for d in drawings], np.float32),
        mouth_box=np.stack([d.mouth_box for d in drawings]),
        pose=np.concatenate([motion.pose, motion.gaze], 1),
        phones=tuple((p.name, round(p.start_s, 4), round(p.end_s, 4)) for p in talk.phones),
        actions=tuple((a.name, a.start_s, a.end_s, a.caption) for a in motion.actions),
        person_id=person_id,
        voice=talk.voice,
        split=split,
        style="cartoon" if split == "cartoon" else "people",
        fps=config.fps,
    )


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    config: PeopleConfig
    folder: str
    split: str
    shard: int

    @property
    def path(self) -> pathlib.Path:
        """Path of the shard once written."""
        count = len(self.config.shards(self.split))
        return records.shard_path(self.folder, self.split, self.shard, count)

    @property
    def clips(self) -> range:
        """Indices of its clips."""
        return self.config.shards(self.split)[self.shard]


def plan_shards(config: PeopleConfig, folder: str | pathlib.Path) -> list[ShardJob]:
    """All shards in the order to write them: one of training, the held-out ones, the rest."""
    jobs = [
        ShardJob(config, str(folder), split, shard)
        for split in records.SPLITS
        for shard in range(len(config.shards(split)))
    ]
    rank = dict(held_out_person=1, held_out_both=2, held_out_voice=3, train=4, cartoon=5)
    first = [job for job in jobs if job.split == "train"][:1]
    rest = [job for job in jobs if job not in first]
    return first + sorted(rest, key=lambda job: rank[job.split])


def write_shard(job: ShardJob) -> int:
    """Renders and writes one shard unless it exists; returns the frames rendered."""
    if job.path.exists():
        return 0
    clips: Iterator[ClipRecord] = (make_clip(job.config, job.split, i) for i in job.clips)
    return records.write_shard(job.path, clips) * job.config.num_frames


def start_manifest(config: PeopleConfig, folder: str | pathlib.Path) -> None:
    """Creates the folder, or checks that what lies there belongs to the same settings."""
    records.start_manifest(folder, _manifest(config))


def finish_manifest(config: PeopleConfig, folder: str | pathlib.Path) -> str:
    """Marks the set complete and records the hash of all shards; returns the hash."""
    return records.finish_manifest(folder, _manifest(config))


def _manifest(config: PeopleConfig) -> dict[str, Any]:
    return dict(
        config=dataclasses.asdict(config),
        splits={
            split: dict(
                clips=config.num_clips(split),
                shards=len(config.shards(split)),
                people=len({person_seed(config, split, i) for i in range(config.num_clips(split))}),
                voices=list(voices(split)),
            )
            for split in records.SPLITS
        },
        unit_names=list(mesh_lib.load_face_mesh().unit_names),
        sample_rate=speech.SAMPLE_RATE,
        lookahead_samples=LOOKAHEAD_SAMPLES,
    )
