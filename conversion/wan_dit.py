"""Wan2.2-S2V transformer: official tensor names and config -> ours.

Source of the names: the Wan2.2-S2V-14B checkpoint (1260 tensors).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from conversion.rules import Rule, conv, patch, squeeze, transpose
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.lora import is_adapted

__all__ = [
    "LORA_TABLE",
    "SCALING",
    "TABLE",
    "MergedLora",
    "config_from_official",
    "plain_lora_name",
]

SCALING = 0.5
"""Alpha over rank of the published LoRA, 64 / 128."""


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


def _lora_rules() -> Iterator[Rule]:
    for rule in TABLE:
        if is_adapted(rule.target):
            linear = rule.source.removesuffix(".weight")
            yield Rule(f"{linear}.lora_A.weight", f"{rule.target}/a", transpose)
            yield Rule(f"{linear}.lora_B.weight", f"{rule.target}/b", transpose)


LORA_TABLE = tuple(_lora_rules())
"""Rules for a LoRA under the names of `plain_lora_name`; ours is `kernel + scaling * a @ b`."""

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


def plain_lora_name(name: str) -> str:
    """A LoRA tensor's name without the parts that some files have and some do not."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


class MergedLora(Mapping):
    """Official weights with a LoRA added, tensor by tensor: `W + scaling * B @ A` in float32.

    Attributes:
        shapes, dtypes: as of the base weights.
        adapted: names of the weights that the LoRA changes.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        adapter: Mapping[str, np.ndarray],
        scaling: float = SCALING,
    ):
        """Pairs the factors.

        Args:
            weights: official name -> array.
            adapter: LoRA tensors, with or without the prefix `base_model.model.` and `.default`.
            scaling: alpha / rank; 0.5 for the published file.

        Raises:
            ValueError: a tensor that adapts nothing, half of a pair, or factors whose product has
                another shape than the weight; the message lists them all.
        """
        self._weights, self._adapter, self._scaling = weights, adapter, np.float32(scaling)
        self._pairs: dict[str, dict[str, str]] = {}
        self.shapes, shapes = _shapes(weights), _shapes(adapter)
        self.dtypes = getattr(weights, "dtypes", None) or {n: a.dtype for n, a in weights.items()}
        wrong = []
        for name in shapes:
            linear, _, factor = plain_lora_name(name).removesuffix(".weight").rpartition(".lora_")
            if factor not in ("A", "B") or f"{linear}.weight" not in self.shapes:
                wrong.append(name)
            elif factor in self._pairs.setdefault(linear, {}):
                wrong.append(f"{name} (a second lora_{factor})")
            else:
                self._pairs[linear][factor] = name
        for linear, pair in self._pairs.items():
            if len(pair) < 2:
                wrong.append(f"{linear} (only lora_{''.join(pair)})")
                continue
            (rank, inputs), (outputs, other) = (shapes[pair[f]] for f in "AB")
            if rank != other or (outputs, inputs) != tuple(self.shapes[f"{linear}.weight"]):
                wrong.append(f"{linear} (B {(outputs, other)} times A {(rank, inputs)})")
        if wrong:
            raise ValueError(
                f"{len(wrong)} LoRA tensors match no linear layer of the checkpoint: {wrong}"
            )
        self.adapted = sorted(f"{linear}.weight" for linear in self._pairs)

    def __getitem__(self, name: str) -> np.ndarray:
        """The merged tensor in the type of the base weight."""
        base = self._weights[name]
        pair = self._pairs.get(name.removesuffix(".weight"))
        if pair is None or not name.endswith(".weight"):
            return base
        down, up = (np.asarray(self._adapter[pair[f]], np.float32) for f in "AB")
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise ValueError(f"the LoRA of {name} holds NaN or infinity; download it again.")
        return base + (self._scaling * (up @ down)).astype(base.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _shapes(weights: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    found = getattr(weights, "shapes", None)
    return found if found is not None else {n: tuple(a.shape) for n, a in weights.items()}
