"""Tokens of the transformer: patches of latents with their kind, and where each of them stands.

noisy latents, pose --patches--> noisy tokens       at their latent frames
portrait            --patches--> reference tokens   at a frame of its own
motion              --packer---> motion tokens      before the clip
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_avatar.models.config import DiTConfig
from jax_avatar.models.layers import PatchProjection
from jax_avatar.models.rope import (
    Rotation,
    concat,
    frame_rotation,
    grid_rotation,
    motion_positions,
)
from jax_avatar.models.tap import tap
from jax_avatar.shapes import Array, Float, Latent, Tokens

__all__ = ["LAST_FRAME", "MOTION_LATENTS", "PATCH", "TokenEmbedding", "TokenPositions"]

LAST_FRAME = 2047
"""Last rotary frame at which a latent or the reference may stand in `block_causal`."""

MOTION_LATENTS = 19
"""Latents before a clip that the motion packer sees: 73 video frames."""

PATCH = (1, 2, 2)
"""Latent frames, rows and columns of a token."""

_NOISY, _REFERENCE, _MOTION = 0, 1, 2  # rows of the token-kind embedding
_MOTION_FRAMES = (16, 2, 1)  # far, mid, near latent frames of the motion clip
_FIRST_FRAME = -MOTION_LATENTS


class TokenEmbedding(nnx.Module):
    """Latents -> tokens; the transformer is one, so that the parameters lie at its top level."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d, c = config.width, config.latent_channels
        self.config = config
        self.patch = PatchProjection(config, c, PATCH, rngs=rngs)
        self.pose = PatchProjection(
            config, config.pose_channels, PATCH, zero=config.zero_init, rngs=rngs
        )
        if config.framepack:
            self.motion_near = PatchProjection(config, c, (1, 2, 2), rngs=rngs)
            self.motion_mid = PatchProjection(config, c, (2, 4, 4), rngs=rngs)
            self.motion_far = PatchProjection(config, c, (4, 8, 8), rngs=rngs)
        kinds = (3, d)
        self.token_kind = nnx.Param(
            jnp.zeros(kinds, config.param_dtype)
            if config.zero_init
            else 0.02 * jax.random.normal(rngs.params(), kinds, config.param_dtype)
        )

    def noisy_tokens(self, noisy: Latent, pose: Float[Array, "b t h w p"]) -> Tokens:
        """Tokens of noisy latents, with the pose added.

        Raises:
            ValueError: the grid has an odd number of rows or columns.
        """
        h, w = noisy.shape[2:4]
        if h % 2 or w % 2:
            raise ValueError(f"latent grid {h}x{w} must be even both ways; change the video size.")
        dtype = self.config.dtype
        tokens, posed = self.patch(noisy.astype(dtype)), self.pose(pose.astype(dtype))
        tap("patch_embed_noisy", tokens)
        tap("cond_embed", posed)
        return tokens + posed + self._kind(_NOISY)

    def sink_tokens(
        self, reference: Float[Array, "b 1 h w c"], motion: Float[Array, "b past h w c"] | None
    ) -> Tokens:
        """Tokens of the portrait, and of the motion latents if there are any.

        Raises:
            ValueError: there are, but the network has no motion packer.
        """
        dtype = self.config.dtype
        tokens = self.patch(reference.astype(dtype))
        tap("patch_embed_ref", tokens)
        parts = [tokens + self._kind(_REFERENCE)]
        if motion is not None:
            if not self.config.framepack:
                raise ValueError("motion latents came, but this DiT has framepack=False; pass None")
            parts += [p + self._kind(_MOTION) for p in self._motion_tokens(motion.astype(dtype))]
        return jnp.concatenate(parts, axis=1)

    def _motion_tokens(self, motion):
        """Near, mid and far motion frames, ever more coarsely packed (FramePack, 2504.12626)."""
        total = sum(_MOTION_FRAMES)
        missing = max(0, total - motion.shape[1])
        motion = jnp.pad(motion, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))[:, -total:]
        far, mid, near = jnp.split(motion, np.cumsum(_MOTION_FRAMES)[:-1], axis=1)
        return self.motion_near(near), self.motion_mid(mid), self.motion_far(far)

    def _kind(self, kind):
        return self.token_kind[...][kind].astype(self.config.dtype)[None, None]


@dataclass(frozen=True)
class TokenPositions:
    """Rotary positions of tokens.

    Attributes:
        config: size of the transformer.
        grid: latent rows and columns.
        half: rounds to float16, see `axis_rotation`.
    """

    config: DiTConfig
    grid: tuple[int, int]
    half: bool

    def along_time(self, frames) -> Rotation:
        """Rotation along the frame axis."""
        config = self.config
        return frame_rotation(frames, config.head_dim, theta=config.rope_theta, half=self.half)

    def frames(self, frames: Rotation) -> Rotation:
        """Rotation of all tokens of latent frames, from `along_time`."""
        h, w = self.grid
        return self._on_grid(frames, range(h // 2), range(w // 2))

    def sink(self, reference: Rotation, groups: tuple[str, ...], motion_at=None) -> Rotation:
        """Rotation of the sink's tokens, group by group.

        Args:
            reference: where the portrait stands in time.
            groups: see `Sink`.
            motion_at: frames relative to the clip's first -> rotation along time; those of a clip
                that begins at frame 0 if not given.
        """
        motion_at = motion_at or self.along_time
        parts = [self.frames(reference)]
        for frames, rows, cols in motion_positions(*self.grid) if "motion" in groups else ():
            if rows.size and cols.size:
                parts.append(self._on_grid(motion_at(frames), rows, cols))
        return concat(parts)

    def clip(self, t: int, first_frame, reference_frame, groups: tuple[str, ...]) -> Rotation:
        """Rotation of all tokens of a clip, `[n pairs]`, or `[b n pairs]` where clips stand apart.

        Args:
            t: latent frames.
            first_frame: rotary frame of the first, of all clips or of each.
            reference_frame: rotary frame of the portrait, likewise.
            groups: of the tokens behind those of the clip, see `Sink`.
        """
        table = self.along_time(np.arange(_FIRST_FRAME, LAST_FRAME + 1))

        def at(frames):
            return Rotation(*(jnp.asarray(part)[frames - _FIRST_FRAME] for part in table))

        def rotation(first, reference):
            noisy = self.frames(at(first + jnp.arange(t)))
            sink = self.sink(
                at(reference[None]), groups, lambda frames: at(first + jnp.asarray(frames))
            )
            return concat([noisy, sink])

        places = jnp.broadcast_arrays(jnp.asarray(first_frame), jnp.asarray(reference_frame))
        return jax.vmap(rotation)(*places) if places[0].ndim else rotation(*places)

    def _on_grid(self, frames, rows, cols):
        config = self.config
        return grid_rotation(
            frames, rows, cols, config.head_dim, theta=config.rope_theta, half=self.half
        )
