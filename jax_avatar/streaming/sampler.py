"""Algorithm 3: a stream on one device, block after block, step after step.

for block g:
    sink <- prefill(first generated latent)        once, before block `aas_after_blocks`
    sink <- prefill(new prompt)                    where one was given since the last block
    x <- noise(g)
    for step i: x <- denoise(x, window i, sink)    window i belongs to step i
    emit x

Where all steps share one history (see `Sampling`) there is one window, which every step of a block
overwrites at the same place: the last one stays, or the refresh after it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jax_avatar.diffusion.sampling import noised
from jax_avatar.models.cache import KVCache, empty_cache
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.sharding import on_mesh, put_on
from jax_avatar.shapes import Array, AudioFeatures, Latent, PyTree, TextStates
from jax_avatar.streaming.mesh import batch_place, cache_place
from jax_avatar.streaming.plan import StreamPlan, denoise, make_prefill
from jax_avatar.weights.files import StoredWeights, place, tree_of

__all__ = ["SequentialStream", "make_step", "step_arguments"]


def make_step(
    graphdef: Any, device: jax.Device | Mesh, speaker_mask: Array | None = None
) -> Callable[..., tuple[Array, KVCache]]:
    """The compiled function of one denoising step of one block.

    Args:
        graphdef: structure of the transformer, from `split`.
        device: where to run, or the mesh of a training run; it need not be here, to compile for it.
        speaker_mask: routing mask of a block, for several speakers.

    Returns:
        `(params, latent, audio, pose, cache, sink, position, sigma, next_sigma, noise) -> (latent,
        cache)`, see `denoise`; latent and cache are donated. `step_arguments` has their shapes.
    """

    def step(params, latent, audio, pose, cache, sink, position, *levels_and_noise):
        parts = (latent, audio, pose, cache, sink, position, *levels_and_noise)
        return denoise(graphdef, params, *parts, speaker_mask)

    places = (batch_place(device), cache_place(device))
    # Donated: latent and cache.
    return jax.jit(on_mesh(step, _mesh(device)), donate_argnums=(1, 4), out_shardings=places)


def step_arguments(
    graphdef: Any,
    params: PyTree,
    config: DiTConfig,
    plan: StreamPlan,
    conditions: Conditions,
    audio: jax.ShapeDtypeStruct,
    device: jax.Device,
) -> tuple:
    """Shapes and places of everything a step is given, from those of a stream's parts.

    Args:
        graphdef: structure of the transformer.
        params: its parameters, abstract.
        config: its size.
        plan: settings of the stream.
        conditions: portrait, prompt, pose, abstract.
        audio: speech features of a block, abstract.
        device: where to run.
    """
    b, _, h, w, c = conditions.reference.shape
    latent = jax.ShapeDtypeStruct((b, config.frames_per_block, h, w, c), config.dtype)

    def at(tree, where=None):
        where = where or SingleDeviceSharding(device)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    return (
        at(params),
        at(latent),
        at(audio),
        at(conditions.pose),
        at(jax.eval_shape(lambda: empty_cache(config, b, h, w)), cache_place(device)),
        at(jax.eval_shape(make_prefill(graphdef), params, conditions), cache_place(device)),
        at(plan.position(config, 0, 0)),
        *at(tuple(np.float32(sigma) for sigma in plan.sigmas[:2])),
        at(latent) if plan.sampler == "renoise" else None,
    )


class SequentialStream:
    """Blocks of audio features in, blocks of clean latents out, nothing waits for the device.

    Source: Live Avatar (arXiv 2512.04677), Algorithm 3; where the released code departs from it,
    `StreamPlan` has the choice.
    """

    def __init__(
        self,
        graphdef,
        params: PyTree | StoredWeights,
        config: DiTConfig,
        plan: StreamPlan,
        conditions: Conditions,
        *,
        speaker_mask: Array | None = None,
        device: jax.Device | Mesh | None = None,
        tap: Callable[[int, int, Latent], None] | None = None,
    ):
        """Prefills the sink.

        Args:
            graphdef: structure of the transformer, from `split`.
            params: its parameters; from disk, they go straight to the device.
            config: its size.
            plan: settings of the stream.
            conditions: portrait, prompt, pose.
            speaker_mask: routing mask of a block, for several speakers.
            device: where to run, the first one if not given; or the mesh of a training run, over
                which the weights already lie and portraits are spread.
            tap: called with block, step and the latent after that step, which is gone afterwards.
        """
        device = device or jax.devices()[0]
        put = lambda tree: put_on(tree, batch_place(device))  # noqa: E731
        self.config, self.plan = config, plan
        prefill, windows = on_mesh(make_prefill(graphdef), _mesh(device)), cache_place(device)
        self._prefill = jax.jit(prefill, out_shardings=windows)
        self._put, self._tap, self._device = put, tap, device
        mask = None if speaker_mask is None else put(speaker_mask)
        b, _, h, w, c = conditions.reference.shape
        shape = (b, config.frames_per_block, h, w, c)
        self._noise = plan.make_noise(shape, config.dtype)
        self._new_noise = plan.make_new_noise(shape, config.dtype)
        self._empty = jax.jit(lambda: empty_cache(config, b, h, w), out_shardings=windows)
        self._levels = [tuple(map(np.float32, levels)) for levels in plan.levels]

        self._noised = jax.jit(noised)
        self._step = make_step(graphdef, device, mask)
        self.restart(params, conditions)

    def restart(self, params: PyTree | StoredWeights, conditions: Conditions) -> None:
        """Back to block 0 with other weights and conditions of the same shapes; nothing is
        compiled anew."""
        if not isinstance(self._device, Mesh):
            on_device = SingleDeviceSharding(self._device)
            params = place(params, jax.tree.map(lambda _: on_device, tree_of(params)))
        self.params = params
        self.conditions = self._put(conditions)
        self.reset()

    def release(self) -> None:
        """Lets go of weights and windows until `restart`."""
        self.params = self.conditions = self.caches = None
        self._now = self._sink = self._first_latent = None

    def reset(self, conditions: Conditions | None = None) -> None:
        """Back to block 0: empty windows, the portrait in the sink.

        Args:
            conditions: of the new stream, of the same shapes; those of the last if not given.
        """
        if conditions is not None:
            self.conditions = self._put(conditions)
        self._now = self.conditions
        self._sink = self._prefill(self.params, self._now)
        self._is_stale = False
        self.caches = [self._empty() for _ in range(self.plan.num_windows)]
        self._hear = self.plan.make_hearing()
        self._first_latent = None
        self._next_block = 0

    def set_text(self, text: TextStates | np.ndarray) -> None:
        """Changes the prompt from the next block on; the window keeps what it has seen.

        Args:
            text: prompt states, of the shape and type of those before.
        """
        self._now = self._now.with_text(self._put(jnp.asarray(text)))
        self._is_stale = True

    def push(self, audio: AudioFeatures | np.ndarray) -> list[Latent]:
        """Generates the next block; returns it in a list (see `PipelinedStream.push`).

        Args:
            audio: speech features of the block's video frames.
        """
        block, plan = self._next_block, self.plan
        if plan.is_renewal(block):
            self._now = self._now.with_reference(self._first_latent)
            self._is_stale = True
        if self._is_stale:
            self._sink = self._prefill(self.params, self._now)
            self._is_stale = False
        audio = self._put(self._hear(jnp.asarray(audio)))
        latent = self._put(self._noise(block))
        for step in range(plan.num_steps):
            latent = self._evaluate(block, step, latent, audio)
            if self._tap:
                self._tap(block, step, latent)
        if plan.refresh != "none":
            step = plan.num_steps
            noise = self._put(self._new_noise(block, step))
            self._evaluate(block, step, self._noised(latent, noise, self._levels[step][0]), audio)
        if block == 0:
            self._first_latent = latent[:, :1]
        self._next_block += 1
        return [latent]

    def finish(self) -> list[Latent]:
        """Blocks still under way: none, since every push completes its block."""
        return []

    def _evaluate(self, block: int, step: int, latent: Latent, audio: AudioFeatures) -> Latent:
        """One evaluation of the network, which writes the block into the window of the step."""
        plan, window = self.plan, step % len(self.caches)
        renoises = plan.sampler == "renoise"
        latent, self.caches[window] = self._step(
            self.params,
            latent,
            audio,
            self.conditions.pose,
            self.caches[window],
            self._sink,
            plan.position(self.config, block, step),
            *self._levels[step],
            self._put(self._new_noise(block, step)) if renoises else None,
        )
        return latent


def _mesh(device: jax.Device | Mesh) -> Mesh | None:
    return device if isinstance(device, Mesh) else None
