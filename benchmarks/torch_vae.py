"""The Wan VAE's decoding of a block of a stream in plain PyTorch, as a yardstick for ours.

Weights carry the official names and layouts; convolutions are `conv3d` over the remembered and the
new frames, and pictures are enlarged before they are convolved.
"""

import torch
import torch.nn.functional as F

from benchmarks.torch_dit import Weights
from jax_avatar.models.config import WanVAEConfig

__all__ = ["TorchDecoder"]


class TorchDecoder:
    """Latents in, 8-bit frames out, `[1 c t h w]`; remembers the frames before."""

    def __init__(self, config: WanVAEConfig, weights: Weights, layout=torch.contiguous_format):
        """Begins a stream.

        Args:
            config: size of the VAE.
            weights: official name -> tensor.
            layout: memory format of weights of convolutions, and so of what they make.
        """

        def lay(w):
            return w.contiguous(memory_format=layout) if w.ndim == 5 else w

        self.config, self.w = config, {name: lay(w) for name, w in weights.items()}
        self.buffers: dict[str, torch.Tensor] = {}

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        """Same as `decode`, as integers 0 to 255."""
        with torch.inference_mode():
            return ((self.decode(latent).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @torch.inference_mode()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Frames of the next latents; a stream begins with one, of which one frame is made.

        Args:
            latent: `[1 c t h w]`, normalised.
        """
        config, shape = self.config, (1, -1, 1, 1, 1)
        mean, std = (
            torch.tensor(values, device=latent.device).reshape(shape)
            for values in (config.latent_mean, config.latent_std)
        )
        x = F.conv3d(
            (latent.float() * std + mean).to(latent.dtype),
            self.w["conv2.weight"],
            self.w["conv2.bias"],
        )
        x = self._conv("decoder.conv1", x)
        x = self._residual("decoder.middle.0", x)
        x = self._attention("decoder.middle.1", x)
        x = self._residual("decoder.middle.2", x)
        index, levels = 0, len(config.dim_mult)
        for level in range(levels):
            for _ in range(config.num_res_blocks + 1):
                x = self._residual(f"decoder.upsamples.{index}", x)
                index += 1
            if level < levels - 1:
                in_time = config.temporal_downsample[::-1][level]
                x = self._enlarge(f"decoder.upsamples.{index}", x, in_time)
                index += 1
        return self._conv("decoder.head.2", F.silu(self._norm("decoder.head.0", x))).float()

    def _norm(self, name, x):
        gamma = self.w[f"{name}.gamma"]
        scale = gamma.float().reshape(-1, *[1] * (x.ndim - 2)) * x.shape[1] ** 0.5
        return (F.normalize(x.float(), dim=1) * scale).to(x.dtype)

    def _conv(self, name, x):
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        past, side = weight.shape[2] - 1, weight.shape[3] // 2
        buffer = self.buffers.get(name)
        if buffer is None:
            buffer = x.new_zeros(*x.shape[:2], past, *x.shape[3:])
        seen = torch.cat([buffer, x], dim=2)
        self.buffers[name] = seen[:, :, -past:].clone()
        return F.conv3d(seen, weight, bias, padding=(0, side, side))

    def _residual(self, name, x):
        y = self._conv(f"{name}.residual.2", F.silu(self._norm(f"{name}.residual.0", x)))
        y = self._conv(f"{name}.residual.6", F.silu(self._norm(f"{name}.residual.3", y)))
        if f"{name}.shortcut.weight" in self.w:
            x = F.conv3d(x, self.w[f"{name}.shortcut.weight"], self.w[f"{name}.shortcut.bias"])
        return x + y

    def _attention(self, name, x):
        b, _, t, h, w = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)
        y = self._norm(f"{name}.norm", frames)
        qkv = F.conv2d(y, self.w[f"{name}.to_qkv.weight"], self.w[f"{name}.to_qkv.bias"])
        query, key, value = qkv.flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        seen = seen.transpose(1, 2).unflatten(-1, (h, w))
        seen = F.conv2d(seen, self.w[f"{name}.proj.weight"], self.w[f"{name}.proj.bias"])
        return x + seen.unflatten(0, (b, t)).transpose(1, 2)

    def _enlarge(self, name, x, in_time):
        if in_time:
            x = self._double_frames(f"{name}.time_conv", x)
        b, _, t, _, _ = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, scale_factor=2, mode="nearest-exact")
        weight, bias = self.w[f"{name}.resample.1.weight"], self.w[f"{name}.resample.1.bias"]
        y = F.conv2d(frames, weight, bias, padding=1)
        return y.unflatten(0, (b, t)).transpose(1, 2)

    def _double_frames(self, name, x):
        if name not in self.buffers:  # the first frame stays single, and is not remembered
            self.buffers[name] = x.new_zeros(*x.shape[:2], 2, *x.shape[3:])
            return x
        b, c, t, h, w = x.shape
        y = self._conv(name, x).reshape(b, 2, c, t, h, w)
        return y.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)
