"""Held-out speech with its motion, as latents, and scores of motion that is made for it.

encoded clips --truth--> curves; features --BatchStream--> latents of every seed --> scores
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from jax_avatar.data.latents import Clips
from jax_avatar.evaluation.motion_scores import curves_of, motion_scores
from jax_avatar.models.vae.anchored import GROUP, AnchoredVAE
from jax_avatar.streaming.batch import BatchStream

__all__ = ["MotionClips"]


class MotionClips:
    """Clips of one length, some seeds of each.

    Attributes:
        vae: says what latents mean.
        fps: frames per second.
        seeds: of each clip; rows of what is made are clips of the first seed, of the second, ...
        truth: curves of the clips.
        others: curves of as many other clips, to see what chance gives.
        reference: latent of no motion, once for every seed and clip.
        features: of the speech, likewise.
    """

    def __init__(
        self,
        clips: Clips,
        vae: AnchoredVAE,
        *,
        count: int,
        seconds: float,
        block: int = 3,
        seeds: int = 1,
    ):
        """Takes the first clips that are long enough.

        Args:
            clips: encoded, of a held-out split.
            vae: that the clips were encoded with.
            count: how many.
            seconds: of each, rounded to whole blocks.
            block: latents of a block.
            seeds: of each.

        Raises:
            ValueError: there are not twice as many that are so long.
        """
        self.vae, self.fps, self.seeds = vae, clips.fps, seeds
        latents = max(1, round(seconds * clips.fps / (GROUP * block))) * block
        chosen = np.flatnonzero(clips.lengths >= latents)
        if len(chosen) < 2 * count:
            raise ValueError(
                f"the set has {len(chosen)} clips of {latents * GROUP / clips.fps:.1f} s or more, "
                f"{2 * count} are needed: {count} to make, and as many others to compare with; "
                "take fewer or shorter ones."
            )
        own, others = (clips.take(chosen[part]) for part in (slice(count), slice(count, 2 * count)))
        self.truth, self.others = (
            curves_of(vae, part.latent[:, :latents].astype(np.float32)) for part in (own, others)
        )
        features = own.features[:, None, : GROUP * latents]
        self.reference = np.tile(own.reference.astype(np.float32), (seeds, 1, 1, 1, 1))
        self.features = np.tile(features.astype(np.float32), (seeds, 1, 1, 1, 1))

    def __len__(self) -> int:
        return len(self.truth)

    def make(self, stream: BatchStream) -> Float[np.ndarray, "s b T c"]:
        """Curves of what a stream makes of the speech."""
        return self.by_seed(stream.latents(self.reference, self.features))

    def by_seed(self, latents: Float[np.ndarray, "n t h w z"]) -> Float[np.ndarray, "s b T c"]:
        """Curves of latents of all seeds."""
        curves = curves_of(self.vae, latents)
        return curves.reshape(self.seeds, len(self), *curves.shape[1:])

    def scores(self, made: Float[np.ndarray, "s b T c"]) -> dict[str, Any]:
        """Scores of curves of all seeds, see `motion_scores`."""
        return motion_scores(made, self.truth, self.vae.config, self.fps)
