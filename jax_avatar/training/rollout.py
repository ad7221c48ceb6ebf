"""Self-forcing (Algorithm 1): the generator denoises a clip on its own past, as a stream would.

    block g:  X_g ~ N(0, I) --step 1--> .. --step m - 1--> x~_g --step m, the exit--> X_g
              each step sees the sink and the history of blocks g - w .. g - 1

Only the exit is differentiated: `x~_g` and all history are constants. So the gradient of a loss of
the clip is a sum over blocks, and Algorithm 2 (`training/blockwise.py`) makes it block by block.

Source: Live Avatar (arXiv 2512.04677), Algorithm 1; Self-Forcing (arXiv 2506.08009).
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_avatar.diffusion.flow import clean_from_velocity
from jax_avatar.diffusion.sampling import noised
from jax_avatar.diffusion.step import move
from jax_avatar.models.cache import History, KVCache, Past, Sink
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.sharding import clip_axes
from jax_avatar.shapes import Array, IntScalar, Latent
from jax_avatar.training.rollout_plan import RandomDraws, RolloutPlan

__all__ = [
    "ClipDenoiser",
    "Net",
    "Trace",
    "concat_blocks",
    "exit_block",
    "generated_clips",
    "self_forcing",
    "self_forcing_batch",
]


Net = Any
"""A `DiT` with its weights: `prefill`, `project_prompt` and `block_after` are called."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """Result of a rollout: the clip and the inputs of its exit steps."""

    start: Any  # N b t h w c, x~: the blocks before their exit step
    clean: Any  # N b t h w c, X: the blocks after it
    history: History  # of all blocks, for Algorithm 2
    sink: Sink


def self_forcing(
    net: Net,
    frozen: Net,
    conditions: Conditions,
    draws: RandomDraws,
    exit_step: IntScalar,
    plan: RolloutPlan,
    *,
    keeps_history: bool = True,
) -> Trace:
    """Algorithm 1: every block starts from noise and is denoised on the model's own past.

    Args:
        net: the generator; only the exit steps are differentiated in it.
        frozen: the same without a gradient.
        conditions: of the clip; its pose holds for every block.
        draws: its random numbers.
        exit_step: 0 for the first, pure-noise step; the same for all blocks.
        plan: how clips are made.
        keeps_history: of all blocks, for Algorithm 2; else only of the last that a block sees.
    """
    clip = ClipDenoiser(plan, conditions, draws, _prefill(frozen, conditions, draws, plan))
    early_step, refresh = _early_step(plan), _refresh(plan)
    N = len(draws.noise)

    def block(histories, g):
        step = functools.partial(early_step, clip, frozen, histories["exits"], g)
        x, rings = jax.lax.fori_loop(0, exit_step, step, (draws.noise[g], histories["steps"]))
        start = jax.lax.stop_gradient(x)  # x~_g
        clean, kv = clip.exit(net, start, histories["exits"], g, exit_step)  # X_g
        kv = refresh(clip, frozen, clean, kv, histories["exits"], g)
        kv = plan.corrupt(jax.lax.stop_gradient(kv), draws.corrupt_key(g, exit_step))
        return {"steps": rings, "exits": histories["exits"].append(kv, g)}, (start, clean)

    # Unrolled where it is differentiated: a scan would keep its carry once per block.
    unroll = N if plan.settings.gradient == "clip" else 1
    histories, (start, clean) = jax.lax.scan(
        block, clip.no_history(keeps_history), jnp.arange(N), unroll=unroll
    )
    return Trace(start, clean, histories["exits"], clip.sink)


def exit_block(
    net: Net,
    trace: Trace,
    conditions: Conditions,
    draws: RandomDraws,
    exit_step: IntScalar,
    plan: RolloutPlan,
    g: IntScalar,
) -> Latent:
    """The exit step of block `g` again, from what Algorithm 1 left; arguments as there."""
    trace = jax.lax.stop_gradient(trace)
    clip = ClipDenoiser(plan, conditions, draws, trace.sink)
    return clip.exit(net, trace.start[g], trace.history, g, exit_step)[0]


def self_forcing_batch(
    net: Net,
    frozen: Net,
    conditions: Conditions,
    draws: RandomDraws,
    exit_step: IntScalar,
    plan: RolloutPlan,
    *,
    keeps_history: bool = True,
) -> Trace:
    """`self_forcing` of several clips, each with its own random numbers and positions.

    Arguments as there; conditions, draws and the result have a leading axis of clips.
    """

    def one(conditions, draws):
        return self_forcing(
            net, frozen, conditions, draws, exit_step, plan, keeps_history=keeps_history
        )

    return jax.vmap(one, spmd_axis_name=clip_axes())(conditions, draws)


def concat_blocks(blocks: Array) -> Latent:
    """`[N b t h w c]` -> the clip `[b (N t) h w c]`."""
    n, b, t = blocks.shape[:3]
    return jnp.moveaxis(blocks, 0, 1).reshape(b, n * t, *blocks.shape[3:])


def generated_clips(traces: Trace) -> Latent:
    """The clips of several rollouts, `[clips t h w c]`."""
    return jax.vmap(concat_blocks)(traces.clean)[:, 0]


@dataclass(frozen=True)
class ClipDenoiser:
    """Steps of the blocks of one clip, and what they share.

    Attributes:
        plan: how clips are made.
        conditions: of the clip.
        draws: its random numbers.
        sink: seen by all blocks.
    """

    plan: RolloutPlan
    conditions: Conditions
    draws: RandomDraws
    sink: Sink

    @property
    def window(self) -> int:
        """Blocks of the past that a block sees."""
        return self.plan.window(len(self.draws.noise))

    def velocity(
        self, net: Net, x: Latent, sigma: Array, past: Past, g: IntScalar, step: IntScalar
    ) -> tuple[Latent, KVCache]:
        """Velocity of block `g`, and its keys and values."""
        heard = self.conditions.with_audio(self.plan.hear(self.conditions.audio, g))
        timestep = jnp.broadcast_to(1000 * sigma, x.shape[:2])
        position = self.plan.position(self.draws, g, step)
        return net.block_after(x, timestep, heard, past, self.sink, position)

    def exit(
        self, net: Net, start: Latent, history: History, g: IntScalar, exit_step: IntScalar
    ) -> tuple[Latent, KVCache]:
        """The exit step, x~_g -> X_g, and its keys and values."""
        sigma = self.plan.levels()[exit_step]
        # The prompt's keys and values are no history: they are differentiated.
        key, value = net.project_prompt(self.conditions.text)
        sink = dataclasses.replace(self.sink, text_key=key, text_value=value)
        prompted = dataclasses.replace(self, sink=sink)
        past = history.last(self.window, g)
        velocity, kv = prompted.velocity(net, start, sigma, past, g, exit_step)
        return clean_from_velocity(start, velocity, sigma), kv

    def move(self, x: Latent, velocity: Latent, g: IntScalar, step: IntScalar) -> Latent:
        """Block `g` at the next noise level."""
        levels = self.plan.levels()
        noise = self.plan.new_noise(self.draws, g, step)
        return move(x, velocity, levels[step], levels[step + 1], noise)

    def no_history(self, keeps_all: bool) -> dict[str, History]:
        """Before the first block: a history of the exits, and one ring per step before the exit."""
        settings, num_blocks = self.plan.settings, len(self.draws.noise)
        _, t, h, w, _ = self.draws.noise.shape[1:]
        layers, b, _, *heads = self.sink.key.shape
        block = (layers, b, t * (h // 2) * (w // 2), *heads)
        slots = num_blocks if keeps_all else max(self.window, 1)
        steps = 0 if self.plan.shares_history else max(1, settings.num_steps - 1)
        dtype = self.sink.key.dtype
        return {
            "steps": History.empty((steps, self.window), block, dtype),
            "exits": History.empty((slots,), block, dtype),
        }


def _prefill(net, conditions, draws, plan):
    sink = net.prefill(conditions)
    return jax.lax.stop_gradient(plan.corrupt_sink(sink, draws.corrupt_key(-1, 0)))


def _early_step(plan):
    """`(clip, net, exits, g, step, (x, rings)) -> (x, rings)`: a step before the exit."""
    return _step_on_shared_history if plan.shares_history else _step_on_own_history


def _step_on_own_history(clip, net, exits, g, step, state):
    x, rings = state
    past = rings.last(clip.window, g, step)
    velocity, kv = clip.velocity(net, x, clip.plan.levels()[step], past, g, step)
    kv = clip.plan.corrupt(kv, clip.draws.corrupt_key(g, step))
    return clip.move(x, velocity, g, step), rings.append(kv, g, step)


def _step_on_shared_history(clip, net, exits, g, step, state):
    x, rings = state
    past = exits.last(clip.window, g)
    velocity, _ = clip.velocity(net, x, clip.plan.levels()[step], past, g, step)
    return clip.move(x, velocity, g, step), rings


def _refresh(plan):
    """`(clip, net, X_g, kv, exits, g) -> kv`: the keys and values that later blocks see."""
    return _keep if plan.settings.refresh == "none" else _evaluate_again


def _keep(clip, net, clean, kv, exits, g):
    return kv


def _evaluate_again(clip, net, clean, kv, exits, g):
    """Keys and values of the finished block, at level 0 or noised anew."""
    settings = clip.plan.settings
    step = settings.num_steps
    sigma = jnp.float32(settings.levels[step][0])
    noise = clip.draws.new_noise(g, step)
    x = noised(jax.lax.stop_gradient(clean), noise, sigma)
    return clip.velocity(net, x, sigma, exits.last(clip.window, g), g, step)[1]
