"""Block-wise gradient (Algorithm 2): the gradient of Algorithm 1 with the memory of one block.

    pass F   clips by Algorithm 1, without a gradient; kept: x~_g, history, sink
    loss     dL/dX of the whole clips, from the score networks
    pass B   for g = N .. 1: the exit step of block g again, and its vector-Jacobian product

`x~_g` and history are constants of Algorithm 1, so the sum over blocks is its gradient, exactly.

Source: Live Avatar (arXiv 2512.04677), Algorithm 2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_avatar.models.conditions import Conditions
from jax_avatar.models.sharding import clip_axes, constrain_params
from jax_avatar.shapes import Array, IntScalar, Latent, PyTree
from jax_avatar.training.rollout import Net, exit_block, generated_clips, self_forcing_batch
from jax_avatar.training.rollout_plan import RandomDraws, RolloutPlan

__all__ = ["blockwise_gradient", "gradient_of", "rollout_gradient"]

Bind = Callable[[PyTree], Net]
Score = Callable[[Latent], tuple[Latent, dict[str, Array]]]
Gradient = tuple[PyTree, Latent, dict[str, Array]]


def blockwise_gradient(
    bind: Bind,
    weights: PyTree,
    conditions: Conditions,
    draws: RandomDraws,
    exit_step: IntScalar,
    plan: RolloutPlan,
    score: Score,
) -> Gradient:
    """Algorithm 2: gradient of the clips' loss in the generator's weights.

    Args:
        bind: trained weights -> the generator.
        weights: trained weights.
        conditions: with a leading axis of clips.
        draws: random numbers of each, with the same leading axis.
        exit_step: shared by all clips and blocks.
        plan: how clips are made.
        score: clips `[clips t h w c]` -> the gradient of the loss in them, and metrics.

    Returns:
        The gradient, the clips, and the metrics with `replay_error`, the largest difference of
        pass B from pass F.
    """
    frozen = bind(jax.lax.stop_gradient(weights))
    traces = self_forcing_batch(frozen, frozen, conditions, draws, exit_step, plan)  # pass F
    clips = generated_clips(traces)
    grad_clips, metrics = score(clips)  # dL/dX
    N = traces.clean.shape[1]
    grad_blocks = grad_clips.reshape(len(clips), N, 1, -1, *clips.shape[2:])

    def exits(weights, g):
        net = bind(weights)

        def one(trace, conditions, draws):
            return exit_block(net, trace, conditions, draws, exit_step, plan, g)

        return jax.vmap(one, spmd_axis_name=clip_axes())(traces, conditions, draws)

    def add_block(total, g):  # pass B
        clean, pullback = jax.vjp(lambda weights: exits(weights, g), weights)
        (grads,) = pullback(grad_blocks[:, g].astype(clean.dtype))
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
        return constrain_params(total), jnp.max(jnp.abs(clean - traces.clean[:, g]))

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights)
    grads, errors = jax.lax.scan(add_block, zero, jnp.arange(N), reverse=True)
    return grads, clips, metrics | {"replay_error": jnp.max(errors).astype(jnp.float32)}


def rollout_gradient(
    bind: Bind,
    weights: PyTree,
    conditions: Conditions,
    draws: RandomDraws,
    exit_step: IntScalar,
    plan: RolloutPlan,
    score: Score,
) -> Gradient:
    """The same gradient through the whole of Algorithm 1, with the memory of all blocks.

    Arguments and result as of `blockwise_gradient`; there is no second pass to measure.
    """
    frozen = bind(jax.lax.stop_gradient(weights))

    def generate(weights):
        traces = self_forcing_batch(bind(weights), frozen, conditions, draws, exit_step, plan)
        return generated_clips(traces)

    clips, pullback = jax.vjp(generate, weights)
    grad_clips, metrics = score(clips)
    return pullback(grad_clips)[0], clips, metrics


def gradient_of(plan: RolloutPlan) -> Callable[..., Gradient]:
    """The function that `RolloutConfig.gradient` names."""
    return {"blocks": blockwise_gradient, "clip": rollout_gradient}[plan.settings.gradient]
