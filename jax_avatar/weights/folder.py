"""A model folder -> the networks and settings that a stream needs.

config.json   {"name", "dit": kind, "vae": kind, "speech": kind, "stream": {settings}}
dit, vae, speech   one safetensors file or Orbax folder each
lora          an adapter that is added to dit, if `config.json` names one
text          the prompt encoder, if `config.json` names one
text_tokenizer/    its tokenizer's files
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jax_avatar.models.lora import adapter_leaves, add_adapter
from jax_avatar.models.params import flatten
from jax_avatar.models.quantise import quantise_params
from jax_avatar.models.speech.mel import SpeechConfig
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2Config
from jax_avatar.shapes import PyTree
from jax_avatar.weights.fields import fill_fields
from jax_avatar.weights.files import (
    StoredWeights,
    load_json,
    load_weights,
    on_host,
    open_weights,
    tree_of,
)
from jax_avatar.weights.kinds import KINDS, find_kind
from jax_avatar.weights.settings import StreamSettings

__all__ = [
    "SMALL",
    "AvatarModel",
    "Network",
    "has_text_encoder",
    "load_model",
    "load_network",
    "load_settings",
    "load_text_encoder",
]

SMALL = Path(__file__).parents[1] / "assets" / "small"
"""Folder of the small model that ships with the package."""

_STREAMED = ("dit", "vae", "speech")  # the prompt encoder is loaded apart, and only if needed


@dataclass(frozen=True)
class Network:
    """Structure, weights and size of one network; large weights are still on disk."""

    graphdef: Any
    params: PyTree | StoredWeights
    config: Any
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class AvatarModel:
    """Everything that makes a talking avatar.

    Attributes:
        name: of the model, for messages.
        dit: the transformer.
        vae: the video autoencoder.
        speech: the audio front end.
        settings: how to stream it.
    """

    name: str
    dit: Network
    vae: Network
    speech: Network
    settings: StreamSettings


def load_settings(
    folder: str | Path = SMALL, *, force_sampler: bool = False, **changes: Any
) -> StreamSettings:
    """Streaming settings of the model in a folder, without reading its weights.

    Arguments and errors as in `load_model`.
    """
    folder = Path(folder)
    content = load_json(folder / "config.json")
    missing = [key for key in ("name", *_STREAMED, "stream") if key not in content]
    if missing:
        raise ValueError(
            f"{folder / 'config.json'} lacks {missing}; convert the missing networks "
            "into it (python -m conversion.convert --help), or name another folder."
        )
    strings = [key for key in ("name", *_STREAMED, "text", "lora") if key in content]
    wrong = [key for key in strings if not isinstance(content[key], str)]
    if wrong or not isinstance(content["stream"], dict):
        raise ValueError(
            f"{folder / 'config.json'}: {wrong or 'stream'} is no "
            f"{'string' if wrong else 'object'}; copy it again, or restore it."
        )
    stored = fill_fields(StreamSettings, content["stream"], f"{folder / 'config.json'}: stream")
    told = fill_fields(StreamSettings, {**dataclasses.asdict(stored), **changes}, "stream")
    if not force_sampler:
        stored.check_training(told)
    return told


def load_model(
    folder: str | Path = SMALL, *, weights: str = "", force_sampler: bool = False, **changes: Any
) -> AvatarModel:
    """Reads a model folder.

    Args:
        folder: with `config.json` and the weights of three networks; the small model by default.
        weights: "int8" or "fp8" rounds the transformer's large kernels; "" leaves them as stored.
        force_sampler: `changes` may be others than the model was trained with, for ablations.
        **changes: fields of `StreamSettings` to use instead of the folder's.

    Raises:
        ValueError: something is missing, of an unknown kind, or does not fit its config; or
            noise levels, sampler or history differ from those of the training.
    """
    folder = Path(folder)
    settings = load_settings(folder, force_sampler=force_sampler, **changes)
    content = load_json(folder / "config.json")
    networks = {
        name: load_network(folder, name, content[name], fps=settings.fps) for name in _STREAMED
    }
    if "lora" in content:
        networks["dit"] = _with_adapter(networks["dit"], folder)
    if weights and weights != networks["dit"].config.weights:
        networks["dit"] = _in_eight_bits(networks["dit"], content["dit"], weights)
    KINDS["dit"][content["dit"]].network.check_level("stream.sigmas", settings.sigmas[-2])
    model = AvatarModel(content["name"], settings=settings, **networks)
    _check_fit(model, folder)
    return model


def has_text_encoder(folder: str | Path) -> bool:
    """True if the model in a folder comes with a prompt encoder."""
    return "text" in load_json(Path(folder) / "config.json")


def load_text_encoder(folder: str | Path) -> Network:
    """Reads the prompt encoder of a model folder, in the type it is stored in.

    It can be larger than the rest of the model: make states of the prompt, then drop it.

    Raises:
        ValueError: there is none, or as in `load_model`.
    """
    folder = Path(folder)
    if not has_text_encoder(folder):
        raise ValueError(
            f"the model in {folder} has no prompt encoder: its config.json names no 'text'. "
            "Convert one into the folder, or stream without a prompt."
        )
    kind = load_json(folder / "config.json")["text"]
    return load_network(folder, "text", kind, widen=False)


def load_network(
    folder: str | Path, name: str, kind: str, *, fps: int | None = None, widen: bool = True
) -> Network:
    """Reads one network.

    Args:
        folder: that holds it.
        name: "dit", "vae", "speech" or "text".
        kind: of the network, as in `config.json`.
        fps: video frames per second that a speech encoder is to make features for; those it is
            stored with if not given.
        widen: see `load_weights`.

    Raises:
        ValueError: as in `load_model`.
    """
    folder = Path(folder)
    found = find_kind(name, kind, folder / "config.json")
    if name == "dit":  # large: it goes from disk to its devices
        params, fields, metadata = open_weights(folder, name)
    else:
        params, fields, metadata = load_weights(folder, name, widen=widen)
    try:
        config = fill_fields(found.config, fields, "config")
        # Sizes that are none are refused by whatever meets them first.
        graphdef, expected = found.abstract(config)
    except (ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(
            f"weights of '{name}' in {folder} are not those of a {kind} {name} ({error}); pass the "
            "folder of a whole model."
        ) from error
    if name == "speech" and fps:
        config = _at_fps(config, fps, folder)
        graphdef, _ = found.abstract(config)
    got = {path: _shape_and_kind(leaf) for path, leaf in flatten(tree_of(params)).items()}
    want = {path: _shape_and_kind(leaf) for path, leaf in flatten(expected).items()}
    wrong = [path for path in got | want if got.get(path) != want.get(path)]
    if wrong:
        lines = [f"{p}: {got.get(p, 'missing')}, expected {want.get(p, 'nothing')}" for p in wrong]
        raise ValueError(
            f"weights of '{name}' in {folder} do not fit their config; convert or train them "
            "again:\n  " + "\n  ".join(lines)
        )
    return Network(graphdef, params, config, metadata)


def _at_fps(config: SpeechConfig | Wav2Vec2Config, fps: int, folder: Path):
    try:
        return config.at_fps(fps)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _shape_and_kind(leaf: Any) -> str:
    """Shape and type of a weight; floating-point types of two bytes and more are one."""
    dtype = jnp.dtype(leaf.dtype)
    is_wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    return f"{tuple(leaf.shape)} {'float' if is_wide else dtype}"


def _with_adapter(dit: Network, folder: Path) -> Network:
    """The transformer with the folder's LoRA added, on the host."""
    adapter, fields, _ = load_weights(folder, "lora")
    if not isinstance(fields.get("scaling"), int | float):
        raise ValueError(f"{folder}: 'lora' has no scaling in its config, so it is no adapter.")
    if dit.config.weights:
        raise ValueError(
            f"{folder}: an adapter cannot be added to {dit.config.weights} weights; convert the "
            "transformer with --lora FILE --merge --dtype."
        )
    factors = flatten(adapter)
    rank = next((leaf.shape[-1] for path, leaf in factors.items() if path.endswith("/a")), 0)
    fitting = adapter_leaves(tree_of(dit.params), rank)
    wrong = [p for p, leaf in factors.items() if p in fitting and fitting[p].shape != leaf.shape]
    if wrong:
        raise ValueError(
            f"{folder}: the adapter's {wrong[0]} is {factors[wrong[0]].shape}, expected "
            f"{fitting[wrong[0]].shape}; it is for another transformer."
        )
    with on_host():
        params = add_adapter(_in_memory(dit.params), adapter, fields["scaling"])
    return dataclasses.replace(dit, params=params)


def _in_memory(params: PyTree | StoredWeights) -> PyTree:
    return params.restore() if isinstance(params, StoredWeights) else params


def _in_eight_bits(dit: Network, kind: str, weights: str) -> Network:
    if dit.config.weights:
        raise ValueError(
            f"the transformer is stored in {dit.config.weights} and cannot become {weights}; "
            "convert it again with that --dtype."
        )
    config = dit.config.replace(weights=weights)
    with on_host():
        params = quantise_params(_in_memory(dit.params), weights)
    graphdef, _ = KINDS["dit"][kind].abstract(config)
    return dataclasses.replace(dit, graphdef=graphdef, params=params, config=config)


def _check_fit(model: AvatarModel, folder: Path) -> None:
    dit, vae, speech = model.dit.config, model.vae.config, model.speech.config
    pairs = {
        "latent channels of dit and vae": (dit.latent_channels, vae.z_dim),
        "audio channels of dit and speech": (dit.audio_width, speech.width),
        "hidden states of dit and speech": (dit.audio_layers, speech.num_states),
    }
    if model.settings.pose == "reference":
        pairs["pose and latent channels of dit"] = (dit.pose_channels, dit.latent_channels)
    wrong = [f"{name}: {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise ValueError(f"the networks in {folder} do not fit together: {'; '.join(wrong)}.")
