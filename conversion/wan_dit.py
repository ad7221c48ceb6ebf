"""Wan2.2-S2V transformer: official tensor names and config -> ours.

Source of the names: the Wan2.2-S2V-14B checkpoint (1260 tensors).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from conversion.rules import Rule, conv, patch, squeeze, transpose
from jax_avatar.models.config import DiTConfig

__all__ = ["TABLE", "config_from_official", "lora_shapes", "merge_lora"]


def _linear(source: str, target: str, layout=transpose) -> Iterator[Rule]:
    yield Rule(f"{source}.weight", f"{target}/kernel", layout)
    yield Rule(f"{source}.bias", f"{target}/bias")


def _attention(source: str, target: str) -> Iterator[Rule]:
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        yield from _linear(f"{source}.{theirs}", f"{target}/{ours}")
    yield Rule(f"{source}.norm_q.weight", f"{target}/norm_query/scale")
    yield Rule(f"{source}.norm_k.weight", f"{target}/norm_key/scale")


def _rules() -> Iterator[Rule]:
    yield from _linear("patch_embedding", "patch/linear", patch(1, 2, 2))
    yield from _linear("cond_encoder", "pose/linear", patch(1, 2, 2))
    yield from _linear("frame_packer.proj", "motion_near/linear", patch(1, 2, 2))
    yield from _linear("frame_packer.proj_2x", "motion_mid/linear", patch(2, 4, 4))
    yield from _linear("frame_packer.proj_4x", "motion_far/linear", patch(4, 8, 8))
    yield Rule("trainable_cond_mask.weight", "token_kind")
    yield from _linear("text_embedding.0", "text_in")
    yield from _linear("text_embedding.2", "text_out")
    yield from _linear("time_embedding.0", "time/hidden")
    yield from _linear("time_embedding.2", "time/out")
    yield from _linear("time_projection.1", "time/project")

    yield Rule("blocks.{i}.modulation", "blocks/modulation", squeeze(leading=1))
    yield from _attention("blocks.{i}.self_attn", "blocks/self_attention")
    yield from _attention("blocks.{i}.cross_attn", "blocks/cross_attention")
    yield Rule("blocks.{i}.norm3.weight", "blocks/norm_cross/scale")
    yield Rule("blocks.{i}.norm3.bias", "blocks/norm_cross/bias")
    yield from _linear("blocks.{i}.ffn.0", "blocks/ffn_in")
    yield from _linear("blocks.{i}.ffn.2", "blocks/ffn_out")

    yield Rule("head.modulation", "head_modulation", squeeze(leading=1))
    yield from _linear("head.head", "head")

    audio = "casual_audio_encoder"  # spelt so in the checkpoint
    yield Rule(f"{audio}.weights", "audio/mix", squeeze(leading=1, trailing=2))
    yield Rule(f"{audio}.encoder.padding_tokens", "audio/pad_token", squeeze(leading=3))
    yield from _linear(f"{audio}.encoder.conv1_local.conv", "audio/local_in", conv)
    yield from _linear(f"{audio}.encoder.conv1_global.conv", "audio/global_in", conv)
    yield from _linear(f"{audio}.encoder.conv2.conv", "audio/conv2", conv)
    yield from _linear(f"{audio}.encoder.conv3.conv", "audio/conv3", conv)
    yield from _linear(f"{audio}.encoder.final_linear", "audio/global_out")
    yield from _attention("audio_injector.injector.{j}", "injectors/attention")
    yield from _linear("audio_injector.injector_adain_layers.{j}.linear", "injectors/adaln")


TABLE = tuple(_rules())
"""Rules for every tensor of the official transformer; nothing is ignored."""

_RENAMED = {
    "dim": "width",
    "ffn_dim": "ffn_width",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "freq_dim": "freq_width",
    "text_dim": "text_width",
    "text_len": "text_len",
    "in_dim": "latent_channels",
    "cond_dim": "pose_channels",
    "audio_dim": "audio_width",
    "num_audio_token": "num_audio_tokens",
    "audio_inject_layers": "audio_inject_layers",
    "eps": "eps",
    "enable_framepack": "framepack",
    "zero_init": "zero_init",
}

_EXPECTED = {
    "patch_size": [1, 2, 2],
    "window_size": [-1, -1],
    "qk_norm": True,
    "cross_attn_norm": True,
    "enable_adain": True,
    "adain_mode": "attn_norm",
    "zero_timestep": True,
    "enable_motioner": False,
    "enable_tsm": False,
    "trainable_token": False,
    "trainable_token_pos_emb": False,
    "framepack_drop_mode": "padd",
    "add_last_motion": True,
    "model_type": "s2v",
}


def config_from_official(official: Mapping[str, Any], **changes: Any) -> DiTConfig:
    """Our configuration for an official `config.json`.

    Args:
        official: the official keys and values; keys starting with "_" are ignored.
        **changes: fields of `DiTConfig` that the file does not have, such as `half_rotary`.

    Raises:
        ValueError: a setting this project does not implement, or one it does not know.
    """
    fields, wrong = {}, []
    for key, value in official.items():
        plain = list(value) if isinstance(value, list | tuple) else value
        if key in _RENAMED:
            fields[_RENAMED[key]] = plain
        elif key == "motion_frames":
            fields["audio_history"] = plain[0] if isinstance(plain, list) else plain
        elif key == "out_dim":
            if plain != official.get("in_dim", plain):
                wrong.append(f"out_dim {plain} differs from in_dim {official['in_dim']}")
        elif key in _EXPECTED:
            if plain != _EXPECTED[key]:
                wrong.append(f"{key} is {plain!r}, only {_EXPECTED[key]!r} is implemented")
        elif not key.startswith("_"):
            wrong.append(f"{key}={plain!r} is unknown")
    if wrong:
        raise ValueError("official transformer config: " + "; ".join(wrong))
    return DiTConfig(**(fields | changes))


def lora_targets(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """Official names of the linears that the LoRA adapts -> (outputs, inputs)."""
    d, hidden = config.width, config.ffn_width
    targets = {}
    for i in range(config.num_layers):
        for attention in ("self_attn", "cross_attn"):
            targets |= {f"blocks.{i}.{attention}.{name}": (d, d) for name in "qkvo"}
        targets |= {f"blocks.{i}.ffn.0": (hidden, d), f"blocks.{i}.ffn.2": (d, hidden)}
    for j in range(len(config.audio_inject_layers)):
        targets |= {f"audio_injector.injector.{j}.{name}": (d, d) for name in "qkvo"}
    return targets


def lora_shapes(config: DiTConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole LoRA file for a transformer of this size."""
    shapes = {}
    for name, (outputs, inputs) in lora_targets(config).items():
        shapes[f"{name}.lora_A.default.weight"] = (rank, inputs)
        shapes[f"{name}.lora_B.default.weight"] = (outputs, rank)
    return shapes


def merge_lora(
    weights: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], scaling: float
) -> dict[str, np.ndarray]:
    """Adds low-rank updates to official weights: `W + scaling * B @ A`, computed in float32.

    Args:
        weights: official name -> array.
        adapter: LoRA tensors, with or without the prefix `base_model.model.` and `.default`.
        scaling: alpha / rank; 0.5 for the published file.

    Raises:
        ValueError: a tensor that adapts nothing, or half of a pair; the message lists them all.
    """
    pairs: dict[str, dict[str, np.ndarray]] = {}
    unmatched = []
    for name, array in adapter.items():
        plain = name.removeprefix("base_model.model.").replace(".default", "")
        linear, _, factor = plain.removesuffix(".weight").rpartition(".lora_")
        if factor not in ("A", "B") or f"{linear}.weight" not in weights:
            unmatched.append(name)
        else:
            pairs.setdefault(linear, {})[factor] = np.asarray(array, np.float32)
    unmatched += [f"{name} (only lora_{''.join(p)})" for name, p in pairs.items() if len(p) < 2]
    if unmatched:
        raise ValueError(
            f"{len(unmatched)} LoRA tensors match no linear layer of the checkpoint: {unmatched}"
        )
    merged = dict(weights)
    for linear, pair in pairs.items():
        base = weights[f"{linear}.weight"]
        update = np.float32(scaling) * (pair["B"] @ pair["A"])
        merged[f"{linear}.weight"] = base + update.astype(base.dtype)
    return merged
