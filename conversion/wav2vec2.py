"""wav2vec2-large-xlsr-53: names of the published checkpoint -> ours, in all its spellings."""

import re
from collections.abc import Mapping
from typing import Any

from conversion.rules import Ignore, Rule, Table, conv, keep, squeeze, transpose
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2Config

__all__ = ["TABLE", "config_from", "config_from_shapes", "official_names"]

_PREFIX = "wav2vec2."
# Gain and direction of the positional convolution, as today's and as older files name them.
_PARAMETRIZED = ("parametrizations.weight.original0", "parametrizations.weight.original1")
_WEIGHT_NORM = ("weight_g", "weight_v")


def _weights(source: str, target: str, layout=transpose) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}/kernel", layout),
        Rule(f"{source}.bias", f"{target}/bias", keep),
    ]


def _norm(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}/scale", keep),
        Rule(f"{source}.bias", f"{target}/bias", keep),
    ]


def _table() -> Table:
    conv_layer, features = "feature_extractor.conv_layers.{i}", "feature_projection"
    layer, position = "encoder.layers.{i}", "encoder.pos_conv_embed.conv"
    rules = [
        *_weights(f"{conv_layer}.conv", "convs/{i}", conv),
        *_norm(f"{conv_layer}.layer_norm", "convs/{i}/norm"),
        *_norm(f"{features}.layer_norm", "norm_features"),
        *_weights(f"{features}.projection", "project"),
        Rule(f"{position}.{_PARAMETRIZED[0]}", "position/gain", squeeze(leading=2)),
        Rule(f"{position}.{_PARAMETRIZED[1]}", "position/direction", conv),
        Rule(f"{position}.bias", "position/bias", keep),
        *_norm(f"{layer}.layer_norm", "layers/norm_attention"),
        *_weights(f"{layer}.attention.q_proj", "layers/query"),
        *_weights(f"{layer}.attention.k_proj", "layers/key"),
        *_weights(f"{layer}.attention.v_proj", "layers/value"),
        *_weights(f"{layer}.attention.out_proj", "layers/out"),
        *_norm(f"{layer}.final_layer_norm", "layers/norm_ffn"),
        *_weights(f"{layer}.feed_forward.intermediate_dense", "layers/ffn_in"),
        *_weights(f"{layer}.feed_forward.output_dense", "layers/ffn_out"),
        *_norm("encoder.layer_norm", "norm_out"),
    ]
    return (
        *(Rule(f"{_PREFIX}{rule.source}", rule.target, rule.transform) for rule in rules),
        Ignore(f"{_PREFIX}masked_spec_embed", "stands for masked frames in training", kept=True),
        Ignore("lm_head.{*}", "letters of the transcript; hidden states are taken", kept=True),
    )


TABLE: Table = _table()
"""Every tensor of the published checkpoint, as today's library names them."""


def official_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """`weights` under the names of `TABLE`, whichever spelling they came in.

    Args:
        weights: name -> anything (arrays or shapes).
    """

    def plain(name: str) -> str:
        for old, new in zip(_WEIGHT_NORM, _PARAMETRIZED, strict=True):
            name = name.replace(f"pos_conv_embed.conv.{old}", f"pos_conv_embed.conv.{new}")
        is_bare = re.match(
            r"(feature_extractor|feature_projection|encoder|masked_spec_embed)\b", name
        )
        return f"{_PREFIX}{name}" if is_bare else name

    return {plain(name): value for name, value in weights.items()}


_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_width",
    "conv_dim": "conv_widths",
    "conv_kernel": "conv_kernels",
    "conv_stride": "conv_strides",
    "num_conv_pos_embeddings": "position_kernel",
    "num_conv_pos_embedding_groups": "position_groups",
    "layer_norm_eps": "eps",
}
# What changes the numbers, and the one form that is implemented.
_FIXED = {
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "add_adapter": False,
    "adapter_attn_dim": None,
}


def config_from(values: Mapping[str, Any], **changes: Any) -> Wav2Vec2Config:
    """Config of a checkpoint from its `config.json`.

    Args:
        values: the content; settings of training and of other heads are passed over.
        changes: fields to set on top, for example `fps`.

    Raises:
        ValueError: a form that is not implemented, or a size that is missing.
    """
    wrong = [
        f"{key} = {values[key]!r}, expected {wanted!r}"
        for key, wanted in _FIXED.items()
        if key in values and values[key] != wanted
    ]
    if wrong:
        raise ValueError(
            f"wav2vec2 config: {'; '.join(wrong)}. Only the large XLSR-53 form is implemented."
        )
    missing = sorted(set(_FIELDS) - set(values) - {"layer_norm_eps"})
    if missing:
        raise ValueError(f"wav2vec2 config lacks {missing}; pass the checkpoint's config.json.")
    fields = {ours: values[key] for key, ours in _FIELDS.items() if key in values}
    return Wav2Vec2Config(**(fields | changes))


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], **changes: Any) -> Wav2Vec2Config:
    """Config of a checkpoint, read off the shapes of its tensors.

    Strides and head size are not in the shapes: they are the published ones, 64 channels a head.

    Args:
        shapes: name in any spelling -> shape.
        changes: fields to set on top.

    Raises:
        ValueError: the layers are not there.
    """
    shapes = official_names(shapes)
    numbers = {
        kind: [
            int(found[1]) for name in shapes if (found := re.match(rf"{pattern}\.(\d+)\.", name))
        ]
        for kind, pattern in (
            ("convs", r"wav2vec2\.feature_extractor\.conv_layers"),
            ("layers", r"wav2vec2\.encoder\.layers"),
        )
    }
    direction = f"{_PREFIX}encoder.pos_conv_embed.conv.{_PARAMETRIZED[1]}"
    if direction not in shapes or not all(numbers.values()):
        raise ValueError(
            f"{len(shapes)} tensors without {direction}, encoder.layers.* or conv_layers.*: these "
            "are not the names of a wav2vec2."
        )
    convs = [
        shapes[f"{_PREFIX}feature_extractor.conv_layers.{i}.conv.weight"]
        for i in range(1 + max(numbers["convs"]))
    ]
    width, inputs, taps = shapes[direction]
    ffn = shapes[f"{_PREFIX}encoder.layers.0.feed_forward.intermediate_dense.weight"]
    fields = {
        "width": width,
        "num_layers": 1 + max(numbers["layers"]),
        "num_heads": max(1, width // 64),
        "ffn_width": ffn[0],
        "conv_widths": tuple(shape[0] for shape in convs),
        "conv_kernels": tuple(shape[2] for shape in convs),
        "position_kernel": taps,
        "position_groups": width // inputs,
    }
    return Wav2Vec2Config(**(fields | changes))
