import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.readers import SafetensorsFile, open_weights
from jax_avatar.weights.whole_file import BrokenFile


def test_tensors_metadata_and_shapes_are_those_that_were_written(tmp_path):
    tensors = {
        "half": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "whole": np.arange(4, dtype=np.int64),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"config": "{}"})
    file = open_weights(tmp_path)
    assert file.metadata == {"config": "{}"}
    assert file.shapes == {name: array.shape for name, array in tensors.items()}
    for name in tensors:
        assert file[name].dtype == tensors[name].dtype
        np.testing.assert_array_equal(file[name], load_file(tmp_path / "x.safetensors")[name])


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_a_cut_file_is_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.zeros((5, 4), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BrokenFile, match=r"x\.safetensors is (not a readable|cut off)"):
        SafetensorsFile(path)


def test_shards_are_one_checkpoint_and_a_missing_tensor_is_named(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "1.safetensors", "b": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    weights = open_weights(tmp_path)
    assert weights.shapes == {"a": (2,), "b": (3,)}
    np.testing.assert_array_equal(weights["a"], np.ones(2))
    index.write_text(json.dumps({"weight_map": places | {"c": "1.safetensors"}}))
    with pytest.raises(ValueError, match=r"\['c'\]"):
        open_weights(tmp_path)


def test_an_ambiguous_folder_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="holds 2 checkpoints"):
        open_weights(tmp_path)
