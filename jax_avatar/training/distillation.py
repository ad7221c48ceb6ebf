"""One outer step of self-forcing distribution matching distillation, as a pure function.

every `generator_every` steps    generator makes clips, critic and teacher say where to go
every step                       generator makes other clips, critic learns to denoise them

    teacher = base            critic = base, adapter           generator = base, adapter

The base is frozen and one copy; an adapter lies beside it and is never merged in training. With
full fine-tuning, critic and generator are whole copies of the weights instead.

Source: Live Avatar (arXiv 2512.04677), Algorithms 1 and 2; Self-Forcing (arXiv 2506.08009).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Float

from jax_avatar.diffusion.flow import add_noise, clean_from_velocity
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.params import abstract, merge
from jax_avatar.models.sharding import constrain, constrain_params
from jax_avatar.shapes import Array, Latent, PyTree
from jax_avatar.training.distill_state import DistillConfig, DistillState, Told
from jax_avatar.training.dmd import (
    critic_loss,
    distillation_loss,
    draw_level,
    generator_gradient,
    guide,
    guide_apart,
)
from jax_avatar.training.rollout import (
    Clip,
    Generator,
    RolloutConfig,
    clip_gradient,
    draw,
    made_clips,
    roll_out,
)
from jax_avatar.training.run.accumulate import accumulate_gradients, clip_keys
from jax_avatar.training.run.guards import (
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
from jax_avatar.training.stages.validation import levels_in_bins

__all__ = ["Distiller", "check_levels", "make_distiller"]

_GENERATOR, _CRITIC = 0, 1  # roles, folded into the key


@dataclass(frozen=True)
class Distiller:
    """The step, for one transformer.

    Attributes:
        generator: structure, with adapters if there are any, size and rollout; also the critic's.
        teacher: structure of the transformer without adapters.
        settings: batches, scores and what is trained.
        loop: learning rate, betas, decay and clipping, of both optimisers.
        data: what monitors compare generated clips with.
    """

    generator: Generator
    teacher: Any
    settings: DistillConfig
    loop: LoopConfig
    data: ClipFigures | None = None

    def start(self, generator: PyTree, critic: PyTree) -> DistillState:
        """The state before the first step, from the weights or adapters to start with."""
        # Copies, since the state is donated and one buffer cannot be given away twice.
        generator, critic, ema = (
            jax.tree.map(lambda p: jnp.array(p, jnp.float32), tree)
            for tree in (generator, critic, generator)
        )
        for_generator, for_critic = map(make_optimiser, self._loops)
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
            watch=new_monitor(self.generator.config.latent_channels),
        )

    def is_generator_step(self, step: int) -> bool:
        """True if the generator is updated in step `step`, counted from 0."""
        return (step + 1) % self.settings.generator_every == 0

    def step(
        self, state: DistillState, batch: Mapping[str, Told], key: Array, base: PyTree
    ) -> tuple[DistillState, dict[str, Array]]:
        """One outer step.

        Args:
            state: before it.
            batch: "critic", and "generator" in steps that update the generator.
            key: of the run; the step's number is folded in here.
            base: the teacher's weights, frozen.

        Returns:
            The state after it, and metrics.
        """
        metrics = {}
        if "generator" in batch:
            state, metrics = self.update_generator(state, batch["generator"], key, base)
        state, more = self.update_critic(state, batch["critic"], key, base)
        return state, metrics | more

    def generator_slope(
        self, critic: PyTree, base: PyTree, made: Latent, told: Told, key: Array
    ) -> tuple[Latent, dict[str, Array]]:
        """Gradient of the distillation loss in the clips, and metrics.

        Among them are `scores`, for `add_scores`: noise level and errors of every clip.

        Args:
            critic: parameters of the critic's transformer.
            base: the teacher's.
            made: clips of the generator.
            told: what they were told.
            key: of the noise and its level.
        """
        settings = self.settings
        noise, sigma = self._noise(key, made, told.row)
        noisy = add_noise(made, noise, sigma)
        fake = _score(self.generator.graphdef, critic, noisy, sigma, told)
        cond = _score(self.teacher, base, noisy, sigma, told)
        guided = self._guided(base, cond, noisy, sigma, told)
        real = clean_from_velocity(noisy, guided, sigma)
        gradient = generator_gradient(
            made,
            clean_from_velocity(noisy, fake, sigma),
            real,
            normalizer=settings.normalizer,
            frames_per_block=self.generator.config.frames_per_block,
            limit=settings.gradient_limit,
        )
        loss, slope = jax.value_and_grad(distillation_loss)(made, gradient)
        metrics = {
            "dmd_loss": loss,
            "dmd_gradient": jnp.mean(jnp.abs(gradient)),
            "normalizer": jnp.mean(jnp.abs(made - real)),
            "scores": {
                "sigma": sigma.reshape(-1),
                "critic": _errors(fake, made, noise),
                "teacher": _errors(cond, made, noise),
            },
        }
        return slope, metrics

    def _guided(self, base, cond, noisy, sigma, told):
        """The teacher's velocity, guided where the settings say so."""
        settings = self.settings
        scale, text_scale = settings.guidance_scale, settings.text_guidance_scale
        if scale == 1 and text_scale in (0, 1):
            return cond
        # With the place of these zeros left open, jax 0.11 has the velocity wrong on 4x2 CPUs.
        silence = constrain(jnp.zeros_like(told.features), "data")

        def ask(**changes):
            without = dataclasses.replace(told, features=silence, **changes)
            return _score(self.teacher, base, noisy, sigma, without)

        def guided():
            if text_scale == 0:
                return guide(cond, ask(text=told.null_text), scale)
            silent = ask()
            null = silent if text_scale == 1 else ask(text=told.null_text)
            return guide_apart(cond, silent, null, speech_scale=scale, text_scale=text_scale)

        low, high = settings.guidance_bounds
        if (low, high) == (0, 1):
            return guided()
        is_guided = (low <= sigma) & (sigma <= high)
        # Without a clip in the band, the teacher is not asked.
        return jnp.where(is_guided, jax.lax.cond(is_guided.any(), guided, lambda: cond), cond)

    def update_generator(
        self, state: DistillState, told: Told, key: Array, base: PyTree
    ) -> tuple[DistillState, dict[str, Array]]:
        """The generator's part of a step; arguments as in `step`."""
        bind, keys = self.settings.bind(base), _keys(key, state.step, _GENERATOR)
        critic, exit_step = bind(state.critic), self._exit_step(keys[2])

        def measure(told):
            def score(made):
                return self.generator_slope(critic, base, made, told, keys[1])

            clips, draws = self._clips(told, keys[0])
            grads, made, metrics = clip_gradient(
                self.generator, bind, state.generator, clips, draws, exit_step, score
            )
            each = {"made": made, "scores": metrics.pop("scores")}
            if "replay_error" in metrics:
                each["replay_error"] = jnp.broadcast_to(metrics.pop("replay_error"), len(made))
            return constrain_params(grads), metrics, each

        grads, metrics, each = accumulate_gradients(measure, told, self.loop.accumulate)
        made, scores = each.pop("made"), each.pop("scores")
        largest = jax.tree.map(jnp.max, each)
        limit = self.settings.replay_limit_for(self.generator.config.dtype)
        is_replayed = largest.get("replay_error", 0.0) <= limit
        (optimiser, rate), _ = self._optimisers(state)
        cause, norm = check_update(
            metrics["dmd_loss"], grads, made, self.settings.clean_limit, is_replayed=is_replayed
        )
        moments, is_good = state.generator_optimiser, cause == 0
        new, moved, norms = _stepped(
            "generator_", optimiser, grads, moments, state.generator, cause, state.guard
        )
        starts = is_good & (state.step + 1 >= self.settings.ema_start)
        # Until averaging starts, and when it does, the average is the weights.
        decay = jnp.where(state.ema_started, self.loop.ema_decay, 0.0)
        state = dataclasses.replace(
            state,
            generator=new,
            generator_optimiser=moved,
            ema=_chosen(is_good, update_ema(state.ema, new, decay), state.ema),
            ema_started=state.ema_started | starts,
            generator_updates=state.generator_updates + is_good.astype(jnp.int32),
            guard=record_skip(state.guard, state.step, cause),
            watch=add_scores(state.watch, **scores, shift=self.settings.timestep_shift),
        )
        metrics |= {
            "generator_norm": norm,
            "generator_rate": rate * rate_factor(state.guard),
            "generator_exit": exit_step + 1,
            "largest_clean": jnp.max(jnp.abs(made)),
            "ema_distance": average_distance(state.ema, state.generator),
        }
        return constrain_params(state), metrics | norms | largest

    def update_critic(
        self, state: DistillState, told: Told, key: Array, base: PyTree
    ) -> tuple[DistillState, dict[str, Array]]:
        """The critic's part of a step, which it ends; arguments as in `step`.

        It learns `state.watch.critic_steps` times, always on new clips of the same conditions.
        """
        settings = self.settings

        def once(number, through):
            return self._teach_critic(through[0], told, jax.random.fold_in(key, number), base)

        if settings.max_critic_steps == 1:
            state, metrics = once(0, (state, None))
        else:
            _, shapes = jax.eval_shape(once, 0, (state, None))
            blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            times = state.watch.critic_steps
            state, metrics = jax.lax.fori_loop(0, times, once, (state, blank))
        every, most = settings.monitor_every, settings.max_critic_steps
        watch, figures = summarise(
            state.watch, state.step, self.data, every=every, max_critic_steps=most
        )
        metrics |= figures | guard_metrics(state.guard, state.step)
        metrics["generator_updates"] = state.generator_updates
        return dataclasses.replace(state, step=state.step + 1, watch=watch), metrics

    def critic_errors(
        self, student: PyTree, critic: PyTree, base: PyTree, told: Told, key: Array
    ) -> Float[Array, "b n"]:
        """The critic's error on clips of the last step, for every clip and bin of the noise level.

        Args:
            student: weights or adapter that makes the clips.
            critic: weights or adapter.
            base: the teacher's weights.
            told: what clips are told.
            key: of all chance.
        """
        bind, generator = self.settings.bind(base), self.generator
        clip_key, level_key, noise_key = jax.random.split(key, 3)
        clips, draws = self._clips(told, clip_key)
        last = jnp.int32(generator.settings.num_steps - 1)
        traces = roll_out(generator, bind(student), clips, draws, last, keeps_history=False)
        made = made_clips(traces)
        noise = jax.vmap(lambda key: jax.random.normal(key, made.shape[1:]))(
            clip_keys(noise_key, told.row)
        )

        def errors(level):
            noisy = add_noise(made, noise, level)
            sigma = jnp.full((len(made), 1, 1, 1, 1), level)
            return _errors(
                _score(generator.graphdef, bind(critic), noisy, sigma, told), made, noise
            )

        return jax.lax.map(errors, levels_in_bins(level_key)).T

    def _teach_critic(self, state, told, key, base):
        settings, generator = self.settings, self.generator
        bind, keys = settings.bind(base), _keys(key, state.step, _CRITIC)
        params, exit_step = bind(state.generator), self._exit_step(keys[2])

        def measure(told):
            clips, draws = self._clips(told, keys[0])
            traces = roll_out(generator, params, clips, draws, exit_step, keeps_history=False)
            made = made_clips(traces)
            made = jax.lax.stop_gradient(made)
            noise, sigma = self._noise(keys[1], made, told.row)
            noisy = add_noise(made, noise, sigma)

            def loss(critic):
                velocity = _score(generator.graphdef, bind(critic), noisy, sigma, told)
                return critic_loss(velocity, made, noise)

            value, grads = jax.value_and_grad(loss)(state.critic)
            return constrain_params(grads), {"loss": value}, (made, sigma.reshape(-1))

        grads, means, (made, sigma) = accumulate_gradients(measure, told, self.loop.accumulate)
        value = means["loss"]
        _, (optimiser, rate) = self._optimisers(state)
        cause, norm = check_update(value, grads, made, self.settings.clean_limit)
        moments, is_good = state.critic_optimiser, cause == 0
        new, moved, norms = _stepped(
            "critic_", optimiser, grads, moments, state.critic, cause, state.guard
        )
        is_final = exit_step == generator.settings.num_steps - 1
        frames = generator.config.frames_per_block
        state = dataclasses.replace(
            state,
            critic=new,
            critic_optimiser=moved,
            critic_updates=state.critic_updates + is_good.astype(jnp.int32),
            guard=record_skip(state.guard, state.step, cause),
            watch=add_clips(state.watch, made, is_final & is_good, frames),
        )
        metrics = {
            "loss": value,
            "critic_norm": norm,
            "critic_rate": rate * rate_factor(state.guard),
            "critic_exit": exit_step + 1,
        }
        shares = bin_shares(sigma, settings.timestep_shift)
        return constrain_params(state), metrics | norms | shares

    @property
    def _loops(self) -> tuple[LoopConfig, LoopConfig]:
        """Learning rates of generator and critic, over what their schedules count."""
        settings, loop = self.settings, self.loop
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
        self, state: DistillState
    ) -> list[tuple[optax.GradientTransformation, Float[Array, ""]]]:
        """Of generator and critic, each with its learning rate."""
        counts = (state.step, state.step)
        if self.settings.schedule_counts == "updates":
            counts = (state.generator_updates, state.critic_updates)
        return [
            (make_optimiser(loop, count), jnp.float32(learning_rate(loop)(count)))
            for loop, count in zip(self._loops, counts, strict=True)
        ]

    def _clips(self, told: Told, key: Array):
        """Conditions and chance, with a leading axis of clips before batches of one."""
        config = self.generator.config
        frames = (1, config.frames_per_block, *told.reference.shape[2:])
        pose = jnp.broadcast_to(told.pose, (len(told.pose), *frames[1:-1], told.pose.shape[-1]))
        clips = Clip(
            text=told.text[:, None],
            reference=told.reference[:, None],
            features=told.features[:, None],
            pose=pose[:, None],
        )
        blocks = self.settings.latents // config.frames_per_block

        def draw_one(key):
            return draw(key, self.generator.settings, blocks, frames)

        return clips, jax.vmap(draw_one)(clip_keys(key, told.row))

    def _exit_step(self, key):
        return jax.random.randint(key, (), 0, self.generator.settings.num_steps)

    def _noise(self, key, made, row):
        """Noise and its level, one per clip, ready to broadcast."""
        settings = self.settings

        def one(key):
            level_key, noise_key = jax.random.split(key)
            level = draw_level(level_key, settings.timestep_shift, settings.sigma_bounds)
            return jax.random.normal(noise_key, made.shape[1:]), level

        noise, sigma = jax.vmap(one)(clip_keys(key, row))
        return noise, sigma[:, None, None, None, None]


def make_distiller(
    network: type[DiT],
    model: DiTConfig,
    rollout: RolloutConfig,
    settings: DistillConfig,
    loop: LoopConfig,
    data: ClipFigures | None = None,
) -> Distiller:
    """The step for a transformer of some size.

    Args:
        network: its class.
        model: its size, without adapters.
        rollout: how the generator makes clips.
        settings: batches, scores and what is trained.
        loop: of both optimisers.
        data: what monitors compare generated clips with.
    """
    check_levels(network, rollout, settings)
    adapted = settings.adapted(model)
    teacher, student = (
        abstract(lambda size=size: network(size, rngs=nnx.Rngs(0)))[0] for size in (model, adapted)
    )
    return Distiller(Generator(student, adapted, rollout), teacher, settings, loop, data)


def check_levels(network: type[DiT], rollout: RolloutConfig, settings: DistillConfig) -> None:
    """Checks that neither the student nor the scores are asked for levels below the network's.

    Raises:
        ValueError: they are.
    """
    network.check_level("rollout.sigmas", rollout.sigmas[-2])
    network.check_level("task.sigma_bounds", settings.sigma_bounds[0])


def _score(graphdef, params, noisy, sigma, told):
    """Velocity of whole clips, all frames seeing all others."""
    timestep = jnp.broadcast_to(1000 * sigma[:, :, 0, 0, 0], noisy.shape[:2])
    conditions = Conditions(
        text=told.text, reference=told.reference, pose=told.pose, audio=told.features
    )
    return merge(graphdef, params).bidirectional(noisy, timestep, conditions)


def _keys(key, step, role):
    """Keys of the clips' chance, of the scores' and of the exit step."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), role), 3)


def _errors(velocity, made, noise):
    """The critic's loss, clip by clip."""
    return jax.vmap(lambda *clip: critic_loss(*(part[None] for part in clip)))(
        velocity, made, noise
    )


def _stepped(role, optimiser, grads, moments, weights, cause, guard):
    updates, moved = optimiser.update(grads, moments, weights)
    updates = scaled_update(updates, guard)
    new = _chosen(cause == 0, optax.apply_updates(weights, updates), weights)
    norms = step_norms(role, grads, updates, new, cause)
    return new, _chosen(cause == 0, moved, moments), norms


def _chosen(is_good, new, old):
    return jax.tree.map(lambda n, o: jnp.where(is_good, n, o), new, old)
