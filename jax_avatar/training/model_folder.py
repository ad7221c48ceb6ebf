"""Model folders around a transformer in training: where its other networks come from and go to.

weights.model: config.json, VAE, front ends --+
weights.vae, weights.speech: other ones ------+--> exported folder, which can be streamed
trained transformer --------------------------+
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.params import flatten
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.models.sharding import param_shardings
from jax_avatar.shapes import PyTree
from jax_avatar.training.base_weights import base_hash
from jax_avatar.weights.checksums import keep_checksums, rewriting
from jax_avatar.weights.fields import plain_fields
from jax_avatar.weights.files import (
    StoredWeights,
    load_header,
    load_json,
    load_weights,
    open_weights,
    save_json,
    save_weights,
    tree_of,
)

__all__ = [
    "NETWORKS",
    "StageWeights",
    "export_model",
    "fitting",
    "model_content",
    "read_adapter",
    "read_dit",
    "trained_fps",
]

NETWORKS = {"portrait": PortraitDiT, "wan_s2v": DiT}
"""Kinds of transformers by their names in `config.json`."""


@dataclass(frozen=True)
class StageWeights:
    """Folders with weights that a stage of flow matching starts from.

    Attributes:
        model: a whole model; its VAE, front ends and stream settings go with the transformer.
        vae: has a VAE to use instead.
        speech: has a speech encoder to use instead.
        start: has the transformer to start from; "" starts from random weights.
    """

    model: str
    vae: str = ""
    speech: str = ""
    start: str = ""

    @property
    def others(self) -> dict[str, str]:
        """Networks that do not come from `model`, and their folders."""
        named = {"vae": self.vae, "speech": self.speech}
        return {name: folder for name, folder in named.items() if folder}

    def folder(self, name: str) -> str:
        """Source folder of a network."""
        return self.others.get(name, self.model)


def model_content(folder: str) -> dict[str, Any]:
    """The `config.json` of a whole model.

    Raises:
        ValueError: it is not that of a whole model.
    """
    content = load_json(Path(folder) / "config.json")
    if content.get("dit") not in NETWORKS or "stream" not in content:
        raise ValueError(
            f"weights.model={folder}: its config.json has dit {content.get('dit')!r}, "
            f"expected one of {', '.join(NETWORKS)}, and a stream section; give the folder of "
            "a whole model."
        )
    return content


def trained_fps(folder: str | Path) -> int | None:
    """Frames per second that the transformer in a folder was trained at by an earlier stage.

    None for others, as converted ones, and where there is nothing to read.
    """
    try:
        return load_header(folder, "dit")[1].get("fps")
    except ValueError:
        return None


def export_model(
    folder: str | Path,
    source: str,
    params: PyTree,
    config: DiTConfig,
    metadata: Mapping[str, Any],
    *,
    stream: Mapping[str, Any],
    name: str = "",
    others: Mapping[str, str] | None = None,
    adapter: tuple[PyTree, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a model folder that can be streamed: `config.json` and all its networks.

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
    folder, content, others = Path(folder), model_content(source), others or {}
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
    content.pop("lora", None)
    save_weights(folder, "dit", jax.device_get(params), plain_fields(config), dict(metadata))
    if adapter:
        factors, fields = adapter
        history = {**metadata, "base": base_hash(folder)}
        save_weights(folder, "lora", jax.device_get(factors), fields, history)
        content["lora"] = "lora"
    content |= {"name": name} if name else {}
    content["stream"] = {**content["stream"], **fitting(stream, config)}
    save_json(folder / "config.json", content)


def fitting(stream: Mapping[str, Any], config: DiTConfig) -> dict[str, Any]:
    """Stream settings that fit a transformer: one without the motion packer is told no motion."""
    return {**stream, **({} if config.framepack else {"motion": "none"})}


def read_dit(folder: str | Path, expected: PyTree, mesh: Mesh | None = None) -> PyTree:
    """A transformer's weights; from an Orbax folder each device of a mesh reads its own part.

    Args:
        folder: that holds them.
        expected: abstract parameters.
        mesh: of the run; host arrays if not given.

    Raises:
        ValueError: they are those of another transformer.
    """
    stored, _, _ = open_weights(folder, "dit")
    # A network without the motion packer may start from one with it.
    unused = {name for name in tree_of(stored) if name.startswith("motion_")} - set(expected)
    used = {name: leaf for name, leaf in tree_of(stored).items() if name not in unused}
    size = load_header(folder, "dit")[0]
    _check(used, expected, folder, f"set config.model to its size, {size}.")
    if not isinstance(stored, StoredWeights):
        return used
    return stored.restore(None if mesh is None else param_shardings(expected, mesh), only=set(used))


def read_adapter(
    folder: str | Path, expected: PyTree, fields: Mapping[str, Any], *, base: str | Path = ""
) -> PyTree:
    """An adapter's factors.

    Args:
        folder: that holds `lora`.
        expected: abstract factors.
        fields: rank and scaling that training goes on with.
        base: has the transformer that it is laid beside; not compared if not given.

    Raises:
        ValueError: there is none, or it is for another transformer or scaled otherwise, or was
            trained beside other weights than those of `base`.
    """
    adapter, stored, history = load_weights(folder, "lora")
    hint = "set config.task.adapter_rank and adapter_alpha as it was trained."
    _check(adapter, expected, folder, hint)
    if stored["scaling"] != fields["scaling"]:
        raise ValueError(
            f"the adapter in {folder} is scaled by {stored['scaling']}, here by "
            f"{fields['scaling']} (alpha over rank); {hint}"
        )
    if base and history.get("base", "") not in ("", base_hash(base)):
        raise ValueError(
            f"the adapter in {folder} was trained beside other weights than those of {base}; give "
            "the teacher that stage 1 started from, or train stage 1 from this one."
        )
    return adapter


def _check(params: PyTree, expected: PyTree, folder: str | Path, hint: str) -> None:
    got = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    want = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    wrong = [path for path in got | want if got.get(path) != want.get(path)]
    if wrong:
        raise ValueError(
            f"weights in {folder} do not fit the transformer: {wrong[0]} is "
            f"{got.get(wrong[0], 'missing')}, expected {want.get(wrong[0], 'nothing')}; {hint}"
        )


def _copy(path: Path, folder: Path) -> None:
    target = folder / path.name
    if path.exists() and path.resolve() != target.resolve():
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)
