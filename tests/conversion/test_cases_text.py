import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conversion.verify import main

GOLDEN = Path(__file__).parents[1] / "golden" / "text"


def rows(text):
    return [line for line in text.splitlines() if " FAIL" in line or " ok " in line]


def copy(folder, *names):
    for name in names:
        shutil.copy(GOLDEN / name, folder)


def test_the_encoder_reproduces_every_official_number(tmp_path, capsys):
    files = sorted(GOLDEN.glob("*.safetensors"))
    copy(tmp_path, *(path.name for path in files))
    code = main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0, [row for row in rows(printed) if "FAIL" in row]
    inputs = {"ids", "mask", "rel_pos"}
    for path in files:
        if "weights" not in path.name:
            for name in set(load_file(path)) - inputs:
                assert f" {name} " in printed, f"{name} was not verified"


def change_io(folder, change):
    copy(folder, "umt5_b_io.safetensors", "umt5_b_weights.safetensors")
    path = folder / "umt5_b_io.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    io = load_file(path)
    change(io)
    for name in list(folder.iterdir()):  # a case is known by its content
        name.rename(folder / name.name.replace("umt5_b", "other"))
    save_file(io, folder / "other_io.safetensors", metadata)


def nudge(name, index, amount):
    def change(io):
        io[name] = io[name].copy()
        io[name][index] += amount

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (nudge("block1_out", (1, 3, 2), 3e-4), "block1_out"),
        (nudge("out_full_bf16_model", (1, 3, 2), 0.5), "out_full_bf16_model (max)"),
        (nudge("context_zero_padded", (1, 100, 2), 1e-9), "context_zero_padded (padding)"),
        (nudge("rel_bucket", 7, 1), "rel_bucket"),
        (nudge("pos_bias_block0_L40", (0, 1, 2, 3), 1e-5), "pos_bias_block0_L40"),
        (nudge("seq_lens", 1, 1), "seq_lens"),
        (lambda io: io.update(surprise=np.zeros(3, np.float32)), "unknown tensor"),
        (lambda io: io.update(block9_out=io["block1_out"]), "block9_out"),
    ],
)
def test_a_wrong_or_unknown_tensor_fails_and_only_that_one(tmp_path, capsys, change, told):
    change_io(tmp_path, change)
    assert main([str(tmp_path), "--failures-only"]) == 1
    failed = rows(capsys.readouterr().out)
    assert len(failed) == 1 and told in failed[0]


def test_a_bfloat16_error_everywhere_fails_by_its_mean(tmp_path, capsys):
    change_io(tmp_path, nudge("out_full_bf16_model", ..., 0.03))
    main([str(tmp_path)])
    failed = [row for row in rows(capsys.readouterr().out) if "FAIL" in row]
    assert any("(mean)" in row for row in failed)


def test_a_mask_with_gaps_fails(tmp_path, capsys):
    change_io(tmp_path, nudge("mask", (0, 5), -1))
    assert main([str(tmp_path)]) == 1
    assert "mask has gaps" in capsys.readouterr().out


def test_the_published_checkpoint_fits_our_network(tmp_path, capsys):
    name = "manifest_umt5_xxl.json"
    copy(tmp_path, name)
    assert main([str(tmp_path)]) == 0
    assert "242 tensors used, 0 ignored" in capsys.readouterr().out
    shapes = json.loads((tmp_path / name).read_text())
    shapes["blocks.23.ffn.fc2.weight"][0] = 4
    del shapes["blocks.7.norm2.weight"]
    (tmp_path / name).write_text(json.dumps(shapes))
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "blocks.23.ffn.fc2.weight" in printed and "blocks.7.norm2.weight" in printed


def test_prompts_are_cleaned_as_officially(tmp_path, capsys):
    name = "prompt_cleaning_examples.json"
    copy(tmp_path, name)
    examples = json.loads((tmp_path / name).read_text())
    assert main([str(tmp_path)]) == 0
    assert len(rows(capsys.readouterr().out)) == len(examples)
    examples[3]["out"] += " "
    (tmp_path / name).write_text(json.dumps(examples))
    assert main([str(tmp_path), "--failures-only"]) == 1
    assert len(rows(capsys.readouterr().out)) == 1
