"""Stages read their folders, cut their batches and sample as their settings say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.latents import random_clips
from jax_avatar.diffusion.schedule import few_step_schedule
from jax_avatar.models.network import Network, flatten
from jax_avatar.training.stages import build as stages
from jax_avatar.training.stages.distill import DistillTask, DistillWeights
from jax_avatar.training.teacher import SamplerConfig, make_sampler
from jax_avatar.weights.fields import plain_fields
from jax_avatar.weights.files import load_weights, save_weights
from tests.training.test_distillation import LOOP, ROLLOUT, SETTINGS

MODEL = testing.NANO.replace(framepack=False)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models whose weights are all alike within a network and differ between folders."""
    made = {}
    for value, name in enumerate(("model", "teacher", "student", "vae", "speech"), 1):
        folder = made[name] = tmp_path_factory.mktemp(name)
        testing.save_model(folder)
        for network in ("dit", "vae", "speech"):
            params, config, _ = load_weights(folder, network)
            params = jax.tree.map(lambda leaf, value=value: np.full_like(leaf, value), params)
            save_weights(folder, network, params, config)
    return made


def value_of(params):
    """The one value of all weights."""
    (value,) = {float(v) for leaf in flatten(params).values() for v in np.unique(leaf)}
    return value


def distil(weights, **changes):
    settings = dataclasses.replace(SETTINGS, adapter_rank=0, **changes)
    clips = random_clips(5, 7, testing.GRID, 4, (2, 6))
    return DistillTask(MODEL, ROLLOUT, settings, weights, clips)


def test_distillation_reads_each_network_from_its_folder(folders, tmp_path):
    weights = {name: str(folders[name]) for name in ("model", "teacher", "student")}
    task = distil(DistillWeights(**weights))
    state = task.start(LOOP, KEY)
    assert [value_of(p) for p in (task.base.on(), state.critic, state.generator)] == [2, 2, 3]
    task.export(state.ema, tmp_path, {})
    assert value_of(load_weights(tmp_path, "dit")[0]) == 3
    assert value_of(load_weights(tmp_path, "vae")[0]) == 1
    state = distil(DistillWeights(**{**weights, "student": ""})).start(LOOP, KEY)
    assert value_of(state.generator) == 2


def test_a_batch_of_distillation_has_as_many_clips_as_long_as_told(folders):
    task = distil(DistillWeights(str(folders["model"])), batch_size=4, latents=3)
    batch = task.batches(SETTINGS.generator_every - 1)
    assert task.batch_size == 4 and set(batch) == {"critic", "generator"}
    for clips in batch.values():
        assert clips.conditions.audio.shape[:3] == (4, 1, 12)
        np.testing.assert_array_equal(clips.row, np.arange(4))
    assert len(task.batches(0, np.arange(2))["critic"].row) == 2


def test_the_clips_of_a_role_are_those_of_the_seed(folders):
    weights = DistillWeights(str(folders["model"]))
    clips = random_clips(6, 7, testing.GRID, 4, (2, 6))

    def portraits(seed, role):
        task = DistillTask(MODEL, ROLLOUT, SETTINGS, weights, clips, seed=seed)
        steps = [SETTINGS.generator_every * n - 1 for n in (1, 2, 3)]
        return np.stack([task.batches(step)[role].conditions.reference for step in steps])

    one = portraits(1, "critic")
    np.testing.assert_array_equal(one, portraits(1, "critic"))
    for other in (portraits(2, "critic"), portraits(1, "generator")):
        assert not np.array_equal(one, other)


def test_flow_matching_reads_each_network_from_its_folder(folders, tmp_path, monkeypatch):
    """VAE and speech encoder that encode are those that are exported."""
    asked = []

    def load_latents(settings, split):
        asked.append(settings["weights"])
        return random_clips(3, 7, testing.GRID, 4, (2, 6))

    monkeypatch.setattr(stages, "load_latents", load_latents)
    weights = {
        **{name: str(folders[name]) for name in ("model", "vae", "speech")},
        "start": str(folders["student"]),
    }
    fields = plain_fields(MODEL)
    settings = {
        "stage": "diffusion_forcing", "seed": 3, "fps": 16, "data": "", "latents": "",
        "weights": weights, "model": fields, "task": {"batch_size": 2, "latents": 6},
        "loop": {"num_steps": 2, "warmup_steps": 0},
    }  # fmt: skip
    build, loop = stages.build_stage(settings)
    task = build()
    assert loop.seed == task.seed == 3
    assert asked == [{"vae": weights["vae"], "speech": weights["speech"]}]
    params = task.init(KEY)
    assert value_of(params) == 3
    task.export(params, tmp_path, {})
    found = [value_of(load_weights(tmp_path, name)[0]) for name in ("dit", "vae", "speech")]
    assert found == [3, 4, 5]


@pytest.mark.parametrize(("num_steps", "shift", "seed"), [(3, 2.0, 7), (5, 4.0, 8)])
def test_a_teacher_samples_with_its_steps_shift_and_seed(num_steps, shift, seed):
    """With the noise level as velocity a clip is its noise and the sum of steps times levels."""

    class Level(Network):
        smallest_sigma = 0.0

        def bind(self, params):
            return self

        def bidirectional(self, noisy, timestep, conditions):
            return jnp.broadcast_to(timestep[:, :1, None, None, None] / 1000, noisy.shape)

    settings = SamplerConfig(num_steps=num_steps, shift=shift, guidance=1.0, seed=seed)
    reference, features = jnp.zeros((2, 1, 4, 4, 4)), jnp.zeros((2, 1, 12, 2, 6))
    clip = make_sampler(Level({}, None, MODEL), settings)({}, reference, features)
    even = np.linspace(1, 0, num_steps + 1)
    sigmas = shift * even / (1 + (shift - 1) * even)
    np.testing.assert_allclose(sigmas, few_step_schedule(num_steps, shift).sigmas, atol=1e-6)
    noise = jax.random.normal(jax.random.key(seed), (2, 3, 4, 4, 4))
    moved = np.sum(np.diff(sigmas) * sigmas[:-1])
    np.testing.assert_allclose(clip, noise + moved, atol=1e-5)
