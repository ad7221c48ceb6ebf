"""The streaming step of the transformer in plain PyTorch, as a yardstick for ours.

Weights carry the official names and layouts. Attention is `scaled_dot_product_attention`, norms are
PyTorch's own; the window is written in place, and the prompt's keys and values are cached, as in
ours. One sample and one speaker.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jax_avatar.models.cache import BlockPosition
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.rope import concat, frame_rotation, grid_rotation, motion_positions

__all__ = ["TorchStep", "rotations"]

Weights = Mapping[str, torch.Tensor]
_FLOAT32 = ("time_", "head.", "casual_audio_encoder.")  # computed in float32, as in ours
_AUDIO = "casual_audio_encoder.encoder"


def rotations(config: DiTConfig, grid: tuple[int, int], position: BlockPosition) -> tuple:
    """Unit complex numbers `[tokens, pairs]` that turn the block's tokens and the sink's."""
    h, w = grid
    options = {"theta": config.rope_theta, "half": config.half_rotary}

    def turn(frames, rows, columns):
        return grid_rotation(frames, rows, columns, config.head_dim, **options)

    own = turn(position.frame, range(h // 2), range(w // 2))
    sink = [turn(position.reference, range(h // 2), range(w // 2))]
    for frames, rows, columns in motion_positions(h, w) if config.framepack else ():
        if rows.size and columns.size:
            sink.append(turn(frame_rotation(frames, config.head_dim, **options), rows, columns))
    return tuple(np.asarray(r.cos) + 1j * np.asarray(r.sin) for r in (own, concat(sink)))


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[None, :, None]).flatten(-2).to(x.dtype)


def _attend(query, key, value):
    """`[b n m e]`, as everywhere here."""
    heads = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2)


class TorchStep:
    """One step of a stream; every call goes on from the latent before.

    Attributes:
        latent: of the block, `[1 c t h w]`.
        key, value: the window, a `[1 s m e]` for every layer.
    """

    def __init__(self, config: DiTConfig, weights: Weights, inputs: Mapping[str, Any]):
        """Takes over everything it is given; nothing is copied.

        Args:
            config: size of the transformer.
            weights: official name -> tensor.
            inputs: tensors `latent`, `pose` `[1 c t h w]`, `audio` `[T k a]`, `own` and `cond`
                (from `rotations`), `sink_key`, `sink_value`, `text_key`, `text_value`
                `[l 1 s m e]`, `key`, `value` (of all layers, likewise); numbers `slot`, `sigma`
                and `next_sigma`.
        """
        self.config = config
        self.w = {n: w.float() if n.startswith(_FLOAT32) else w for n, w in weights.items()}
        self.__dict__.update(inputs)
        self.dtype = self.latent.dtype

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        """The latent after the step."""
        config, w = self.config, self.w
        tokens = self._patches("patch_embedding", self.latent)
        x = tokens + self._patches("cond_encoder", self.pose) + w["trainable_cond_mask.weight"][0]
        embedding, rows = self._time(x.device)
        spoken, overall = self._audio()
        for layer in range(config.num_layers):
            x = self._block(f"blocks.{layer}", layer, x, rows)
            if layer in config.audio_inject_layers:
                j = config.audio_inject_layers.index(layer)
                x = x + self._inject(j, x, spoken, overall)
        velocity = self._head(x, embedding).to(self.dtype)
        moved = self.latent.float() + (self.next_sigma - self.sigma) * velocity.float()
        self.latent = moved.to(self.dtype)
        return self.latent

    def _linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _patches(self, name, x):
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return F.conv3d(x, weight, bias, stride=(1, 2, 2)).flatten(2).transpose(1, 2)

    def _time(self, device):
        t, half = self.latent.shape[2], self.config.freq_width // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        angle = 1000 * self.sigma * frequency
        sinusoid = torch.cat([angle.cos(), angle.sin()]).float().expand(1, t, -1)
        hidden = F.silu(self._linear("time_embedding.0", sinusoid))
        embedding = self._linear("time_embedding.2", hidden)
        rows = self._linear("time_projection.1", F.silu(embedding))
        return embedding, rows.unflatten(-1, (6, -1))

    def _spread(self, rows, n):
        return rows.repeat_interleave(n // rows.shape[1], dim=1)

    def _norm(self, x, eps=None):
        return F.layer_norm(x, x.shape[-1:], eps=self.config.eps if eps is None else eps)

    def _projected(self, name, x, which):
        y = self._linear(f"{name}.{which}", x)
        if which != "v":
            y = F.rms_norm(y, y.shape[-1:], self.w[f"{name}.norm_{which}.weight"], self.config.eps)
        return y.unflatten(-1, (self.config.num_heads, -1))

    def _block(self, name, layer, x, rows):
        w, n = self.w, x.shape[1]
        rows = w[f"{name}.modulation"].float() + rows.squeeze(0)  # t 6 d
        shift, scale, gate, shift2, scale2, gate2 = (
            self._spread(row[None], n) for row in rows.unbind(1)
        )
        attended = (self._norm(x).float() * (1 + scale) + shift).to(self.dtype)
        seen = self._self_attention(f"{name}.self_attn", layer, attended)
        x = x.float() + gate * seen.float()
        norm = w[f"{name}.norm3.weight"], w[f"{name}.norm3.bias"]
        prompted = F.layer_norm(x.to(self.dtype), x.shape[-1:], *norm, self.config.eps)
        cross = f"{name}.cross_attn"
        query = self._projected(cross, prompted, "q")
        prompted = _attend(query, self.text_key[layer], self.text_value[layer])
        x = x + self._linear(f"{cross}.o", prompted.flatten(-2)).float()
        hidden = (self._norm(x).float() * (1 + scale2) + shift2).to(self.dtype)
        hidden = F.gelu(self._linear(f"{name}.ffn.0", hidden), approximate="tanh")
        return (x + gate2 * self._linear(f"{name}.ffn.2", hidden).float()).to(self.dtype)

    def _self_attention(self, name, layer, x):
        query, key, value = (self._projected(name, x, which) for which in "qkv")
        keys, values = self.key[layer], self.value[layer]
        cond, n = self.cond.shape[0], x.shape[1]
        start = cond + self.slot * n
        keys[:, :cond] = _rotate(self.sink_key[layer], self.cond)
        values[:, :cond] = self.sink_value[layer]
        keys[:, start : start + n] = _rotate(key, self.own)
        values[:, start : start + n] = value
        seen = _attend(_rotate(query, self.own), keys, values)
        return self._linear(f"{name}.o", seen.flatten(-2))

    def _audio(self):
        """Spoken tokens `[t k d]` and one `[1 t d]` for each latent frame."""
        config, w = self.config, self.w
        mix = F.silu(w["casual_audio_encoder.weights"].flatten())
        x = torch.einsum("tka,k->ta", self.audio.float(), mix / mix.sum())
        history = 1 + (config.audio_history - 1) % 4
        x = torch.cat([x[:1].expand(history, -1), x])
        dropped = -(-history // 4)
        count = config.num_audio_tokens
        local = self._conv("conv1_local", x[None], 1)
        local = self._tower(local.unflatten(-1, (count, -1)).squeeze(0).transpose(0, 1))
        pad = w[f"{_AUDIO}.padding_tokens"].reshape(1, 1, -1).expand(1, local.shape[1], -1)
        local = torch.cat([local, pad])[:, dropped:].transpose(0, 1)
        overall = self._tower(self._conv("conv1_global", x[None], 1))
        return local, self._linear(f"{_AUDIO}.final_linear", overall)[:, dropped:]

    def _conv(self, name, x, stride):
        weight, bias = self.w[f"{_AUDIO}.{name}.conv.weight"], self.w[f"{_AUDIO}.{name}.conv.bias"]
        padded = F.pad(x.transpose(1, 2), (2, 0), mode="replicate")
        return F.conv1d(padded, weight, bias, stride=stride).transpose(1, 2)

    def _tower(self, x):
        x = F.silu(self._norm(x))
        x = F.silu(self._norm(self._conv("conv2", x, 2)))
        return F.silu(self._norm(self._conv("conv3", x, 2)))

    def _inject(self, j, x, spoken, overall):
        name, t = f"audio_injector.injector.{j}", spoken.shape[0]
        adaln = f"audio_injector.injector_adain_layers.{j}.linear"
        shift, scale = self._linear(adaln, F.silu(overall).to(self.dtype)).float().chunk(2, -1)
        frames = x.unflatten(1, (t, -1)).squeeze(0)  # t n d
        shift, scale = shift.squeeze(0)[:, None], scale.squeeze(0)[:, None]
        frames = (self._norm(frames, 1e-5).float() * (1 + scale) + shift).to(self.dtype)
        spoken = spoken.to(self.dtype)
        key, value = (self._projected(name, spoken, which) for which in "kv")
        added = _attend(self._projected(name, frames, "q"), key, value)
        return self._linear(f"{name}.o", added.flatten(-2)).reshape(x.shape)

    def _head(self, x, embedding):
        modulation = self.w["head.modulation"].squeeze(0)
        shift, scale = (self._spread(embedding + row, x.shape[1]) for row in modulation)
        out = self._linear("head.head", self._norm(x).float() * (1 + scale) + shift)
        _, c, t, h, w = self.latent.shape
        out = out.reshape(1, t, h // 2, w // 2, 2, 2, c)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(1, c, t, h, w)
