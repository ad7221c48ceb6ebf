"""Small streaming speech encoder: waveform -> hidden states per video frame.

    samples --log_mel--> columns, 4 per video frame --causal convolutions--> k hidden states
                                                                             |
    AudioFeatures [b u T k a] <-- at the last column of each video frame ----+--> face units

The state of a stream is nothing but its last samples: a stream starts in silence, and whole clip
and chunk by chunk are the same computation.
"""

import functools
import importlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jax_avatar.shapes import Array, AudioFeatures, Float

__all__ = ["SpeechConfig", "SpeechEncoder", "SpeechState", "log_mel"]

_COLUMNS_PER_FRAME = 4
_WINDOW_S = 0.025
_LOG_FLOOR = 1e-4


@dataclass(frozen=True)
class SpeechConfig:
    """Rates and sizes of the speech encoder.

    Attributes:
        sample_rate: of the wave, mono.
        fps: video frames per second; a video frame must be a multiple of four samples.
        lookahead_ms: how far past the time of a video frame its features may listen.
        bands: mel bands.
        min_hz: lowest frequency of the mel bands.
        max_hz: highest frequency of the mel bands.
        width: channels of a hidden state.
        dilations: of the convolutions over mel columns, one per layer.
        kernel: taps of a convolution.
        units: names of the face units that the head regresses; left stands for both sides.
        mel_mean: per band, subtracted from the log-mel columns; () for zeros.
        mel_std: per band, divides them; () for ones.
    """

    sample_rate: int = 16_000
    fps: int = 16
    lookahead_ms: int = 80
    bands: int = 64
    min_hz: float = 50.0
    max_hz: float = 7600.0
    width: int = 96
    dilations: Sequence[int] = (1, 2, 4, 4)
    kernel: int = 5
    units: Sequence[str] = (
        "jawOpen",
        "mouthFunnel",
        "mouthPucker",
        "mouthPressLeft",
        "mouthRollLower",
        "mouthRollUpper",
        "mouthLowerDownLeft",
        "mouthUpperUpLeft",
        "mouthStretchLeft",
        "mouthSmileLeft",
        "tongueOut",
    )
    mel_mean: Sequence[float] = ()
    mel_std: Sequence[float] = ()

    def __post_init__(self):
        for name in ("dilations", "units", "mel_mean", "mel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.sample_rate % (self.fps * _COLUMNS_PER_FRAME):
            raise ValueError(
                f"sample_rate {self.sample_rate} at fps {self.fps}: a video frame must be a "
                f"multiple of {_COLUMNS_PER_FRAME} samples; at 16000 Hz take fps 10, 16, 20 or 25."
            )
        for name in ("mel_mean", "mel_std"):
            if len(getattr(self, name)) not in (0, self.bands):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values: expected one per band "
                    f"({self.bands}) or none."
                )

    def at_fps(self, fps: int) -> "SpeechConfig":
        """The config for a rate of video frames, which must be the one it was trained for.

        Raises:
            ValueError: it is another one, at which columns and so everything would be others.
        """
        if fps != self.fps:
            raise ValueError(
                f"the mel speech encoder was trained for {self.fps} frames per second, {fps} are "
                f"asked for; train one with configs/speech.py and --config.model.fps={fps}, or "
                f"stay at {self.fps}."
            )
        return self

    @property
    def num_states(self) -> int:
        """Hidden states per video frame, `k`."""
        return len(self.dilations) + 1

    @property
    def samples_per_frame(self) -> int:
        """Samples per video frame."""
        return self.sample_rate // self.fps

    @property
    def lookahead_samples(self) -> int:
        """Samples past the time of a video frame that its features may use."""
        return self.sample_rate * self.lookahead_ms // 1000

    @property
    def hop(self) -> int:
        """Samples between mel columns."""
        return self.samples_per_frame // _COLUMNS_PER_FRAME

    @property
    def window(self) -> int:
        """Samples under one mel column."""
        return round(self.sample_rate * _WINDOW_S)

    @property
    def receptive_samples(self) -> int:
        """Samples that the features of one video frame depend on."""
        return self.window + self.hop * (self.kernel - 1) * sum(self.dilations)

    @property
    def history_samples(self) -> int:
        """Samples kept between the chunks of a stream."""
        return max(0, self.receptive_samples - self.samples_per_frame)

    def sample_range(self, first_frame: int, num_frames: int) -> tuple[int, int]:
        """The chunk that brings video frames `first_frame` onwards: first sample, last + 1.

        Consecutive chunks touch. The start is negative where a stream begins with less
        look-ahead than a video frame; silence goes there.
        """
        start = (first_frame - 1) * self.samples_per_frame + self.lookahead_samples
        return start, start + num_frames * self.samples_per_frame


def log_mel(samples: Float[Array, "*batch N"], config: SpeechConfig) -> Float[Array, "*batch C m"]:
    """Log-magnitude mel columns, each from the `config.window` samples before its end.

    Args:
        samples: mono in [-1, 1]; the last column ends with the last sample, and there are as many
            columns, `config.hop` apart, as fit.
        config: rates and bands.

    Returns:
        `1 + (N - window) // hop` columns of `config.bands` values, not normalised.

    Source: Slaney's mel filters as in `librosa.filters.mel`.
    """
    window, hop = config.window, config.hop
    columns = 1 + (samples.shape[-1] - window) // hop
    first = samples.shape[-1] - window - (columns - 1) * hop
    index = first + hop * np.arange(columns)[:, None] + np.arange(window)[None]
    hann, filters = _mel_arrays(config.sample_rate, window, config.bands, config.min_hz,
                                config.max_hz)  # fmt: skip
    frames = samples[..., index] * hann.reshape((1,) * samples.ndim + (-1,))
    magnitude = jnp.abs(jnp.fft.rfft(frames, _fft_size(window)))
    return jnp.log(magnitude @ filters + _LOG_FLOOR)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeechState:
    """Streaming state: the last samples."""

    samples: Array  # b u history_samples


class SpeechEncoder(nnx.Module):
    """Causal convolutions over mel columns; features are the state after each layer.

    The features of video frame `i` depend only on samples before
    `i * samples_per_frame + lookahead_samples`, for clips and for streams.
    """

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.inputs = nnx.Linear(config.bands, width, rngs=rngs)
        self.layers = nnx.List(
            [_Layer(width, config.kernel, d, rngs=rngs) for d in config.dilations]
        )
        self.head_norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, len(config.units), rngs=rngs)

    def encode(self, wave: Float[Array, "b u N"], num_frames: int) -> AudioFeatures:
        """Features of a clip that starts in silence; missing samples at its end are silence.

        Args:
            wave: mono in [-1, 1], per clip and speaker; sample 0 is heard at video frame 0.
            num_frames: video frames wanted.
        """
        return self._hidden(self._clip(wave, num_frames), _COLUMNS_PER_FRAME)

    def start(self, head: Float[Array, "b u N"]) -> SpeechState:
        """Streaming state after the samples `head`, with silence before.

        For features from video frame 0 on, `head` is the samples before
        `config.sample_range(0, 1)[0]`; it may be empty.
        """
        size = self.config.history_samples
        return SpeechState(jnp.pad(head, ((0, 0), (0, 0), (size, 0)))[..., head.shape[-1] :])

    def features(
        self, state: SpeechState, samples: Float[Array, "b u N"]
    ) -> tuple[AudioFeatures, SpeechState]:
        """Features of the next video frames of a stream.

        Args:
            state: from `start` or the previous call.
            samples: those of `config.sample_range`, a multiple of `config.samples_per_frame`.

        Returns:
            One feature frame per `samples_per_frame` samples, and the state after them.
        """
        per_frame, size = self.config.samples_per_frame, self.config.history_samples
        if samples.shape[-1] % per_frame:
            raise ValueError(
                f"{samples.shape[-1]} samples: expected whole video frames, a multiple of "
                f"{per_frame}; cut the stream by `config.sample_range`."
            )
        heard = jnp.concatenate([state.samples, samples], axis=-1)
        features = self._hidden(heard, _COLUMNS_PER_FRAME)
        return features, SpeechState(heard[..., heard.shape[-1] - size :])

    def units(self, features: AudioFeatures) -> Float[Array, "b u T n"]:
        """Face units `config.units` read from features; an auxiliary task and a check."""
        return self.head(self.head_norm(features[..., -1, :]))

    def dense_units(self, wave: Float[Array, "b u N"], num_frames: int) -> Float[Array, "b u C n"]:
        """Same as `units` at every mel column: column `4 * i` is at the time of video frame `i`."""
        return self.units(self._hidden(self._clip(wave, num_frames), 1))

    def _clip(self, wave: Array, num_frames: int) -> Array:
        """Cuts or pads a clip to what `_hidden` needs for video frames 0 to `num_frames` - 1."""
        config = self.config
        _, stop = config.sample_range(0, num_frames)
        before = config.receptive_samples - config.lookahead_samples
        wave = jnp.pad(wave, ((0, 0), (0, 0), (0, max(0, stop - wave.shape[-1]))))[..., :stop]
        if before < 0:
            return wave[..., -before:]
        return jnp.pad(wave, ((0, 0), (0, 0), (before, 0)))

    def _hidden(self, samples: Array, stride: int) -> Array:
        """Hidden states at every `stride`-th column up to the end of `samples`."""
        config = self.config
        columns = log_mel(samples.astype(jnp.float32), config)
        mean = np.asarray(config.mel_mean or np.zeros(config.bands), np.float32)
        std = np.asarray(config.mel_std or np.ones(config.bands), np.float32)
        columns = (columns - mean[None, None, None]) / std[None, None, None]
        x = self.inputs(rearrange(columns, "b u n m -> (b u) n m"))
        states = [x]
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        # No padding anywhere: each layer is shorter at the start, all end at the same column.
        count = (x.shape[1] - 1) // stride + 1
        first = (count - 1) * stride + 1
        states = jnp.stack([state[:, -first::stride] for state in states], axis=2)
        return rearrange(states, "(b u) T k a -> b u T k a", b=samples.shape[0])


class _Layer(nnx.Module):
    """Residual dilated convolution over columns, without padding."""

    def __init__(self, width: int, kernel: int, dilation: int, *, rngs: nnx.Rngs):
        self.kernel, self.dilation = kernel, dilation
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.taps = nnx.Linear(kernel * width, width, rngs=rngs)
        self.mix = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b n a"]) -> Float[Array, "b l a"]:
        length = x.shape[1] - (self.kernel - 1) * self.dilation
        y = self.norm(x)
        # One product over concatenated taps is several times faster on CPU than a convolution.
        shifted = [y[:, i * self.dilation :][:, :length] for i in range(self.kernel)]
        y = self.mix(jax.nn.gelu(self.taps(jnp.concatenate(shifted, axis=-1))))
        return x[:, -length:] + y


def _fft_size(window: int) -> int:
    return 1 << (window - 1).bit_length()


@functools.lru_cache
def _mel_arrays(
    sample_rate: int, window: int, bands: int, min_hz: float, max_hz: float
) -> tuple[np.ndarray, np.ndarray]:
    """Hann window and mel filters (frequencies, bands)."""
    filters = _librosa_filters().mel(
        sr=sample_rate, n_fft=_fft_size(window), n_mels=bands, fmin=min_hz, fmax=max_hz
    )
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return hann.astype(np.float32), np.ascontiguousarray(filters.T, np.float32)


@functools.cache
def _librosa_filters():
    """The module `librosa.filters`, also where neither the installation nor home can be written."""
    try:
        return importlib.import_module("librosa.filters")
    except RuntimeError:  # Numba found no folder to keep compiled code in
        import numba

        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_avatar-numba-")
        numba.config.reload_config()
        return importlib.import_module("librosa.filters")
