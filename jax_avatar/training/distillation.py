"""One outer step of self-forcing distribution matching distillation, as pure functions.

every `generator_every` steps    generator makes clips, critic and teacher say where to go
every step                       generator makes other clips, critic learns to denoise them

    teacher = base            critic = base, adapter           generator = base, adapter

The base is frozen and one copy; an adapter lies beside it and is never merged in training. With
full fine-tuning, critic and generator are whole copies of the weights instead.

Source: Live Avatar (arXiv 2512.04677), Algorithms 1 and 2; Self-Forcing (arXiv 2506.08009).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from jax_avatar.diffusion.flow import add_noise
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network
from jax_avatar.models.sharding import constrain_params, on_mesh
from jax_avatar.shapes import Array, IntScalar, PyTree
from jax_avatar.training.blockwise import gradient_of
from jax_avatar.training.distill_state import ClipBatch, DistillConfig, DistillState
from jax_avatar.training.dmd import critic_loss
from jax_avatar.training.rollout import generated_clips, self_forcing_batch
from jax_avatar.training.rollout_plan import (
    RandomDraws,
    RolloutConfig,
    RolloutPlan,
    sample_randomness,
)
from jax_avatar.training.run.accumulate import accumulate_gradients, clip_keys
from jax_avatar.training.run.guards import (
    Guard,
    check_update,
    guard_metrics,
    new_guard,
    rate_factor,
    record_skip,
)
from jax_avatar.training.run.monitors import (
    ClipFigures,
    add_clips,
    add_scores,
    bin_shares,
    new_monitor,
    summarise,
)
from jax_avatar.training.run.norms import average_distance, step_norms
from jax_avatar.training.run.state import scaled_update, update_ema
from jax_avatar.training.run.step import LoopConfig, learning_rate, make_optimiser
from jax_avatar.training.scores import clip_errors, clip_velocity, sample_noise, score_gradient
from jax_avatar.training.stages.validation import levels_in_bins

__all__ = [
    "Distillation",
    "check_levels",
    "compiled_updates",
    "critic_errors",
    "make_distillation",
    "rollout_inputs",
    "sample_exit_step",
    "start",
    "update_critic",
    "update_generator",
]

_GENERATOR, _CRITIC = 0, 1  # roles, folded into the key

Metrics = dict[str, Array]


@dataclass(frozen=True)
class Distillation:
    """Constants of the step, for one transformer.

    Attributes:
        student: parameters -> transformer, with adapters if there are any; also the critic's.
        teacher: parameters -> transformer without adapters.
        plan: how the generator makes clips.
        settings: batches, scores and what is trained.
        loop: learning rate, betas, decay and clipping, of both optimisers.
        data: what monitors compare generated clips with.
    """

    student: Callable[[PyTree], Any]
    teacher: Callable[[PyTree], Any]
    plan: RolloutPlan
    settings: DistillConfig
    loop: LoopConfig
    data: ClipFigures | None = None

    def bind(self, base: PyTree) -> Callable[[PyTree], Any]:
        """Returns `weights or adapter -> transformer`, of generator and critic."""
        params_of = self.settings.bind(base)
        return lambda weights: self.student(params_of(weights))


def make_distillation(
    network: type[DiT],
    model: DiTConfig,
    rollout: RolloutConfig,
    settings: DistillConfig,
    loop: LoopConfig,
    data: ClipFigures | None = None,
) -> Distillation:
    """The step's constants for a transformer of some size.

    Args:
        network: its class.
        model: its size, without adapters.
        rollout: how the generator makes clips.
        settings: batches, scores and what is trained.
        loop: of both optimisers.
        data: what monitors compare generated clips with.

    Raises:
        ValueError: as of `check_levels`.
    """
    check_levels(network, rollout, settings)
    adapted = settings.adapted(model)
    teacher, student = (
        Network.abstract(network, size).without_params().bind for size in (model, adapted)
    )
    return Distillation(student, teacher, RolloutPlan(adapted, rollout), settings, loop, data)


def check_levels(network: type[DiT], rollout: RolloutConfig, settings: DistillConfig) -> None:
    """Checks that neither the student nor the scores are asked for levels below the network's.

    Raises:
        ValueError: they are.
    """
    network.check_level("rollout.sigmas", rollout.sigmas[-2])
    network.check_level("task.sigma_bounds", settings.sigma_bounds[0])


def start(setup: Distillation, generator: PyTree, critic: PyTree) -> DistillState:
    """The state before the first step, from the weights or adapters to start with."""
    # Copies, since the state is donated and one buffer cannot be given away twice.
    generator, critic, ema = (
        jax.tree.map(lambda p: jnp.array(p, jnp.float32), tree)
        for tree in (generator, critic, generator)
    )
    for_generator, for_critic = map(make_optimiser, _loops(setup))
    return DistillState(
        step=jnp.int32(0),
        generator=generator,
        critic=critic,
        ema=ema,
        ema_started=jnp.array(False),
        generator_optimiser=for_generator.init(generator),
        critic_optimiser=for_critic.init(critic),
        generator_updates=jnp.int32(0),
        critic_updates=jnp.int32(0),
        guard=new_guard(),
        watch=new_monitor(setup.plan.config.latent_channels),
    )


def compiled_updates(
    setup: Distillation, mesh: Mesh | None = None
) -> Mapping[str, Callable[..., tuple[DistillState, Metrics]]]:
    """`(state, batch, key, base) -> (state, metrics)` of "generator" and "critic", in their order.

    Together they are a step, in two programs, since most steps leave the generator out. The state
    is donated.
    """
    updates = {"generator": update_generator, "critic": update_critic}
    return {
        role: jax.jit(on_mesh(functools.partial(update, setup), mesh), donate_argnums=0)
        for role, update in updates.items()
    }


def update_generator(
    setup: Distillation, state: DistillState, batch: ClipBatch, key: Array, base: PyTree
) -> tuple[DistillState, Metrics]:
    """The generator's part of a step.

    Args:
        setup: constants.
        state: before it.
        batch: conditions of the clips to generate.
        key: of the run; the step's number is folded in here.
        base: the teacher's weights, frozen.
    """
    settings, plan = setup.settings, setup.plan
    keys = _keys(key, state.step, _GENERATOR)
    exit_step = sample_exit_step(keys.exit, plan)

    def measure(batch):
        return _distillation_gradient(setup, state, batch, keys, exit_step, base)

    grads, metrics, each = accumulate_gradients(measure, batch, setup.loop.accumulate)
    clips, scores = each.pop("clips"), each.pop("scores")
    largest = jax.tree.map(jnp.max, each)
    is_replayed = largest.get("replay_error", 0.0) <= settings.replay_limit_for(plan.config.dtype)
    (optimiser, rate), _ = _optimisers(setup, state)
    cause, norm = check_update(
        metrics["dmd_loss"], grads, clips, settings.clean_limit, is_replayed=is_replayed
    )
    is_good = cause == 0
    moments = state.generator_optimiser
    new, moments, norms = _guarded_update(
        "generator_", optimiser, grads, moments, state.generator, cause, state.guard
    )
    starts = is_good & (state.step + 1 >= settings.ema_start)
    # Until averaging starts, and when it does, the average is the weights.
    decay = jnp.where(state.ema_started, setup.loop.ema_decay, 0.0)
    state = dataclasses.replace(
        state,
        generator=new,
        generator_optimiser=moments,
        ema=_where_tree(is_good, update_ema(state.ema, new, decay), state.ema),
        ema_started=state.ema_started | starts,
        generator_updates=state.generator_updates + is_good.astype(jnp.int32),
        guard=record_skip(state.guard, state.step, cause),
        watch=add_scores(state.watch, **scores, shift=settings.timestep_shift),
    )
    metrics |= {
        "generator_norm": norm,
        "generator_rate": rate * rate_factor(state.guard),
        "generator_exit": exit_step + 1,
        "largest_clean": jnp.max(jnp.abs(clips)),
        "ema_distance": average_distance(state.ema, state.generator),
    }
    return constrain_params(state), metrics | norms | largest


def _distillation_gradient(setup, state, batch, keys, exit_step, base):
    """Gradient of the distillation loss in the generator, means, and values of each clip."""
    bind, teacher, plan = setup.bind(base), setup.teacher(base), setup.plan
    critic, frames = bind(state.critic), plan.config.frames_per_block

    def score(clips):
        return score_gradient(
            critic, teacher, clips, batch, keys.scores, setup.settings, frames_per_block=frames
        )

    inputs, gradient = rollout_inputs(setup, batch, keys.clips), gradient_of(plan)
    grads, clips, metrics = gradient(bind, state.generator, *inputs, exit_step, plan, score)
    each = {"clips": clips, "scores": metrics.pop("scores")}
    if "replay_error" in metrics:
        each["replay_error"] = jnp.broadcast_to(metrics.pop("replay_error"), len(clips))
    return constrain_params(grads), metrics, each


def update_critic(
    setup: Distillation, state: DistillState, batch: ClipBatch, key: Array, base: PyTree
) -> tuple[DistillState, Metrics]:
    """The critic's part of a step, which it ends; arguments as of `update_generator`.

    It learns `state.watch.critic_steps` times, always on new clips of the same conditions.
    """
    settings = setup.settings

    def once(number, through):
        return teach_critic(setup, through[0], batch, jax.random.fold_in(key, number), base)

    if settings.max_critic_steps == 1:
        state, metrics = once(0, (state, None))
    else:
        _, shapes = jax.eval_shape(once, 0, (state, None))
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        times = state.watch.critic_steps
        state, metrics = jax.lax.fori_loop(0, times, once, (state, blank))
    every, most = settings.monitor_every, settings.max_critic_steps
    watch, figures = summarise(
        state.watch, state.step, setup.data, every=every, max_critic_steps=most
    )
    metrics |= figures | guard_metrics(state.guard, state.step)
    metrics["generator_updates"] = state.generator_updates
    return dataclasses.replace(state, step=state.step + 1, watch=watch), metrics


def teach_critic(setup, state, batch, key, base):
    """One update of the critic on new clips; arguments as of `update_generator`."""
    settings, plan = setup.settings, setup.plan
    bind, keys = setup.bind(base), _keys(key, state.step, _CRITIC)
    net, exit_step = bind(state.generator), sample_exit_step(keys.exit, plan)

    def measure(batch):
        inputs = rollout_inputs(setup, batch, keys.clips)
        traces = self_forcing_batch(net, net, *inputs, exit_step, plan, keeps_history=False)
        clips = jax.lax.stop_gradient(generated_clips(traces))
        noise, sigma = sample_noise(keys.scores, clips, batch.row, settings)
        noisy = add_noise(clips, noise, sigma)

        def loss(critic):
            velocity = clip_velocity(bind(critic), noisy, sigma, batch.conditions)
            return critic_loss(velocity, clips, noise)

        value, grads = jax.value_and_grad(loss)(state.critic)
        return constrain_params(grads), {"loss": value}, (clips, sigma.reshape(-1))

    grads, means, (clips, sigma) = accumulate_gradients(measure, batch, setup.loop.accumulate)
    value = means["loss"]
    _, (optimiser, rate) = _optimisers(setup, state)
    cause, norm = check_update(value, grads, clips, settings.clean_limit)
    is_good = cause == 0
    moments = state.critic_optimiser
    new, moments, norms = _guarded_update(
        "critic_", optimiser, grads, moments, state.critic, cause, state.guard
    )
    is_final, frames = exit_step == plan.settings.num_steps - 1, plan.config.frames_per_block
    state = dataclasses.replace(
        state,
        critic=new,
        critic_optimiser=moments,
        critic_updates=state.critic_updates + is_good.astype(jnp.int32),
        guard=record_skip(state.guard, state.step, cause),
        watch=add_clips(state.watch, clips, is_final & is_good, frames),
    )
    metrics = {
        "loss": value,
        "critic_norm": norm,
        "critic_rate": rate * rate_factor(state.guard),
        "critic_exit": exit_step + 1,
    }
    shares = bin_shares(sigma, settings.timestep_shift)
    return constrain_params(state), metrics | norms | shares


def critic_errors(
    setup: Distillation, student: PyTree, critic: PyTree, base: PyTree, batch: ClipBatch, key: Array
) -> Float[Array, "b n"]:
    """The critic's error on clips of the last step, for every clip and bin of the noise level.

    Args:
        setup: constants.
        student: weights or adapter that generates the clips.
        critic: weights or adapter.
        base: the teacher's weights.
        batch: conditions of the clips.
        key: of all random numbers.
    """
    bind, plan = setup.bind(base), setup.plan
    clip_key, level_key, noise_key = jax.random.split(key, 3)
    inputs = rollout_inputs(setup, batch, clip_key)
    net, last = bind(student), jnp.int32(plan.settings.num_steps - 1)
    traces = self_forcing_batch(net, net, *inputs, last, plan, keeps_history=False)
    clips = generated_clips(traces)
    noise = jax.vmap(lambda key: jax.random.normal(key, clips.shape[1:]))(
        clip_keys(noise_key, batch.row)
    )

    def errors(level):
        noisy = add_noise(clips, noise, level)
        sigma = jnp.full((len(clips), 1, 1, 1, 1), level)
        velocity = clip_velocity(bind(critic), noisy, sigma, batch.conditions)
        return clip_errors(velocity, clips, noise)

    return jax.lax.map(errors, levels_in_bins(level_key)).T


def rollout_inputs(
    setup: Distillation, batch: ClipBatch, key: Array
) -> tuple[Conditions, RandomDraws]:
    """Conditions and random numbers, with a leading axis of clips before batches of one."""
    plan = setup.plan
    blocks = setup.settings.latents // plan.config.frames_per_block
    block = (1, plan.config.frames_per_block, *batch.conditions.reference.shape[2:])

    def sample(key):
        return sample_randomness(key, plan.settings, blocks, block)

    conditions = jax.tree.map(lambda leaf: leaf[:, None], batch.conditions)
    return conditions, jax.vmap(sample)(clip_keys(key, batch.row))


def sample_exit_step(key: Array, plan: RolloutPlan) -> IntScalar:
    """The exit, one of the denoising steps, of all clips of a step."""
    return jax.random.randint(key, (), 0, plan.settings.num_steps)


class _Keys(NamedTuple):
    clips: Array
    scores: Array
    exit: Array


def _keys(key, step, role):
    """Keys of the clips' random numbers, of the scores' and of the exit step."""
    return _Keys(*jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), role), 3))


def _loops(setup: Distillation) -> tuple[LoopConfig, LoopConfig]:
    """Learning rates of generator and critic, over what their schedules count."""
    settings, loop = setup.settings, setup.loop
    critic = dataclasses.replace(
        loop,
        learning_rate=settings.critic_learning_rate,
        schedule=settings.critic_schedule or loop.schedule,
    )
    if settings.schedule_counts == "updates":
        updates = loop.num_steps // settings.generator_every
        loop = dataclasses.replace(loop, num_steps=max(updates, loop.warmup_steps + 1))
    return loop, critic


def _optimisers(
    setup: Distillation, state: DistillState
) -> list[tuple[optax.GradientTransformation, Float[Array, ""]]]:
    """Optimisers of generator and critic, each with its learning rate."""
    counts = (state.step, state.step)
    if setup.settings.schedule_counts == "updates":
        counts = (state.generator_updates, state.critic_updates)
    return [
        (make_optimiser(loop, count), jnp.float32(learning_rate(loop)(count)))
        for loop, count in zip(_loops(setup), counts, strict=True)
    ]


def _guarded_update(
    role: str,
    optimiser: optax.GradientTransformation,
    grads: PyTree,
    moments: PyTree,
    weights: PyTree,
    cause: Array,
    guard: Guard,
) -> tuple[PyTree, PyTree, Metrics]:
    """New weights and moments, the old ones if there is a cause to skip; and the norms."""
    updates, moved = optimiser.update(grads, moments, weights)
    updates = scaled_update(updates, guard)
    new = _where_tree(cause == 0, optax.apply_updates(weights, updates), weights)
    norms = step_norms(role, grads, updates, new, cause)
    return new, _where_tree(cause == 0, moved, moments), norms


def _where_tree(is_good: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(is_good, n, o), new, old)
