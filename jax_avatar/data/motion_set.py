"""Speech and motion -> encoded data set, without a single picture.

track --curves, windows of four frames--> anchored VAE's linear code -> latents
      --wave--> speech encoder -> features

The portrait of every clip is the latent of no motion.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_avatar.data.encode import caption_of
from jax_avatar.data.encoded import EncodedClip, encode_encoded, finish_index, start_index
from jax_avatar.data.shards import write_records
from jax_avatar.data.talking_people.head_motion import CURVES
from jax_avatar.data.talking_people.tracks import Track, TrackConfig, TrackJob, make_track
from jax_avatar.data.talking_people.utterances import (
    SPLITS,
    UtterancesConfig,
    load_utterances,
)
from jax_avatar.models.vae.anchored import GROUP
from jax_avatar.shapes import Float
from jax_avatar.weights.encoders import Encoders
from jax_avatar.weights.hashes import content_hash
from jax_avatar.weights.networks import kind_of, load_network

__all__ = ["MotionCode", "MotionSetConfig", "encode_track", "write_motion_set"]


@dataclasses.dataclass(frozen=True)
class MotionSetConfig:
    """Amounts of a set.

    Attributes:
        hours: of training tracks.
        held_out_minutes: of each held-out split.
        tracks_per_shard: records of a shard.
    """

    hours: float = 4.0
    held_out_minutes: float = 20.0
    tracks_per_shard: int = 90

    def __post_init__(self):
        if self.hours <= 0 or self.held_out_minutes < 0 or self.tracks_per_shard < 1:
            raise ValueError(
                f"hours {self.hours}, held_out_minutes {self.held_out_minutes}, tracks_per_shard "
                f"{self.tracks_per_shard}: expected hours above 0 and at least one track."
            )

    def num_tracks(self, split: str, seconds: float) -> int:
        """Tracks of a split, each of some seconds."""
        wanted = 3600 * self.hours if split == "train" else 60 * self.held_out_minutes
        return -int(-wanted // seconds)

    def total(self, seconds: float) -> int:
        """Tracks of all splits."""
        return sum(self.num_tracks(split, seconds) for split in SPLITS)


class MotionCode:
    """The linear code of motion that an anchored VAE's latents are."""

    def __init__(self, folder: str | Path):
        if (kind := kind_of(folder, "vae")) != "anchored":
            raise ValueError(
                f"{folder} has a VAE of kind {kind!r}, whose latents are pictures; motion needs "
                "the code of one of kind 'anchored': pass its folder as --vae."
            )
        network = load_network(folder, "vae")
        self.config, self._basis = network.config, network.bind().basis
        if missing := sorted(set(self.config.curves) ^ set(CURVES)):
            raise ValueError(
                f"the VAE in {folder} has other curves of motion than are made here "
                f"({', '.join(missing)}); train one with configs/anchored_vae.py."
            )
        self._order = [CURVES.index(name) for name in self.config.curves]
        self._scale = np.asarray(self.config.scale, np.float32)
        self.hash = content_hash(folder, "vae")

    def to_latent(self, curves: Float[np.ndarray, "T c"]) -> Float[np.ndarray, "t h w z"]:
        """Curves in the order of `CURVES`, a multiple of four frames -> latents."""
        scaled = curves[:, self._order] / self._scale
        windows = scaled.reshape(-1, GROUP, scaled.shape[1]).astype(np.float32)
        latent = np.asarray(self._basis.to_latent(jnp.asarray(windows)))
        return latent.reshape(-1, *self.config.latent_shape)

    def to_curves(self, latent: Float[np.ndarray, "t h w z"]) -> Float[np.ndarray, "T c"]:
        """Back, as far as the code carries them."""
        flat = jnp.asarray(latent, jnp.float32).reshape(len(latent), -1)
        windows = self._basis.to_curves(flat)
        curves = np.asarray(windows).reshape(GROUP * len(latent), -1) * self._scale
        return curves[:, np.argsort(self._order)]


def encode_track(
    track: Track, code: MotionCode, fps: int, source: str, encoders: Encoders | None = None
) -> EncodedClip:
    """A track as the transformer trains on it.

    Latent 0 stands for frames -3 to 0, which is what a stream under way would have there.

    Args:
        track: what is said and how it moves.
        code: of the VAE.
        fps: of the track.
        source: name of the record.
        encoders: for the speech features; None leaves them out.
    """
    frames = len(track.curves) - (GROUP - 1)
    wave = np.round(track.wave.clip(-1, 1) * 32767).astype(np.int16)
    actions = tuple((a.name, a.start_s, a.end_s, a.caption) for a in track.actions)
    return EncodedClip(
        latent=code.to_latent(track.curves),
        reference=code.to_latent(np.zeros((GROUP, len(CURVES)), np.float32)),
        wave=wave,
        text=None,
        features=encoders.features(wave, frames) if encoders else None,
        mouth=None,
        lip_gap=None,
        reference_frames=(-1,),
        first_frame=0,
        caption=caption_of("", actions),
        actions=actions,
        fps=fps,
        person=track.voice_number,
        source=f"{source} {track.voice}",
    )


def write_motion_set(
    out: str | Path,
    code: MotionCode,
    encoders: Encoders | None,
    amounts: MotionSetConfig,
    tracks: TrackConfig,
    utterances: UtterancesConfig,
    folder: str | Path,
    *,
    map_jobs: Callable[[Callable, Iterable], Iterable] = map,
    advance: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Writes a set shard by shard; what was finished before stays.

    Args:
        out: folder of the encoded set.
        code: of the VAE.
        encoders: for the speech features; None leaves them out.
        amounts: of the set.
        tracks: what they are like.
        utterances: that are in `folder`.
        folder: of utterances.
        map_jobs: `map`, or that of some processes.
        advance: called with the number of tracks that were finished.

    Returns:
        The index.

    Raises:
        ValueError: utterances are missing, or `out` holds another set.
    """
    out, folder = Path(out), str(folder)
    splits = [s for s in SPLITS if amounts.num_tracks(s, tracks.seconds)]
    heard = {s: load_utterances(utterances, folder, s).content_hash for s in splits}
    weights = {"vae": code.hash, **({"speech": encoders.hashes["speech"]} if encoders else {})}
    settings = {
        "weights": weights,
        "splits": splits,
        "utterances": heard,
        **dataclasses.asdict(amounts),
        **dataclasses.asdict(tracks),
    }
    start_index(out, settings)
    shards: dict[str, list[Path]] = {}
    for split in splits:
        plan = _plan(out, split, amounts.num_tracks(split, tracks.seconds), amounts)
        shards[split] = list(plan)
        for path, indices in plan.items():
            if not path.exists():
                jobs = [TrackJob(tracks, utterances, folder, split, i) for i in indices]
                made = map_jobs(make_track, jobs)
                write_records(path, _encoded(made, jobs, code, encoders, advance))
            else:
                advance(len(indices))
    return finish_index(out, shards)


def _plan(out: Path, split: str, count: int, amounts: MotionSetConfig) -> Mapping[Path, range]:
    size = amounts.tracks_per_shard
    parts = [range(i, min(i + size, count)) for i in range(0, count, size)]
    names = (f"{split}-{i:05d}-of-{len(parts):05d}.array_record" for i in range(len(parts)))
    return {out / name: part for name, part in zip(names, parts, strict=True)}


def _encoded(
    tracks: Iterable[Track],
    jobs: list[TrackJob],
    code: MotionCode,
    encoders: Encoders | None,
    advance: Callable[[int], Any],
) -> Iterator[bytes]:
    for job, track in zip(jobs, tracks, strict=True):
        source = f"{job.split}-{job.index}"
        yield encode_encoded(encode_track(track, code, job.config.fps, source, encoders))
        advance(1)
