"""Golden cases of the Wan 2.1 VAE.

A case is `<stem>_weights.safetensors` and `<stem>_io.safetensors`, the official constructor
arguments in the metadata key `config`, streaming schedules in `streams`; optionally
`<stem>_intermediates.safetensors`. Arrays are channels first.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conversion.cases import Case, Check, compare, weight_pairs
from conversion.readers import SafetensorsFile
from conversion.rules import convert
from conversion.wan_vae import TABLE, config_from, official_names
from jax_avatar.models.config import WanVAEConfig
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.tap import record
from jax_avatar.models.vae.wan import WanVAE

__all__ = ["VAECases"]

_TOLERANCE = 1e-4
_ROUND_TRIP_TOLERANCE = 2e-4  # errors of encoder and decoder add up
_INPUTS = ("video", "image", "latents")
# Official layer names -> names of our taps.
_LAYERS = (
    (r"^dec\.conv1$", "decoder.conv_in"),
    (r"^dec\.upsamples\.", "decoder.up."),
    (r"^dec\.head_out$", "decoder.head"),
    (r"^dec\.", "decoder."),
    (r"^enc\.conv1$", "encoder.conv_in"),
    (r"^enc\.downsamples\.", "encoder.down."),
    (r"^enc\.head_out$", "encoder.head"),
    (r"^enc\.", "encoder."),
)


class VAECases:
    """Encode, decode and streams against the official classes' numbers."""

    name = "vae"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """Pairs of weights and inputs/outputs whose config is that of a VAE."""
        cases = []
        for case in weight_pairs(files, {"dim_mult"}):
            layers = case.files[0].with_name(f"{case.name}_intermediates.safetensors")
            cases.append(replace(case, files=(*case.files, layers)) if layers in files else case)
        return cases

    def run(self, case: Case) -> Iterable[Check]:
        """Every tensor of the case, or a failing check for one it cannot make."""
        weights, io, *layers = (SafetensorsFile(path) for path in case.files)
        config = _config(weights.metadata, io)
        yield from _constants(config, io)
        vae, report = _load(config, weights)
        yield Check("weights", 0.0, 0.0, report)
        yield from _outputs(_Results(vae, io))
        if layers:
            yield from _layers(_Results(vae, io), layers[0])


@cache
def _methods(config: WanVAEConfig) -> tuple[Any, dict[str, Callable]]:
    """Flat abstract parameters, and the streaming methods with taps, compiled per shape."""
    network = Network.abstract(WanVAE, config)
    target = network.params

    def tapped(method: str) -> Callable:
        def call(params, *arguments):
            with record() as taps:
                return *getattr(network.bind(params), method)(*arguments), taps

        # Each shape runs once or twice, so compiling fast matters more than running fast.
        return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})

    names = ("encode_first", "encode_next", "decode_first", "decode_next")
    return flatten(target), {name: tapped(name) for name in names}


class _Bound:
    """The VAE with its weights; takes and gives channels first."""

    def __init__(self, config: WanVAEConfig, params: Any):
        self.config = config
        self._params = jax.device_put(params)
        self._methods = _methods(config)[1]

    def encode(self, *chunks: np.ndarray) -> list[tuple[np.ndarray, Any, dict]]:
        """Latent, state and layers of each chunk of one clip."""
        return self._stream("encode", chunks)

    def decode(self, *chunks: np.ndarray) -> list[tuple[np.ndarray, Any, dict]]:
        """Frames, state and layers of each chunk of one clip."""
        return self._stream("decode", chunks)

    def _stream(self, kind: str, chunks: Sequence[np.ndarray]) -> list:
        first, following = self._methods[f"{kind}_first"], self._methods[f"{kind}_next"]
        value, state, taps = first(self._params, _last(chunks[0]))
        results = [(_first(value), state, taps)]
        for chunk in chunks[1:]:
            value, state, taps = following(self._params, state, _last(chunk))
            results.append((_first(value), state, taps))
        return results


class _Results:
    """Our outputs for the inputs of a case, each computed on first access."""

    def __init__(self, vae: _Bound, io: SafetensorsFile):
        self.vae = vae
        self.io = io

    @cached_property
    def _encoding(self) -> tuple[np.ndarray, Any, dict]:
        return self.vae.encode(self.io["video"])[0]

    @property
    def moments(self) -> np.ndarray:
        return _first(self._encoding[2]["to_moments"])

    @property
    def encoded(self) -> np.ndarray:
        return self._encoding[0]

    @cached_property
    def decoded(self) -> np.ndarray:
        return self.vae.decode(self.io["latents"])[0][0]

    def encode_image(self, num_latents: int) -> np.ndarray:
        frames = 1 + self.vae.config.temporal_stride * (num_latents - 1)
        chunks = _first_alone(np.repeat(self.io["image"], frames, axis=2))
        return _joined(self.vae.encode(*chunks))

    def stream_encode(self) -> np.ndarray:
        # The official stream's first call takes the first frame and one more group.
        chunks = _first_alone(self.io["video"])
        cut = self.vae.config.temporal_stride
        chunks = [piece for chunk in chunks for piece in np.split(chunk, [cut], axis=2)]
        return _joined(self.vae.encode(*(chunk for chunk in chunks if chunk.shape[2])))

    def stream_decode(self, schedule: Sequence[int]) -> list[np.ndarray]:
        latents = self.io["latents"]
        if sum(schedule) > latents.shape[2]:
            raise ValueError(f"stream {schedule} needs more latents than {latents.shape[2]}")
        first, *later = np.split(latents, np.cumsum(schedule), axis=2)[:-1]
        alone = _first_alone(first)
        results = self.vae.decode(*alone, *later)
        return [_joined(results[: len(alone)])] + [video for video, *_ in results[len(alone) :]]

    def decode_encoded(self) -> np.ndarray:
        return _joined(self.vae.decode(*_first_alone(self.encoded)))


def _config(metadata: Mapping[str, str], io: SafetensorsFile) -> WanVAEConfig:
    values = json.loads(metadata["config"])
    if values["z_dim"] != WanVAEConfig.z_dim:
        # No published statistics for this size: take the ones the numbers were made with.
        values["latents_mean"] = io["latent_mean"].tolist()
        values["latents_std"] = io["latent_std"].tolist()
    return config_from(values)


def _constants(config: WanVAEConfig, io: SafetensorsFile) -> Iterator[Check]:
    for name in ("latent_mean", "latent_std"):
        if name in io:
            yield compare(name, np.float32(getattr(config, name)), io[name], 0.0)


def _load(config: WanVAEConfig, weights: SafetensorsFile) -> tuple[_Bound, str]:
    named = {name.removeprefix("sd."): weights[name] for name in weights}
    source = official_names(named, config.num_res_blocks)
    params, report = convert(source, TABLE, _methods(config)[0])
    return _Bound(config, unflatten(params)), str(report)


def _outputs(results: _Results) -> Iterator[Check]:
    io, z_dim = results.io, results.vae.config.z_dim
    makers: dict[str, Callable[[], np.ndarray]] = {
        "enc_moments": lambda: results.moments,
        "enc_mean_raw": lambda: results.moments[:, :z_dim],
        "enc_mean_norm": lambda: results.encoded,
        "stream_enc_norm": results.stream_encode,
        "enc_image_norm": lambda: results.encode_image(1),
        "enc_image_rep5_norm": lambda: results.encode_image(io["enc_image_rep5_norm"].shape[2]),
        "dec_raw": lambda: results.decoded,
        "dec_clamped": lambda: np.clip(results.decoded, -1, 1),
        "dec_single_latent_raw": lambda: results.vae.decode(io["latents"][:, :, :1])[0][0],
        "dec_of_encoded_raw": results.decode_encoded,
    }
    streams = json.loads(io.metadata.get("streams", "{}"))
    streamed = {
        f"stream_{name}.chunk{k}_raw": name
        for name, calls in streams.items()
        for k in range(len(calls))
    }
    for name in io:
        if name in makers:
            tolerance = _ROUND_TRIP_TOLERANCE if name == "dec_of_encoded_raw" else _TOLERANCE
            yield compare(name, makers[name](), io[name], tolerance)
        elif name not in (*_INPUTS, "latent_mean", "latent_std", *streamed):
            yield Check(name, np.inf, _TOLERANCE, "unknown tensor")
    for name in streams:
        for k, video in enumerate(results.stream_decode(streams[name])):
            yield _expect(io, f"stream_{name}.chunk{k}_raw", video)


def _layers(results: _Results, file: SafetensorsFile) -> Iterator[Check]:
    """Layer by layer and buffer by buffer, one latent (or group of frames) at a time."""
    io, stride = results.io, results.vae.config.temporal_stride
    latents = 1 + max(_numbers(file, r"dec\.latent(\d+)\."), default=-1)
    latents = max(latents, *_numbers(file, r"dec\.cache_after(\d+)\."), 1)
    if "after_conv2" in file:
        latents = max(latents, file["after_conv2"].shape[2])
    groups = 1 + max(_numbers(file, r"enc\.chunk(\d+)\."), default=0)
    decoded = results.vae.decode(*_single(io["latents"], range(1, latents + 1)))
    cuts = [1 + stride * group for group in range(groups)]
    encoded = results.vae.encode(*_single(io["video"], cuts))
    for name in file:
        if name == "after_conv2":
            values = [_first(taps["from_latent"]) for _, _, taps in decoded]
            values = np.concatenate(values, axis=2)[:, :, : file[name].shape[2]]
            yield compare(name, values, file[name], _TOLERANCE)
        elif found := re.fullmatch(r"dec\.latent(\d+)\.(.*)", name):
            yield _layer(file, name, decoded[int(found[1])][2], f"dec.{found[2]}")
        elif found := re.fullmatch(r"enc\.chunk(\d+)\.(.*)", name):
            yield _layer(file, name, encoded[int(found[1])][2], f"enc.{found[2]}")
        elif found := re.fullmatch(r"dec\.cache_after([1-9]\d*)\.(\d+)", name):
            buffers = decoded[int(found[1]) - 1][1].buffers
            yield _buffer(file, name, buffers, int(found[2]))
        else:
            yield Check(name, np.inf, _TOLERANCE, "unknown tensor")


def _layer(file: SafetensorsFile, name: str, taps: Mapping[str, Any], layer: str) -> Check:
    for pattern, replacement in _LAYERS:
        layer = re.sub(pattern, replacement, layer)
    if layer not in taps:
        return Check(name, np.inf, _TOLERANCE, f"no layer {layer}")
    return compare(name, _first(taps[layer]), file[name], _TOLERANCE)


def _buffer(file: SafetensorsFile, name: str, buffers: tuple, slot: int) -> Check:
    if slot >= len(buffers):
        return Check(name, np.inf, _TOLERANCE, f"we have {len(buffers)} buffers")
    ours, expected = _first(buffers[slot]), file[name]
    # The official cache leaves out leading frames that are still zero.
    lack = max(ours.shape[2] - expected.shape[2], 0)
    expected = np.pad(expected, [(0, 0), (0, 0), (lack, 0), (0, 0), (0, 0)])
    return compare(name, ours, expected, _TOLERANCE)


def _expect(file: SafetensorsFile, name: str, value: np.ndarray) -> Check:
    if name not in file:
        return Check(name, np.inf, _TOLERANCE, "not in the file")
    return compare(name, value, file[name], _TOLERANCE)


def _numbers(file: SafetensorsFile, pattern: str) -> list[int]:
    return [int(found[1]) for name in file if (found := re.match(pattern, name))]


def _first_alone(clip: np.ndarray) -> list[np.ndarray]:
    """Splits like a live stream: the first latent (or frame) alone, so that few shapes compile."""
    return [part for part in np.split(clip, [1], axis=2) if part.shape[2]]


def _joined(results: list) -> np.ndarray:
    return np.concatenate([value for value, *_ in results], axis=2)


def _single(array: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    return np.split(array, list(cuts), axis=2)[: len(cuts)]


def _last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(array, 1, -1))


def _first(array: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, 1)
