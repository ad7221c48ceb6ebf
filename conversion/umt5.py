"""UMT5 encoder: official names (`models_t5_umt5-xxl-enc-bf16.pth`) -> ours.

Names of transformers' `UMT5EncoderModel` are translated first.
"""

import re
from collections.abc import Mapping
from typing import Any

from conversion.rules import Ignore, Rule, Table, keep, transpose
from jax_avatar.models.config import UMT5Config

__all__ = ["TABLE", "config_from", "config_from_shapes", "official_name", "official_names"]

_EMBEDDING = "token_embedding.weight"
_COPY = "encoder.embed_tokens.weight"

TABLE: Table = (
    Rule(_EMBEDDING, "embedding", keep),
    Rule("blocks.{i}.norm1.weight", "blocks/norm_attention/scale", keep),
    Rule("blocks.{i}.attn.q.weight", "blocks/query/kernel", transpose),
    Rule("blocks.{i}.attn.k.weight", "blocks/key/kernel", transpose),
    Rule("blocks.{i}.attn.v.weight", "blocks/value/kernel", transpose),
    Rule("blocks.{i}.attn.o.weight", "blocks/out/kernel", transpose),
    Rule("blocks.{i}.pos_embedding.embedding.weight", "blocks/position", keep),
    Rule("blocks.{i}.norm2.weight", "blocks/norm_ffn/scale", keep),
    Rule("blocks.{i}.ffn.gate.0.weight", "blocks/ffn_gate/kernel", transpose),
    Rule("blocks.{i}.ffn.fc1.weight", "blocks/ffn_in/kernel", transpose),
    Rule("blocks.{i}.ffn.fc2.weight", "blocks/ffn_out/kernel", transpose),
    Rule("norm.weight", "norm/scale", keep),
    # What transformers' checkpoints may hold besides; the official one holds none of it.
    Ignore(_COPY, "tied to shared.weight, which is used"),
    Ignore("decoder.{*}", "the decoder half, which no prompt encoder uses"),
    Ignore("lm_head.weight", "the decoder's output layer"),
)
"""Every tensor of the official checkpoint; of that, nothing is ignored."""

# transformers -> official.
_TRANSFORMERS = (
    (r"shared\.weight", _EMBEDDING),
    (r"encoder\.final_layer_norm\.weight", "norm.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight",
     r"blocks.\1.attn.\2.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
     r"blocks.\1.pos_embedding.embedding.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight",
     r"blocks.\1.ffn.gate.0.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight",
     r"blocks.\1.ffn.fc1.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
)  # fmt: skip


def official_name(name: str) -> str:
    """Official name of a tensor that transformers' `UMT5EncoderModel` calls `name`."""
    for pattern, replacement in _TRANSFORMERS:
        name, count = re.subn(rf"^{pattern}$", replacement, name)
        if count:
            break
    return name


def official_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """`weights` under their official names, whichever of the two namings they came in.

    transformers writes the embedding as `shared.weight`, as `encoder.embed_tokens.weight`, or as
    both; of both it uses the first. The second then keeps its name, and `TABLE` ignores it.

    Args:
        weights: name -> anything (arrays, shapes or names).
    """
    named = {official_name(name): value for name, value in weights.items()}
    if _COPY in named and _EMBEDDING not in named:
        named[_EMBEDDING] = named.pop(_COPY)
    return named


def config_from(values: Mapping[str, Any], **changes: Any) -> UMT5Config:
    """Config of an official or a transformers encoder.

    Args:
        values: the constructor arguments of the official `T5Encoder`, or transformers'
            `config.json`, of which only the encoder's sizes are read.
        changes: fields to set on top, for example `dtype`.

    Raises:
        ValueError: a size is missing, or something this implementation does not have.
    """
    is_official = "dim_attn" in values
    names = _OFFICIAL if is_official else _HUGGING_FACE
    missing = [key for key in names.values() if key not in values]
    if missing:
        raise ValueError(
            f"text encoder config lacks {missing}; pass the official constructor arguments or "
            "transformers' config.json of a UMT5 model."
        )
    for key, implemented in _FIXED.items():
        if values.get(key, implemented) != implemented:
            raise ValueError(
                f"text encoder config {key} = {values[key]!r}: only UMT5's {implemented!r} is "
                "implemented; convert a UMT5 encoder."
            )
    fields = {ours: values[theirs] for ours, theirs in names.items()}
    if is_official:
        fields["head_dim"] = _head_dim(values["dim_attn"], values["num_heads"])
    else:
        fields["eps"] = values.get("layer_norm_epsilon", UMT5Config.eps)
    return UMT5Config(**(fields | changes))


_OFFICIAL = {
    "vocab_size": "vocab_size",
    "width": "dim",
    "ffn_width": "dim_ffn",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "num_buckets": "num_buckets",
    "max_distance": "max_dist",
}
_HUGGING_FACE = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "ffn_width": "d_ff",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "num_layers": "num_layers",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
_FIXED = {"shared_pos": False, "model_type": "umt5", "feed_forward_proj": "gated-gelu"}


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], **changes: Any) -> UMT5Config:
    """Config of a checkpoint, read off the shapes of its tensors.

    Args:
        shapes: official name -> shape.
        changes: fields to set, such as `dtype`, or `max_distance`, which no shape determines.

    Raises:
        ValueError: the tensors are not those of a UMT5 encoder.
    """
    layers = [int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))]
    first = "blocks.0.pos_embedding.embedding.weight", "blocks.0.attn.q.weight"
    needed = {_EMBEDDING, *first, "blocks.0.ffn.fc1.weight"}
    missing = sorted(needed - set(shapes))
    if missing:
        raise ValueError(
            f"{len(shapes)} tensors without {missing}: these are not the official names of a UMT5 "
            "encoder."
        )
    vocab_size, width = shapes[_EMBEDDING]
    num_buckets, num_heads = shapes[first[0]]
    fields = {
        "vocab_size": vocab_size,
        "width": width,
        "ffn_width": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_heads": num_heads,
        "head_dim": _head_dim(shapes[first[1]][0], num_heads),
        "num_layers": max(layers) + 1,
        "num_buckets": num_buckets,
    }
    return UMT5Config(**(fields | changes))


def _head_dim(width: int, num_heads: int) -> int:
    if width % num_heads:
        raise ValueError(
            f"attention width {width} is not a multiple of {num_heads} heads; the checkpoint and "
            "its config do not belong together."
        )
    return width // num_heads
