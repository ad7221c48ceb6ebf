"""The causal video VAE of Wan 2.1: a whole clip at once, or chunk by chunk.

    video [b 1+4n H W 3] -- encode --> latent [b 1+n H/8 W/8 c] -- decode --> video

Time is only ever looked at backwards, by convolutions over the current and earlier frames. Cut
into chunks, each convolution remembers its last input frames in a buffer; the tuple of buffers is
the whole state of a stream. No buffers (`None`) means that the clip begins: the first latent then
stands for one frame alone, every later one for four.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jax_avatar.models.config import WanVAEConfig
from jax_avatar.models.tap import tap
from jax_avatar.models.vae.conv import causal_conv3d
from jax_avatar.models.vae.interface import VideoVAE
from jax_avatar.shapes import Array, Float, Latent, Video

__all__ = ["VAEState", "WanVAE", "upsample_conv"]

Buffers = tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VAEState:
    """Streaming state between chunks.

    Attributes:
        buffers: last input frames of each causal convolution with a memory, in order of
            execution; the official cache has the same slots.
    """

    buffers: Any  # each b T H W c


class WanVAE(VideoVAE):
    """Encoder and decoder between RGB video and normalised latents.

    The methods are pure. Taps have the output of every layer.

    Source: github.com/Wan-Video/Wan2.1, `wan/modules/vae.py`.
    """

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.to_moments = Pointwise(config, 2 * config.z_dim, 2 * config.z_dim, rngs=rngs)
        self.from_latent = Pointwise(config, config.z_dim, config.z_dim, rngs=rngs)

    def encode(self, video: Video) -> Latent:
        """Latents of a whole clip: the posterior mean, normalised per channel.

        Args:
            video: `1 + 4 n` frames, rows and columns multiples of 8, in [-1, 1].

        Returns:
            `1 + n` latents, float32.

        Raises:
            ValueError: another number of frames, rows or columns.
        """
        return self.encode_first(video)[0]

    def encode_first(self, video: Video) -> tuple[Latent, VAEState]:
        """Begins a clip: as `encode`, with the state for the frames that follow."""
        self._check_video(video, is_first=True)
        moments, buffers = self._moments(video, None)
        return self._normalise(moments), VAEState(buffers)

    def encode_next(self, state: VAEState, video: Video) -> tuple[Latent, VAEState]:
        """Continues a clip with `4 k` frames, which give `k` latents."""
        self._check_video(video, is_first=False)
        moments, buffers = self._moments(video, state.buffers)
        return self._normalise(moments), VAEState(buffers)

    def encode_moments(self, video: Video) -> Float[Array, "b t h w moments"]:
        """Posterior mean and log-variance of a whole clip, joined along channels, not normalised.

        Args:
            video: as in `encode`.
        """
        self._check_video(video, is_first=True)
        return self._moments(video, None)[0]

    def decode(self, latent: Latent) -> Video:
        """Frames of a whole clip, `1 + 4 n` from `1 + n` latents; float32, not clamped to [-1, 1].

        Args:
            latent: normalised latents, the first one that of a single frame.

        Raises:
            ValueError: another number of channels.
        """
        return self.decode_first(latent)[0]

    def decode_first(self, latent: Latent) -> tuple[Video, VAEState]:
        """Begins a clip: `k` latents give `1 + 4 (k - 1)` frames, and the state for what follows.

        Live streams pass one latent here, so that every later block has the same shape.
        """
        video, buffers = self._decode(latent, None)
        return video, VAEState(buffers)

    def decode_next(self, state: VAEState, latent: Latent) -> tuple[Video, VAEState]:
        """Continues a clip: `k` latents give `4 k` frames."""
        video, buffers = self._decode(latent, state.buffers)
        return video, VAEState(buffers)

    def _moments(self, video: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        x, buffers = self.encoder(video.astype(self.config.dtype), buffers)
        moments = self.to_moments(x).astype(jnp.float32)
        tap("to_moments", moments)
        return moments, buffers

    def _normalise(self, moments: Array) -> Array:
        mean, std = self._statistics()
        return (moments[..., : self.config.z_dim] - mean) * (1 / std)

    def _decode(self, latent: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        config = self.config
        if latent.shape[-1] != config.z_dim or not latent.shape[1]:
            raise ValueError(
                f"latent {latent.shape}: expected [b t h w {config.z_dim}], channels last and at "
                "least one latent frame. Check the axis order and the VAE's config."
            )
        mean, std = self._statistics()
        # The statistics stay float32: in bfloat16 alone they would shift latents by up to 0.09.
        x = self.from_latent((latent.astype(jnp.float32) * std + mean).astype(config.dtype))
        tap("from_latent", x)
        x, buffers = self.decoder(x, buffers)
        return x.astype(jnp.float32), buffers

    def _statistics(self) -> tuple[Array, Array]:
        shape = (1, 1, 1, 1, -1)
        return (
            jnp.asarray(self.config.latent_mean, jnp.float32).reshape(shape),
            jnp.asarray(self.config.latent_std, jnp.float32).reshape(shape),
        )

    def _check_video(self, video: Array, *, is_first: bool) -> None:
        stride, step = self.config.spatial_stride, self.config.temporal_stride
        _, frames, height, width, channels = video.shape
        if channels != 3 or not height or not width or height % stride or width % stride:
            raise ValueError(
                f"video {video.shape}: expected [b T H W 3] with rows and columns multiples of "
                f"{stride}. Crop or resize the video."
            )
        if frames < 1 or (frames - is_first) % step:
            count = f"1 + {step} n" if is_first else f"{step} n, at least {step},"
            raise ValueError(
                f"video {video.shape}: expected {count} frames, since a latent stands for {step} "
                f"frames{' and the first one for one' if is_first else ''}. Cut the clip."
            )


class Encoder(nnx.Module):
    """Frames -> features at latent resolution, both moments' channels."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        widths = [config.dim * mult for mult in (1, *config.dim_mult)]
        layers = []
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers.append(Residual(config, inputs, outputs, rngs=rngs))
            for _ in range(config.num_res_blocks - 1):
                layers.append(Residual(config, outputs, outputs, rngs=rngs))
            if level < len(config.dim_mult) - 1:
                in_time = config.temporal_downsample[level]
                layers.append(Downsample(config, outputs, in_time=in_time, rngs=rngs))
        self.conv_in = CausalConv(config, 3, widths[0], rngs=rngs)
        self.down = nnx.List(layers)
        self.middle = _middle(config, widths[-1], rngs)
        self.head = Head(config, widths[-1], 2 * config.z_dim, rngs=rngs)

    def __call__(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        """Runs one chunk; the buffers go in and out in order of execution."""
        layers = {"encoder.conv_in": self.conv_in}
        layers |= {f"encoder.down.{i}": layer for i, layer in enumerate(self.down)}
        layers |= {f"encoder.middle.{i}": layer for i, layer in enumerate(self.middle)}
        return _run(layers | {"encoder.head": self.head}, x, buffers)


class Decoder(nnx.Module):
    """Features at latent resolution -> frames."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        mults = config.dim_mult[::-1]
        widths = [config.dim * mult for mult in (mults[0], *mults)]
        in_time = config.temporal_downsample[::-1]
        layers = []
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            inputs = inputs // 2 if level else inputs  # halved by the upsampling before
            layers.append(Residual(config, inputs, outputs, rngs=rngs))
            for _ in range(config.num_res_blocks):
                layers.append(Residual(config, outputs, outputs, rngs=rngs))
            if level < len(mults) - 1:
                layers.append(Upsample(config, outputs, in_time=in_time[level], rngs=rngs))
        self.conv_in = CausalConv(config, config.z_dim, widths[0], rngs=rngs)
        self.middle = _middle(config, widths[0], rngs)
        self.up = nnx.List(layers)
        self.head = Head(config, widths[-1], 3, rngs=rngs)

    def __call__(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        """Runs one chunk; the buffers go in and out in order of execution."""
        layers = {"decoder.conv_in": self.conv_in}
        layers |= {f"decoder.middle.{i}": layer for i, layer in enumerate(self.middle)}
        layers |= {f"decoder.up.{i}": layer for i, layer in enumerate(self.up)}
        return _run(layers | {"decoder.head": self.head}, x, buffers)


def _middle(config: WanVAEConfig, width: int, rngs: nnx.Rngs) -> nnx.List:
    first = Residual(config, width, width, rngs=rngs)
    attention = FrameAttention(config, width, rngs=rngs)
    return nnx.List([first, attention, Residual(config, width, width, rngs=rngs)])


def _run(layers: dict[str, nnx.Module], x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
    expected = sum(layer.num_buffers for layer in layers.values())
    if buffers is not None and len(buffers) != expected:
        raise ValueError(
            f"the state has {len(buffers)} buffers, this network {expected}; pass the state that "
            "its own previous call returned."
        )
    new_buffers: Buffers = ()
    for name, layer in layers.items():
        start = len(new_buffers)
        own = None if buffers is None else buffers[start : start + layer.num_buffers]
        x, own = layer(x, own)
        new_buffers += own
        tap(name, x)
    return x, new_buffers


class CausalConv(nnx.Module):
    """3x3x3 convolution over the current and the two earlier frames."""

    num_buffers = 1

    def __init__(
        self,
        config: WanVAEConfig,
        inputs: int,
        outputs: int,
        window: tuple[int, int, int] = (3, 3, 3),
        *,
        rngs: nnx.Rngs,
    ):
        self.kernel = _kernel(config, (*window, inputs, outputs), rngs)
        self.bias = nnx.Param(jnp.zeros(outputs, config.param_dtype))

    def __call__(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        padding = self.kernel.shape[1] // 2
        buffer = None if buffers is None else buffers[0]
        x, buffer = causal_conv3d(
            x, self.kernel[...], self.bias[...], buffer, spatial_padding=padding
        )
        return x, (buffer,)


class Residual(nnx.Module):
    """Two normalised convolutions beside a shortcut."""

    num_buffers = 2

    def __init__(self, config: WanVAEConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm_a = ChannelNorm(config, inputs)
        self.conv_a = CausalConv(config, inputs, outputs, rngs=rngs)
        self.norm_b = ChannelNorm(config, outputs)
        self.conv_b = CausalConv(config, outputs, outputs, rngs=rngs)
        changes = inputs != outputs
        self.shortcut = Pointwise(config, inputs, outputs, rngs=rngs) if changes else None

    def __call__(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        first, second = (None, None) if buffers is None else (buffers[:1], buffers[1:])
        y, first = self.conv_a(jax.nn.silu(self.norm_a(x)), first)
        y, second = self.conv_b(jax.nn.silu(self.norm_b(y)), second)
        return (x if self.shortcut is None else self.shortcut(x)) + y, first + second


class FrameAttention(nnx.Module):
    """One attention head over the positions of each frame; frames do not see each other."""

    num_buffers = 0

    def __init__(self, config: WanVAEConfig, width: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(config, width)
        self.qkv = Pointwise(config, width, 3 * width, rngs=rngs)
        self.out = Pointwise(config, width, width, zero=True, rngs=rngs)

    def __call__(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        _, frames, height, _, _ = x.shape
        tokens = rearrange(self.qkv(self.norm(x)), "b t h w c -> (b t) (h w) 1 c")
        query, key, value = jnp.split(tokens, 3, axis=-1)
        seen = jax.nn.dot_product_attention(query, key, value)
        seen = rearrange(seen, "(b t) (h w) 1 c -> b t h w c", t=frames, h=height)
        return x + self.out(seen), ()


class Upsample(nnx.Module):
    """Doubles rows and columns and halves the channels; `in_time` doubles the frames first."""

    def __init__(self, config: WanVAEConfig, width: int, *, in_time: bool, rngs: nnx.Rngs):
        self.num_buffers = int(in_time)
        time_conv = CausalConv(config, width, 2 * width, (3, 1, 1), rngs=rngs) if in_time else None
        self.time_conv = time_conv
        self.conv = FrameConv(config, width, width // 2, rngs=rngs)

    def __call__(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        new_buffers: Buffers = ()
        if self.time_conv is not None:
            x, new_buffers = self._double_frames(x, buffers)
        y = upsample_conv(_join(x), self.conv.kernel[...], self.conv.bias[...])
        return _split(y, x), new_buffers

    def _double_frames(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        if buffers is not None:
            y, buffers = self.time_conv(x, buffers)
            return _interleave(y), buffers
        # The first frame stays single, and the convolution over the others never sees it.
        if x.shape[1] == 1:
            taps = self.time_conv.kernel.shape[0] - 1
            return x, (jnp.zeros((x.shape[0], taps, *x.shape[2:]), x.dtype),)
        y, buffers = self.time_conv(x[:, 1:], None)
        return jnp.concatenate([x[:, :1], _interleave(y)], axis=1), buffers


class Downsample(nnx.Module):
    """Halves rows and columns; `in_time` halves the frames afterwards."""

    def __init__(self, config: WanVAEConfig, width: int, *, in_time: bool, rngs: nnx.Rngs):
        self.num_buffers = int(in_time)
        self.conv = FrameConv(config, width, width, rngs=rngs)
        time_conv = CausalConv(config, width, width, (3, 1, 1), rngs=rngs) if in_time else None
        self.time_conv = time_conv

    def __call__(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        # Padded on the right and at the bottom only, as the source does.
        y = _conv2d(
            _join(x), self.conv.kernel[...], self.conv.bias[...], ((0, 1), (0, 1)), stride=2
        )
        y = _split(y, x)
        if self.time_conv is None:
            return y, ()
        if buffers is not None:
            return self._halve_frames(jnp.concatenate([buffers[0].astype(y.dtype), y], axis=1))
        # The first frame stays as it is; from the second on, frames are joined in pairs.
        later, buffers = self._halve_frames(y) if y.shape[1] > 1 else (y[:, 1:], (y,))
        return jnp.concatenate([y[:, :1], later], axis=1), buffers

    def _halve_frames(self, x: Array) -> tuple[Array, Buffers]:
        """Every pair of frames with the frame before it, by three taps: `1 + 2 m` -> `m`."""
        kernel, bias = self.time_conv.kernel[...].astype(x.dtype), self.time_conv.bias[...]
        stop = x.shape[1] - 2
        y = sum(
            jnp.einsum("bthwc,co->bthwo", x[:, tap : tap + stop : 2], kernel[tap, 0, 0])
            for tap in range(3)
        )
        return y + _channels(bias, y), (x[:, -1:],)


class Head(nnx.Module):
    """Norm, SiLU and the last convolution."""

    num_buffers = 1

    def __init__(self, config: WanVAEConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(config, inputs)
        self.conv = CausalConv(config, inputs, outputs, rngs=rngs)

    def __call__(self, x: Array, buffers: Buffers | None) -> tuple[Array, Buffers]:
        return self.conv(jax.nn.silu(self.norm(x)), buffers)


class FrameConv(nnx.Module):
    """Holds the weights of a 3x3 convolution over single frames."""

    def __init__(self, config: WanVAEConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = _kernel(config, (3, 3, inputs, outputs), rngs)
        self.bias = nnx.Param(jnp.zeros(outputs, config.param_dtype))


class Pointwise(nnx.Module):
    """A linear map of the channels at every position (a 1x1x1 convolution)."""

    def __init__(
        self, config: WanVAEConfig, inputs: int, outputs: int, *, zero=False, rngs: nnx.Rngs
    ):
        self.kernel = _kernel(config, (inputs, outputs), rngs, zero=zero)
        self.bias = nnx.Param(jnp.zeros(outputs, config.param_dtype))

    def __call__(self, x: Array) -> Array:
        y = jnp.einsum("bthwc,co->bthwo", x, self.kernel[...].astype(x.dtype))
        return y + _channels(self.bias[...], y)


class ChannelNorm(nnx.Module):
    """Scales the channel vector of every position to length `sqrt(C)`, in float32."""

    def __init__(self, config: WanVAEConfig, width: int):
        self.scale = nnx.Param(jnp.ones(width, config.param_dtype))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        # The source bounds the length by 1e-12; an epsilon added to the square is not the same.
        # Bounding the square instead keeps the gradient of an all-zero position finite.
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        length = jnp.sqrt(jnp.maximum(square, 1e-24))
        scale = _channels(self.scale[...].astype(jnp.float32), wide)
        return (wide / length * np.float32(x.shape[-1] ** 0.5) * scale).astype(x.dtype)


def upsample_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c o"], bias: Float[Array, " o"]
) -> Float[Array, "b H W o"]:
    """Repeats every pixel 2x2, then convolves 3x3 with zero padding, without the large image.

    Of the nine taps, those that fall on copies of one pixel are summed beforehand. That leaves a
    2x2 kernel for each of the four positions inside a repeated pixel: 4/9 of the arithmetic.

    Args:
        x: images.
        kernel: the 3x3 kernel, as it would be used on the repeated image.
        bias: one number per output channel.
    """
    _, height, width, channels = x.shape
    # [position, neighbour, tap]: even rows see (above, own, own), odd rows (own, own, below).
    taps = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)
    summed = jnp.einsum(
        "pik,qjl,klco->ijcpqo", taps, taps, kernel.astype(jnp.float32), precision="highest"
    ).reshape(2, 2, channels, -1)
    y = _conv2d(x, summed, None, ((1, 1), (1, 1)))
    y = y.reshape(*y.shape[:3], 2, 2, -1)
    rows = [
        jnp.stack([y[:, p : p + height, q : q + width, p, q] for q in range(2)], axis=3)
        for p in range(2)
    ]
    y = rearrange(jnp.stack(rows, axis=2), "b h p w q o -> b (h p) (w q) o")
    return y + _channels(bias, y)


def _conv2d(
    x: Array, kernel: Array, bias: Array | None, padding: tuple, *, stride: int = 1
) -> Array:
    y = jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y if bias is None else y + _channels(bias, y)


def _interleave(x: Array) -> Array:
    """Frames of both halves of the channels, one after the other."""
    return rearrange(x, "b t h w (two c) -> b (t two) h w c", two=2)


def _join(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _split(y: Array, x: Array) -> Array:
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _channels(values: Array, x: Array) -> Array:
    return values.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _kernel(config: WanVAEConfig, shape: tuple, rngs: nnx.Rngs, *, zero=False) -> nnx.Param:
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
    return nnx.Param(init(rngs.params(), shape, config.param_dtype))
