import json
from pathlib import Path

import numpy as np
import pytest

from conversion.cases_dit import DiTCases
from conversion.cases_manifests import Manifests
from conversion.cases_tables import RotaryCases, RoutingCases, SamplerTables
from conversion.readers import SafetensorsFile
from conversion.rules import convert, export
from conversion.wan_dit import LORA_TABLE, TABLE, MergedLora, config_from_official, plain_lora_name
from jax_avatar.models.config import wan_s2v_14b
from jax_avatar.models.dit import DiT
from jax_avatar.models.lora import adapter_leaves, add_adapter
from jax_avatar.models.network import Network, flatten, unflatten

GOLDEN = Path(__file__).parents[1] / "golden" / "dit"
FILES = sorted(path for path in GOLDEN.iterdir() if path.suffix in (".json", ".safetensors"))
INFO = json.loads((GOLDEN / "cfgA.json").read_text())


def state_dict():
    file = SafetensorsFile(GOLDEN / "cfgA.safetensors")
    return {name[3:]: np.asarray(file[name]) for name in file if name.startswith("sd.")}


def target_of(config):
    return flatten(Network.abstract(DiT, config).params)


@pytest.mark.parametrize(
    "kind", [DiTCases(), Manifests(), RotaryCases(), RoutingCases(), SamplerTables()]
)
def test_golden_cases(kind):
    cases = kind.find(FILES)
    assert cases
    for case in cases:
        checks = list(kind.run(case))
        failed = [check for check in checks if not check.passed]
        assert checks and not failed, failed


def test_official_weights_survive_the_round_trip():
    source = state_dict()
    params, report = convert(source, TABLE, target_of(config_from_official(INFO["model_config"])))
    assert len(report.used) == len(source) and not report.ignored
    back = export(params, TABLE)
    assert back.keys() == source.keys()
    for name, array in source.items():
        np.testing.assert_array_equal(back[name], array)


def test_the_published_size_has_the_published_number_of_parameters():
    target = target_of(wan_s2v_14b())
    assert sum(np.prod(leaf.shape) for leaf in target.values()) == 16_295_755_609
    leaves = adapter_leaves(unflatten(target_of(wan_s2v_14b())), 128)
    assert sum(np.prod(leaf.shape) for leaf in leaves.values()) == 676_331_520


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
    target = target_of(config)

    def adapter(self, rename=lambda name: name):
        leaves = adapter_leaves(unflatten(self.target), 2)
        draw = np.random.default_rng(0).normal
        ours = {path: draw(size=leaf.shape).astype(np.float32) for path, leaf in leaves.items()}
        return {rename(name): array for name, array in export(ours, LORA_TABLE).items()}

    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: f"base_model.model.{name}",
            lambda name: name.replace(".weight", ".default.weight"),
            lambda name: f"base_model.model.{name.replace('.weight', '.default.weight')}",
        ],
    )
    def test_every_spelling_is_understood(self, rename):
        weights = state_dict()
        plain = MergedLora(weights, self.adapter())
        other = MergedLora(weights, self.adapter(rename))
        assert len(plain.adapted) == len(other.adapted) == 48
        for name in plain.adapted:
            np.testing.assert_array_equal(plain[name], other[name])
            assert np.abs(plain[name] - weights[name]).max() > 0.1

    def test_merging_before_and_after_conversion_is_the_same(self):
        weights, adapter = state_dict(), self.adapter()
        before, _ = convert(dict(MergedLora(weights, adapter, 0.5)), TABLE, self.target)
        params, _ = convert(weights, TABLE, self.target)
        leaves = adapter_leaves(unflatten(self.target), 2)
        ours, report = convert(adapter, LORA_TABLE, leaves)
        assert len(report.used) == len(adapter)
        after = flatten(add_adapter(unflatten(params), unflatten(ours), 0.5))
        for path, expected in before.items():
            np.testing.assert_allclose(after[path], expected, atol=1e-6)

    def test_what_adapts_nothing_is_listed(self):
        stray = self.adapter() | {"blocks.99.self_attn.q.lora_A.default.weight": np.zeros((2, 4))}
        with pytest.raises(ValueError, match=r"1 LoRA tensors.*blocks\.99"):
            MergedLora(state_dict(), stray)

    def test_half_a_pair_and_other_ranks_are_listed(self):
        adapter = self.adapter()
        del adapter["blocks.0.self_attn.q.lora_B.weight"]
        adapter["blocks.0.self_attn.k.lora_B.weight"] = np.zeros((64, 3), np.float32)
        with pytest.raises(ValueError, match=r"B \(64, 3\).*self_attn\.q \(only lora_A\)"):
            MergedLora(state_dict(), adapter)

    def test_spellings_lose_nothing_but_the_prefix(self):
        name = "base_model.model.blocks.3.ffn.0.lora_A.default.weight"
        assert plain_lora_name(name) == "blocks.3.ffn.0.lora_A.weight"
