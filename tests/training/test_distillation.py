import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar import testing
from jax_avatar.data.latents import random_clips
from jax_avatar.diffusion.sampling import Sampling
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.lora import add_adapter, init_adapter
from jax_avatar.models.network import flatten
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.training import distillation
from jax_avatar.training.distill_state import ClipBatch, DistillConfig
from jax_avatar.training.distillation import Distillation, rollout_inputs
from jax_avatar.training.rollout import exit_block, self_forcing
from jax_avatar.training.rollout_plan import RolloutConfig, RolloutPlan
from jax_avatar.training.run.loop import train
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.scores import score_gradient
from jax_avatar.training.stages.distill import DistillTask, DistillWeights
from jax_avatar.weights.files import load_json, load_weights, save_json
from jax_avatar.weights.folder import load_model

MODEL = testing.NANO.replace(framepack=False, num_layers=1, ring_blocks=2)
ROLLOUT = RolloutConfig(sigmas=(1.0, 0.8, 0.0), shift_max=20)
SETTINGS = DistillConfig(
    batch_size=2, latents=6, generator_every=2, critic_learning_rate=1e-3, ema_start=4,
    adapter_rank=2, adapter_alpha=4.0,
)  # fmt: skip
LOOP = LoopConfig(
    num_steps=2, learning_rate=1e-3, final_learning_rate=1.0, warmup_steps=0, betas=(0.0, 0.999),
    max_grad_norm=10.0, ema_decay=0.9, log_every=1, checkpoint_every=1,
)  # fmt: skip
KEY = jax.random.key(11)


def make_batch(seed=0, b=2, grid=(4, 4), config=MODEL):
    keys = jax.random.split(jax.random.key(seed), 3)
    reference = jax.random.normal(keys[0], (b, 1, *grid, 4))
    features = (b, 1, 24, config.audio_layers, config.audio_width)
    text = jax.random.normal(keys[2], (b, 2, config.text_width))
    features, row = jax.random.normal(keys[1], features), np.arange(b, dtype=np.int32)
    conditions = Conditions(
        text=text, null_text=jnp.zeros_like(text), reference=reference, audio=features,
        pose=reference,
    )  # fmt: skip
    return ClipBatch(conditions, row)


@functools.cache
def distillation_of():
    """The step's constants, and the base."""
    network = testing.make_network(MODEL)
    config = SETTINGS.adapted(MODEL)
    student, plan = testing.make_network(config).bind, RolloutPlan(config, ROLLOUT)
    return Distillation(student, network.bind, plan, SETTINGS, LOOP), network.params


@functools.cache
def compiled(role):
    setup, _ = distillation_of()
    return jax.jit(functools.partial(getattr(distillation, f"update_{role}"), setup))


def start():
    setup, base = distillation_of()
    adapters = [init_adapter(base, SETTINGS.adapter_rank, key) for key in jax.random.split(KEY)]
    return distillation.start(setup, *adapters)


def with_other_average(state):
    """At first the average is the weights, and nothing that moves it toward them would show."""
    return dataclasses.replace(state, ema=jax.tree.map(lambda p: p + 1, state.ema))


def update(role, state, batch=None):
    return compiled(role)(state, batch or make_batch(), KEY, distillation_of()[1])


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def is_same(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_an_update_of_one_network_leaves_the_other_alone():
    state = with_other_average(start())
    critic, told = update("critic", state)
    assert 0 < float(told["critic_update/attention"]) < float(told["critic_weight/attention"])
    assert_same(critic.generator, state.generator)
    assert_same(critic.ema, state.ema)
    assert not is_same(critic.critic, state.critic)
    assert (int(critic.step), int(critic.critic_updates), int(critic.generator_updates)) == (
        1,
        1,
        0,
    )

    both, metrics = update("generator", critic)
    assert_same(both.critic, critic.critic)
    assert_same(both.critic_optimiser, critic.critic_optimiser)
    assert not is_same(both.generator, critic.generator)
    assert (int(both.step), int(both.generator_updates)) == (1, 1)
    assert metrics["replay_error"] < 1e-5 and metrics["generator_norm"] > 0
    parts = [value for name, value in metrics.items() if name.startswith("generator_grad/")]
    np.testing.assert_allclose(np.linalg.norm(parts), metrics["generator_norm"], rtol=1e-5)
    assert metrics["ema_distance"] >= 0


def test_the_average_copies_when_it_starts_and_then_lags():
    state = dataclasses.replace(start(), step=jnp.int32(1))
    early, _ = update("generator", state)
    assert_same(early.ema, early.generator)
    assert not early.ema_started
    begun, _ = update("generator", dataclasses.replace(early, step=jnp.int32(3)))
    assert_same(begun.ema, begun.generator)
    assert begun.ema_started
    later, _ = update("generator", dataclasses.replace(begun, step=jnp.int32(5)))
    expected = jax.tree.map(lambda e, g: 0.9 * e + 0.1 * g, begun.ema, later.generator)
    for a, b in zip(jax.tree.leaves(later.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("role", ["generator", "critic"])
def test_what_is_not_finite_is_counted_and_changes_nothing(role):
    state, batch = with_other_average(start()), make_batch()
    audio = batch.conditions.audio.at[0, 0, 3].set(jnp.nan)
    broken = batch.conditions.with_audio(audio)
    after, _ = update(role, state, dataclasses.replace(batch, conditions=broken))
    assert after.guard.skipped.tolist() == [1, 0, 0]  # the clips are to blame
    for name in ("generator", "critic", "ema", "generator_optimiser", "critic_optimiser"):
        assert_same(getattr(after, name), getattr(state, name))
    assert int(after.generator_updates) == int(after.critic_updates) == 0


@pytest.mark.parametrize(
    ("dtype", "limit", "error", "is_taken"),
    [
        (jnp.float32, 0.0, 0.9e-3, True),
        (jnp.float32, 0.0, 1.1e-3, False),
        (jnp.bfloat16, 0.0, 0.9e-2, True),
        (jnp.bfloat16, 0.0, 1.1e-2, False),
        (jnp.float32, 0.2, 0.19, True),
        (jnp.bfloat16, 1e-4, 2e-4, False),
    ],
)
def test_a_replay_that_strays_changes_nothing(monkeypatch, dtype, limit, error, is_taken):
    setup, base = distillation_of()
    settings = dataclasses.replace(SETTINGS, replay_limit=limit)
    plan = RolloutPlan(MODEL.replace(dtype=dtype), ROLLOUT)
    setup, state = dataclasses.replace(setup, settings=settings, plan=plan), start()

    def gradient(bind, weights, *_):
        scores = {name: jnp.ones(2) for name in ("sigma", "critic", "teacher")}
        metrics = {"dmd_loss": jnp.float32(1), "scores": scores, "replay_error": jnp.float32(error)}
        return jax.tree.map(jnp.ones_like, weights), jnp.zeros((2, 6, 4, 4, 4)), metrics

    monkeypatch.setattr(distillation, "gradient_of", lambda plan: gradient)
    after, metrics = distillation.update_generator(setup, state, make_batch(), KEY, base)
    assert float(metrics["replay_error"]) == np.float32(error)
    assert is_same(after.generator, state.generator) != is_taken
    assert after.guard.skipped.tolist() == [0, 0, 0 if is_taken else 1]


def behind(state):
    """As after reviews that saw the critic lag."""
    return dataclasses.replace(state, watch=dataclasses.replace(state.watch, critic_steps=3))


@pytest.mark.parametrize(("settings", "count"), [({}, 1), ({"max_critic_steps": 10}, 3)])
def test_the_critic_learns_more_than_once_only_where_it_may(monkeypatch, settings, count):
    setup, base = distillation_of()
    setup = dataclasses.replace(setup, settings=dataclasses.replace(SETTINGS, **settings))

    def learn(setup, state, *_):
        return dataclasses.replace(state, critic_updates=state.critic_updates + 1), {}

    monkeypatch.setattr(distillation, "teach_critic", learn)
    state, _ = distillation.update_critic(setup, behind(start()), make_batch(), KEY, base)
    assert (int(state.critic_updates), int(state.step)) == (count, 1)


@pytest.mark.slow
def test_a_critic_that_lags_learns_several_times_in_a_step_on_other_clips():
    state, lagging = start(), behind(start())
    setup, base = distillation_of()
    settings = dataclasses.replace(SETTINGS, max_critic_steps=10)
    setup = dataclasses.replace(setup, settings=settings)
    patient = jax.jit(functools.partial(distillation.update_critic, setup))

    def update(role, state):
        return patient(state, make_batch(), KEY, base)

    once, first = update("critic", state)
    thrice, last = update("critic", lagging)
    assert (int(thrice.critic_updates), int(thrice.step)) == (3, 1)
    assert_same(thrice.generator, state.generator)
    assert not is_same(thrice.critic, once.critic)
    assert float(first["loss"]) != float(last["loss"])
    assert_same(update("critic", lagging)[0], thrice)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_fresh_adapters_agree_with_the_teacher_only_without_guidance(scale):
    settings = dataclasses.replace(SETTINGS, guidance_scale=scale)
    clips = jax.random.normal(KEY, (2, 6, 4, 4, 4))
    value, metrics = jax.jit(gradient_in(settings))(start().critic, distillation_of()[1], clips)
    assert bool(np.abs(value).max() > 0) == (scale != 1)
    np.testing.assert_array_equal(metrics["scores"]["critic"], metrics["scores"]["teacher"])


def gradient_in(settings):
    """`(critic's adapter, base, clips) -> gradient of the loss in the clips, metrics`."""
    setup, batch = distillation_of()[0], make_batch()

    def gradient(critic, base, clips):
        networks = setup.bind(base)(critic), setup.teacher(base)
        return score_gradient(*networks, clips, batch, KEY, settings, frames_per_block=3)

    return gradient


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_only_adapters_are_trained():
    """Critic, teacher, the blocks before their exit and all history are constants."""
    setup, base = distillation_of()
    state, clips = start(), jax.random.normal(KEY, (2, 6, 4, 4, 4))
    bind, plan = setup.bind(base), setup.plan

    def loss(critic, base):
        return gradient_in(SETTINGS)(critic, base, clips)[1]["dmd_loss"]

    value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(state.critic, base)
    assert value > 0 and largest(slopes) == 0

    one, draws = jax.tree.map(lambda leaf: leaf[0], rollout_inputs(setup, make_batch(), KEY))

    @jax.jit
    def roll(adapter):
        return self_forcing(bind(adapter), bind(adapter), one, draws, 1, plan)

    trace = roll(state.generator)

    def exit(adapter, trace):
        clean = exit_block(bind(adapter), trace, one, draws, 1, plan, 1)
        return jnp.sum(jnp.sin(clean))

    for_adapter, for_trace = jax.jit(jax.grad(exit, (0, 1)))(state.generator, trace)
    assert largest(for_trace) == 0 and largest(for_adapter) > 0
    paths = set(flatten(state.generator))
    assert set(flatten(for_adapter)) == paths and all(p.endswith(("/a", "/b")) for p in paths)


def test_fresh_adapters_change_nothing_at_all():
    setup, base = distillation_of()
    one, draws = jax.tree.map(lambda leaf: leaf[0], rollout_inputs(setup, make_batch(), KEY))

    def roll(network, params, config):
        plan = RolloutPlan(config, ROLLOUT)

        def run(params):
            net = network(params)
            return self_forcing(net, net, one, draws, 1, plan).clean

        return jax.jit(run)(params)

    params = setup.settings.bind(base)(start().generator)
    clips = [roll(setup.student, params, setup.plan.config), roll(setup.teacher, base, MODEL)]
    np.testing.assert_array_equal(*clips)


def make_task(model, rollout=None, **changes):
    testing.save_model(model)
    config = dataclasses.replace(MODEL, num_layers=testing.NANO.num_layers, ring_blocks=4)
    settings = dataclasses.replace(SETTINGS, **changes)
    weights = DistillWeights(str(model), str(model))
    clips = random_clips(3, 7, (4, 4), 4, (2, 6))
    rollout = dataclasses.replace(ROLLOUT, **(rollout or {}))
    return DistillTask(config, rollout, settings, weights, clips)


OTHER = {"sampler": "renoise", "cache": "exit_only", "refresh": "fixed", "refresh_sigma": 0.3}
OTHER |= {"sink_distance": (5, 9), "audio_context": "clip"}


@pytest.mark.parametrize("rank", [0, 2])
def test_the_exported_folder_is_a_model_with_the_student(tmp_path, rank):
    task = make_task(tmp_path / "model", adapter_rank=rank, rollout=OTHER)
    weights = jax.tree.map(lambda p: p + 0.01, task.start(LOOP, KEY).ema)
    task.export(weights, tmp_path / "out", {"step": 3})
    model = load_model(tmp_path / "out")
    for settings in (model.settings, StreamPlan.from_settings(model.settings, 0)):
        told = {name: getattr(settings, name) for name in Sampling.named()}
        assert told == {"sigmas": ROLLOUT.sigmas, **OTHER}
    assert ("lora" in load_json(tmp_path / "out" / "config.json")) == bool(rank)
    base, found = load_weights(tmp_path / "model", "dit")[0], flatten(model.dit.params)
    scaling = task.settings.adapter_fields["scaling"] if rank else 0
    expected = add_adapter(base, weights, scaling) if rank else weights
    for path, leaf in flatten(expected).items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-6)


@pytest.mark.slow
def test_the_loop_distils_and_resumes_bit_by_bit(tmp_path):
    def run(name, **changes):
        config = dataclasses.replace(LOOP, **changes)
        return train(make_task(tmp_path / "model"), config, tmp_path / name, progress=False)

    whole = run("whole")
    assert (int(whole.critic_updates), int(whole.generator_updates)) == (2, 1)
    assert int(run("cut", max_minutes=1e-9).step) == 1
    assert_same(run("cut"), whole)
    assert load_model(tmp_path / "cut").settings.sigmas == ROLLOUT.sigmas


def test_clips_are_cut_with_their_speech_and_differ_by_role(tmp_path):
    testing.save_model(tmp_path)
    clips = random_clips(3, 7, (4, 4), 4, (2, 6))
    made = DistillTask(MODEL, ROLLOUT, SETTINGS, DistillWeights(str(tmp_path)), clips)
    assert set(made.batches(0)) == {"critic"} and set(made.batches(1)) == {"critic", "generator"}
    # As it goes to other processes.
    assert_same(pickle.loads(pickle.dumps(made.source))(1), made.batches(1))
    assert_same(made.batches(1), made.batches(1))
    pairs = [made.batches(step) for step in (1, 3, 5, 7)]
    assert sum(is_same(pair["critic"], pair["generator"]) for pair in pairs) < 2
    given = made.batches(1)["critic"].conditions
    index = [np.abs(clips.reference - r).sum((1, 2, 3, 4)).argmin() for r in given.reference]
    for features, i in zip(given.audio[:, 0], index, strict=True):
        cuts = [clips.features[i, 4 * s : 4 * s + 24].astype(np.float32) for s in (0, 1)]
        assert any(np.array_equal(features, cut) for cut in cuts)


def test_parts_that_do_not_fit_are_named(tmp_path):
    testing.save_model(tmp_path)
    clips, weights = random_clips(3, 7, (4, 4), 4, (2, 6)), DistillWeights(str(tmp_path))
    with pytest.raises(ValueError, match=r"task\.latents=8: clips have 7"):
        settings = dataclasses.replace(SETTINGS, latents=8)
        DistillTask(MODEL, ROLLOUT, settings, weights, clips)
    content = load_json(tmp_path / "config.json")
    save_json(tmp_path / "config.json", content | {"dit": "portrait"})
    with pytest.raises(ValueError, match=r"task\.sigma_bounds asks PortraitDiT.* level 0\.02;"):
        DistillTask(MODEL, ROLLOUT, SETTINGS, weights, clips)
    settings = dataclasses.replace(SETTINGS, sigma_bounds=(0.1, 0.98))
    with pytest.raises(ValueError, match=r"rollout\.sigmas asks PortraitDiT.* level 0\.05;"):
        rollout = dataclasses.replace(ROLLOUT, sigmas=(1.0, 0.05, 0.0))
        DistillTask(MODEL, rollout, settings, weights, clips)
    save_json(tmp_path / "config.json", {"dit": "other"})
    with pytest.raises(ValueError, match=r"dit is of kind 'other', known are .*portrait"):
        DistillTask(MODEL, ROLLOUT, SETTINGS, weights, clips)
