"""Self-forcing: the generator denoises a clip on its own past, as a stream would.

    block i:  noise --step 1--> .. --step m - 1--> x~_i --step m--> X_i
              each step sees the sink and its own history of blocks i - w .. i - 1

Only step m, the exit, is differentiated: `x~_i` and all history are constants. So the gradient of
a loss of the clip is a sum over blocks, and Algorithm 2 makes it from one block at a time.

Source: Live Avatar (arXiv 2512.04677), Algorithms 1 and 2; Self-Forcing (arXiv 2506.08009).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_avatar.diffusion.flow import clean_from_velocity
from jax_avatar.diffusion.sampling import Sampling, noised
from jax_avatar.diffusion.schedule import few_step_schedule
from jax_avatar.diffusion.step import move
from jax_avatar.models.cache import Sink, frame_table, position_in
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.params import merge
from jax_avatar.models.sharding import clip_axes, constrain_params
from jax_avatar.models.speech.tokens import EARLIER_FRAMES
from jax_avatar.shapes import Array, IntScalar, Latent, PyTree

__all__ = [
    "Clip",
    "Draws",
    "Generator",
    "RolloutConfig",
    "Trace",
    "clip_gradient",
    "draw",
    "joined",
    "made_clips",
    "roll_out",
]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Sampling):
    """Settings of the generator's rollout in training.

    The settings of `Sampling` are stored with the student, which is streamed with the same; those
    here are of training alone.

    Attributes:
        kv_noise: noise added to keys and values when they are written, relative to their size.
        kv_noise_on: "k", "v" or "both".
        kv_noise_sink: add it to the sink, too.
        sink_distance_per: "call", drawn for every block and evaluation, or "clip".
        shift_max: clips start at a latent frame drawn from 0 to this.
        gradient: "blocks", one block at a time (Algorithm 2), or "clip", through the whole rollout
            (Algorithm 1); the same gradient, more memory.
    """

    sigmas: Sequence[float] | str = few_step_schedule(4).sigmas
    kv_noise: float = 0.0
    kv_noise_on: str = "both"
    kv_noise_sink: bool = False
    sink_distance_per: str = "call"
    shift_max: int = 1003
    gradient: str = "blocks"

    SECTION = "rollout."
    CHOICES = Sampling.CHOICES | {
        "kv_noise_on": ("k", "v", "both"),
        "sink_distance_per": ("call", "clip"),
        "gradient": ("blocks", "clip"),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.kv_noise < 0 or self.shift_max < 0:
            raise ValueError(
                f"rollout.kv_noise {self.kv_noise} and rollout.shift_max {self.shift_max} must not "
                "be negative."
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clip:
    """Conditions of a clip.

    Attributes:
        text: prompt states, `b p f`.
        reference: the portrait's latent, `b 1 h w c`.
        features: speech features, four video frames per latent, `b u T k a`.
        pose: pose latents of one block, `b t h w c`.
    """

    text: Any
    reference: Any
    features: Any
    pose: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """All random numbers of a clip, drawn up front: Algorithm 2's second pass needs the same."""

    noise: Any  # N b t h w c, where the blocks start
    distance: Any  # N T+1, of the reference, per block and step; the last is the refresh's
    first_frame: Any  # latent frame of block 0
    renoise_key: Any
    history_key: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """Result of a rollout: the clip and the inputs of its exit steps."""

    start: Any  # N b t h w c, x~: the blocks before their exit step
    clean: Any  # N b t h w c, X: the blocks after it
    key: Any  # N l b n m e, history as written, rotated
    value: Any  # N l b n m e
    sink: Sink


def draw(key: Array, settings: RolloutConfig, num_blocks: int, shape: tuple[int, ...]) -> Draws:
    """Draws the chance of one clip.

    Args:
        key: of this clip, role and step; nothing else decides.
        settings: ranges.
        num_blocks: blocks of the clip.
        shape: of a block, `b t h w c`.
    """
    keys = jax.random.split(key, 5)
    low, high = settings.sink_distance
    table = (num_blocks, settings.num_steps + 1)
    drawn = table if settings.sink_distance_per == "call" else (1, 1)
    distance = jax.random.randint(keys[1], drawn, low, high + 1)
    return Draws(
        noise=jax.random.normal(keys[0], (num_blocks, *shape)),
        distance=jnp.broadcast_to(distance, table),
        first_frame=jax.random.randint(keys[2], (), 0, settings.shift_max + 1),
        renoise_key=keys[3],
        history_key=keys[4],
    )


def joined(blocks: Array) -> Latent:
    """`[N b t h w c]` -> the clip `[b (N t) h w c]`."""
    n, b, t = blocks.shape[:3]
    return jnp.moveaxis(blocks, 0, 1).reshape(b, n * t, *blocks.shape[3:])


@dataclass(frozen=True)
class Generator:
    """The transformer as a maker of clips; weights are an argument of what it does.

    Attributes:
        graphdef: structure of the transformer.
        config: its size; `ring_blocks - 1` blocks of the past are seen.
        settings: of the rollout.
    """

    graphdef: Any
    config: DiTConfig
    settings: RolloutConfig

    def rollout(
        self,
        params: PyTree,
        clip: Clip,
        draws: Draws,
        exit_step: IntScalar,
        *,
        keeps_history: bool = True,
    ) -> Trace:
        """Makes a clip (pass F; with a gradient, Algorithm 1).

        Args:
            params: of the generator. Only the exit steps are differentiated in them.
            clip: what it is told.
            draws: its chance.
            exit_step: 0 for the first, pure-noise step; the same for all blocks.
            keeps_history: of all blocks, for pass B; else only of the last that a block sees.
        """
        settings = self.settings
        frozen = jax.lax.stop_gradient(params)
        sigmas = jnp.asarray(settings.sigmas, jnp.float32)
        sink = self._sink(frozen, clip, draws)
        num_blocks, *shape = draws.noise.shape
        own_history = not settings.shares_history
        size = self._history_shape(sink, shape)
        window = min(self.config.ring_blocks - 1, num_blocks)
        slots = num_blocks if keeps_history else max(window, 1)
        empty = jnp.zeros((slots, *size), sink.key.dtype)
        # One ring of past blocks per step before the exit.
        rings = (max(1, settings.num_steps - 1) if own_history else 0, window)
        ring = jnp.zeros((*rings, *size), sink.key.dtype)

        def block(carry, number):
            rings, written = carry

            def early(step, state):
                x, rings = state
                past = _from_ring(rings, step) if own_history else _before(written, number, window)
                velocity, own = self._velocity(
                    frozen, x, sigmas[step], clip, draws, sink, number, step, past
                )
                if own_history and window:
                    own = self._corrupted(own, draws, number, step)
                    rings = _write(rings, own, (step, number % window))
                noise = self._fresh_noise(draws, number, step, x.shape)
                return move(x, velocity, sigmas[step], sigmas[step + 1], noise), rings

            x, rings = jax.lax.fori_loop(0, exit_step, early, (draws.noise[number], rings))
            start = jax.lax.stop_gradient(x)
            clean, own = self._exit(params, start, exit_step, clip, draws, sink, number, written)
            if settings.refresh != "none":
                own = self._refreshed(frozen, clean, clip, draws, sink, number, written)
            own = self._corrupted(jax.lax.stop_gradient(own), draws, number, exit_step)
            return (rings, _write(written, own, (number % slots,))), (start, clean)

        # Unrolled where it is differentiated: a scan would keep its carry once per block.
        unroll = num_blocks if settings.gradient == "clip" else 1
        (_, written), (start, clean) = jax.lax.scan(
            block, ((ring, ring), (empty, empty)), jnp.arange(num_blocks), unroll=unroll
        )
        return Trace(start, clean, *written, sink)

    def exit_block(
        self,
        params: PyTree,
        trace: Trace,
        clip: Clip,
        draws: Draws,
        exit_step: IntScalar,
        number: IntScalar,
    ) -> Latent:
        """The exit step of one block again, on what the rollout left (pass B).

        Arguments as in `rollout`; `number` is the block's.
        """
        trace = jax.lax.stop_gradient(trace)
        written = (trace.key, trace.value)
        clean, _ = self._exit(
            params, trace.start[number], exit_step, clip, draws, trace.sink, number, written
        )
        return clean

    def _exit(self, params, start, exit_step, clip, draws, sink, number, written):
        window = min(self.config.ring_blocks - 1, len(written[0]))
        sigma = jnp.asarray(self.settings.sigmas, jnp.float32)[exit_step]
        # The prompt's keys and values are no history: they are differentiated.
        key, value = merge(self.graphdef, params).project_prompt(clip.text)
        told = dataclasses.replace(sink, text_key=key, text_value=value)
        past = _before(written, number, window)
        velocity, own = self._velocity(
            params, start, sigma, clip, draws, told, number, exit_step, past
        )
        return clean_from_velocity(start, velocity, sigma), own

    def _refreshed(self, params, clean, clip, draws, sink, number, written):
        """Keys and values of the finished block, at level 0 or noised anew."""
        step = self.settings.num_steps
        sigma = jnp.float32(self.settings.levels[step][0])
        x = jax.lax.stop_gradient(clean)
        noise = jax.random.normal(_fold(draws.renoise_key, number, step), x.shape)
        x = noised(x, noise, sigma)
        past = _before(written, number, min(self.config.ring_blocks - 1, len(written[0])))
        return self._velocity(params, x, sigma, clip, draws, sink, number, step, past)[1]

    def _velocity(self, params, latent, sigma, clip, draws, sink, number, step, past):
        config, t = self.config, latent.shape[1]
        last = self.settings.shift_max + t * len(draws.noise)
        frames = max(config.reference_frame, last + self.settings.sink_distance[1]) + 1
        position = position_in(
            frame_table(config, frames),
            config,
            number,
            draws.distance[number, step],
            first_frame=draws.first_frame,
        )
        features, frames = clip.features, 4 * t
        if self.settings.audio_context == "clip":
            before = jnp.repeat(features[:, :, :1], EARLIER_FRAMES, axis=2)
            features = jnp.concatenate([before, features], axis=2)
            frames += EARLIER_FRAMES
        features = jax.lax.dynamic_slice_in_dim(features, 4 * t * number, frames, axis=2)
        timestep = jnp.broadcast_to(1000 * sigma, latent.shape[:2])
        velocity, own = merge(self.graphdef, params).block_after(
            latent, timestep, Conditions(pose=clip.pose, audio=features), past, sink, position
        )
        return velocity, (own.key, own.value)

    def _sink(self, params, clip, draws):
        told = Conditions(text=clip.text, reference=clip.reference)
        sink = merge(self.graphdef, params).prefill(told)
        if self.settings.kv_noise and self.settings.kv_noise_sink:
            key, value = self._corrupted((sink.key, sink.value), draws, -1, 0)
            sink = dataclasses.replace(sink, key=key, value=value)
        return jax.lax.stop_gradient(sink)

    def _history_shape(self, sink, shape):
        b, t, h, w, _ = shape
        layers, _, _, *heads = sink.key.shape
        return (layers, b, t * (h // 2) * (w // 2), *heads)

    def _fresh_noise(self, draws, number, step, shape):
        if self.settings.sampler == "euler":
            return None
        return jax.random.normal(_fold(draws.renoise_key, number, step), shape)

    def _corrupted(self, own, draws, number, step):
        settings = self.settings
        if not settings.kv_noise:
            return own
        keys = jax.random.split(_fold(draws.history_key, number, step))

        def corrupt(part, key):
            # Per layer and clip: `[l b n m e]`.
            wide = part.astype(jnp.float32)
            size = jnp.sqrt(jnp.mean(jnp.square(wide), axis=(2, 3, 4), keepdims=True))
            noise = jax.random.normal(key, part.shape)
            return (wide + settings.kv_noise * size * noise).astype(part.dtype)

        chosen = {"k": (True, False), "v": (False, True), "both": (True, True)}
        return tuple(
            corrupt(part, key) if is_chosen else part
            for part, key, is_chosen in zip(own, keys, chosen[settings.kv_noise_on], strict=True)
        )


def roll_out(
    generator: Generator,
    params: PyTree,
    clips: Clip,
    draws: Draws,
    exit_step: IntScalar,
    *,
    keeps_history: bool = True,
) -> Trace:
    """`Generator.rollout` of several clips, each with its own chance and positions.

    Arguments as there; clips, draws and the result have a leading axis of clips.
    """

    def one(clip, chance):
        return generator.rollout(params, clip, chance, exit_step, keeps_history=keeps_history)

    return jax.vmap(one, spmd_axis_name=clip_axes())(clips, draws)


def made_clips(traces: Trace) -> Latent:
    """The clips of several rollouts, `[clips t h w c]`."""
    return jax.vmap(joined)(traces.clean)[:, 0]


def clip_gradient(
    generator: Generator,
    bind: Callable[[PyTree], PyTree],
    weights: PyTree,
    clips: Clip,
    draws: Draws,
    exit_step: IntScalar,
    score: Callable[[Latent], tuple[Latent, dict[str, Array]]],
) -> tuple[PyTree, Latent, dict[str, Array]]:
    """Gradient of a clip's loss in the generator's weights.

    Args:
        generator: makes the clips.
        bind: trained weights -> parameters of the transformer.
        weights: what is trained.
        clips: conditions, a leading axis of clips before what `Clip` says.
        draws: chance of each, with the same leading axis.
        exit_step: shared by all clips and blocks.
        score: clips `[clips t h w c]` -> the gradient of the loss in them, and metrics.

    Returns:
        The gradient, the clips, and the metrics with `replay_error`, how far the second pass
        strayed from the first.
    """

    if generator.settings.gradient == "clip":

        def make(weights):
            return made_clips(roll_out(generator, bind(weights), clips, draws, exit_step))

        made, pull = jax.vjp(make, weights)
        slope, metrics = score(made)
        return pull(slope)[0], made, metrics

    frozen = jax.lax.stop_gradient(weights)
    traces = roll_out(generator, bind(frozen), clips, draws, exit_step)
    made = made_clips(traces)
    slope, metrics = score(made)
    slope = slope.reshape(len(made), traces.clean.shape[1], 1, -1, *made.shape[2:])

    def block(total, number):
        def exits(weights):
            params = bind(weights)

            def one(trace, clip, chance):
                return generator.exit_block(params, trace, clip, chance, exit_step, number)

            return jax.vmap(one, spmd_axis_name=clip_axes())(traces, clips, draws)

        again, pull = jax.vjp(exits, weights)
        (grads,) = pull(slope[:, number].astype(again.dtype))
        error = jnp.max(jnp.abs(again - traces.clean[:, number]))
        return constrain_params(
            jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
        ), error

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights)
    blocks = jnp.arange(traces.clean.shape[1])
    total, errors = jax.lax.scan(block, zero, blocks, reverse=True)
    return total, made, metrics | {"replay_error": jnp.max(errors).astype(jnp.float32)}


def _from_ring(rings, step):
    """History of one step: `layer -> (key, value)`; rings are `[T-1 w l b n m e]`."""

    def past(layer):
        return tuple(_tokens(_layer_of(ring, (step, 0), ring.shape[1], layer)[0]) for ring in rings)

    return past


def _before(written, number, window):
    """History as written by the exits: the `window` blocks before, filled ones first.

    Where no more blocks than those are kept, they are a ring: slices start within it in any case.
    """

    def past(layer):
        first = jnp.maximum(number - window, 0)
        return tuple(_tokens(_layer_of(part, (first,), window, layer)) for part in written)

    return past


def _layer_of(blocks, first, count, layer):
    """`[.. w l b n m e]` -> some blocks of one layer, `[.. w b n m e]`.

    One slice inside the scan over layers, not one of the step before: what does not depend on the
    layer is moved out of the scan, and would be a copy of the window of all layers.
    """
    axis = len(first)  # of layers
    starts = [jnp.int32(i) for i in (*first, layer)] + [jnp.int32(0)] * (blocks.ndim - axis - 1)
    sizes = (*[1] * (axis - 1), count, 1, *blocks.shape[axis + 1 :])
    return jnp.squeeze(jax.lax.dynamic_slice(blocks, starts, sizes), axis)


def _tokens(blocks):
    """`[w b n m e]` -> `[b (w n) m e]`."""
    w, b, n, *heads = blocks.shape
    return jnp.moveaxis(blocks, 0, 1).reshape(b, w * n, *heads)


def _write(histories, own, index):
    def write(history, part):
        starts = [jnp.int32(i) for i in index] + [jnp.int32(0)] * part.ndim
        part = part.astype(history.dtype).reshape(*[1] * len(index), *part.shape)
        return jax.lax.dynamic_update_slice(history, part, starts)

    return tuple(write(*pair) for pair in zip(histories, own, strict=True))


def _fold(key, number, step):
    return jax.random.fold_in(jax.random.fold_in(key, number + 1), step)
