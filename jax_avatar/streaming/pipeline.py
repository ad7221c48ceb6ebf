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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_avatar.diffusion.sampling import Sampling, noised
from jax_avatar.models.cache import KVCache, Sink, empty_cache
from jax_avatar.models.conditions import Conditions
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.network import Network
from jax_avatar.models.sharding import kv_sharding, param_shardings, put_on
from jax_avatar.shapes import Array, AudioFeatures, Latent, PyTree, TextStates
from jax_avatar.streaming.plan import StreamPlan, check_slices
from jax_avatar.streaming.sampler import denoise
from jax_avatar.streaming.state import StreamState, add_context, change_prompt, renew
from jax_avatar.weights.files import place, tree_of

__all__ = [
    "PipelineState",
    "PipelinedStream",
    "Register",
    "SliceInputs",
    "check_mesh",
    "make_empty_slices",
    "make_slice_prefill",
    "make_tick",
    "slice_inputs",
]

_STAGE = PartitionSpec("stage")
_EVERYWHERE = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SliceInputs:
    """Inputs of one tick; every leaf begins with the axis of the slices.

    Attributes:
        audio: speech features of the block in each slice.
        positions: where it stands, per evaluation.
        noise: to noise it with anew, `[stage evaluation b t h w c]`; None where none is taken.
    """

    audio: Any
    positions: tuple[Any, ...]
    noise: Any


@functools.lru_cache(maxsize=16)
def make_tick(network: Network, mesh: Mesh, sampling: Sampling) -> Callable[..., tuple]:
    """The compiled tick: every slice denoises its block, latents move on.

    Streams of one network, mesh and sampling share it.

    Args:
        network: structure and size of the transformer, `without_params`.
        mesh: axes "stage" and "model"; its devices need not be here, to compile for them.
        sampling: of the stream; its steps are spread evenly over the slices.

    Returns:
        `(params, noise, incoming, windows, sink, conditions, inputs) -> (x, incoming, windows)`;
        incoming and windows are donated. `incoming` is what each slice has from the one before.
    """
    stages = mesh.shape["stage"]
    steps, renoises = sampling.num_steps // stages, sampling.sampler == "renoise"
    levels = np.array(sampling.levels, np.float32).reshape(stages, -1, 2)
    onward = [(k, k + 1) for k in range(stages - 1)]

    def tick(params, noise, incoming, windows, sink, conditions, inputs):
        """Algorithm 4: what slice k does at a tick, its steps of the block that has come to it."""
        dit, k = network.bind(params), jax.lax.axis_index("stage")
        conditions = conditions.with_audio(inputs.audio)
        own_levels = jax.lax.dynamic_index_in_dim(levels, k, keepdims=False)
        windows = list(windows)

        def step(i, x):
            w, new_noise = i % len(windows), inputs.noise[i] if renoises else None
            position, sigmas = inputs.positions[i], own_levels[i]
            x, windows[w] = denoise(
                dit, x, conditions, windows[w], sink, position, sigmas, new_noise
            )  # KV_i
            return x

        x = jnp.where(k == 0, noise, incoming)
        for i in range(steps):
            x = step(i, x)
        if sampling.refresh != "none":  # the clean block writes the history
            step(steps, noised(x, inputs.noise[steps], own_levels[steps, 0]))
        return x, jax.lax.ppermute(x, "stage", onward), tuple(windows)

    mapped = _on_slices(
        mesh,
        tick,
        (_EVERYWHERE, _EVERYWHERE, _STAGE, _STAGE, _STAGE, _EVERYWHERE, _STAGE),
        _STAGE,
    )
    by_stage = NamedSharding(mesh, _STAGE)
    # Windows keep their place, so that a slice updates them where they are.
    places = (by_stage, by_stage, kv_sharding(mesh))
    return jax.jit(mapped, donate_argnums=(2, 3), out_shardings=places)


@dataclass(frozen=True)
class Register:
    """Shift register on the host: which block is in which slice.

    Attributes:
        blocks: number of the block in each slice; None where there is none.
        expected: number of the block that each slice gets next.
    """

    blocks: tuple[int | None, ...]
    expected: tuple[int, ...]

    @classmethod
    def empty(cls, slices: int) -> "Register":
        """No block in any slice."""
        return cls((None,) * slices, (0,) * slices)

    def advance(self, entering: int | None) -> tuple["Register", int | None]:
        """One tick: blocks move on by one slice.

        Args:
            entering: block that comes into the first slice; None lets the others move on.

        Returns:
            The register during the tick, and the block that leaves the last slice after it.
        """
        blocks = (entering, *self.blocks[:-1])
        expected = tuple(
            old if block is None else block + 1
            for block, old in zip(blocks, self.expected, strict=True)
        )
        return Register(blocks, expected), blocks[-1]

    @property
    def places(self) -> tuple[int, ...]:
        """Number of the block in whose place each slice works.

        A slice without a block works on whatever it holds, in the place of the block that it gets
        next: that block overwrites the slot before anything attends to it.
        """
        return tuple(
            expected if block is None else block
            for block, expected in zip(self.blocks, self.expected, strict=True)
        )

    @property
    def is_drained(self) -> bool:
        """True if no block has further slices before it."""
        return all(block is None for block in self.blocks[:-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PipelineState(StreamState):
    """State of a pipelined stream; sink and windows begin with the axis of the slices.

    Attributes:
        incoming: latents on their way, what each slice has from the one before.
        register: which block is in which slice.
        audio: speech features of the blocks under way.
        sinks: block -> sink from that block on, until the last slice has it.
    """

    incoming: Any
    register: Register = field(metadata={"static": True})
    audio: Mapping[int, Any] = field(default_factory=dict)
    sinks: Mapping[int, Any] = field(default_factory=dict)


class PipelinedStream:
    """Blocks of audio features in, blocks of clean latents out, a few blocks later.

    The same latents as `SequentialStream`, for every layout.

    Attributes:
        state: all that the stream remembers.
        params: weights of the transformer, on every slice.

    Source: Live Avatar (arXiv 2512.04677), Algorithm 4.
    """

    def push(self, audio: AudioFeatures | np.ndarray) -> list[Latent]:
        """Feeds the next block's audio; returns the blocks that have come out, oldest first.

        Nothing waits for the devices: a returned latent is a promise on the last slice.

        Args:
            audio: speech features of the block's video frames.
        """
        finished = []
        # The new sink is made of block 0, which must have left the last slice. After four blocks
        # on four slices it has; sooner, the pipeline waits.
        while self.plan.is_renewal(self.state.block) and self.state.first is None:
            finished += self._tick(None)
        state, g = renew(self.state, self.plan), self.state.block  # adaptive attention sink
        if state.is_stale:
            sinks = {**state.sinks, g: self.prefill(self.params, state.conditions)}
            state = replace(state, sinks=sinks, is_stale=False)
        heard, earlier = add_context(self.plan, np.asarray(audio), state.earlier)
        audio = {**state.audio, g: heard}
        self.state = replace(state, audio=audio, earlier=earlier, block=g + 1)
        return finished + self._tick(g)

    def _tick(self, entering: int | None) -> list[Latent]:
        """One tick of all slices; returns the block that leaves the last one, if any."""
        register, leaving = self.state.register.advance(entering)
        state = self._swap_sinks(replace(self.state, register=register))
        of_stream = state.conditions
        inputs = slice_inputs(self.plan, self.config, register.places, state.audio, self.new_noise)
        x, incoming, windows = self.tick(
            self.params,
            self.put(self.noise(register.places[0]), _EVERYWHERE),
            state.incoming,
            state.windows,
            state.sink,
            Conditions(pose=of_stream.pose, speaker_mask=of_stream.speaker_mask),
            self.put(inputs, _STAGE),
        )
        state = replace(state, incoming=incoming, windows=windows)
        if leaving is None:
            self.state = state
            return []
        clean = _last_stage(x)
        audio = {g: heard for g, heard in state.audio.items() if g != leaving}
        if leaving == 0 and self.plan.aas_after_blocks:
            state = replace(state, first=self.first_latent(x))
        self.state = replace(state.with_clean(clean), audio=audio)
        return [clean]

    def _swap_sinks(self, state: PipelineState) -> PipelineState:
        """Gives a slice its new sink when the first block that is to see it has come there."""
        sink, sinks = state.sink, dict(state.sinks)
        for k, g in enumerate(state.register.blocks):
            if g in sinks:
                is_there = self.put(np.arange(len(state.register.blocks)) == k, _STAGE)
                sink = self.swap(sink, sinks[g], is_there)
        sinks.pop(state.register.blocks[-1], None)
        return replace(state, sink=sink, sinks=sinks)

    def finish(self) -> list[Latent]:
        """Blocks still under way, oldest first."""
        finished = []
        while not self.state.register.is_drained:
            finished += self._tick(None)
        return finished

    def set_text(self, text: TextStates | np.ndarray) -> None:
        """Changes the prompt from the next block on, which keeps it through all slices."""
        self.state = change_prompt(self.state, self.put(text, _EVERYWHERE))

    # ---- start -----------------------------------------------------------------------------

    def __init__(
        self,
        network: Network,
        plan: StreamPlan,
        conditions: Conditions,
        mesh: Mesh,
    ):
        """Places weights, prefills every slice's sink.

        Args:
            network: the transformer; of weights on disk, every device reads only its own.
            plan: settings of the stream; its steps are spread evenly over the slices.
            conditions: portrait, prompt, pose.
            mesh: axes "stage" and "model", from `make_mesh`.
        """
        config, bare = network.config, network.without_params()
        check_mesh(config, plan, mesh)
        self.config, self.plan, self.mesh = config, plan, mesh
        self.params = place(network.params, param_shardings(tree_of(network.params), mesh))
        b, _, h, w, c = conditions.reference.shape
        shape = (b, config.frames_per_block, h, w, c)
        self.noise = plan.make_noise(shape, config.dtype)
        self.new_noise = plan.make_new_noise(shape, config.dtype)
        self.tick = make_tick(bare, mesh, Sampling(**plan.sampling()))
        swap = _on_slices(mesh, _swap, (_STAGE, _STAGE, _STAGE), _STAGE)
        self.swap = jax.jit(swap, donate_argnums=0)
        self.prefill = make_slice_prefill(bare, mesh)
        self.first_latent = jax.jit(_on_slices(mesh, _first_latent, (_STAGE,), _EVERYWHERE))
        self.empty = make_empty_slices(config, plan, (b, h, w), mesh)
        self.reset(conditions)

    def reset(self, conditions: Conditions | None = None) -> None:
        """Back to block 0: empty windows, the portrait in every slice's sink.

        Args:
            conditions: of the new stream, of the same shapes; those of the last if not given.
        """
        if conditions is not None:
            self.conditions = self.put(conditions, _EVERYWHERE)
        self.state = None
        incoming, windows = self.empty()
        self.state = PipelineState(
            conditions=self.conditions,
            sink=self.prefill(self.params, self.conditions),
            windows=windows,
            incoming=incoming,
            register=Register.empty(self.mesh.shape["stage"]),
        )

    def put(self, tree: PyTree, spec: PartitionSpec) -> PyTree:
        """Host or device values -> global arrays; every host passes the same values."""
        return put_on(tree, NamedSharding(self.mesh, spec))


def check_mesh(config: DiTConfig, sampling: Sampling, mesh: Mesh) -> None:
    """Refuses a mesh that does not fit the stream.

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


@functools.lru_cache(maxsize=16)
def make_slice_prefill(network: Network, mesh: Mesh) -> Callable[[PyTree, Conditions], Sink]:
    """The compiled `(params, conditions) -> sink`, on every slice; arguments as for `make_tick`."""

    def prefill(params, conditions):
        return network.bind(params).prefill(conditions)

    mapped = _on_slices(mesh, prefill, (_EVERYWHERE, _EVERYWHERE), _STAGE)
    return jax.jit(mapped, out_shardings=kv_sharding(mesh))


def make_empty_slices(
    config: DiTConfig, sampling: Sampling, grid: tuple[int, int, int], mesh: Mesh
) -> Callable[[], tuple[Array, tuple[KVCache, ...]]]:
    """The compiled `() -> (incoming, windows)` of slices that hold no block.

    Args:
        config: size of the transformer.
        sampling: of the stream.
        grid: batch, latent rows and columns.
        mesh: as for `make_tick`.
    """
    stages, (b, h, w) = mesh.shape["stage"], grid

    def empty():
        latents = (stages, b, config.frames_per_block, h, w, config.latent_channels)
        windows = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[None], (stages, *leaf.shape)),
            empty_cache(config, b, h, w),
        )
        return jnp.zeros(latents, config.dtype), (windows,) * (sampling.num_windows // stages)

    return jax.jit(empty, out_shardings=(NamedSharding(mesh, _STAGE), kv_sharding(mesh)))


def slice_inputs(
    plan: StreamPlan,
    config: DiTConfig,
    places: Sequence[int],
    audio: Mapping[int, np.ndarray],
    new_noise: Callable[[int, int], Array],
) -> SliceInputs:
    """Inputs of one tick, on the host.

    Args:
        plan: of the stream.
        config: size of the transformer.
        places: number of the block in whose place each slice works.
        audio: block -> its speech features, at least one; others hear silence.
        new_noise: from `StreamPlan.make_new_noise`.
    """
    count = plan.num_evaluations // len(places)
    silence = np.zeros_like(next(iter(audio.values())))

    def stacked(make, i, arrays):
        of_slices = [make(g, k * count + i) for k, g in enumerate(places)]
        return jax.tree.map(lambda *leaves: arrays.stack(leaves), *of_slices)

    positions = [stacked(functools.partial(plan.position, config), i, np) for i in range(count)]
    noise = None
    if plan.takes_noise:
        noise = jnp.stack([stacked(new_noise, i, jnp) for i in range(count)], axis=1)
    heard = np.stack([audio.get(g, silence) for g in places])
    return SliceInputs(heard, tuple(positions), noise)


def _on_slices(mesh: Mesh, function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """The function on every slice, which sees its own part of `[stage ...]` without that axis."""

    def on_slice(*arguments):
        own = [
            jax.tree.map(lambda leaf: leaf[0], argument) if spec == _STAGE else argument
            for argument, spec in zip(arguments, in_specs, strict=True)
        ]
        made = function(*own)
        return jax.tree.map(lambda leaf: leaf[None], made) if out_specs == _STAGE else made

    # The "model" axis is left to the compiler: `param_shardings` says how it splits.
    return jax.shard_map(
        on_slice,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"stage"},
        check_vma=False,
    )


def _swap(old: PyTree, new: PyTree, is_there: Array) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(is_there, b, a), old, new)


def _first_latent(x: Array) -> Array:
    is_last = jax.lax.axis_index("stage") == jax.lax.axis_size("stage") - 1
    # A sum of one value and zeros; XLA's CPU compiler aborts on bfloat16 sums in here.
    latent = jnp.where(is_last, x[:, :1].astype(jnp.float32), 0)
    return jax.lax.psum(latent, "stage").astype(x.dtype)


def _last_stage(x: Array) -> Array:
    """The last slice's part of `[stage, ...]`, where it is, without a copy to the host."""
    last = x.shape[0] - 1
    shard = next(s for s in x.addressable_shards if s.index[0].start in (last, None))
    return shard.data[0]
