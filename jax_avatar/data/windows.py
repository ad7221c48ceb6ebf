"""Clips -> batches of windows, features cut with their latents.

clips --shuffled by seed--> clip, first latent --cut, portrait, padding--> a row of a step's batch
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_avatar.data.example_order import Order
from jax_avatar.data.latents import Clips
from jax_avatar.models.config import DiTConfig

__all__ = ["Windows", "check_fit"]


def check_fit(
    clips: Clips,
    model: DiTConfig,
    latents: int,
    *,
    motion: int = 0,
    fps: int | None = None,
    grid: tuple[int, int] | None = None,
) -> None:
    """Checks that clips can be trained on.

    Args:
        clips: to train on.
        model: the transformer.
        latents: of a window.
        motion: latents that must come before it.
        fps: of the run; not checked if not given.
        grid: latent rows and columns that it is made for; not checked if not given.

    Raises:
        ValueError: they do not fit; says in what.
    """
    _check_channels(clips, model)
    _check_lengths(clips, model, latents, motion)
    if fps and clips.fps not in (0, fps):
        raise ValueError(
            f"clips have {clips.fps} frames per second, this run config.fps={fps}; prepare and "
            f"encode the data with --fps {fps}, or train at --config.fps={clips.fps}."
        )
    # Clips of noise, which have no rate, may have any size as well.
    grid = grid if clips.fps else None
    if any(side % 2 for side in clips.grid) or (grid and tuple(clips.grid) != tuple(grid)):
        raise ValueError(
            f"latents have {tuple(clips.grid)} rows and columns, expected "
            f"{tuple(grid) if grid else 'even numbers'}; prepare the data at the model's size."
        )


def _check_channels(clips: Clips, model: DiTConfig) -> None:
    """Refuses latents, speech features and text that the transformer cannot take."""
    if clips.channels != model.latent_channels:
        raise ValueError(
            f"latents have {clips.channels} channels, the transformer expects "
            f"{model.latent_channels}; set model.latent_channels, or encode with its own VAE."
        )
    if tuple(clips.states) != (model.audio_layers, model.audio_width):
        raise ValueError(
            f"speech features have {tuple(clips.states)} states and channels, the transformer "
            f"expects {(model.audio_layers, model.audio_width)}; set model.audio_layers and "
            "model.audio_width, or encode with its own front end."
        )
    if clips.text_width not in (0, model.text_width):
        raise ValueError(
            f"text rows have {clips.text_width} channels, the transformer expects "
            f"{model.text_width}; set model.text_width, or encode with its own prompt encoder."
        )


def _check_lengths(clips: Clips, model: DiTConfig, latents: int, motion: int) -> None:
    """Refuses windows that are not whole blocks, or longer than a clip."""
    longest = int(max(clips.lengths))
    if latents > longest or latents % model.frames_per_block:
        raise ValueError(
            f"task.latents={latents}: clips have {longest} and a block has "
            f"{model.frames_per_block}; give whole blocks, no more than a clip has."
        )
    if latents + motion > longest + clips.has_first:
        raise ValueError(
            f"task.motion_frames wants {motion} latents before the {latents} of a window, that is "
            f"clips of {latents + motion} latents or more; the longest has "
            f"{longest + clips.has_first}. Prepare longer clips, make task.latents smaller, or set "
            "task.motion_frames=none."
        )


class Windows:
    """Batches of windows of clips; which, depends on seed, step and row alone."""

    def __init__(
        self,
        clips: Clips,
        latents: int,
        batch_size: int,
        *,
        text_len: int = 1,
        text_width: int = 1,
        seed: int | Sequence[int] = 0,
        still_share: float = 1.0,
        motion: int = 0,
    ):
        """Lists the windows.

        Args:
            clips: to cut from.
            latents: of a window.
            batch_size: windows per step, of all hosts together.
            text_len: rows that text is padded to with zeros.
            text_width: channels of the one row of zeros where clips have no text.
            seed: of the order, and of which portrait a window goes with.
            still_share: share of every person's windows to use, those nearest to the portrait.
            motion: latents that come before every window, latent 0 of a clip at most.
        """
        self.clips, self.latents, self._motion = clips, latents, motion
        self.windows = _windows(clips, latents, still_share, max(0, motion - clips.has_first))
        self._text_len, self._text_width = text_len, text_width
        self._seed = np.random.SeedSequence(seed)
        order_seed = int(self._seed.generate_state(1)[0])
        self.order = Order(len(self.windows), batch_size, order_seed)

    @classmethod
    def for_model(cls, clips: Clips, model: DiTConfig, settings: Any, **options: Any) -> "Windows":
        """Windows for a transformer's stage.

        Args:
            clips: to cut from.
            model: size of the transformer.
            settings: of the stage; has `latents` and `batch_size`.
            **options: as of the constructor.
        """
        text = {"text_len": model.text_len, "text_width": model.text_width}
        return cls(clips, settings.latents, settings.batch_size, **text, **options)

    def batch(self, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The windows of a step, float32; every window comes once per epoch.

        Args:
            step: 0 or later.
            rows: of the batch to make, for a host that needs no others; all if not given.

        Returns:
            `latent` `b t h w c`, `reference` `b 1 h w c`, `features` `b 1 T k a`, `text` and
            `null_text` `b p f`, `mouth` `b t h w`, `lip_gap` `b T`; and `motion` `b t h w c`, the
            latents before the window, if any are wanted.
        """
        rows = np.arange(self.order.batch_size) if rows is None else rows
        parts = [self._window(step, int(row)) for row in rows]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _window(self, step: int, row: int) -> dict[str, np.ndarray]:
        index, start = self.windows[self.order.example(step, row)]
        clip = self.clips.moving(int(index))
        # Without latent 0 and frame 0, latent s of the clip shows frames 4s to 4s+3.
        shown = slice(start, start + self.latents)
        frames = slice(4 * start, 4 * (start + self.latents))
        rng = np.random.default_rng([*self._seed.generate_state(4), step, row])
        portrait = _pick_portrait(clip["reference_frames"], frames, self.clips.fps, rng)
        part = {
            "latent": clip["latent"][shown],
            "reference": clip["reference"][portrait][None],
            "features": clip["features"][frames][None],
            "text": self._padded(clip.get("text")),
            "null_text": self._padded(self.clips.null_text),
            "mouth": clip["mouth"][shown],
            "lip_gap": clip["lip_gap"][frames],
        }
        if self._motion:
            before = clip["latent"][max(0, start - self._motion) : start]
            needs_first = start < self._motion
            part["motion"] = np.concatenate([clip["first"], before]) if needs_first else before
        return {name: np.asarray(value).astype(np.float32) for name, value in part.items()}

    def _padded(self, rows: np.ndarray | None) -> np.ndarray:
        if not self.clips.text_width:
            return np.zeros((1, self._text_width), np.float32)
        padded = np.zeros((self._text_len, self.clips.text_width), np.float32)
        if rows is not None:
            padded[: len(rows)] = rows[: self._text_len]
        return padded


def _pick_portrait(places: Sequence[int], frames: slice, fps: int, rng: np.random.Generator) -> int:
    """A candidate portrait, if possible not from within a second of the window.

    Args:
        places: frame of every candidate in the clip, frame 0 included; -1 for none of it.
        frames: of the window, without frame 0.
        fps: frames per second.
        rng: draws.
    """
    first, last = frames.start + 1, frames.stop
    far = [i for i, f in enumerate(places) if f < 0 or f <= first - fps or f >= last + fps]
    return int(rng.choice(far or len(places)))


def _windows(clips: Clips, latents: int, share: float, earliest: int = 0) -> np.ndarray:
    """Clip and first latent, from `earliest` on, of the windows to train on, `[windows 2]`."""
    starts = np.maximum(0, np.asarray(clips.lengths) - latents + 1 - earliest)
    index = np.repeat(np.arange(len(clips)), starts)
    first = np.arange(len(index)) - np.repeat(np.cumsum(starts) - starts, starts)
    windows = np.stack([index, earliest + first], -1)
    if share >= 1:
        return windows
    moved = [_distance_from_portrait(clips.moving(i)) for i in range(len(clips))]
    moved = np.array([moved[i][s : s + latents].mean() for i, s in windows])
    kept = []
    for person in np.unique(clips.person):
        own = np.flatnonzero(clips.person[index] == person)
        order = np.argsort(moved[own], kind="stable")
        kept.append(windows[own[order[: max(1, round(share * len(own)))]]])
    return np.concatenate(kept)


def _distance_from_portrait(clip: dict[str, Any]) -> np.ndarray:
    """Mean square difference of every latent from the portrait, outside of the mouth."""
    change = clip["latent"].astype(np.float32) - clip["reference"][:1].astype(np.float32)
    return (np.square(change).mean(-1) * ~np.asarray(clip["mouth"], bool)).mean((1, 2))
