import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from conversion.cases_dit import DiTCases, DiTManifests, RotaryCases, RoutingCases, SamplerTables
from conversion.readers import SafetensorsFile
from conversion.rules import convert, export
from conversion.wan_dit import TABLE, config_from_official, lora_shapes, lora_targets, merge_lora
from jax_avatar.models.config import wan_s2v_14b
from jax_avatar.models.dit import DiT
from jax_avatar.models.params import abstract, flatten

GOLDEN = Path(__file__).parents[1] / "golden" / "dit"
FILES = sorted(path for path in GOLDEN.iterdir() if path.suffix in (".json", ".safetensors"))
INFO = json.loads((GOLDEN / "cfgA.json").read_text())


def state_dict():
    file = SafetensorsFile(GOLDEN / "cfgA.safetensors")
    return {name[3:]: np.asarray(file[name]) for name in file if name.startswith("sd.")}


@pytest.mark.parametrize(
    "kind", [DiTCases(), DiTManifests(), RotaryCases(), RoutingCases(), SamplerTables()]
)
def test_golden_cases(kind):
    cases = kind.find(FILES)
    assert cases
    for case in cases:
        checks = list(kind.run(case))
        failed = [check for check in checks if not check.passed]
        assert checks and not failed, failed


def test_official_weights_survive_the_round_trip():
    config = config_from_official(INFO["model_config"])
    _, target = abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))
    source = state_dict()
    params, report = convert(source, TABLE, flatten(target))
    assert len(report.used) == len(source) and not report.ignored
    back = export(params, TABLE)
    assert back.keys() == source.keys()
    for name, array in source.items():
        np.testing.assert_array_equal(back[name], array)


def test_the_published_size_has_the_published_number_of_parameters():
    _, target = abstract(lambda: DiT(wan_s2v_14b(), rngs=nnx.Rngs(0)))
    assert sum(np.prod(leaf.shape) for leaf in flatten(target).values()) == 16_295_755_609
    shapes = lora_shapes(wan_s2v_14b(), 128)
    assert len(shapes) == 896 and sum(np.prod(s) for s in shapes.values()) == 676_331_520


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_adain": False}, "enable_adain is False"),
        ({"colour": "blue"}, "colour='blue' is unknown"),
        ({"out_dim": 48}, "out_dim 48 differs"),
    ],
)
def test_configs_that_are_not_implemented_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_official(INFO["model_config"] | change)


class TestLora:
    config = config_from_official(INFO["model_config"])

    def adapter(self, rename=lambda name: name):
        draw = np.random.default_rng(0).normal
        shapes = lora_shapes(self.config, 2)
        return {rename(name): draw(size=s).astype(np.float32) for name, s in shapes.items()}

    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: f"base_model.model.{name}",
            lambda name: name.replace(".default", ""),
            lambda name: f"base_model.model.{name.replace('.default', '')}",
        ],
    )
    def test_every_spelling_is_understood(self, rename):
        weights = state_dict()
        plain = merge_lora(weights, self.adapter(), 0.5)
        other = merge_lora(weights, self.adapter(rename), 0.5)
        for name in lora_targets(self.config):
            np.testing.assert_array_equal(plain[f"{name}.weight"], other[f"{name}.weight"])
            assert np.abs(plain[f"{name}.weight"] - weights[f"{name}.weight"]).max() > 0.1

    def test_what_adapts_nothing_is_listed(self):
        stray = self.adapter() | {"blocks.99.self_attn.q.lora_A.default.weight": np.zeros((2, 4))}
        with pytest.raises(ValueError, match=r"1 LoRA tensors.*blocks\.99"):
            merge_lora(state_dict(), stray, 0.5)

    def test_half_a_pair_is_listed(self):
        adapter = self.adapter()
        del adapter["blocks.0.self_attn.q.lora_B.default.weight"]
        with pytest.raises(ValueError, match=r"self_attn\.q \(only lora_A\)"):
            merge_lora(state_dict(), adapter, 0.5)
