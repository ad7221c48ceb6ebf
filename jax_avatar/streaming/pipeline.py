"""Algorithm 4, timestep-forcing pipeline parallelism (TPP): a stream over several mesh slices.

    tick        0      1      2      3      4
    slice 0   block0 block1 block2 block3 block4      steps of the highest noise
    slice 1          block0 block1 block2 block3  ...
    slice 2                 block0 block1 block2
    slice 3                        block0 block1      lowest noise
    VAE                                   block0      its own jitted function, not waited for

Every slice keeps its own weights, windows and sink. Only the latent moves on, by `ppermute`. A sink
that changes, with the portrait's renewal or a new prompt, changes slice by slice: when the first
block that is to see it comes there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_avatar.diffusion.sampling import Sampling, noised
from jax_avatar.models.cache import BlockPosition, KVCache, empty_cache
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.sharding import param_shardings
from jax_avatar.shapes import Array, AudioFeatures, Latent, PyTree, TextStates
from jax_avatar.streaming.mesh import cache_place
from jax_avatar.streaming.plan import (
    StreamPlan,
    check_slices,
    denoise,
    make_prefill,
)
from jax_avatar.weights.files import StoredWeights, place, tree_of

__all__ = ["PipelinedStream", "check_mesh", "make_tick", "tick_arguments"]

_STAGE = PartitionSpec("stage")
_EVERYWHERE = PartitionSpec()


def check_mesh(config: DiTConfig, sampling: Sampling, mesh: Mesh) -> int:
    """Evaluations of the transformer that a slice makes of every block.

    Raises:
        ValueError: the steps do not spread over the mesh, or the transformer does not split.
    """
    stages, shards = mesh.shape["stage"], mesh.shape["model"]
    check_slices(sampling, stages)
    if sampling.num_steps % stages:
        raise ValueError(
            f"{sampling.num_steps} timesteps do not spread evenly over {stages} slices; see "
            "parse_layout."
        )
    if config.num_heads % shards or config.ffn_width % shards:
        raise ValueError(
            f"{shards} devices per slice do not divide {config.num_heads} heads and "
            f"feed-forward width {config.ffn_width}; change the number after the x in --mesh."
        )
    return sampling.num_evaluations // stages


def make_tick(
    graphdef: Any, mesh: Mesh, sampling: Sampling, speaker_mask: Array | None = None
) -> Callable[..., tuple[Array, Array, list[KVCache]]]:
    """The compiled function of one tick: every slice denoises its block, latents move on.

    Args:
        graphdef: structure of the transformer, from `split`.
        mesh: axes "stage" and "model"; its devices need not be here, to compile for them.
        sampling: of the stream; its steps are spread evenly over the slices.
        speaker_mask: routing mask of a block, for several speakers.

    Returns:
        `(params, noise, latents, audio, pose, caches, sinks, positions, levels, new noise) ->
        (denoised, moved on, caches)`; latents and caches are donated. `tick_arguments` has their
        shapes.
    """
    stages = mesh.shape["stage"]
    steps, renoises = sampling.num_steps // stages, sampling.sampler == "renoise"

    def tick(params, noise, latents, audio, pose, caches, sinks, positions, levels, new_noise):
        """Work of one slice; leading axes of one stage are stripped and put back."""
        own = functools.partial(jax.tree.map, lambda leaf: leaf[0])
        stage = jax.lax.axis_index("stage")
        latent = jnp.where(stage == 0, noise, latents[0])
        sink, windows = own(sinks), own(caches)
        for step, position in enumerate(own(positions)):
            sigma, next_sigma = levels[0, step]
            is_refresh, window = step == steps, step % len(windows)
            after, windows[window] = denoise(
                graphdef,
                params,
                noised(latent, new_noise[0, step], sigma) if is_refresh else latent,
                audio[0],
                pose,
                windows[window],
                sink,
                position,
                sigma,
                next_sigma,
                new_noise[0, step] if renoises else None,
                speaker_mask,
            )
            latent = latent if is_refresh else after
        windows = jax.tree.map(lambda leaf: leaf[None], windows)
        onward = [(i, i + 1) for i in range(stages - 1)]
        moved = jax.lax.ppermute(latent, "stage", onward)
        return latent[None], moved[None], windows

    mapped = _shard_map(
        mesh,
        tick,
        (_EVERYWHERE, _EVERYWHERE, _STAGE, _STAGE, _EVERYWHERE, *[_STAGE] * 5),
        (_STAGE, _STAGE, _STAGE),
    )
    by_stage = NamedSharding(mesh, _STAGE)
    # Windows keep their place, so that a slice updates them where they are.
    places = (by_stage, by_stage, cache_place(mesh))
    return jax.jit(mapped, donate_argnums=(2, 5), out_shardings=places)


def tick_arguments(
    graphdef: Any,
    params: PyTree,
    config: DiTConfig,
    plan: StreamPlan,
    conditions: Conditions,
    audio: jax.ShapeDtypeStruct,
    mesh: Mesh,
) -> tuple:
    """Shapes and places of everything a tick is given, from those of a stream's parts.

    Args:
        graphdef: structure of the transformer.
        params: its parameters, abstract.
        config: its size.
        plan: settings of the stream.
        conditions: portrait, prompt, pose, abstract.
        audio: speech features of a block, abstract.
        mesh: from `make_mesh`.
    """
    stages = mesh.shape["stage"]
    evaluations = check_mesh(config, plan, mesh)
    b, _, h, w, c = conditions.reference.shape

    def at(tree, spec, lead=()):
        sharding = NamedSharding(mesh, spec) if isinstance(spec, PartitionSpec) else spec
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=sharding), tree
        )

    latent = jax.ShapeDtypeStruct((b, config.frames_per_block, h, w, c), config.dtype)
    caches = jax.eval_shape(lambda: _caches(config, (b, h, w), stages, plan))
    sink = jax.eval_shape(make_prefill(graphdef), params, conditions)
    position = plan.position(config, 0, 0)
    return (
        jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            params,
            param_shardings(params, mesh),
        ),
        at(latent, _EVERYWHERE),
        at(latent, _STAGE, (stages,)),
        at(audio, _STAGE, (stages,)),
        at(conditions.pose, _EVERYWHERE),
        at(caches, cache_place(mesh)),
        at(sink, cache_place(mesh), (stages,)),
        at([position] * evaluations, _STAGE, (stages,)),
        at(_levels(plan, stages), _STAGE),
        at(latent, _STAGE, (stages, evaluations)) if plan.takes_noise else None,
    )


class PipelinedStream:
    """Blocks of audio features in, blocks of clean latents out, a few blocks later.

    The same latents as `SequentialStream`, for every layout.

    Source: Live Avatar (arXiv 2512.04677), Algorithm 4.
    """

    def __init__(
        self,
        graphdef: Any,
        params: PyTree | StoredWeights,
        config: DiTConfig,
        plan: StreamPlan,
        conditions: Conditions,
        mesh: Mesh,
        *,
        speaker_mask: Array | None = None,
    ):
        """Places weights, prefills every slice's sink.

        Args:
            graphdef: structure of the transformer, from `split`.
            params: its parameters; from disk, every device reads only its own.
            config: its size.
            plan: settings of the stream; its steps are spread evenly over the slices.
            conditions: portrait, prompt, pose.
            mesh: axes "stage" and "model", from `make_mesh`.
            speaker_mask: routing mask of a block, for several speakers.
        """
        self.config, self.plan, self.mesh = config, plan, mesh
        self.stages = mesh.shape["stage"]
        self.evaluations = check_mesh(config, plan, mesh)
        self.params = place(params, param_shardings(tree_of(params), mesh))
        self.conditions = self._put(conditions, _EVERYWHERE)
        b, _, h, w, c = conditions.reference.shape
        self._shape = (b, config.frames_per_block, h, w, c)
        self._noise = plan.make_noise(self._shape, config.dtype)
        self._new_noise = plan.make_new_noise(self._shape, config.dtype)

        self._swap = self._make_swap()
        self._prefill = self._make_prefill(graphdef)
        self._tick = make_tick(graphdef, mesh, plan, speaker_mask)
        self._make_caches = jax.jit(
            lambda: _caches(config, (b, h, w), self.stages, plan),
            out_shardings=cache_place(mesh),
        )
        self._levels = self._put(_levels(plan, self.stages), _STAGE)

        self.reset()

    def reset(self, conditions: Conditions | None = None) -> None:
        """Back to block 0: empty windows, the portrait in every slice's sink.

        Args:
            conditions: of the new stream, of the same shapes; those of the last if not given.
        """
        if conditions is not None:
            self.conditions = self._put(conditions, _EVERYWHERE)
        self._now = self.conditions
        self._sinks = self._prefill(self.params, self._now)
        self._hear = self.plan.make_hearing()
        self._first_latent = None
        self._is_stale = False
        self._coming = {}  # block -> sinks from that block on, swapped in slice by slice
        self._caches = self._make_caches()
        latents = np.zeros((self.stages, *self._shape), self.config.dtype)
        self._latents = self._put(latents, _STAGE)
        self._audio = {}  # block -> features, kept until the last slice has used them
        self._blocks = [None] * self.stages  # block in each slice
        self._following = [0] * self.stages  # the block that each slice waits for
        self._next_block = 0

    def set_text(self, text: TextStates | np.ndarray) -> None:
        """Changes the prompt from the next block on, which keeps it through all slices.

        Args:
            text: prompt states, of the shape and type of those before.
        """
        self._now = self._now.with_text(self._put(text, _EVERYWHERE))
        self._is_stale = True

    def push(self, audio: AudioFeatures | np.ndarray) -> list[Latent]:
        """Feeds the next block's audio; returns the blocks that have come out, oldest first.

        Nothing waits for the devices: a returned latent is a promise on the last slice.

        Args:
            audio: speech features of the block's video frames.
        """
        block = self._next_block
        self._audio[block] = self._hear(np.asarray(audio))
        self._next_block += 1
        finished = []
        if self.plan.is_renewal(block):
            # The new sink is made of block 0, which must have left the last slice. After four
            # blocks on four slices it has; sooner, the pipeline waits.
            while self._first_latent is None:
                finished += self._advance(None)
            self._now = self._now.with_reference(self._first_latent)
            self._is_stale = True
        if self._is_stale:
            self._coming[block] = self._prefill(self.params, self._now)
            self._is_stale = False
        return finished + self._advance(block)

    def finish(self) -> list[Latent]:
        """Blocks still under way, oldest first."""
        finished = []
        while any(block is not None for block in self._blocks[:-1]):
            finished += self._advance(None)
        return finished

    def _advance(self, entering: int | None) -> list[Latent]:
        """One tick: every slice denoises its block, latents move on."""
        blocks = [entering, *self._blocks[:-1]]
        for stage, block in enumerate(blocks):
            if block is not None:
                self._following[stage] = block + 1
                if block in self._coming:
                    self._swap_sink(stage, block)
        # A slice without a block works on whatever it holds, in the place of the block it waits
        # for: that block overwrites the slot before anything attends to it.
        numbers = [
            following if block is None else block
            for block, following in zip(blocks, self._following, strict=True)
        ]
        silence = np.zeros_like(next(iter(self._audio.values())))
        audio = np.stack([self._audio.get(number, silence) for number in numbers])
        done, self._latents, self._caches = self._tick(
            self.params,
            self._put(self._noise(numbers[0]), _EVERYWHERE),
            self._latents,
            self._put(audio, _STAGE),
            self.conditions.pose,
            self._caches,
            self._sinks,
            self._put(self._positions(numbers), _STAGE),
            self._levels,
            self._put(self._noise_between(numbers), _STAGE),
        )
        self._blocks = blocks
        last = blocks[-1]
        if last is None:
            return []
        self._audio.pop(last)
        latent = _last_stage(done)
        if last == 0 and self.plan.aas_after_blocks:
            self._first_latent = self._spread_last(done)
        return [latent]

    def _positions(self, blocks: list[int]) -> list[BlockPosition]:
        """Of every evaluation of a slice: where its block stands, `[stage ...]`."""

        plan, count = self.plan, self.evaluations
        made = [
            [plan.position(self.config, b, s * count + step) for s, b in enumerate(blocks)]
            for step in range(count)
        ]
        return [jax.tree.map(lambda *leaves: np.stack(leaves), *slices) for slices in made]

    def _noise_between(self, blocks: list[int]) -> Array | None:
        """Noise to noise blocks with anew, `[stage evaluation b t h w c]`, if any is taken."""
        if not self.plan.takes_noise:
            return None
        count = self.evaluations
        return jnp.stack(
            [
                jnp.stack([self._new_noise(b, s * count + step) for step in range(count)])
                for s, b in enumerate(blocks)
            ]
        )

    def _swap_sink(self, stage: int, block: int) -> None:
        is_mine = self._put(np.arange(self.stages) == stage, _STAGE)
        self._sinks = self._swap(self._sinks, self._coming[block], is_mine)
        if stage == self.stages - 1:
            del self._coming[block]

    # ---- compiled functions ------------------------------------

    def _make_prefill(self, graphdef) -> Callable:
        prefill = make_prefill(graphdef)

        def on_every_slice(params, conditions):
            return jax.tree.map(lambda leaf: leaf[None], prefill(params, conditions))

        mapped = _shard_map(self.mesh, on_every_slice, (_EVERYWHERE, _EVERYWHERE), _STAGE)
        return jax.jit(mapped, out_shardings=cache_place(self.mesh))

    def _make_swap(self) -> Callable:
        def swap(old, new, is_mine):
            return jax.tree.map(lambda a, b: jnp.where(is_mine[0], b, a), old, new)

        mapped = _shard_map(self.mesh, swap, (_STAGE, _STAGE, _STAGE), _STAGE)
        return jax.jit(mapped, donate_argnums=(0,))

    @functools.cached_property
    def _spread_last(self) -> Callable:
        def first_latent(done):
            is_last = jax.lax.axis_index("stage") == self.stages - 1
            # A sum of one value and zeros; XLA's CPU compiler aborts on bfloat16 sums in here.
            latent = jnp.where(is_last, done[0, :, :1].astype(jnp.float32), 0)
            return jax.lax.psum(latent, "stage").astype(done.dtype)

        return jax.jit(_shard_map(self.mesh, first_latent, (_STAGE,), _EVERYWHERE))

    def _put(self, tree: PyTree, spec: PartitionSpec) -> PyTree:
        """Host or device values -> global arrays; every host passes the same values."""
        sharding = NamedSharding(self.mesh, spec)
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)

        def place(leaf):
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(place, tree)


def _shard_map(mesh: Mesh, function, in_specs, out_specs) -> Callable:
    # The "model" axis is left to the compiler: `param_shardings` says how it splits.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"stage"},
        check_vma=False,
    )


def _levels(plan: StreamPlan, stages: int) -> np.ndarray:
    """Noise levels before and after every evaluation, `[stage, evaluation, 2]`."""
    return np.array(plan.levels, np.float32).reshape(stages, -1, 2)


def _caches(
    config: DiTConfig, grid: tuple[int, int, int], stages: int, sampling: Sampling
) -> list[KVCache]:
    """Empty windows of the steps of a slice; `grid` is batch, latent rows and columns."""
    return [_stacked(empty_cache(config, *grid), stages)] * (sampling.num_windows // stages)


def _stacked(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (count, *leaf.shape)), tree)


def _last_stage(done: Array) -> Array:
    """The last slice's part of `[stage, ...]`, where it is, without a copy to the host."""
    last = done.shape[0] - 1
    shard = next(s for s in done.addressable_shards if s.index[0].start in (last, None))
    return shard.data[0]
