"""Sampling of a few-step student, block after block: one definition for training and streaming."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax.numpy as jnp

from jax_avatar.diffusion.flow import add_noise
from jax_avatar.diffusion.schedule import Schedule, named_schedule
from jax_avatar.shapes import Array, Latent

__all__ = ["Sampling", "noised"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Noise levels, sampler, history and hearing of a student, as in its training.

    A block's keys and values are its history for the blocks after it. With `cache` "per_step" and
    `refresh` "none" every step has a history of its own, at its own noise level, so that steps of
    different blocks can run side by side (TPP). In all other modes the last evaluation of a block
    writes one history for all steps of the next blocks, so that blocks follow one another.

    Attributes:
        sigmas: noise levels, falling to 0, or the name of one of `STEP_SETS`, such as "shift3" or,
            with another number of steps, "shift3:2".
        sampler: "euler", or "renoise", which noises every clean prediction anew.
        cache: "per_step", every step sees history at its own noise level, or "exit_only", all see
            that of the last step (Algorithm 1 as printed; in training, of the exit step).
        refresh: what history is written: "none", the step's own, noisy; "clean", that of the
            finished block at level 0, from one more evaluation of the network; "fixed", that of
            the finished block noised to `refresh_sigma`. The last two replace `cache`.
        refresh_sigma: noise level of "fixed".
        audio_context: what a block hears of the time before it: "block_reset", nothing, as in the
            release, or "clip", the end of the speech of the block before.
        sink_distance: how far the rolling reference stands ahead of a block, in latent frames,
            drawn per block and evaluation from this inclusive range; (4, 30) in the release. Equal
            ends fix it.

    Source: Live Avatar (arXiv 2512.04677), Algorithms 1 and 3, History Corrupt and its ablation;
    "clean" is Self-Forcing's (arXiv 2506.08009).
    """

    sigmas: Sequence[float] | str
    sampler: str = "euler"
    cache: str = "per_step"
    refresh: str = "none"
    refresh_sigma: float = 0.557
    audio_context: str = "block_reset"
    sink_distance: Sequence[int] = (4, 30)

    SECTION: ClassVar[str] = ""  # where the settings are written, for messages
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "sampler": ("euler", "renoise"),
        "cache": ("per_step", "exit_only"),
        "refresh": ("none", "clean", "fixed"),
        "audio_context": ("block_reset", "clip"),
    }

    def __post_init__(self):
        if isinstance(self.sigmas, str):
            object.__setattr__(self, "sigmas", named_schedule(self.sigmas).sigmas)
        for name in ("sigmas", "sink_distance"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        Schedule(self.sigmas)
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{self.SECTION}{name} {getattr(self, name)!r} must be one of "
                    f"{', '.join(choices)}."
                )
        if not 0 < self.refresh_sigma < 1:
            raise ValueError(
                f"{self.SECTION}refresh_sigma {self.refresh_sigma} must be between 0 and 1; give "
                "for example 0.557."
            )
        if len(self.sink_distance) != 2 or not 0 <= self.sink_distance[0] <= self.sink_distance[1]:
            raise ValueError(
                f"{self.SECTION}sink_distance {self.sink_distance} must be two numbers of latent "
                "frames, the smaller first, for example (4, 30)."
            )

    @property
    def num_steps(self) -> int:
        """Denoising steps."""
        return len(self.sigmas) - 1

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the network for a block (NFE): the steps, and the refresh of history."""
        return self.num_steps + (self.refresh != "none")

    @property
    def shares_history(self) -> bool:
        """All steps read one history, which a block's last evaluation has written."""
        return self.refresh != "none" or self.cache == "exit_only"

    @property
    def history(self) -> str:
        """The setting that decides what is read as history, for messages."""
        name = "cache" if self.refresh == "none" else "refresh"
        return f"{name} {getattr(self, name)}"

    @property
    def num_windows(self) -> int:
        """Windows of keys and values that a stream keeps."""
        return 1 if self.shares_history else self.num_steps

    @property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """Noise level before and after every evaluation of a block; a refresh stays at its own."""
        steps = tuple(zip(self.sigmas[:-1], self.sigmas[1:], strict=True))
        refresh = {"none": (), "clean": ((0.0, 0.0),), "fixed": ((self.refresh_sigma,) * 2,)}
        return steps + refresh[self.refresh]

    @property
    def takes_noise(self) -> bool:
        """A block is noised anew, between its steps or for the refresh."""
        return self.sampler == "renoise" or self.refresh != "none"

    @classmethod
    def named(cls) -> tuple[str, ...]:
        """Names of the settings, as model folders store them."""
        return tuple(field.name for field in fields(Sampling))

    def sampling(self) -> dict[str, Any]:
        """The settings as plain values, without those that a subclass adds."""
        values = {name: getattr(self, name) for name in self.named()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def noised(clean: Latent, noise: Latent, sigma: Array) -> Latent:
    """A finished block at the level at which it is read as history, in its dtype.

    Args:
        clean: the block.
        noise: new noise of its shape.
        sigma: level of the refresh; 0 leaves the block as it is.
    """
    wide = add_noise(clean.astype(jnp.float32), noise.astype(jnp.float32), sigma)
    return wide.astype(clean.dtype)
