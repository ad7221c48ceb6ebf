"""A training plan is made of the real gradient step."""

import dataclasses

import jax
import pytest

from jax_avatar.models import sharding
from jax_avatar.models.config import wan_s2v_14b
from jax_avatar.models.dit import DiT
from jax_avatar.planning.hardware import HARDWARE
from jax_avatar.planning.programs import abstract_model, placed_bytes
from jax_avatar.planning.training import (
    Training,
    kept_bytes,
    plan_training,
    summed_over_replicas,
    training_devices,
    training_programs,
)
from jax_avatar.testing import GRID, NANO
from jax_avatar.training.rollout_plan import RolloutConfig
from jax_avatar.training.run.placement import clip_devices
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.flow import ForcingConfig
from tests.planning.test_stream import NANO_FOLDER


@pytest.mark.slow
def test_the_state_is_counted():
    model = abstract_model(NANO_FOLDER | {"dit": NANO_FOLDER["dit"] | {"framepack": False}})
    count = sum(leaf.size for leaf in jax.tree.leaves(model.dit.params))
    needs = plan_training(model, GRID, "1", HARDWARE["h200"], FORCING)
    used = {name: figure.value for name, figure in needs.devices[0].bytes.items()}
    assert used["weights"] == used["averaged weights"] == 4 * count
    assert 8 * count <= used["optimiser"] < 8.1 * count
    assert used["gradients, activations, temporaries"] > 4 * count
    assert needs.fits and dataclasses.asdict(needs)["fps"] == 0


@pytest.mark.slow
def test_too_large_a_state_asks_for_more_devices():
    model = abstract_model(NANO_FOLDER | {"dit": NANO_FOLDER["dit"] | {"framepack": False}})
    small = dataclasses.replace(HARDWARE["h100"], memory_gb=1e-6)
    needs = plan_training(model, GRID, "2", small, FORCING)
    assert not needs.fits and needs.advice[0].startswith("--mesh ")


@pytest.mark.slow
def test_an_adapter_has_a_frozen_base():
    sections = FORCING | {"task": {"latents": 6, "adapter_rank": 2}}
    needs = plan_training(abstract_model(NANO_FOLDER), GRID, "2x2", HARDWARE["h200"], sections)
    used = {name: figure.value for name, figure in needs.devices[0].bytes.items()}
    assert used["frozen base"] > used["adapter"] == used["averaged adapter"] > 0
    assert used["optimiser"] < used["frozen base"]


FORCING = {"model": {"framepack": False}, "task": {"latents": 6}}
SECTIONS = {
    "model": {"framepack": False, "ring_blocks": 2},
    "rollout": {"sigmas": (1.0, 0.8, 0.0)},
    "task": {"latents": 6, "adapter_rank": 2},
}


def test_replicas_hold_what_one_of_them_alone_does(monkeypatch):
    """And each device has a clip of its own; gradients are what replicas exchange."""
    monkeypatch.setattr(sharding, "SMALL", 1)  # however small, weights are cut
    held, batches, remarks = [], [], []
    for text in ("2x2x1", "2x1", "4x1"):
        mesh, _ = training_devices(text, HARDWARE["h100"], NANO.num_heads)
        settings = ForcingConfig(**FORCING["task"], batch_size=clip_devices(mesh))
        config = NANO.replace(attention="chunked", **FORCING["model"])
        training = Training(DiT, config, GRID, settings, LoopConfig(num_steps=1000))
        (program,) = training_programs(training, mesh)
        held.append({name: placed_bytes(tree) for name, tree in program.held.items()})
        batches.append(program.arguments[1]["latent"].shape[0])
        remarks.append(summed_over_replicas(mesh, program.held["weights"]))
    assert held[0] == held[1] and batches == [4, 2, 4]
    assert held[2]["weights"] < 0.6 * held[0]["weights"]
    assert remarks[1] == () and "within the 2 devices" in remarks[0][0]
    assert "summed over 2 replicas" in remarks[0][0]


@pytest.mark.slow
def test_distillation_is_planned_with_its_own_updates():
    needs = plan_training(abstract_model(NANO_FOLDER), (4, 4), "2x2", HARDWARE["h100"], SECTIONS)
    generator, critic = needs.devices
    assert (generator.role, critic.role) == ("generator's update", "critic's update")
    assert needs.fits and generator.count == 4 and not generator.refused
    used = {name: figure.value for name, figure in generator.bytes.items()}
    assert used["frozen base"] > used["generator and critic"] > used["averaged generator"]
    # More is kept for the generator's blocks than one block's history, which heads share.
    assert used["gradients, activations, temporaries"] > needs.figures["block_history"].value


def test_what_is_kept_grows_with_clip_window_and_steps():
    config = NANO.replace(ring_blocks=3, num_layers=40)
    rollout = RolloutConfig(sigmas=(1.0, 0.8, 0.5, 0.0))
    literal = dataclasses.replace(rollout, cache="exit_only")
    kept, longer = (kept_bytes(config, GRID, rollout, latents) for latents in (9, 12))
    block = kept["block_history"]
    assert block == 2 * config.num_layers * 3 * 16 * config.width * 4
    # Three blocks' history and two of each earlier step; the critic's clip needs two of its own.
    assert kept["generator_kept"] == (3 + 2 * 2) * block
    assert kept["critic_kept"] == (2 + 2 * 2) * block == longer["critic_kept"]
    assert longer["generator_kept"] - kept["generator_kept"] == block
    # Without the earlier steps' rings, gradients need more than those.
    less, more = (kept_bytes(config, GRID, literal, latents) for latents in (9, 12))
    assert 3 * block < less["generator_kept"] < kept["generator_kept"]
    assert 2 * block < less["critic_kept"] < more["critic_kept"]


def test_the_published_size_needs_what_the_sums_say():
    """2.77 GB of keys and values per block, 16.2 GB for the critic's whole clip."""
    config = wan_s2v_14b(ring_blocks=5)
    rollout = RolloutConfig(sigmas=(1.0, 0.9375, 0.8333, 0.625, 0.0))
    literal = dataclasses.replace(rollout, cache="exit_only")
    kept, less = (kept_bytes(config, (50, 90), rollout, 21) for rollout in (rollout, literal))
    assert abs(kept["block_history"] / 1e9 - 2.765) < 0.01
    assert abs(less["critic_kept"] / 1e9 - 16.2) < 0.1
    assert abs(kept["critic_kept"] / 1e9 - (33.2 + 4 * 2.765)) < 0.1
    assert abs(less["generator_kept"] / 1e9 - (18.8 + 2.8)) < 0.3
    assert abs(kept["generator_kept"] / 1e9 - (33.2 + 7 * 2.765)) < 0.1
