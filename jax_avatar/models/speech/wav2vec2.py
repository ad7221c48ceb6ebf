"""wav2vec 2.0 as an audio front end: waveform -> all hidden states per video frame.

    samples --7 convolutions--> 50 Hz --transformer--> k hidden states --30 Hz, video rate-->
    AudioFeatures [b u T k a]

    encode     a whole recording at once, as the official pipelines do
    features   a live stream: a window of fixed length rolls over the sound

Source: Baevski et al., arXiv:2006.11477; layer norm before each sublayer as in XLSR-53
(arXiv:2006.13979).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jax_avatar.models.attention import attend
from jax_avatar.models.layers import LayerNorm, linear, stack_layers
from jax_avatar.models.speech.feature_rate import (
    bucket_indices,
    num_frames_30hz,
    pick_frames,
    positions_at,
    to_30hz,
)
from jax_avatar.models.tap import tap
from jax_avatar.shapes import Array, AudioFeatures, Float, IntScalar

__all__ = ["Wav2Vec2", "Wav2Vec2Config", "Wav2Vec2State", "normalise", "xlsr53_large"]

_RATE = 50  # frames per second, which the change of rate counts on
_VARIANCE_EPS = 1e-7


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Size of the network, and its rolling window in live streams.

    Attributes:
        width: channels of a hidden state.
        num_layers: transformer layers.
        num_heads: attention heads.
        ffn_width: hidden channels of the feed-forward networks.
        conv_widths: channels after each convolution of the extractor.
        conv_kernels: taps of each.
        conv_strides: stride of each; their product is the hop between frames.
        position_kernel: taps of the positional convolution.
        position_groups: its channel groups.
        eps: of the layer norms.
        sample_rate: of the wave, mono; 50 times the hop.
        fps: video frames per second.
        live: how a stream is encoded: "rolling", a window over the past, the new frames and a
            look-ahead; or "isolated", every chunk by itself as the official streaming prototype
            does, with the last video frame of a 0.48 s chunk left at zero.
        look_back_s: past in the rolling window, a multiple of the hop.
        look_ahead_s: future in the rolling window, a multiple of the hop; it is waited for.
        level_s: time constant of the running mean and variance of the samples.
        variance_floor: least variance that samples are divided by; silence is not amplified.
        dtype: compute type; norms are float32.
        param_dtype: storage type of the parameters.
    """

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    ffn_width: int = 4096
    conv_widths: Sequence[int] = (512,) * 7
    conv_kernels: Sequence[int] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2)
    position_kernel: int = 128
    position_groups: int = 16
    eps: float = 1e-5
    sample_rate: int = 16_000
    fps: int = 25
    live: str = "rolling"
    look_back_s: float = 4.0
    look_ahead_s: float = 0.24
    level_s: float = 20.0
    variance_floor: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("conv_widths", "conv_kernels", "conv_strides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        self._check_network()
        self._check_stream()

    def _check_network(self):
        counts = [len(x) for x in (self.conv_widths, self.conv_kernels, self.conv_strides)]
        if len(set(counts)) > 1 or not counts[0]:
            raise ValueError(
                f"conv_widths, conv_kernels and conv_strides have {counts} values; give one each "
                "per convolution."
            )
        for name in ("num_heads", "position_groups"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"wav2vec2 width {self.width} is not a multiple of {name} "
                    f"{getattr(self, name)}; change one of them."
                )
        if self.sample_rate != _RATE * self.hop:
            raise ValueError(
                f"sample_rate {self.sample_rate} and conv_strides {self.conv_strides} give "
                f"{self.sample_rate / self.hop:g} frames per second; expected {_RATE}."
            )

    def _check_stream(self):
        if self.sample_rate % self.fps:
            raise ValueError(
                f"sample_rate {self.sample_rate} is not a multiple of fps {self.fps}; at 16000 Hz "
                "take fps 10, 16, 20 or 25."
            )
        if self.live not in ("rolling", "isolated"):
            raise ValueError(f"live {self.live!r} must be rolling or isolated.")
        for name in ("look_back_s", "look_ahead_s"):
            hops = getattr(self, name) * _RATE
            if hops < 0 or abs(hops - round(hops)) > 1e-6:
                raise ValueError(
                    f"{name} {getattr(self, name)} must be a multiple of {1 / _RATE:g} s, at "
                    f"least 0; take {max(0, round(hops)) / _RATE:g}."
                )
        if self.level_s <= 0 or self.variance_floor <= 0:
            raise ValueError(
                f"level_s {self.level_s} and variance_floor {self.variance_floor} must be positive."
            )

    @property
    def hop(self) -> int:
        """Samples between frames of the extractor."""
        return math.prod(self.conv_strides)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def num_states(self) -> int:
        """Hidden states per video frame, `k`."""
        return self.num_layers + 1

    @property
    def samples_per_frame(self) -> int:
        """Samples per video frame."""
        return self.sample_rate // self.fps

    @property
    def look_back_samples(self) -> int:
        """Samples of the window before a chunk's first video frame."""
        return round(self.look_back_s * _RATE) * self.hop if self.live == "rolling" else 0

    @property
    def lookahead_samples(self) -> int:
        """Samples of the window past the end of a chunk's last video frame."""
        return round(self.look_ahead_s * _RATE) * self.hop if self.live == "rolling" else 0

    @property
    def history_samples(self) -> int:
        """Samples kept between the chunks of a stream."""
        return self.look_back_samples + self.lookahead_samples

    def num_frames(self, samples: int) -> int:
        """Frames of the extractor for a wave of so many samples."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            samples = max(0, (samples - kernel) // stride + 1)
        return samples

    def sample_range(self, first_frame: int, num_frames: int) -> tuple[int, int]:
        """The chunk that brings video frames `first_frame` onwards: first sample, last + 1.

        Consecutive chunks touch.
        """
        start = first_frame * self.samples_per_frame + self.lookahead_samples
        return start, start + num_frames * self.samples_per_frame

    def at_fps(self, fps: int) -> "Wav2Vec2Config":
        """The config for a rate of video frames: frames at 50 Hz are mixed to any."""
        return self.replace(fps=fps)

    def replace(self, **changes: Any) -> "Wav2Vec2Config":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def xlsr53_large(**changes: Any) -> Wav2Vec2Config:
    """The published size: wav2vec2-large-xlsr-53, 315 million parameters.

    Source: `config.json` of the checkpoint that ships with Wan2.2-S2V-14B.
    """
    return Wav2Vec2Config(**changes)


def normalise(wave: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
    """Zero mean and unit variance over the whole wave; silence stays silent.

    On the host in float64, rounded once; inside a compiled program in float32, a few units in the
    last place from that.
    """
    if not isinstance(wave, jax.core.Tracer):
        exact = np.asarray(wave, np.float64)
        exact = exact - exact.mean(-1, keepdims=True)
        exact /= np.sqrt(np.mean(exact * exact, -1, keepdims=True) + _VARIANCE_EPS)
        return jnp.asarray(exact.astype(np.float32))
    wave = wave.astype(jnp.float32)
    centred = wave - wave.mean(-1, keepdims=True)
    # Rounding of the mean shows where an offset is much larger than the sound; a second pass
    # removes it.
    centred = centred - centred.mean(-1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    return centred / jnp.sqrt(variance + _VARIANCE_EPS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Wav2Vec2State:
    """Streaming state."""

    samples: Any  # b u history_samples, zeros where nothing was heard yet
    heard: Any  # how many of them were, int32
    phase: Any  # the next video frame, counted from the last whole second, int32
    moments: Any  # 3 b u: decaying number, sum and sum of squares of samples, per second


class Wav2Vec2(nnx.Module):
    """The encoder; every hidden state is an output."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.config = config
        inputs = (1, *config.conv_widths[:-1])
        sizes = zip(inputs, config.conv_widths, config.conv_kernels, config.conv_strides,
                    strict=True)  # fmt: skip
        self.convs = nnx.List([_Conv(config, *size, rngs=rngs) for size in sizes])
        self.norm_features = LayerNorm(config.conv_widths[-1], config.eps, config.param_dtype)
        self.project = linear(config, config.conv_widths[-1], config.width, rngs=rngs)
        self.position = PositionConv(config, rngs=rngs)
        self.layers = stack_layers(lambda r: _Layer(config, rngs=r), config.num_layers, rngs)
        self.norm_out = LayerNorm(config.width, config.eps, config.param_dtype)

    # ---- the network ----------------------------------------------------------------------

    def hidden_states(
        self, wave: Float[Array, "b N"], padding: IntScalar | None = None
    ) -> Float[Array, "k b n a"]:
        """Input of the first layer, then the output of every layer, at 50 Hz.

        The last state is layer-normed, as the official pipelines' version of the library has it;
        later versions of that library give it without the norm.

        Args:
            wave: normalised samples.
            padding: the first so many samples are not part of the wave; states from there on are
                as if it began there, if that is a multiple of the hop. Earlier states mean nothing.
        """
        config = self.config
        frames = config.num_frames(wave.shape[-1])
        if not frames:
            raise ValueError(f"a wave of {wave.shape[-1]} samples is too short; 400 make one frame")
        x = wave[..., None].astype(config.dtype)
        for index, conv in enumerate(self.convs):
            x = conv(x)
            tap(f"conv{index}", x)
        x = self.project(self.norm_features(x))
        tap("projected", x)
        mask = None
        if padding is not None:
            mask = (config.hop * jnp.arange(frames) >= padding)[None]
            # Where the wave begins, the positional convolution sees zeros; so it must here.
            x = jnp.where(mask[..., None], x, 0)
        positions = self.position(x)
        tap("positions", positions)
        x = x + positions
        structure, state = nnx.split(self.layers)

        def layer(x, state):
            return nnx.merge(structure, state)(x, mask), x

        x, states = jax.lax.scan(layer, x, state)
        return jnp.concatenate([states, self.norm_out(x)[None]])

    # ---- a whole recording ----------------------------------------------------------------

    def encode(self, wave: Float[Array, "b u N"], num_frames: int) -> AudioFeatures:
        """Features of the first `num_frames` video frames; zeros after the end of the wave.

        Args:
            wave: mono in [-1, 1], per clip and speaker; sample 0 is heard at video frame 0.
            num_frames: video frames wanted.

        Raises:
            ValueError: less than 0.05 s of sound.
        """
        config = self.config
        frames = config.num_frames(wave.shape[-1])
        wanted = num_frames_30hz(frames)
        states = self.hidden_states(normalise(rearrange(wave, "b u N -> (b u) N")))
        index = bucket_indices(wanted, config.fps, num_frames)[:num_frames]
        rows = rearrange(states.astype(jnp.float32), "k b n a -> (k b) n a")
        rows = pick_frames(to_30hz(rows), index)
        return rearrange(rows, "(k b u) T a -> b u T k a", b=wave.shape[0], u=wave.shape[1])

    # ---- a live stream --------------------------------------------------------------------

    def start(self, head: Float[Array, "b u N"]) -> Wav2Vec2State:
        """Streaming state after the samples `head`, with nothing before.

        Args:
            head: the samples before `config.sample_range(i, 1)[0]`, for features from video frame
                `i` on.
        """
        config = self.config
        size, length = config.history_samples, head.shape[-1]
        frame, rest = divmod(length - config.lookahead_samples, config.samples_per_frame)
        if frame < 0 or rest:
            raise ValueError(
                f"{length} samples before the stream: expected the look-ahead of "
                f"{config.lookahead_samples} and whole video frames of {config.samples_per_frame}; "
                "cut the stream by `config.sample_range`."
            )
        samples = jnp.pad(head.astype(jnp.float32), ((0, 0), (0, 0), (size, 0)))[..., length:]
        nothing = jnp.zeros((3, *head.shape[:2]), jnp.float32)
        return Wav2Vec2State(
            samples,
            jnp.int32(min(length, size)),
            jnp.int32(frame % config.fps),
            self._listen(nothing, head),
        )

    def features(
        self, state: Wav2Vec2State, samples: Float[Array, "b u N"]
    ) -> tuple[AudioFeatures, Wav2Vec2State]:
        """Features of the next video frames of a stream.

        Args:
            state: from `start` or the previous call.
            samples: those of `config.sample_range`, a multiple of `config.samples_per_frame`.

        Returns:
            One feature frame per `samples_per_frame` samples, and the state after them.
        """
        config = self.config
        count, rest = divmod(samples.shape[-1], config.samples_per_frame)
        if rest or not count:
            raise ValueError(
                f"{samples.shape[-1]} samples: expected whole video frames, a multiple of "
                f"{config.samples_per_frame}; cut the stream by `config.sample_range`."
            )
        moments = self._listen(state.moments, samples)
        window = jnp.concatenate([state.samples, samples.astype(jnp.float32)], axis=-1)
        padding = config.history_samples - state.heard
        if config.live == "isolated":
            features = self.encode(samples, count)
        else:
            features = self._rolling(window, padding, state.phase, moments, count)
        size = config.history_samples
        return features, Wav2Vec2State(
            window[..., window.shape[-1] - size :],
            jnp.minimum(state.heard + samples.shape[-1], size),
            (state.phase + count) % config.fps,
            moments,
        )

    def _rolling(self, window, padding, phase, moments, count: int) -> Array:
        """Features of `count` video frames inside a window."""
        config = self.config
        weight, total, squares = moments
        mean = (total / weight)[..., None]
        variance = jnp.maximum((squares / weight)[..., None] - mean**2, config.variance_floor)
        normed = rearrange((window - mean) / jnp.sqrt(variance), "b u N -> (b u) N")
        states = self.hidden_states(normed, padding).astype(jnp.float32)
        # Times since the last whole second, so that integers stay small however long a stream is.
        # Unit: a 30th of a sample.
        start = phase * config.samples_per_frame - config.look_back_samples
        time = positions_at(phase, count, config.fps) * config.sample_rate - 30 * start
        hop, last = 30 * config.hop, states.shape[2] - 1
        time = jnp.clip(time, 30 * padding, hop * last)
        before = time // hop
        after = jnp.minimum(before + 1, last)
        share = ((time % hop) / hop).astype(jnp.float32)[None, None, :, None]
        features = (1 - share) * states[:, :, before] + share * states[:, :, after]
        return rearrange(features, "k (b u) T a -> b u T k a", b=window.shape[0])

    def _listen(self, moments: Array, samples: Array) -> Array:
        """Lets the running level forget and take in new samples."""
        count = samples.shape[-1]
        if not count:
            return moments
        samples = samples.astype(jnp.float32)
        mean, square = samples.mean(-1), jnp.mean(samples * samples, -1)
        seconds = count / self.config.sample_rate
        kept = np.float32(math.exp(-seconds / self.config.level_s))
        return kept * moments + (1 - kept) * jnp.stack([jnp.ones_like(mean), mean, square])


class PositionConv(nnx.Module):
    """Grouped convolution over frames, weight-normalised per tap; its output marks positions."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.config = config
        taps, inputs = config.position_kernel, config.width // config.position_groups
        scale = 2 / math.sqrt(taps * config.width)
        direction = scale * jax.random.normal(rngs.params(), (taps, inputs, config.width))
        self.direction = nnx.Param(direction.astype(config.param_dtype))
        gain = jnp.sqrt(jnp.sum(direction**2, (1, 2)))
        self.gain = nnx.Param(gain.astype(config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.width, config.param_dtype))

    def kernel(self) -> Float[Array, "taps inputs outputs"]:
        """The weights that are applied: `gain` along `direction`.

        Both stay parameters, since the product could not be taken apart bit by bit; multiplying
        costs a hundredth of the convolution.
        """
        direction = self.direction[...].astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(direction**2, (1, 2), keepdims=True))
        return self.gain[...].astype(jnp.float32)[:, None, None] * direction / norm

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        taps = self.config.position_kernel
        # An even kernel sees one frame more of the past than of the future.
        y = _conv(x, self.kernel(), (1,), [(taps // 2, taps - 1 - taps // 2)],
                  self.config.position_groups)  # fmt: skip
        return jax.nn.gelu(y + self.bias[...].astype(x.dtype)[None, None], approximate=False)


class _Conv(nnx.Module):
    """Convolution of the extractor, layer norm over channels, GELU."""

    def __init__(self, config, inputs: int, outputs: int, taps: int, stride: int, *, rngs):
        self.stride = stride
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (taps, inputs, outputs), config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, config.param_dtype))
        self.norm = LayerNorm(outputs, config.eps, config.param_dtype)

    def __call__(self, x: Float[Array, "b N c"]) -> Float[Array, "b n o"]:
        y = _conv(x, self.kernel[...], (self.stride,), "VALID")
        y = self.norm(y + self.bias[...].astype(x.dtype)[None, None])
        return jax.nn.gelu(y, approximate=False)


class _Layer(nnx.Module):
    """Self-attention and feed-forward, each behind a layer norm."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        d = config.width
        self.heads = (config.num_heads, config.head_dim)
        self.norm_attention = LayerNorm(d, config.eps, config.param_dtype)
        self.query = linear(config, d, d, rngs=rngs)
        self.key = linear(config, d, d, rngs=rngs)
        self.value = linear(config, d, d, rngs=rngs)
        self.out = linear(config, d, d, rngs=rngs)
        self.norm_ffn = LayerNorm(d, config.eps, config.param_dtype)
        self.ffn_in = linear(config, d, config.ffn_width, rngs=rngs)
        self.ffn_out = linear(config, config.ffn_width, d, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], mask: Array | None) -> Float[Array, "b n d"]:
        normed = self.norm_attention(x)
        query, key, value = (
            y(normed).reshape(*x.shape[:2], *self.heads) for y in (self.query, self.key, self.value)
        )
        seen = attend(query, key, value, mask=mask)
        x = x + self.out(seen.reshape(x.shape))
        hidden = jax.nn.gelu(self.ffn_in(self.norm_ffn(x)), approximate=False)
        return x + self.ffn_out(hidden)


def _conv(x: Array, kernel: Array, stride, padding, groups: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        stride,
        padding,
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=groups,
    )
