import numpy as np
import pytest

from jax_avatar.testing import save_orbax
from jax_avatar.weights.files import (
    load_json,
    load_weights,
    save_json,
    save_weights,
)
from jax_avatar.weights.orbax import StoredWeights

PARAMS = {
    "blocks": {"0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 8}},
    "bias": np.ones(3, np.float32),
    "count": np.array(7, np.int32),
}
NANO = {"width": 3, "layers": [0, 2]}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(actual[key], value)
        else:
            np.testing.assert_array_equal(np.asarray(actual[key]), value)


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_weights_come_back_with_config_and_history(tmp_path, dtype):
    save_weights(tmp_path, "net", PARAMS, NANO, {"command": "train"}, dtype=dtype)
    params, config, metadata = load_weights(tmp_path, "net")
    assert_same(params, PARAMS)  # eighths are exact in every type
    assert (config, metadata) == (NANO, {"command": "train"})
    assert params["bias"].dtype == np.float32


def test_half_precision_halves_the_file(tmp_path):
    big = {"w": np.zeros((256, 256), np.float32)}
    wide = save_weights(tmp_path, "wide", big, {}).stat().st_size
    half = save_weights(tmp_path, "half", big, {}, dtype="bfloat16").stat().st_size
    assert half < 0.6 * wide


def test_orbax_comes_back_through_the_same_call(tmp_path):
    save_orbax(tmp_path / "net", PARAMS, NANO, {"command": "train"})
    params, config, metadata = load_weights(tmp_path, "net")
    assert_same(params, PARAMS)
    assert (config, metadata) == (NANO, {"command": "train"})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    save_weights(tmp_path, "net", PARAMS, NANO)
    with pytest.raises(TypeError):
        save_weights(tmp_path, "net", PARAMS, {"bad": object()})
    assert_same(load_weights(tmp_path, "net")[0], PARAMS)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_missing_cut_off_and_foreign_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no weights of 'net'.*net\.safetensors"):
        load_weights(tmp_path, "net")
    with pytest.raises(ValueError, match="no such folder"):
        load_weights(tmp_path / "nowhere", "net")
    path = save_weights(tmp_path, "net", PARAMS, NANO)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is cut off: it has"):
        load_weights(tmp_path, "net")
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not written by this project"):
        load_weights(tmp_path, "foreign")


def test_an_unfinished_orbax_folder_is_refused(tmp_path):
    (tmp_path / "net").mkdir()
    with pytest.raises(ValueError, match="not a finished Orbax checkpoint"):
        StoredWeights(tmp_path / "net")


def test_json_round_trip_and_errors(tmp_path):
    save_json(tmp_path / "config.json", {"a": [1, 2]})
    assert load_json(tmp_path / "config.json") == {"a": [1, 2]}
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_json(tmp_path / "broken.json")


def test_a_failed_orbax_save_leaves_the_old_checkpoint(tmp_path):
    save_orbax(tmp_path / "net", PARAMS, NANO)
    with pytest.raises((TypeError, ValueError)):
        save_orbax(tmp_path / "net", PARAMS, {"bad": object()})
    assert_same(load_weights(tmp_path, "net")[0], PARAMS)


def test_an_orbax_save_replaces_the_old_checkpoint_and_leaves_nothing_else(tmp_path):
    for value in (1, 2):
        save_orbax(tmp_path / "net", {"w": np.full(3, value, np.float32)}, NANO)
    np.testing.assert_array_equal(load_weights(tmp_path, "net")[0]["w"], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
