"""Golden cases of the transformer and the sampler.

<name>.safetensors         state dict `sd.*`, inputs, whole-clip forms     metadata `info`
<name>_stream.safetensors  sink, streaming blocks, rollouts                metadata `info`
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion.cases import Case, Check, compare
from conversion.readers import SafetensorsFile
from conversion.rules import convert
from conversion.wan_dit import (
    TABLE,
    MergedLora,
    config_from_official,
)
from jax_avatar.diffusion.schedule import Schedule, euler_schedule
from jax_avatar.models.attention import block_causal_mask
from jax_avatar.models.cache import block_position, empty_cache
from jax_avatar.models.conditions import Conditions, still_pose
from jax_avatar.models.dit import DiT
from jax_avatar.models.layers import layer_norm, modulate
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.tap import record
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.sampler import SequentialStream

__all__ = ["DiTCases"]

_ATOL, _RTOL = 2e-5, 1e-4


class DiTCases:
    """A tiny official transformer in all its forms."""

    name = "dit"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Pairs of files whose metadata `info` names the same model."""
        infos = {}
        for path in files:
            if path.suffix == ".safetensors":
                info = json.loads(SafetensorsFile(path).metadata.get("info", "{}"))
                if "model_config" in info:
                    infos[path] = info
        cases = []
        for path, info in infos.items():
            if not any(name.startswith("sd.") for name in SafetensorsFile(path)):
                continue
            others = [p for p in infos if p != path and p.stem.startswith(path.stem)]
            companions = [p for p in files if p == path.with_suffix(".json")]
            cases.append(Case(info["name"], (path, *others, *companions), info))
        return cases

    def run(self, case: Case) -> Iterable[Check]:
        """Checks every tensor of the files that is not an input."""
        tensors: dict[str, np.ndarray] = {}
        for path in case.files:
            if path.suffix == ".safetensors":
                tensors |= dict(SafetensorsFile(path))
            elif json.loads(path.read_text()) != case.data:
                yield Check(path.name, np.inf, 0.0, "differs from the metadata `info`")
        golden = _Golden(tensors, case.data)
        makers = [golden.units, golden.audio, golden.wan22, golden.train, golden.lora]
        if any(name.startswith("sink.") for name in tensors):
            makers += [golden.sink, golden.stream, golden.rollouts]
        done: set[str] = set()
        for maker in makers:
            for name, value in maker():
                if name in tensors:
                    done.add(name)
                    exact = name in ("train.mask",)
                    yield compare(
                        name,
                        _like(value, tensors[name]),
                        tensors[name],
                        0.0 if exact else _ATOL,
                        0.0 if exact else _RTOL,
                    )
        for name in sorted(set(tensors) - done - golden.inputs):
            yield Check(name, np.inf, _ATOL, "no check covers this tensor")


class _Golden:
    """Computes the tensors of one model; methods yield (name, value)."""

    def __init__(self, tensors: Mapping[str, np.ndarray], info: Mapping[str, Any]):
        self.t, self.info = tensors, info
        self.config = config_from_official(
            info["model_config"],
            half_rotary=True,
            frames_per_block=info["frames_per_block"],
            ring_blocks=info["cache_blocks"],
            audio_history=info["motion_frames"][0],
        )
        self.state_dict = {k[3:]: v for k, v in tensors.items() if k.startswith("sd.")}
        self.network = Network.abstract(DiT, self.config)
        self.params = self._load(self.state_dict)
        self._programs: dict[tuple, Callable] = {}

    @cached_property
    def inputs(self) -> set[str]:
        """Tensors that are given, not made."""
        inner = r"(x|t|t_mixed|audio_input|cond_states|mask|audio1|cond1|context1|motion1|ref1|x1)"
        given = [
            r"(sd|in|lora)\..*",
            r"audio\.features",
            r"(wan22|wan22b|stream|multi|rollout)\." + inner,
            r"train\.(x|t|audio_input|cond_states)",
            r"unit\.(x_small|adaln_temb|head_e|head_x)",
            r"stream\.(far_)?(current_frame|relative_dist)",
            r"stream\.new_kv_blocks",
            r"rollout\.(noise|relative_dist)",
        ]
        return {n for n in self.t if any(re.fullmatch(pattern, n) for pattern in given)}

    def _load(self, state_dict):
        flat, _ = convert(state_dict, TABLE, flatten(self.network.params))
        return unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})

    def _run(
        self, form: str, *arguments, params=None, tapped=False, half_rotary=True, **options
    ) -> tuple[Any, dict[str, Any]]:
        """Result of a form of the network, and its intermediates; compiled once per shapes.

        Args:
            form: name of the method.
            *arguments: of the method.
            params: other weights.
            tapped: record intermediates, which unrolls the layers.
            half_rotary: round rotary factors to float16.
            **options: of the method, compiled in.
        """
        key = (form, tapped, half_rotary, *options.items())
        if key not in self._programs:
            network = Network.abstract(DiT, self.config.replace(half_rotary=half_rotary))

            def run(params, *arguments):
                if not tapped:
                    return getattr(network.bind(params), form)(*arguments, **options), {}
                with record() as taps:
                    return getattr(network.bind(params), form)(*arguments, **options), taps

            # Each shape runs a few times, so compiling fast matters more than running fast.
            quick = {"xla_backend_optimization_level": 0}
            self._programs[key] = jax.jit(run, compiler_options=quick)
        return self._programs[key](params or self.params, *arguments)

    def _latent(self, name: str) -> jax.Array:
        """Official `[b?] c t h w` -> `b t h w c`."""
        x = np.asarray(self.t[name])
        return jnp.asarray(np.moveaxis(x if x.ndim == 5 else x[None], 1, -1))

    def _audio(self, name: str, index: int | None = None) -> jax.Array:
        """Official `u k a T` -> `1 u T k a`."""
        x = np.asarray(self.t[name])
        x = x if index is None else x[index][None]
        return jnp.asarray(x.transpose(0, 3, 1, 2)[None])

    @property
    def _text(self):
        return jnp.asarray(self.t["in.context"])[None]

    @property
    def _reference(self):
        return self._latent("in.ref_latents")

    @property
    def _motion(self):
        return self._latent("in.motion_latents")

    # ---- whole clips ----------------------------------------------------------------------

    def units(self) -> Iterator[tuple[str, Any]]:
        """Norms, head and un-patching on their own."""
        dit = self.network.bind(self.params)
        block = _slice(dit.blocks, 0)
        injector = _slice(dit.injectors, 0)
        x = jnp.asarray(self.t["unit.x_small"])
        temb = jnp.asarray(self.t["unit.adaln_temb"])
        shift, scale = jnp.split(injector.adaln(jax.nn.silu(temb)), 2, -1)
        yield "unit.adaln_out", modulate(layer_norm(x, 1e-5), shift[:, None], scale[:, None])
        yield "unit.norm1_out", layer_norm(x, self.config.eps)
        yield "unit.norm3_out", block.norm_cross(x)
        yield "unit.self_norm_q_out", block.self_attention.norm_query(x)
        yield "unit.injector_norm_k_out", injector.attention.norm_key(x)
        grid = tuple(self.t["unit.unpatchify_out"].shape[1:])
        with record() as taps:
            out = dit.apply_head(
                jnp.asarray(self.t["unit.head_x"]),
                jnp.asarray(self.t["unit.head_e"])[None],
                grid,
            )
        yield "unit.head_out", taps["head_out"]
        yield "unit.unpatchify_out", out

    def audio(self) -> Iterator[tuple[str, Any]]:
        """The audio encoder alone, with nothing added before and nothing dropped."""
        encode = jax.jit(lambda params, a: self.network.bind(params).audio.encode(a))
        local, overall = encode(self.params, self._audio("audio.features"))
        yield "audio.local", local
        yield "audio.global", overall

    def wan22(self) -> Iterator[tuple[str, Any]]:
        """The bidirectional form, with its intermediates."""
        frames = self._latent("wan22.x").shape[1]

        def run(motion, tapped=False, **names):
            get = lambda key: names.get(key, f"wan22.{key}")  # noqa: E731
            conditions = Conditions(
                text=names.get("text", self._text),
                reference=names.get("reference", self._reference),
                motion=motion,
                pose=self._latent(get("cond_states")),
                audio=self._audio(get("audio_input")),
            )
            time = jnp.full((1, frames), names.get("t", self.t["wan22.t"])[0], jnp.float32)
            latent = self._latent(get("x"))
            return self._run("bidirectional", latent, time, conditions, tapped=tapped)

        last = sum(self.info["motion_frames"][1:])
        out, taps = run(self._motion[:, -last:], tapped=True)
        yield "wan22.out_motion", out
        time = jnp.asarray(self.t["wan22.t"])
        yield from self._acts("wan22.act.", taps, jnp.concatenate([time, 0 * time]))
        yield "wan22.out_drop_motion", run(None)[0]
        yield "wan22.out_short_motion7", run(self._motion[:, :7])[0]
        if "wan22b.x1" in self.t:
            yield (
                "wan22b.out1",
                run(
                    self._latent("wan22b.motion1"),
                    x="wan22b.x1",
                    t=np.asarray(self.t["wan22b.t"])[1:],
                    cond_states="wan22b.cond1",
                    audio_input="wan22b.audio1",
                    text=jnp.asarray(self.t["wan22b.context1"])[None],
                    reference=self._latent("wan22b.ref1"),
                )[0],
            )
        if "wan22b.t" in self.t:
            # Its first element is the case above.
            yield "wan22b.out0", out

    def train(self) -> Iterator[tuple[str, Any]]:
        """The block-causal training form."""

        def run(**how):
            latent, time = self._latent("train.x"), jnp.asarray(self.t["train.t"])
            conditions = replace(
                self._conditions,
                pose=self._latent("train.cond_states"),
                audio=self._audio("train.audio_input"),
            )
            return self._run("block_causal", latent, time, conditions, audio_context="clip", **how)

        out, taps = run(tapped=True)
        yield "train.out", out
        time = jnp.asarray(self.t["train.t"])[0]
        yield from self._acts("train.act.", taps, jnp.concatenate([time, 0 * time]))
        yield "train.out_f64rope", run(half_rotary=False)[0]
        _, frames, h, w, _ = self._latent("train.x").shape
        tokens = h * w // 4
        yield (
            "train.mask",
            block_causal_mask(
                frames * tokens,
                self.config.cond_tokens(h, w),
                self.config.frames_per_block * tokens,
            ),
        )

    def lora(self) -> Iterator[tuple[str, Any]]:
        """Merged weights, and a streaming block with all of them."""
        adapter = {k[5:]: v for k, v in self.t.items() if k.startswith("lora.")}
        if not adapter:
            return
        merged = MergedLora(self.state_dict, adapter, self.info["lora"]["scaling"])
        for name in self.t:
            if name.startswith("lora_merged.") and name[12:] in merged:
                yield name, merged[name[12:]]
        if "stream.x" in self.t:
            params = self._load(merged)
            yield "lora_merged.vel", self._first_block(params, "stream.t", self._audio_of(0))

    @property
    def _conditions(self) -> Conditions:
        return Conditions(text=self._text, reference=self._reference, motion=self._motion)

    # ---- streams --------------------------------------------------------------------------

    @cached_property
    def _prefilled(self):
        return self._run("prefill", self._conditions, tapped=True)

    def sink(self) -> Iterator[tuple[str, Any]]:
        """Sink prefill."""
        sink, taps = self._prefilled
        for place, layer in (("first", 0), ("last", -1)):
            yield f"sink.cond_k_{place}", sink.key[layer]
            yield f"sink.cond_v_{place}", sink.value[layer]
        rows = self.t["sink.act.time_e"].shape[0] if "sink.act.time_e" in self.t else 1
        yield from self._acts("sink.act.", taps, jnp.zeros(rows))

    def stream(self) -> Iterator[tuple[str, Any]]:
        """Blocks in order on one cache, then far ones; mixed timesteps; several speakers."""
        half, _ = self._stream(tapped=(0, 5))
        exact, _ = self._stream(half_rotary=False)
        yield "stream.vel", np.stack(half["vel"])
        yield "stream.vel_far", np.stack(half["far"])
        yield "stream.vel_far_f64rope", np.stack(exact["far"])
        for name in self.t:
            found = re.fullmatch(r"stream\.vel_f64rope_blocks(\d+)", name)
            if found:
                yield name, np.stack([exact["vel"][int(digit)] for digit in found[1]])
        if "stream.new_kv_blocks" in self.t:
            for place in ("k_first", "k_last", "v_first", "v_last"):
                blocks = np.asarray(self.t["stream.new_kv_blocks"])
                yield f"stream.new_{place}", np.stack([half["kv"][b][place] for b in blocks])
        yield "stream.final_ring_k_first", half["ring"]
        time = jnp.asarray(self.t["stream.t"])[0]
        for block, taps in half["taps"].items():
            prefix = f"stream.act{block}."
            yield f"{prefix}text", self._prefilled[1]["text"]
            yield from self._acts(prefix, taps, jnp.concatenate([time, 0 * time]))
        yield (
            "stream.vel_t_mixed",
            self._first_block(self.params, "stream.t_mixed", self._audio_of(0)),
        )
        if "multi.mask" in self.t:
            mask = jnp.asarray(self.t["multi.mask"])[None, ..., 0]
            audio = self._audio("multi.audio_input")
            yield "multi.vel", self._first_block(self.params, "stream.t", audio, mask)

    def _audio_of(self, block: int) -> jax.Array:
        return self._audio("stream.audio_input", block)

    def _blocks(self, name: str, block: int) -> jax.Array:
        return jnp.asarray(np.moveaxis(np.asarray(self.t[name][block])[None], 1, -1))

    def _sink_and_cache(self, **how):
        _, _, h, w, _ = self._reference.shape
        sink, _ = self._run("prefill", self._conditions, **how)
        return sink, empty_cache(self.config, 1, h, w)

    def _first_block(self, params, timestep: str, audio, mask=None):
        sink, cache = self._sink_and_cache(params=params)
        position = block_position(self.config, 0, 30)
        (out, _), _ = self._run(
            "stream_block",
            self._blocks("stream.x", 0),
            jnp.asarray(self.t[timestep]),
            Conditions(pose=self._blocks("stream.cond_states", 0), audio=audio, speaker_mask=mask),
            cache,
            sink,
            position,
            params=params,
        )
        return out

    def _stream(self, tapped: Sequence[int] = (), half_rotary: bool = True):
        sink, cache = self._sink_and_cache(half_rotary=half_rotary)
        config = self.config.replace(half_rotary=half_rotary)
        per_block = config.frames_per_block
        num_cond = sink.key.shape[2]
        tokens = (cache.key.shape[2] - num_cond) // config.ring_frames
        time = jnp.asarray(self.t["stream.t"])
        made = {"vel": [], "far": [], "kv": {}, "taps": {}}

        def forward(which, current, distance):
            nonlocal cache
            if current % per_block:
                raise ValueError(f"frame {current} does not start a block of {per_block}")
            position = block_position(config, current // per_block, distance)
            pose = self._blocks("stream.cond_states", which)
            is_tapped = current // per_block in tapped
            (out, cache), taps = self._run(
                "stream_block",
                self._blocks("stream.x", which),
                time,
                Conditions(pose=pose, audio=self._audio_of(which)),
                cache,
                sink,
                position,
                tapped=is_tapped,
                half_rotary=half_rotary,
            )
            if is_tapped:
                made["taps"][which] = taps
            start = num_cond + int(position.slot) * tokens * per_block
            slots = slice(start, start + tokens * per_block)
            made["kv"][which] = {
                f"{kind}_{place}": np.asarray(leaf[layer][:, slots])[0]
                for kind, leaf in (("k", cache.key), ("v", cache.value))
                for place, layer in (("first", 0), ("last", -1))
            }
            return _official(out)

        distances = np.asarray(self.t["stream.relative_dist"])
        for block, current in enumerate(np.asarray(self.t["stream.current_frame"])):
            made["vel"].append(forward(block, int(current), int(distances[block])))
        kept = dict(made["kv"])
        far_distances = np.asarray(self.t["stream.far_relative_dist"])
        for index, current in enumerate(np.asarray(self.t["stream.far_current_frame"])):
            made["far"].append(forward(index, int(current), int(far_distances[index])))
        made["kv"], made["ring"] = kept, np.asarray(cache.key[0][:, num_cond:])
        return made, cache

    def rollouts(self) -> Iterator[tuple[str, Any]]:
        """Whole streams of all steps with each renewal of the sink."""
        sigmas = np.asarray(self.t["rollout.sigmas"])
        schedule = euler_schedule(len(sigmas) - 1)
        yield "rollout.sigmas", np.array(schedule.sigmas)
        yield "rollout.timesteps", np.array(schedule.timesteps)
        clip, steps, watched = self.info["cache_blocks"], {}, []
        for name in self.t:
            found = re.fullmatch(r"rollout\.step_latents_blocks([\d_]+)", name)
            if found:
                watched = [int(block) for block in found[1].split("_")]

        def tap(block, step, latent):
            if block in watched:
                steps[block, step] = _official(np.array(latent))

        latents, stream = self._rollout(clip, schedule, tap)
        yield "rollout.latents_aas_clip", latents
        if watched:
            name = "rollout.step_latents_blocks" + "_".join(map(str, watched))
            yield (
                name,
                np.stack([[steps[b, s] for s in range(schedule.num_steps)] for b in watched]),
            )
        for name in self.t:
            found = re.fullmatch(r"rollout\.final_k_last_step(\d+)_slot(\d+)", name)
            if found:
                step, slot = map(int, found.groups())
                size = self.t[name].shape[1]
                key = stream.state.windows[step].key[-1]
                start = self.config.cond_tokens(*self._reference.shape[2:4]) + slot * size
                yield name, key[:, start : start + size]
            found = re.fullmatch(r"rollout\.latents_(aas_block|no_aas)_from(\d+)", name)
            if found:
                first, count = int(found[2]), self.t[name].shape[0]
                renewal = first if found[1] == "aas_block" else 0
                made, _ = self._rollout(renewal, schedule, blocks=first + count)
                yield name, made[first:]

    def _rollout(self, aas: int, schedule: Schedule, tap=None, blocks: int | None = None):
        noise, features = np.asarray(self.t["rollout.noise"]), self.t["rollout.audio_input"]
        per_clip, per_block = self.info["cache_blocks"], self.config.frames_per_block
        distances = np.asarray(self.t["rollout.relative_dist"])

        def make_noise(block, shape):
            clip, index = divmod(block, per_clip)
            part = noise[clip][:, index * per_block : (index + 1) * per_block]
            return np.moveaxis(part[None], 1, -1)

        plan = StreamPlan(
            sigmas=schedule.sigmas,
            aas_after_blocks=aas,
            noise=make_noise,
            distance=lambda block, step: distances[block, step],
        )
        pose = still_pose("zeros", self._reference, self.config.pose_channels)
        stream = SequentialStream(
            self.network.with_params(self.params),
            plan,
            replace(self._conditions, pose=pose),
            tap=tap,
        )
        latents = []
        for block in range(blocks or len(distances)):
            clip, index = divmod(block, per_clip)
            frames = slice(4 * per_block * index, 4 * per_block * (index + 1))
            audio = np.asarray(features[clip][None, ..., frames]).transpose(0, 3, 1, 2)[None]
            latents += [_official(latent) for latent in stream.push(jnp.asarray(audio))]
        return np.stack(latents), stream

    def _acts(self, prefix: str, taps: Mapping[str, Any], time) -> Iterator[tuple[str, Any]]:
        """Intermediates under their official names."""
        embedding = self.network.bind(self.params).time
        hidden, rows = embedding(time[None])
        yield f"{prefix}time_sinusoid", embedding.sinusoid(time)
        yield f"{prefix}time_e", hidden
        yield f"{prefix}time_e0", rows
        last = f"block{self.config.num_layers - 1}_"
        taps = taps | {
            name.replace(last, "block_last_"): value
            for name, value in taps.items()
            if name.startswith(last)
        }
        for name, value in taps.items():
            if not name.startswith("time"):
                yield f"{prefix}{name}", value


def _slice(module, index: int):
    structure, state = nnx.split(module)
    return nnx.merge(structure, jax.tree.map(lambda leaf: leaf[index], state))


def _official(latent) -> np.ndarray:
    """`1 t h w c` -> official `c t h w`."""
    return np.moveaxis(np.asarray(latent[0]), -1, 0)


def _like(value: Any, expected: np.ndarray) -> np.ndarray:
    """Lays a value out as the file has it: channels first where the file has a grid."""
    value = np.asarray(value)
    shape = expected.shape
    if value.shape == shape or value.size != expected.size:
        return value
    if value.ndim == 5 and value.shape[-1] == shape[0] and len(shape) == 4:  # latents
        return _official(value)
    if value.ndim == 3 and len(shape) == 5 and shape[1] == value.shape[2]:  # tokens of a grid
        return value.transpose(0, 2, 1).reshape(shape)
    return value.reshape(shape)
