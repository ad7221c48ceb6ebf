"""Weights on disk are restored on any mesh, each device reading its own part."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jax_avatar.layout import make_mesh, parse_layout
from jax_avatar.models.network import flatten
from jax_avatar.models.quantise import quantise_params
from jax_avatar.models.sharding import param_shardings, param_specs
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import make_network, save_model, save_orbax
from jax_avatar.weights.fields import plain_fields
from jax_avatar.weights.files import place, tree_of
from jax_avatar.weights.folder import load_model
from jax_avatar.weights.orbax import StoredWeights

PARAMS = make_network().params


def training_mesh(data, model):
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def mesh_of(name):
    if name.startswith("train "):
        return training_mesh(*(int(n) for n in name.removeprefix("train ").split("x")))
    return make_mesh(parse_layout(name, 4))[0]


MESHES = ["1", "2", "5", "4x2", "2x2", "train 1x1", "train 4x1", "train 4x2", "train 8x1"]


def shardings(mesh):
    return param_shardings(PARAMS, mesh, smallest=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the weights."""
    folder = tmp_path_factory.mktemp("saved") / "dit"
    save_orbax(folder, PARAMS, {"w": 1})
    return folder


@pytest.mark.parametrize("target", MESHES)
def test_a_checkpoint_restores_on_any_mesh(saved, target):
    wanted = shardings(mesh_of(target))
    restored = place(StoredWeights(saved), wanted)
    for path, leaf in flatten(restored).items():
        assert leaf.sharding.is_equivalent_to(flatten(wanted)[path], leaf.ndim)
        np.testing.assert_array_equal(leaf, flatten(PARAMS)[path])


@pytest.mark.parametrize(("name", "share"), [("4x2", 0.9), ("train 4x2", 0.35), ("train 8x1", 0.3)])
def test_no_device_holds_a_whole_copy(saved, name, share):
    restored = place(StoredWeights(saved), shardings(mesh_of(name)))
    held: dict = {}
    for leaf in jax.tree.leaves(restored):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    whole = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(PARAMS))
    assert len(held) == 8 and max(held.values()) < share * whole, (held, whole)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_are_split_as_their_kernels(kind):
    specs = flatten(param_specs(quantise_params(PARAMS, kind), {"model": 2}))
    assert specs["blocks/ffn_in/kernel_scale"] == PartitionSpec(None, "model")
    assert specs["blocks/ffn_out/kernel_scale"] == PartitionSpec()
    assert specs["blocks/ffn_out/kernel"] == PartitionSpec(None, "model", None)


def test_layers_stay_together_and_small_weights_whole():
    specs = flatten(param_specs(PARAMS, {"data": 2}, smallest=500))
    assert specs["blocks/ffn_in/kernel"][0] is None and "data" in specs["blocks/ffn_in/kernel"]
    assert specs["blocks/ffn_in/bias"] == PartitionSpec()


@pytest.mark.parametrize("mesh", ["1", "2x2"])
def test_a_session_reads_a_stored_transformer_straight_to_its_devices(tmp_path, mesh):
    folder = save_model(tmp_path / "model")
    plain = load_model(folder)
    save_orbax(folder / "dit", plain.dit.params, plain_fields(plain.dit.config))
    (folder / "dit.safetensors").unlink()
    stored = load_model(folder)
    assert isinstance(stored.dit.params, StoredWeights)
    portrait = np.zeros((1, 1, 64, 64, 3), np.float32)
    samples = 0.1 * np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    videos = []
    for model in (plain, stored):
        session = AvatarSession(model, portrait, parse_layout(mesh, 4))
        videos.append(np.concatenate([*session.push(samples), *session.finish()]))
    np.testing.assert_array_equal(*videos)


def test_shapes_are_known_without_reading(saved):
    shapes = {p: leaf.shape for p, leaf in flatten(tree_of(StoredWeights(saved))).items()}
    assert shapes == {p: leaf.shape for p, leaf in flatten(PARAMS).items()}
