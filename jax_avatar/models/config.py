"""Sizes and switches of the networks, checked when built; the published sizes by name."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

__all__ = [
    "ATTENTION_KERNELS",
    "DiTConfig",
    "UMT5Config",
    "WanVAEConfig",
    "strided_grid",
    "umt5_xxl",
    "wan_s2v_14b",
]

ATTENTION_KERNELS = ("auto", "xla", "chunked", "cudnn", "splash")
"""How attention may be computed: by the backend's best, or always by the named one. "chunked" is
"xla" for a few queries at a time, which holds their scores only; slower, anywhere."""


@dataclass(frozen=True)
class DiTConfig:
    """Size of the causal speech-to-video transformer.

    Attributes:
        width: model width `d`.
        ffn_width: hidden width of the feed-forward layers.
        num_heads: attention heads; `width` must divide by it into an even head size.
        num_layers: transformer layers.
        freq_width: width of the timestep sinusoid.
        text_width: channels of the prompt encoder's states.
        text_len: prompt rows the network sees; shorter prompts are padded with zeros.
        latent_channels: channels of the VAE latent, in and out.
        pose_channels: channels of the pose latent.
        audio_width: channels of one speech-encoder state.
        audio_layers: hidden states of the speech encoder, mixed by learned weights.
        num_audio_tokens: local audio tokens per latent frame, without the learned pad token.
        audio_inject_layers: ascending layers after which audio is injected.
        audio_history: video frames of (repeated) history the audio encoder is given.
        frames_per_block: latent frames denoised together.
        ring_blocks: blocks in the rolling window, the current one included.
        reference_frame: rotary frame of the reference where it does not roll.
        rope_theta: base of the rotary frequencies.
        half_rotary: round the causal model's rotary factors to float16, as the official
            buffers do; needed for parity only.
        framepack: the network has the motion-frame packer (three patch projections).
        zero_init: start the audio and pose paths at zero, as for fine-tuning a video model.
        eps: added inside every norm but the audio AdaLN's, which uses 1e-5.
        dtype: compute type of the large matrix products; statistics stay float32.
        param_dtype: storage type of the parameters.
        weights: "" keeps the large products in `dtype`; "int8" or "fp8" computes them in eight
            bits, for inference (`models.quantise`).
        adapter_rank: of the adapters beside the large products, for distillation; 0 for none.
        adapter_scaling: factor of their terms, alpha over rank.
        attention: kernel of the attention, one of `ATTENTION_KERNELS`.
        unroll: layers unrolled per iteration of the scan over layers.
        rematerialise: recompute layers in the backward pass instead of storing them.
    """

    width: int
    ffn_width: int
    num_heads: int
    num_layers: int
    freq_width: int = 256
    text_width: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    pose_channels: int = 16
    audio_width: int = 1024
    audio_layers: int = 25
    num_audio_tokens: int = 4
    audio_inject_layers: Sequence[int] = (0,)
    audio_history: int = 73
    frames_per_block: int = 3
    ring_blocks: int = 4
    reference_frame: int = 30
    rope_theta: float = 10000.0
    half_rotary: bool = False
    framepack: bool = True
    zero_init: bool = True
    eps: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    weights: str = ""
    adapter_rank: int = 0
    adapter_scaling: float = 1.0
    attention: str = "auto"
    unroll: int = 1
    rematerialise: bool = False

    def __post_init__(self):
        # Plain configs carry lists and names; the network wants hashable values.
        object.__setattr__(self, "audio_inject_layers", tuple(self.audio_inject_layers))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.width % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"DiT width {self.width} with {self.num_heads} heads gives head size "
                f"{self.width / self.num_heads:g}; it must be an even number of at least 6. "
                "Change width or num_heads."
            )
        if self.width % 4:
            raise ValueError(
                f"DiT width {self.width} must be a multiple of 4, since the audio encoder works "
                "at a quarter of it. Change width."
            )
        if self.weights not in ("", "int8", "fp8"):
            raise ValueError(f"weights {self.weights!r} must be '' (as stored), 'int8' or 'fp8'.")
        if self.adapter_rank < 0:
            raise ValueError(f"adapter_rank {self.adapter_rank} must be 0 (none) or more.")
        if self.freq_width % 2:
            raise ValueError(f"freq_width {self.freq_width} must be even: half cosines, half sines")
        layers = self.audio_inject_layers
        if (
            not layers
            or list(layers) != sorted(set(layers))
            or not (0 <= layers[0] and layers[-1] < self.num_layers)
        ):
            raise ValueError(
                f"audio_inject_layers {layers} must be ascending layer numbers within "
                f"0..{self.num_layers - 1}, at least one."
            )
        if self.attention not in ATTENTION_KERNELS:
            raise ValueError(
                f"attention {self.attention!r} is unknown; choose one of "
                f"{', '.join(ATTENTION_KERNELS)}."
            )
        if self.audio_history < 1:
            raise ValueError(f"audio_history {self.audio_history} must be at least 1 frame")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def ring_frames(self) -> int:
        """Latent frames in the rolling window."""
        return self.ring_blocks * self.frames_per_block

    def cond_tokens(self, height: int, width: int) -> int:
        """Sink tokens of a latent grid: the reference, then the packed motion frames."""
        tokens = (height // 2) * (width // 2)
        if self.framepack:
            tokens += (height // 2) * (width // 2) + (height // 4) * (width // 4)
            tokens += 4 * (height // 8) * (width // 8)
        return tokens

    def replace(self, **changes: Any) -> "DiTConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def wan_s2v_14b(**changes: Any) -> DiTConfig:
    """The published size: Wan2.2-S2V-14B, 16.3 billion parameters with the audio path.

    Source: Wan2.2-S2V-14B `config.json` and the Wan2.2 repository.
    """
    values = dict(
        width=5120,
        ffn_width=13824,
        num_heads=40,
        num_layers=40,
        audio_inject_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    return DiTConfig(**(values | changes))


def strided_grid(height: int, width: int, stride: int) -> tuple[int, int]:
    """Latent rows and columns of pictures of a VAE whose latent cells are squares of pixels.

    Args:
        height: pixel rows.
        width: pixel columns.
        stride: pixels per latent cell.

    Raises:
        ValueError: the grid would not be even both ways, as the patches of a transformer need it.
    """
    multiple = 2 * stride
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise ValueError(f"{height}*{width} pixels: sides must be multiples of {multiple}.")
    return height // stride, width // stride


@dataclass(frozen=True)
class WanVAEConfig:
    """Size of the causal video VAE of Wan 2.1; the defaults are the published size.

    Attributes:
        dim: channels at full resolution.
        z_dim: channels of the latent.
        dim_mult: channels of each level as a multiple of `dim`; every level after the first
            halves rows and columns.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        temporal_downsample: for each step between levels, whether it also halves the frame rate.
        latent_mean: mean of each latent channel, subtracted by encode.
        latent_std: deviation of each latent channel, divided by in encode.
        dtype: compute type of convolutions and attention; norms and latent statistics are float32.
        param_dtype: storage type of the parameters.

    Source: github.com/Wan-Video/Wan2.1, `wan/modules/vae.py`.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    # fmt: off
    latent_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latent_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("dim_mult", "temporal_downsample", "latent_mean", "latent_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} values for "
                f"{len(self.dim_mult)} levels; give one per step between levels, "
                f"{len(self.dim_mult) - 1}."
            )
        if len(self.latent_mean) != self.z_dim or len(self.latent_std) != self.z_dim:
            raise ValueError(
                f"latent_mean and latent_std have {len(self.latent_mean)} and "
                f"{len(self.latent_std)} values for z_dim {self.z_dim}; give one per channel."
            )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std {self.latent_std} must be positive")
        if any(self.dim * mult % 2 for mult in self.dim_mult):
            raise ValueError(
                f"dim {self.dim} times dim_mult {self.dim_mult} must be even, since the decoder "
                "halves the channels where it doubles the size. Change dim."
            )

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent row and column."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame, the first one apart."""
        return 2 ** sum(self.temporal_downsample)

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of pictures, see `strided_grid`."""
        return strided_grid(height, width, self.spatial_stride)

    def replace(self, **changes: Any) -> "WanVAEConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class UMT5Config:
    """Size of the prompt encoder, the encoder half of UMT5.

    Attributes:
        vocab_size: rows of the token embedding; at least the tokenizer's largest id + 1.
        width: channels of the states.
        ffn_width: hidden width of the feed-forward layers.
        num_heads: attention heads.
        head_dim: channels of one head; heads times this need not be `width`.
        num_layers: layers.
        num_buckets: relative positions told apart, half of them on either side; a multiple of 4.
        max_distance: tokens from which on all distances are alike.
        eps: added inside every norm.
        dtype: compute type; norm statistics and softmax stay float32.
        param_dtype: storage type of the parameters.
        unroll: layers unrolled per iteration of the scan over layers.

    Source: "UniMax", arXiv 2304.09151; T5, arXiv 1910.10683.
    """

    vocab_size: int
    width: int
    ffn_width: int
    num_heads: int
    head_dim: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    unroll: int = 1

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.num_buckets % 4 or self.num_buckets <= 0:
            raise ValueError(
                f"num_buckets {self.num_buckets} must be a multiple of 4: half of them are for "
                "later tokens, and half of each side for single distances."
            )
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance {self.max_distance} must be above {self.num_buckets // 4}, the "
                f"distances that {self.num_buckets} buckets tell apart one by one."
            )

    def replace(self, **changes: Any) -> "UMT5Config":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def umt5_xxl(**changes: Any) -> UMT5Config:
    """The published size: the encoder of UMT5-XXL, 5.7 billion parameters.

    Source: google/umt5-xxl, as distributed with Wan 2.1 and 2.2.
    """
    values = dict(
        vocab_size=256384,
        width=4096,
        ffn_width=10240,
        num_heads=64,
        head_dim=64,
        num_layers=24,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    return UMT5Config(**(values | changes))
