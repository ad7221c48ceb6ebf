"""A distilled student is no teacher: what was merged into a base is recorded and refused."""

import logging

import numpy as np
import pytest

from configs import diffusion_forcing, dmd, teacher
from jax_avatar.training.base_weights import StageWeights, check_not_merged, merge_record
from jax_avatar.training.stages.build import build_stage
from jax_avatar.weights.files import save_json, save_weights

STAGES = {"teacher": teacher, "diffusion_forcing": diffusion_forcing, "dmd": dmd}
MERGED = {"merged": [{"file": "liveavatar.safetensors", "scaling": 0.5}]}


def save(folder, metadata, kind="wan_s2v"):
    save_weights(folder, "dit", {"w": np.ones(2, np.float32)}, {}, metadata)
    save_json(folder / "config.json", {"dit": kind, "stream": {}})
    return str(folder)


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ("teacher", "model"), ("teacher", "start"), ("diffusion_forcing", "model"),
        ("diffusion_forcing", "start"), ("dmd", "model"), ("dmd", "teacher"), ("dmd", "student"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("metadata", [MERGED, {"lora": "liveavatar.safetensors, merged"}])
def test_every_stage_refuses_a_merged_adapter(tmp_path, stage, setting, metadata):
    settings = STAGES[stage].get_config("wan_s2v_14b").to_dict()
    build_stage(settings)  # folders that are not there yet, as in a dry run
    settings["weights"][setting] = save(tmp_path, metadata)
    message = rf"weights\.{setting}=.*liveavatar\.safetensors.*convert all .*without --merge"
    with pytest.raises(ValueError, match=message):
        build_stage(settings)


def test_nothing_merged_passes_and_an_older_folder_is_told_of_once(tmp_path, caplog):
    clean, older = save(tmp_path / "clean", {"merged": []}), save(tmp_path / "older", {"step": 3})
    small = save(tmp_path / "small", {}, kind="portrait")
    assert merge_record(older) == {} and merge_record("") == merge_record(small) == {"merged": []}
    with caplog.at_level(logging.WARNING):
        check_not_merged(StageWeights(clean, start=clean))
        check_not_merged(StageWeights(small, start=small))
        assert not caplog.records
        for _ in range(2):
            check_not_merged(StageWeights(clean, start=older))
    assert [record.message.startswith(older) for record in caplog.records] == [True]
