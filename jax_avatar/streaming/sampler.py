"""Algorithm 3: a stream on one device, block after block, step after step.

Where all steps share one history (see `Sampling`) there is one window, which every step of a block
overwrites at the same place: the last one stays, or the refresh after it.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jax_avatar.diffusion.sampling import Sampling, noised
from jax_avatar.diffusion.step import move
from jax_avatar.models.cache import BlockPosition, KVCache, Sink, empty_cache
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.network import Network
from jax_avatar.models.sharding import batch_sharding, kv_sharding, on_mesh, put_on
from jax_avatar.shapes import Array, AudioFeatures, Latent, PyTree, TextStates
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.state import StreamState, add_context, change_prompt, renew
from jax_avatar.weights.files import StoredWeights, place, tree_of

__all__ = ["SequentialStream", "denoise", "make_prefill", "make_step", "make_windows"]


def denoise(
    dit: DiT,
    x: Array,
    conditions: Conditions,
    window: KVCache,
    sink: Sink,
    position: BlockPosition,
    levels: Any,
    noise: Array | None = None,
) -> tuple[Array, KVCache]:
    """One denoising step of one block; the inner line of Algorithms 3 and 4.

    Args:
        dit: the transformer.
        x: the block at the first level.
        conditions: pose and speech features of the block.
        window: KV_i, that this step reads and writes.
        sink: keys and values of prompt, portrait and motion.
        position: where the block stands.
        levels: noise level before and after the step, scalars.
        noise: to noise the clean prediction with anew; None takes Euler's step.

    Returns:
        The block at the second level, and the window with the block in it.
    """
    sigma, next_sigma = levels
    timestep = jnp.broadcast_to(jnp.float32(1000) * sigma, x.shape[:2])
    velocity, window = dit.stream_block(x, timestep, conditions, window, sink, position)
    return move(x, velocity, sigma, next_sigma, noise), window


class SequentialStream:
    """Blocks of audio features in, blocks of clean latents out, nothing waits for the device.

    Attributes:
        state: all that the stream remembers.
        params: weights of the transformer, on the device.

    Source: Live Avatar (arXiv 2512.04677), Algorithm 3; where the released code departs from it,
    `StreamPlan` has the choice.
    """

    def push(self, audio: AudioFeatures | np.ndarray) -> list[Latent]:
        """Generates the next block; returns it in a list (see `PipelinedStream.push`).

        Args:
            audio: speech features of the block's video frames.
        """
        state, plan = renew(self.state, self.plan), self.plan  # adaptive attention sink
        if state.is_stale:
            sink = self.prefill(self.params, state.conditions)
            state = replace(state, sink=sink, is_stale=False)
        g = state.block
        a, earlier = add_context(plan, jnp.asarray(audio), state.earlier)
        a = self.put(a)
        x = self.put(self.noise(g))  # X_g ~ N(0, I)
        for i in range(plan.num_steps):  # i = T, ..., 1
            x, state = self._denoise(state, i, x, a)
            if self.tap:
                self.tap(g, i, x)
        if plan.refresh != "none":  # the clean block writes the history
            i = plan.num_steps
            noise, (sigma, _) = self.put(self.new_noise(g, i)), self.levels[i]
            _, state = self._denoise(state, i, self.noised(x, noise, sigma), a)
        if g == 0:
            state = replace(state, first=x[:, :1])
        self.state = replace(state.with_clean(x), earlier=earlier, block=g + 1)
        return [x]

    def _denoise(
        self, state: StreamState, i: int, x: Latent, a: AudioFeatures
    ) -> tuple[Latent, StreamState]:
        """Step i of the next block, which writes KV_i."""
        g, plan, fixed = state.block, self.plan, state.conditions
        x, window = self.step(
            self.params,
            x,
            Conditions(pose=fixed.pose, audio=a, speaker_mask=fixed.speaker_mask),
            state.windows[i % len(state.windows)],
            state.sink,
            plan.position(self.config, g, i),
            self.levels[i],
            self.put(self.new_noise(g, i)) if plan.sampler == "renoise" else None,
        )
        return x, state.with_window(i, window)

    def finish(self) -> list[Latent]:
        """Blocks still under way: none, since every push completes its block."""
        return []

    def set_text(self, text: TextStates | np.ndarray) -> None:
        """Changes the prompt from the next block on, see `change_prompt`."""
        self.state = change_prompt(self.state, self.put(jnp.asarray(text)))

    # ---- start and end ---------------------------------------------------------------------

    def __init__(
        self,
        network: Network,
        plan: StreamPlan,
        conditions: Conditions,
        *,
        device: jax.Device | Mesh | None = None,
        tap: Callable[[int, int, Latent], None] | None = None,
    ):
        """Prefills the sink.

        Args:
            network: the transformer; weights on disk go straight to the device.
            plan: settings of the stream.
            conditions: portrait, prompt, pose.
            device: where to run, the first one if not given; or the mesh of a training run, over
                which the weights already lie and portraits are spread.
            tap: called with block, step and the latent after that step, which is gone afterwards.
        """
        config = network.config
        self.config, self.plan, self.tap = config, plan, tap
        self.device = device = device or jax.devices()[0]
        self.levels = [tuple(map(np.float32, levels)) for levels in plan.levels]
        b, _, h, w, c = conditions.reference.shape
        shape = (b, config.frames_per_block, h, w, c)
        self.noise = plan.make_noise(shape, config.dtype)
        self.new_noise = plan.make_new_noise(shape, config.dtype)
        bare = network.without_params()
        self.noised, self.step = jax.jit(noised), make_step(bare, device)
        self.prefill = make_prefill(bare, device)
        self.empty = make_windows(config, plan, (b, h, w), device)
        self.restart(network.params, conditions)

    def restart(self, params: PyTree | StoredWeights, conditions: Conditions) -> None:
        """Back to block 0 with other weights and conditions of the same shapes; nothing is
        compiled anew."""
        if not isinstance(self.device, Mesh):
            on_device = SingleDeviceSharding(self.device)
            params = place(params, jax.tree.map(lambda _: on_device, tree_of(params)))
        self.params = params
        self.reset(conditions)

    def reset(self, conditions: Conditions | None = None) -> None:
        """Back to block 0: empty windows, the portrait in the sink.

        Args:
            conditions: of the new stream, of the same shapes; those of the last if not given.
        """
        if conditions is not None:
            self.conditions = self.put(conditions)
        self.state = None  # its windows make room for new ones
        self.state = StreamState(
            conditions=self.conditions,
            sink=self.prefill(self.params, self.conditions),
            windows=self.empty(),
        )

    def release(self) -> None:
        """Lets go of weights and windows until `restart`."""
        self.params = self.conditions = self.state = None

    def put(self, tree: PyTree) -> PyTree:
        """Puts rows of portraits where the stream runs."""
        return put_on(tree, batch_sharding(self.device))


@functools.lru_cache(maxsize=16)
def make_step(network: Network, device: jax.Device | Mesh) -> Callable[..., tuple[Array, KVCache]]:
    """The compiled `denoise`; streams of one network on one device share it.

    Args:
        network: structure and size of the transformer, `without_params`.
        device: where to run, or the mesh of a training run; it need not be here, to compile for it.

    Returns:
        `(params, x, conditions, window, sink, position, levels, noise) -> (x, window)`; x and
        window are donated.
    """

    def step(params, *arguments):
        return denoise(network.bind(params), *arguments)

    places = (batch_sharding(device), kv_sharding(device))
    # Donated: x and window.
    return jax.jit(on_mesh(step, _mesh(device)), donate_argnums=(1, 3), out_shardings=places)


@functools.lru_cache(maxsize=16)
def make_prefill(
    network: Network, device: jax.Device | Mesh
) -> Callable[[PyTree, Conditions], Sink]:
    """The compiled `(params, conditions) -> sink`; arguments as for `make_step`."""

    def prefill(params, conditions):
        return network.bind(params).prefill(conditions)

    return jax.jit(on_mesh(prefill, _mesh(device)), out_shardings=kv_sharding(device))


def make_windows(
    config: DiTConfig, sampling: Sampling, grid: tuple[int, int, int], device: jax.Device | Mesh
) -> Callable[[], tuple[KVCache, ...]]:
    """The compiled `() -> empty windows`.

    Args:
        config: size of the transformer.
        sampling: of the stream.
        grid: batch, latent rows and columns.
        device: as for `make_step`.
    """
    windows = lambda: (empty_cache(config, *grid),) * sampling.num_windows  # noqa: E731
    return jax.jit(windows, out_shardings=kv_sharding(device))


def _mesh(device: jax.Device | Mesh) -> Mesh | None:
    return device if isinstance(device, Mesh) else None
