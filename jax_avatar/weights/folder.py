"""A model folder -> the networks and settings that a stream needs.

config.json   {"name", "dit": kind, "vae": kind, "speech": kind, "stream": {settings}}
dit, vae, speech   one safetensors file or Orbax folder each
lora          an adapter that is added to dit, if `config.json` names one
text          the prompt encoder, if `config.json` names one
text_tokenizer/    its tokenizer's files
"""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jax_avatar.models.config import DiTConfig
from jax_avatar.models.lora import adapter_leaves, add_adapter
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.quantise import quantise_params
from jax_avatar.shapes import PyTree
from jax_avatar.weights.checksums import keep_checksums, rewriting
from jax_avatar.weights.fields import fill_fields, plain_fields
from jax_avatar.weights.files import on_host, save_json, save_weights, tree_of
from jax_avatar.weights.hashes import base_hash
from jax_avatar.weights.networks import check_fit, kind_of, load_adapter, load_network
from jax_avatar.weights.orbax import StoredWeights
from jax_avatar.weights.settings import StreamSettings, read_config

__all__ = [
    "ASSETS",
    "DEFAULT",
    "SMALL",
    "AvatarModel",
    "export_model",
    "fitting_stream",
    "has_text_encoder",
    "load_model",
    "load_settings",
    "load_text_encoder",
]

ASSETS = Path(__file__).parents[1] / "assets"
"""Folder of what ships with the package."""
DEFAULT = ASSETS / "anchored"
"""Folder of the model that is streamed if none is given."""
SMALL = ASSETS / "small"
"""Folder of the small model, whose latents hold pictures of 96x96 pixels."""

_STREAMED = ("dit", "vae", "speech")  # the prompt encoder is loaded apart, and only if needed


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
    folder: str | Path = DEFAULT, *, force_sampler: bool = False, **changes: Any
) -> StreamSettings:
    """Streaming settings of the model in a folder, without reading its weights.

    Arguments and errors as in `load_model`.
    """
    content = read_config(folder)
    place = f"{Path(folder) / 'config.json'}: stream"
    stored = fill_fields(StreamSettings, content["stream"], place)
    settings = fill_fields(StreamSettings, {**dataclasses.asdict(stored), **changes}, "stream")
    if not force_sampler:
        stored.check_training(settings)
    return settings


def load_model(
    folder: str | Path = DEFAULT, *, weights: str = "", force_sampler: bool = False, **changes: Any
) -> AvatarModel:
    """Reads a model folder.

    Args:
        folder: with `config.json` and the weights of three networks; `DEFAULT` if not given.
        weights: "int8" or "fp8" rounds the transformer's large kernels; "" leaves them as stored.
        force_sampler: `changes` may be others than the model was trained with, for ablations.
        **changes: fields of `StreamSettings` to use instead of the folder's.

    Raises:
        ValueError: something is missing, of an unknown kind, or does not fit its config; or
            noise levels, sampler or history differ from those of the training.
    """
    folder = Path(folder)
    settings = load_settings(folder, force_sampler=force_sampler, **changes)
    content = read_config(folder)
    networks = {
        name: load_network(folder, name, content[name], fps=settings.fps) for name in _STREAMED
    }
    if "lora" in content:
        networks["dit"] = _with_adapter(networks["dit"], folder)
    if weights and weights != networks["dit"].config.weights:
        networks["dit"] = _in_eight_bits(networks["dit"], weights)
    networks["dit"].module_class.check_level("stream.sigmas", settings.sigmas[-2])
    model = AvatarModel(content["name"], settings=settings, **networks)
    _check_fit(model, folder)
    return model


def has_text_encoder(folder: str | Path) -> bool:
    """True if the model in a folder comes with a prompt encoder."""
    return "text" in read_config(folder, ())


def load_text_encoder(folder: str | Path) -> Network:
    """Reads the prompt encoder of a model folder, in the type it is stored in.

    It can be larger than the rest of the model: make states of the prompt, then drop it.

    Raises:
        ValueError: there is none, or as in `load_model`.
    """
    kind = read_config(folder, ()).get("text")
    if kind is None:
        raise ValueError(
            f"the model in {folder} has no prompt encoder: its config.json names no 'text'. "
            "Convert one into the folder, or stream without a prompt."
        )
    return load_network(folder, "text", kind, widen=False)


def export_model(
    folder: str | Path,
    source: str | Path,
    params: PyTree,
    config: DiTConfig,
    metadata: Mapping[str, Any],
    *,
    stream: Mapping[str, Any],
    name: str = "",
    others: Mapping[str, str | Path] | None = None,
    adapter: tuple[PyTree, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a model folder around a trained transformer: `config.json` and all its networks.

    Args:
        folder: where to.
        source: the model folder that everything else comes from.
        params: of the transformer.
        config: its size.
        metadata: of its training.
        stream: stream settings to use instead of the model's.
        name: of the model, for messages; the source's if not given.
        others: networks that come from other folders.
        adapter: kept beside the transformer, with its rank and scaling, if there is one.
    """
    folder, content, others = Path(folder), read_config(source), others or {}
    folder.mkdir(parents=True, exist_ok=True)
    keep_checksums(folder)
    left = {"config", "dit", "lora", "checksums", *others}
    taken = {path.name.split(".")[0]: source for path in sorted(Path(source).iterdir())}
    taken = {network: where for network, where in taken.items() if network not in left}
    for network, where in {**taken, **others}.items():
        with rewriting(folder, network, source=where):
            for path in sorted(Path(where).glob(f"{network}*")):
                if path.name.split(".")[0] == network:
                    _copy(path, folder)
    save_weights(folder, "dit", jax.device_get(params), plain_fields(config), dict(metadata))
    content.pop("lora", None)
    if adapter:
        factors, fields = adapter
        history = {**metadata, "base": base_hash(folder)}
        save_weights(folder, "lora", jax.device_get(factors), fields, history)
        content["lora"] = "lora"
    content |= {"name": name} if name else {}
    content |= {part: kind_of(where, part) for part, where in others.items()}
    content["stream"] = {**content["stream"], **fitting_stream(stream, config)}
    save_json(folder / "config.json", content)


def fitting_stream(stream: Mapping[str, Any], config: DiTConfig) -> dict[str, Any]:
    """Stream settings that fit a transformer: without the motion packer, no motion."""
    return {**stream, **({} if config.framepack else {"motion": "none"})}


def _copy(path: Path, folder: Path) -> None:
    target = folder / path.name
    if path.exists() and path.resolve() != target.resolve():
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)


def _with_adapter(dit: Network, folder: Path) -> Network:
    """The transformer with the folder's LoRA added, on the host."""
    adapter, scaling, _ = load_adapter(folder)
    if dit.config.weights:
        raise ValueError(
            f"{folder}: an adapter cannot be added to {dit.config.weights} weights; convert the "
            "transformer with --lora FILE --merge --dtype."
        )
    factors = flatten(adapter)
    rank = next((leaf.shape[-1] for path, leaf in factors.items() if path.endswith("/a")), 0)
    whole = adapter_leaves(tree_of(dit.params), rank)
    expected = {path: leaf for path, leaf in whole.items() if path in factors}
    check_fit(factors, expected, f"of 'lora' in {folder}", "it is for another transformer.")
    with on_host():
        params = add_adapter(_in_memory(dit.params), adapter, scaling)
    return dit.with_params(params)


def _in_memory(params: PyTree | StoredWeights) -> PyTree:
    return params.restore() if isinstance(params, StoredWeights) else params


def _in_eight_bits(dit: Network, weights: str) -> Network:
    if dit.config.weights:
        raise ValueError(
            f"the transformer is stored in {dit.config.weights} and cannot become {weights}; "
            "convert it again with that --dtype."
        )
    config = dit.config.replace(weights=weights)
    with on_host():
        params = quantise_params(_in_memory(dit.params), weights)
    return Network.abstract(dit.module_class, config).with_params(params)


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
    if model.settings.size:
        try:
            vae.latent_grid(*model.settings.size)
        except ValueError as error:
            raise ValueError(f"stream.size of the model in {folder}: {error}") from None
