"""A training plan is made of the real gradient step."""

import dataclasses

import jax

from jax_avatar.planning.hardware import HARDWARE
from jax_avatar.planning.programs import abstract_model
from jax_avatar.planning.training import plan_training
from tests.nano import GRID
from tests.planning.test_stream import NANO


def test_the_state_is_spread_and_what_is_not_done_yet_is_said():
    # Framepack needs motion latents, which this training does not use.
    model = abstract_model(NANO | {"dit": NANO["dit"] | {"framepack": False}})
    count = sum(leaf.size for leaf in jax.tree.leaves(model.dit.params))
    needs = plan_training(model, GRID, 1, HARDWARE["h200"])
    used = {name: figure.value for name, figure in needs.devices[0].bytes.items()}
    assert used["weights"] == used["averaged weights"] == 4 * count
    assert 8 * count <= used["optimiser"] < 8.1 * count
    assert used["gradients, activations, temporaries"] > 4 * count
    assert needs.fits and dataclasses.asdict(needs)["fps"] == 0
    assert not any("runs on one device" in text for text in needs.remarks)


def test_too_large_a_state_asks_for_more_devices():
    model = abstract_model(NANO | {"dit": NANO["dit"] | {"framepack": False}})
    small = dataclasses.replace(HARDWARE["h100"], memory_gb=1e-6)
    needs = plan_training(model, GRID, 2, small)
    assert not needs.fits and needs.advice[0].startswith("--mesh ")
    assert any("runs on one device" in text for text in needs.remarks)
