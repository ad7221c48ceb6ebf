import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.weights.checkpoint_writer import ResumableCheckpointWriter as Writer
from jax_avatar.weights.orbax import StoredWeights

LEAVES = {
    "blocks/ffn/kernel": jax.ShapeDtypeStruct((3, 4, 5), jnp.bfloat16),
    "blocks/scale": jax.ShapeDtypeStruct((3,), jnp.float32),
    "head": jax.ShapeDtypeStruct((2, 2), jnp.int8),
}


def values():
    draw = np.random.default_rng(0)
    return {
        path: (10 * draw.standard_normal(leaf.shape)).astype(leaf.dtype)
        for path, leaf in LEAVES.items()
    }


def writer(folder, **header):
    return Writer(folder / "dit", LEAVES, {"width": 8, **header}, {"source": "here"})


def fill(checkpoint, layers=(0, 1, 2)):
    content = values()
    for i in layers:
        checkpoint.write(
            f"layer{i}",
            {
                (path, (i,)): content[path][i]
                for path in LEAVES
                if path.startswith("blocks") and f"layer{i}" not in checkpoint.done
            },
        )
    checkpoint.write("head", {("head", ()): content["head"]})


def test_two_conversions_cannot_write_the_same_network(tmp_path):
    leaves = {"a": np.zeros((2, 3), np.float32)}
    first = Writer(tmp_path / "dit", leaves, {}, {})
    for other in ({}, {"other": 1}):  # of the same plan, which would be resumed, and of another
        with pytest.raises(ValueError, match="is being written by another conversion"):
            Writer(tmp_path / "dit", leaves, other, {})
    Writer(tmp_path / "vae", leaves, {}, {}).discard()
    first.write("x", {("a", (i,)): np.ones(3, np.float32) for i in range(2)})
    first.pause()
    again = Writer(tmp_path / "dit", leaves, {}, {})
    assert again.done == {"x"}
    again.finish()
    Writer(tmp_path / "dit", leaves, {}, {}).discard()


def test_what_is_written_slot_by_slot_restores_as_a_whole(tmp_path):
    checkpoint = writer(tmp_path)
    fill(checkpoint)
    assert not (tmp_path / "dit").exists()
    checkpoint.finish()
    stored = StoredWeights(tmp_path / "dit")
    assert (stored.config, stored.metadata) == ({"width": 8}, {"source": "here"})
    params = stored.restore()
    np.testing.assert_array_equal(
        stored.read("blocks/ffn/kernel", (1,)), params["blocks"]["ffn"]["kernel"][1]
    )
    for path, expected in values().items():
        got = params
        for key in path.split("/"):
            got = got[key]
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["dit"]


def test_an_interrupted_run_goes_on_and_nothing_half_loads(tmp_path):
    first = writer(tmp_path)
    fill(first, layers=(0, 1))
    first.pause()
    with pytest.raises(ValueError, match="not a finished"):
        StoredWeights(tmp_path / "dit")
    second = writer(tmp_path)
    assert second.done == {"layer0", "layer1", "head"}
    fill(second, layers=(2,))
    second.finish()
    params = StoredWeights(tmp_path / "dit").restore()
    np.testing.assert_array_equal(params["blocks"]["scale"], values()["blocks/scale"])


def test_another_conversion_starts_anew(tmp_path):
    first = writer(tmp_path)
    fill(first)
    first.pause()
    assert not writer(tmp_path, width=9).done


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(tmp_path):
    first = writer(tmp_path)
    fill(first)
    first.finish()
    second = writer(tmp_path)
    assert not second.done
    second.write("head", {("head", ()): np.zeros((2, 2), np.int8)})
    np.testing.assert_array_equal(StoredWeights(tmp_path / "dit").read("head"), values()["head"])
