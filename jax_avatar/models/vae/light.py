"""A light video VAE that decodes in real time on a CPU, with the frame layout of the Wan VAE.

    encode   frame 0 | frames 1-4 | ...        each group of four frames on its own
               8x8x4 patch, linear ------------------------ + -> latent, 1/8 x 1/8 x 1/4
               conv at 1/4 per frame -> conv at 1/8 --------+   (only if encoder_blocks > 0)
    decode   latent and the one before it
               linear ------------------------------------- + -> four frames
               conv at 1/8 -> conv at 1/4 per frame --------+

The linear paths start as the principal components of the patches, see `principal_components`; the
convolutions learn what they miss. A linear encoder is fixed before any training, so latents stay
valid while the decoder improves. A single frame is a group of four equal frames.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jax_avatar.models.config import strided_grid
from jax_avatar.models.vae.interface import VideoVAE
from jax_avatar.shapes import Latent, Video

__all__ = [
    "LightVAE",
    "LightVAEConfig",
    "LightVAEState",
    "PatchBasis",
    "principal_components",
    "with_patch_basis",
]

_QUARTER = 4  # pixels per cell of the grid on which frames are refined


@dataclass(frozen=True)
class LightVAEConfig:
    """Size of the light VAE, and how its latents are normalised.

    Attributes:
        z_dim: latent channels.
        latent_width: channels of the convolutions at 1/8 resolution, one map per latent.
        frame_width: channels of the decoder's convolutions at 1/4 resolution, one map per frame.
        stem_width: channels of the encoder's convolution at 1/4 resolution.
        encoder_blocks: residual blocks of the encoder at 1/8 resolution; 0 leaves it linear.
        latent_blocks: residual blocks of the decoder at 1/8 resolution.
        frame_blocks: residual blocks at 1/4 resolution in the decoder.
        latent_mean: what `encode` subtracts, one number per channel; empty means zeros.
        latent_std: what `encode` then divides by; empty means ones.
        spatial_stride: pixels per latent cell; only 8 is implemented.
        temporal_stride: frames per latent after the first; only 4 is implemented.
    """

    z_dim: int = 32
    latent_width: int = 96
    frame_width: int = 48
    stem_width: int = 48
    encoder_blocks: int = 0
    latent_blocks: int = 2
    frame_blocks: int = 3
    latent_mean: Sequence[float] = ()
    latent_std: Sequence[float] = ()
    spatial_stride: int = 8
    temporal_stride: int = 4

    def __post_init__(self):
        if (self.spatial_stride, self.temporal_stride) != (8, 4):
            raise ValueError(
                f"spatial_stride={self.spatial_stride}, temporal_stride={self.temporal_stride}: "
                "the light VAE has strides 8 and 4; leave both out, or use the Wan VAE."
            )
        for name, neutral in (("latent_mean", 0.0), ("latent_std", 1.0)):
            values = tuple(float(value) for value in getattr(self, name)) or (neutral,) * self.z_dim
            if len(values) != self.z_dim:
                raise ValueError(
                    f"{name} has {len(values)} numbers for z_dim={self.z_dim}; give one per "
                    "channel, or none."
                )
            object.__setattr__(self, name, values)

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of pictures, see `strided_grid`."""
        return strided_grid(height, width, self.spatial_stride)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, such that `LightVAEConfig(**config.to_dict())` equals `config`."""
        return asdict(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LightVAEState:
    """Decoder state between chunks: the last latent."""

    latent: Array  # b 1 h w c


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions per map; the second starts small, so that the block starts quiet."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.first = _conv(width, width, 3, rngs=rngs)
        self.second = _conv(width, width, 3, gain=0.1, rngs=rngs)

    def __call__(self, x: Float[Array, "b t H W c"]) -> Float[Array, "b t H W c"]:
        return x + self.second(jax.nn.relu(self.first(jax.nn.relu(x))))


class Encoder(nnx.Module):
    """Groups of four frames -> latents before normalisation."""

    def __init__(self, config: LightVAEConfig, *, rngs: nnx.Rngs):
        c, d, stem = config.z_dim, config.latent_width, config.stem_width
        self.patch = nnx.Linear(8 * 8 * 4 * 3, c, rngs=rngs)
        self.is_linear = config.encoder_blocks == 0
        if self.is_linear:
            return
        self.stem = _conv(_QUARTER**2 * 3, stem, 3, rngs=rngs)
        self.group = _conv(4 * 2 * 2 * stem, d, 1, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(d, rngs=rngs) for _ in range(config.encoder_blocks)])
        self.out = _conv(d, c, 3, gain=0.0, rngs=rngs)

    def __call__(self, groups: Float[Array, "b t 4 H W 3"]) -> Latent:
        linear = self.patch(_to_patches(groups))
        if self.is_linear:
            return linear
        x = rearrange(groups, "b t f (h y) (w x) c -> b (t f) h w (y x c)", y=_QUARTER, x=_QUARTER)
        x = jax.nn.relu(self.stem(x))
        x = rearrange(x, "b (t f) (h y) (w x) c -> b t h w (f y x c)", f=4, y=2, x=2)
        x = self.group(x)
        for block in self.blocks:
            x = block(x)
        return linear + self.out(jax.nn.relu(x))


class Decoder(nnx.Module):
    """Latents before normalisation, each with the one before it -> groups of four frames."""

    def __init__(self, config: LightVAEConfig, *, rngs: nnx.Rngs):
        c, d, e = config.z_dim, config.latent_width, config.frame_width
        self.patch = nnx.Linear(c, 8 * 8 * 4 * 3, rngs=rngs)
        self.enter = _conv(2 * c, d, 3, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(d, rngs=rngs) for _ in range(config.latent_blocks)])
        self.expand = _conv(d, 4 * 2 * 2 * e, 1, rngs=rngs)
        self.frame_blocks = nnx.List(
            [ResidualBlock(e, rngs=rngs) for _ in range(config.frame_blocks)]
        )
        self.out = _conv(e, _QUARTER**2 * 3, 3, gain=0.0, rngs=rngs)

    def __call__(self, latent: Latent, previous: Latent) -> Float[Array, "b t 4 H W 3"]:
        linear = _from_patches(self.patch(latent))
        x = self.enter(jnp.concatenate([previous, latent], axis=-1))
        for block in self.blocks:
            x = block(x)
        x = self.expand(jax.nn.relu(x))
        x = rearrange(x, "b t h w (f y x c) -> b (t f) (h y) (w x) c", f=4, y=2, x=2)
        for block in self.frame_blocks:
            x = block(x)
        x = self.out(jax.nn.relu(x))
        x = rearrange(x, "b (t f) h w (y x c) -> b t f (h y) (w x) c", f=4, y=_QUARTER, x=_QUARTER)
        return linear + x


class LightVAE(VideoVAE):
    """Causal video VAE: `1 + 4 (n - 1)` frames <-> `n` normalised latents."""

    def __init__(self, config: LightVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video: Video) -> Latent:
        """Encodes a clip; a latent depends on its own frames alone.

        Args:
            video: `1 + 4 (n - 1)` frames, sides multiples of 8.

        Returns:
            `n` latents; the first stands for the first frame, the others for four frames each.
        """
        frames, height, width = video.shape[1:4]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(
                f"A video of {frames} frames of {height}x{width} pixels: this VAE encodes "
                "1, 5, 9, ... frames with sides that are multiples of 8; cut or pad the video."
            )
        first = jnp.repeat(video[:, :1, None], 4, axis=2)
        later = rearrange(video[:, 1:], "b (t f) H W c -> b t f H W c", f=4)
        mean, std = self._statistics(video.dtype)
        return (self.encoder(jnp.concatenate([first, later], axis=1)) - mean) / std

    def decode(self, latent: Latent) -> Video:
        """Decodes a whole clip; values may leave [-1, 1] a little."""
        video, state = self.decode_first(latent[:, :1])
        if latent.shape[1] == 1:
            return video
        return jnp.concatenate([video, self.decode_next(state, latent[:, 1:])[0]], axis=1)

    def decode_first(
        self, latent: Float[Array, "b 1 h w c"]
    ) -> tuple[Float[Array, "b 1 H W 3"], LightVAEState]:
        """Starts a stream: one latent -> one frame."""
        latent = self._denormalise(latent)
        return self.decoder(latent, latent)[:, 0, 3:], LightVAEState(latent)

    def decode_next(
        self, state: LightVAEState, latent: Latent
    ) -> tuple[Float[Array, "b T H W 3"], LightVAEState]:
        """Continues a stream: each latent -> four frames."""
        latent = self._denormalise(latent)
        previous = jnp.concatenate([state.latent, latent[:, :-1]], axis=1)
        video = rearrange(self.decoder(latent, previous), "b t f H W c -> b (t f) H W c")
        return video, LightVAEState(latent[:, -1:])

    def _denormalise(self, latent: Array) -> Array:
        mean, std = self._statistics(latent.dtype)
        return latent * std + mean

    def _statistics(self, dtype: Any) -> tuple[Array, Array]:
        shape = (1, 1, 1, 1, -1)
        return (
            jnp.asarray(self.config.latent_mean, dtype).reshape(shape),
            jnp.asarray(self.config.latent_std, dtype).reshape(shape),
        )


@dataclass(frozen=True)
class PatchBasis:
    """Principal components of 8x8x4 patches, as the weights of both linear paths."""

    analysis: Float[np.ndarray, "q c"]  # patch -> channels
    analysis_bias: Float[np.ndarray, " c"]
    synthesis: Float[np.ndarray, "c q"]  # channels -> patch
    synthesis_bias: Float[np.ndarray, " q"]


def principal_components(
    video: Float[np.ndarray, "b T H W 3"],
    weight: Float[np.ndarray, "b T H W"],
    z_dim: int,
    *,
    still_share: float = 0.15,
    whitening: float = 0.7,
) -> PatchBasis:
    """Fits the linear paths to a sample of clips.

    Args:
        video: `1 + 4k` frames in [-1, 1].
        weight: how much each pixel's patch counts, for example more around the mouth.
        z_dim: components to keep.
        still_share: how much the first frames, as groups of four equal ones, count in all.
        whitening: 0 keeps the spread of components relative to each other, 1 makes all alike;
            between, no component is so weak that it drowns in the noise of the diffusion, and
            none so strong that it is all the diffusion learns.

    Returns:
        Both linear paths. Over all patches alike, channels have zero mean, and a mean square that
        is one on average.

    Source: the components are Pearson's (1901); the partial whitening is ours.
    """

    def grouped(x):
        still = np.repeat(x[:, :1, None], 4, axis=2)
        moving = x[:, 1:].reshape(x.shape[0], -1, 4, *x.shape[2:])
        return still, moving

    rows, shares, weights = [], [], []
    for part, part_weight, share in zip(
        grouped(video), grouped(weight[..., None]), (still_share, 1 - still_share), strict=True
    ):
        patches = np.asarray(_to_patches(part)).reshape(-1, 768).astype(np.float64)
        w = np.asarray(_to_patches(part_weight)).reshape(len(patches), -1).mean(1)
        rows.append(patches)
        shares.append(np.full(len(w), share / len(w)))
        weights.append(share * w / w.mean() / len(w))
    patches, plain, weighted = (np.concatenate(parts) for parts in (rows, shares, weights))
    mean = weighted @ patches
    centred = patches - mean
    _, vectors = np.linalg.eigh((centred * weighted[:, None]).T @ centred)
    vectors = vectors[:, ::-1][:, :z_dim]
    channels = centred @ vectors
    offset = plain @ channels
    std = np.sqrt(np.maximum(plain @ (channels - offset) ** 2, 1e-12))
    scale = std**whitening
    scale *= np.sqrt(((std / scale) ** 2).mean())
    analysis, synthesis = vectors / scale, (vectors * scale).T
    return PatchBasis(
        analysis.astype(np.float32),
        (-mean @ analysis - offset / scale).astype(np.float32),
        synthesis.astype(np.float32),
        (mean + offset @ vectors.T).astype(np.float32),
    )


def with_patch_basis(params: dict[str, Any], basis: PatchBasis) -> dict[str, Any]:
    """Starts the linear paths of `params`, a LightVAE's, at the principal components."""
    encoder = {"kernel": jnp.asarray(basis.analysis), "bias": jnp.asarray(basis.analysis_bias)}
    decoder = {"kernel": jnp.asarray(basis.synthesis), "bias": jnp.asarray(basis.synthesis_bias)}
    return {
        **params,
        "encoder": {**params["encoder"], "patch": encoder},
        "decoder": {**params["decoder"], "patch": decoder},
    }


def _conv(inputs: int, outputs: int, size: int, *, gain: float = 1.0, rngs: nnx.Rngs) -> nnx.Conv:
    init = jax.nn.initializers.variance_scaling(max(2.0 * gain**2, 1e-12), "fan_in", "normal")
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        padding="SAME",
        kernel_init=init if gain else jax.nn.initializers.zeros,
        rngs=rngs,
    )


def _to_patches(groups: Array | np.ndarray) -> Array | np.ndarray:
    return rearrange(groups, "b t f (h y) (w x) c -> b t h w (f y x c)", f=4, y=8, x=8)


def _from_patches(patches: Array) -> Array:
    return rearrange(patches, "b t h w (f y x c) -> b t f (h y) (w x) c", f=4, y=8, x=8)
