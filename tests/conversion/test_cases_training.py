import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.verify import main

GOLDEN = Path(__file__).parents[1] / "golden" / "training"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_golden_cases(path, tmp_path, capsys):
    shutil.copy(path, tmp_path)
    assert main([str(tmp_path), "--failures-only"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("stem", "name", "change"),
    [
        ("dmd", "base_w3.grad", 1e-5),
        ("critic", "b.loss_direct", 1e-4),
        ("sink_rope", "sink_index", 1),
        ("optim", "gen.params", 2e-6),
        ("masks", "la.s2v.f12_s4_b3_cond7", 1),
        ("dmd_timesteps", "shift5.clamp20_980", 1e-3),
    ],
)
def test_another_number_is_noticed(stem, name, change, tmp_path, capsys):
    tensors = load_file(GOLDEN / f"{stem}.safetensors")
    tensors[name].flat[3 % tensors[name].size] += np.array(change).astype(tensors[name].dtype)
    save_file(tensors, tmp_path / f"{stem}.safetensors")
    assert main([str(tmp_path), "--failures-only"]) == 1
    assert f" {name} " in capsys.readouterr().out


def test_an_unknown_tensor_fails(tmp_path, capsys):
    tensors = load_file(GOLDEN / "critic.safetensors") | {"c.surprise": np.zeros(2, np.float32)}
    save_file(tensors, tmp_path / "critic.safetensors")
    assert main([str(tmp_path), "--failures-only"]) == 1
    assert "c.surprise" in capsys.readouterr().out
