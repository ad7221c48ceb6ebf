"""Wan 2.1 VAE: official names (`Wan2.1_VAE.pth`) -> ours; diffusers' names are translated first."""

import re
from collections.abc import Mapping
from typing import Any

from conversion.rules import Rule, Table, conv, keep, squeeze, transpose
from jax_avatar.models.config import WanVAEConfig

__all__ = ["TABLE", "config_from", "config_from_shapes", "official_name", "official_names"]

# The source stores norm scales as [C, 1, 1, 1], in attention as [C, 1, 1].
_pointwise_2d = squeeze(trailing=2).then(transpose)
_pointwise_3d = squeeze(trailing=3).then(transpose)


def _weights(source: str, target: str, layout) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}/kernel", layout),
        Rule(f"{source}.bias", f"{target}/bias", keep),
    ]


def _residual(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.residual.0.gamma", f"{target}/norm_a/scale", squeeze(trailing=3)),
        *_weights(f"{source}.residual.2", f"{target}/conv_a", conv),
        Rule(f"{source}.residual.3.gamma", f"{target}/norm_b/scale", squeeze(trailing=3)),
        *_weights(f"{source}.residual.6", f"{target}/conv_b", conv),
        *_weights(f"{source}.shortcut", f"{target}/shortcut", _pointwise_3d),
    ]


def _half(name: str, source_levels: str, target_levels: str) -> list[Rule]:
    levels, ours = f"{name}.{source_levels}.{{i}}", f"{name}/{target_levels}/{{i}}"
    return [
        *_weights(f"{name}.conv1", f"{name}/conv_in", conv),
        *_residual(levels, ours),
        *_weights(f"{levels}.resample.1", f"{ours}/conv", conv),
        *_weights(f"{levels}.time_conv", f"{ours}/time_conv", conv),
        *_residual(f"{name}.middle.{{i}}", f"{name}/middle/{{i}}"),
        Rule(f"{name}.middle.{{i}}.norm.gamma", f"{name}/middle/{{i}}/norm/scale", squeeze(0, 2)),
        *_weights(f"{name}.middle.{{i}}.to_qkv", f"{name}/middle/{{i}}/qkv", _pointwise_2d),
        *_weights(f"{name}.middle.{{i}}.proj", f"{name}/middle/{{i}}/out", _pointwise_2d),
        Rule(f"{name}.head.0.gamma", f"{name}/head/norm/scale", squeeze(trailing=3)),
        *_weights(f"{name}.head.2", f"{name}/head/conv", conv),
    ]


TABLE: Table = (
    *_half("encoder", "downsamples", "down"),
    *_half("decoder", "upsamples", "up"),
    *_weights("conv1", "to_moments", _pointwise_3d),
    *_weights("conv2", "from_latent", _pointwise_3d),
)
"""Every tensor of the official checkpoint; nothing is ignored."""

# diffusers -> official, applied in order to the start, the middle and the end of a name.
_DIFFUSERS = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
)
_RESIDUAL = (
    (r"\.norm1\.gamma$", ".residual.0.gamma"),
    (r"\.conv1\.(weight|bias)$", r".residual.2.\1"),
    (r"\.norm2\.gamma$", ".residual.3.gamma"),
    (r"\.conv2\.(weight|bias)$", r".residual.6.\1"),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def official_name(name: str, num_res_blocks: int) -> str:
    """Official name of a tensor that diffusers' `AutoencoderKLWan` calls `name`.

    Args:
        name: diffusers' name.
        num_res_blocks: as in the config; the decoder numbers its layers by it.
    """
    for pattern, replacement in _DIFFUSERS:
        name = re.sub(pattern, replacement, name)

    def flat(found: re.Match) -> str:
        block, kind, index = int(found[1]), found[2], int(found[3])
        within = index if kind == "resnets" else num_res_blocks + 1 + index
        return f"decoder.upsamples.{block * (num_res_blocks + 2) + within}."

    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name)
    if re.match(r"(encoder|decoder)\.(middle|downsamples|upsamples)\.", name):
        for pattern, replacement in _RESIDUAL:
            name = re.sub(pattern, replacement, name)
    return name


def official_names(weights: Mapping[str, Any], num_res_blocks: int) -> dict[str, Any]:
    """`weights` under their official names, whichever of the two namings they came in.

    Args:
        weights: name -> anything (arrays or shapes).
        num_res_blocks: as in the config.
    """
    if not any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in weights):
        return dict(weights)
    return {official_name(name, num_res_blocks): value for name, value in weights.items()}


def config_from(values: Mapping[str, Any], **changes: Any) -> WanVAEConfig:
    """Config of an official or a diffusers VAE.

    Args:
        values: the constructor arguments of the official `WanVAE_`, or diffusers' `config.json`.
        changes: fields to set on top, for example `dtype`.

    Raises:
        ValueError: something this implementation does not have, or an unknown key.
    """
    names = {
        "dim": "dim",
        "base_dim": "dim",
        "z_dim": "z_dim",
        "dim_mult": "dim_mult",
        "num_res_blocks": "num_res_blocks",
        "temperal_downsample": "temporal_downsample",
        "latents_mean": "latent_mean",
        "latents_std": "latent_std",
    }
    fields = {}
    for key, value in values.items():
        if key in ("attn_scales", "dropout"):
            if value:
                raise ValueError(
                    f"VAE config {key} = {value!r}: only the published form is implemented, "
                    "without extra attention and dropout; set it to empty or 0."
                )
        elif key in names:
            fields[names[key]] = tuple(value) if isinstance(value, list) else value
        elif not key.startswith("_"):
            raise ValueError(f"VAE config key {key!r} is not known; known are {sorted(names)}.")
    return WanVAEConfig(**(fields | changes))


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], **changes: Any) -> WanVAEConfig:
    """Config of a checkpoint, read off the shapes of its tensors.

    Args:
        shapes: official name -> shape.
        changes: fields to set on top, for example `dtype`.

    Raises:
        ValueError: the encoder's layers are not there.
    """
    layers: dict[int, set[str]] = {}
    for name in shapes:
        found = re.match(r"encoder\.downsamples\.(\d+)\.(.*)", name)
        if found:
            layers.setdefault(int(found[1]), set()).add(found[2])
    needed = {"encoder.conv1.weight", "conv2.weight"}
    if not layers or needed - set(shapes):
        raise ValueError(
            f"{len(shapes)} tensors without encoder.downsamples.*, encoder.conv1.weight or "
            "conv2.weight: these are not the official names of a Wan VAE."
        )
    # A level ends with a resampling layer, the last one with the last layer.
    ends = [i for i in sorted(layers) if "resample.1.weight" in layers[i]]
    dim = shapes["encoder.conv1.weight"][0]
    widths = [
        shapes[f"encoder.downsamples.{i}.residual.6.weight"][0]
        for i in [*(end - 1 for end in ends), max(layers)]
    ]
    fields = {
        "dim": dim,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": tuple(width // dim for width in widths),
        "num_res_blocks": ends[0] if ends else len(layers),
        "temporal_downsample": tuple("time_conv.weight" in layers[end] for end in ends),
    }
    return WanVAEConfig(**(fields | changes))
