import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.cases_audio import (
    AudioFrontEndCases,
    BucketCases,
    BucketTables,
    Wav2Vec2Cases,
)
from conversion.cases_manifests import Manifests
from conversion.readers import SafetensorsFile
from conversion.rules import check, convert, export
from conversion.verify import main
from conversion.wav2vec2 import TABLE, config_from, config_from_shapes, official_names
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2, xlsr53_large

GOLDEN = Path(__file__).parents[1] / "golden" / "audio"
FILES = sorted(path for path in GOLDEN.iterdir() if path.suffix in (".json", ".safetensors"))
WEIGHTS = SafetensorsFile(GOLDEN / "w2v_a_weights.safetensors")
CONFIG = json.loads(WEIGHTS.metadata["config"])
UNUSED = {"wav2vec2.masked_spec_embed", "lm_head.weight", "lm_head.bias"}


def state_dict():
    return {name.removeprefix("sd."): np.asarray(WEIGHTS[name]) for name in WEIGHTS}


def target_of(config):
    return flatten(Network.abstract(Wav2Vec2, config).params)


def older(name):
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = name.replace(f"parametrizations.weight.{new}", old)
    return name


def headless(name):
    return name.removeprefix("wav2vec2.")


@pytest.mark.parametrize(
    "kind",
    [Wav2Vec2Cases(), Manifests(), BucketCases(), BucketTables(), AudioFrontEndCases()],
    ids=lambda kind: kind.name,
)
def test_golden_cases(kind):
    cases = kind.find(FILES)
    assert cases
    for case in cases:
        checks = list(kind.run(case))
        assert checks
        assert [c for c in checks if not c.passed] == []


def test_every_number_of_a_model_is_verified(capsys, tmp_path):
    for path in GOLDEN.glob("w2v_b_*"):
        shutil.copy(path, tmp_path)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in SafetensorsFile(tmp_path / "w2v_b_io.safetensors"):
        assert f" {name} " in printed or name.endswith(".wave")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda io: io["w1.hidden_states"].__setitem__((2, 3, 4), 9.0), "w1.hidden_states"),
        (lambda io: io.update({"w0.surprise": np.zeros(3, np.float32)}), "unknown tensor"),
        (lambda io: io.pop("w1.wave"), "unknown tensor"),
        (lambda io: io.update({"w1.bucket_fps25_bf12": np.zeros((1, 3, 48, 24))}), "expected"),
    ],
)
def test_what_differs_fails(tmp_path, capsys, change, told):
    shutil.copy(GOLDEN / "w2v_b_weights.safetensors", tmp_path)
    io = {n: a.copy() for n, a in load_file(GOLDEN / "w2v_b_io.safetensors").items()}
    change(io)
    save_file(io, tmp_path / "w2v_b_io.safetensors")
    assert main([str(tmp_path), "--failures-only"]) == 1
    rows = [row for row in capsys.readouterr().out.splitlines() if " FAIL" in row]
    assert any(told in row for row in rows), rows


@pytest.mark.parametrize("prefix", [lambda name: name, headless])
@pytest.mark.parametrize("weight_norm", [lambda name: name, older])
def test_every_spelling_survives_the_round_trip(prefix, weight_norm):
    source = {prefix(weight_norm(name)): array for name, array in state_dict().items()}
    assert official_names(source).keys() == state_dict().keys()
    params, report = convert(official_names(source), TABLE, target_of(config_from(CONFIG)))
    assert set(report.ignored) == UNUSED and all(report.ignored.values())
    assert set(report.kept) == UNUSED
    back = export(params, TABLE)
    assert set(official_names(source)) - set(back) == UNUSED
    for name, array in back.items():
        np.testing.assert_array_equal(array, official_names(source)[name])
        assert array.dtype == official_names(source)[name].dtype


def test_the_published_checkpoint_fits_our_network():
    manifest = json.loads((GOLDEN / "manifest_wav2vec2_xlsr53.json").read_text())
    shapes = {name: tuple(shape) for name, shape in manifest.items()}
    assert config_from_shapes(shapes) == xlsr53_large()
    report = check(shapes, TABLE, target_of(xlsr53_large()))
    assert len(report.used) == 421 and len(report.ignored) == 3


def test_a_config_is_read_off_the_shapes():
    shapes = {name: array.shape for name, array in state_dict().items()}
    heads = CONFIG["num_attention_heads"]
    assert config_from_shapes(shapes, num_heads=heads) == config_from(CONFIG)
    with pytest.raises(ValueError, match="not the names of a wav2vec2"):
        config_from_shapes({"lm_head.weight": (33, 32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm = False, expected True"),
        ({"feat_extract_norm": "group"}, "'group', expected 'layer'"),
        ({"hidden_act": "relu"}, "Only the large XLSR-53 form"),
    ],
)
def test_forms_that_are_not_implemented_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from(CONFIG | change)
    with pytest.raises(ValueError, match=r"lacks \['hidden_size'\]"):
        config_from({key: value for key, value in CONFIG.items() if key != "hidden_size"})
