import re

import numpy as np
import pytest

from conversion.rules import check, export
from conversion.wan_vae import TABLE, config_from, config_from_shapes, official_name, official_names
from jax_avatar.models.config import WanVAEConfig
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.vae.wan import WanVAE

SMALL = WanVAEConfig(
    dim=2,
    z_dim=3,
    dim_mult=(1, 3, 2),
    num_res_blocks=2,
    temporal_downsample=(False, True),
    latent_mean=(0.0, 0.0, 0.0),
    latent_std=(1.0, 1.0, 1.0),
)


def official_weights(config):
    target = Network.abstract(WanVAE, config).params
    flat = flatten(target)
    weights = export({path: np.zeros(leaf.shape, np.float32) for path, leaf in flat.items()}, TABLE)
    return {name: array.shape for name, array in weights.items()}, flat


def test_export_gives_names_that_check_accepts_and_a_config_that_is_read_back():
    shapes, target = official_weights(SMALL)
    assert len(check(shapes, TABLE, target).used) == len(target) == len(shapes)
    assert (
        config_from_shapes(shapes, latent_mean=(0.0, 0.0, 0.0), latent_std=(1.0, 1.0, 1.0)) == SMALL
    )


def test_official_arguments_and_diffusers_config_mean_the_same():
    official = {
        "dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
    }
    diffusers = {key: value for key, value in official.items() if key != "dim"}
    diffusers |= {"base_dim": 8, "_class_name": "AutoencoderKLWan"}
    assert config_from(official) == config_from(diffusers) == WanVAEConfig(dim=8)


@pytest.mark.parametrize("values", [{"attn_scales": [0.5]}, {"dropout": 0.1}, {"is_residual": 1}])
def test_what_is_not_implemented_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        config_from(values)


@pytest.mark.parametrize(
    ("diffusers", "official"),
    [
        ("quant_conv.weight", "conv1.weight"),
        ("post_quant_conv.bias", "conv2.bias"),
        ("encoder.conv_in.weight", "encoder.conv1.weight"),
        ("decoder.norm_out.gamma", "decoder.head.0.gamma"),
        ("decoder.conv_out.weight", "decoder.head.2.weight"),
        ("encoder.mid_block.resnets.1.conv2.bias", "encoder.middle.2.residual.6.bias"),
        ("decoder.mid_block.attentions.0.to_qkv.weight", "decoder.middle.1.to_qkv.weight"),
        ("decoder.mid_block.attentions.0.norm.gamma", "decoder.middle.1.norm.gamma"),
        ("encoder.down_blocks.3.conv_shortcut.weight", "encoder.downsamples.3.shortcut.weight"),
        ("encoder.down_blocks.5.time_conv.bias", "encoder.downsamples.5.time_conv.bias"),
        ("encoder.down_blocks.2.resample.1.weight", "encoder.downsamples.2.resample.1.weight"),
        ("decoder.up_blocks.1.resnets.0.norm2.gamma", "decoder.upsamples.4.residual.3.gamma"),
        ("decoder.up_blocks.0.upsamplers.0.time_conv.bias", "decoder.upsamples.3.time_conv.bias"),
        ("decoder.up_blocks.3.resnets.2.conv1.weight", "decoder.upsamples.14.residual.2.weight"),
    ],
)
def test_diffusers_names_are_translated(diffusers, official):
    assert official_name(diffusers, num_res_blocks=2) == official


def diffusers_name(name, num_res_blocks):
    """The other direction, written independently, for the round trip."""
    if re.match(r"conv[12]\.", name):
        return name.replace("conv1.", "quant_conv.").replace("conv2.", "post_quant_conv.")
    name = re.sub(r"^(\w+)\.conv1\.", r"\1.conv_in.", name)
    name = name.replace(".head.0.", ".norm_out.").replace(".head.2.", ".conv_out.")
    if ".residual." in name or ".shortcut." in name:
        for old, new in [("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2")]:
            name = name.replace(f".residual.{old}.", f".{new}.")
        name = name.replace(".shortcut.", ".conv_shortcut.")
    middle = ["resnets.0", "attentions.0", "resnets.1"]
    name = re.sub(r"\.middle\.(\d)\.", lambda m: f".mid_block.{middle[int(m[1])]}.", name)
    name = name.replace(".downsamples.", ".down_blocks.")

    def up(found):
        block, i = divmod(int(found[1]), num_res_blocks + 2)
        kind = f"resnets.{i}" if i <= num_res_blocks else "upsamplers.0"
        return f".up_blocks.{block}.{kind}."

    return re.sub(r"\.upsamples\.(\d+)\.", up, name)


@pytest.mark.parametrize("num_res_blocks", [1, 2])
def test_a_whole_diffusers_checkpoint_is_recognised(num_res_blocks):
    shapes, target = official_weights(SMALL.replace(num_res_blocks=num_res_blocks))
    renamed = {diffusers_name(name, num_res_blocks): shape for name, shape in shapes.items()}
    assert len(renamed) == len(shapes) and not set(renamed) & {"conv1.weight"}
    translated = official_names(renamed, num_res_blocks)
    assert translated == shapes
    check(translated, TABLE, target)
    assert official_names(shapes, num_res_blocks) == shapes
