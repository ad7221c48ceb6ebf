"""Model folders around a transformer in training: where its other networks come from and go to.

weights.model: config.json, VAE, front ends --+
weights.vae, weights.speech: other ones ------+--> exported folder, which can be streamed
trained transformer --------------------------+
"""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jax_avatar.io.checkpoint import load_header, load_json, load_weights, save_json, save_weights
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.dit import DiT
from jax_avatar.models.params import flatten
from jax_avatar.models.portrait_dit import PortraitDiT
from jax_avatar.shapes import PyTree

__all__ = ["NETWORKS", "StageWeights", "config_fields", "export_model", "read_dit"]

NETWORKS = {"portrait": PortraitDiT, "wan_s2v": DiT}
"""Kinds of transformers by their names in `config.json`."""

_WEIGHTS = (".safetensors", "")  # a file, or an Orbax folder


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
        """Where a network comes from."""
        return self.others.get(name, self.model)

    def content(self) -> dict[str, Any]:
        """The model's `config.json`.

        Raises:
            ValueError: it is not that of a whole model.
        """
        content = load_json(Path(self.model) / "config.json")
        if content.get("dit") not in NETWORKS or "stream" not in content:
            raise ValueError(
                f"weights.model={self.model}: its config.json has dit {content.get('dit')!r}, "
                f"expected one of {', '.join(NETWORKS)}, and a stream section; give the folder of "
                "a whole model."
            )
        return content


def export_model(
    folder: str | Path,
    weights: StageWeights,
    params: PyTree,
    config: DiTConfig,
    metadata: Mapping[str, Any],
    *,
    name: str,
    stream: Mapping[str, Any],
) -> None:
    """Writes a model folder: `config.json` and all its networks.

    Args:
        folder: where to.
        weights: where the other networks come from.
        params: of the transformer.
        config: its size.
        metadata: of its training.
        name: of the model, for messages.
        stream: stream settings to use instead of the model's.
    """
    folder, content = Path(folder), weights.content()
    folder.mkdir(parents=True, exist_ok=True)
    left = {"config", "dit", "lora", *weights.others}
    for path in sorted(Path(weights.model).iterdir()):
        if path.name.split(".")[0] not in left:
            _copy(path, folder)
    for network, source in weights.others.items():
        for ending in _WEIGHTS:
            _copy(Path(source) / (network + ending), folder)
    save_weights(folder, "dit", jax.device_get(params), config_fields(config), dict(metadata))
    content = {key: value for key, value in content.items() if key != "lora"}
    if not config.framepack:
        stream = {**stream, "motion": "none"}
    content |= {"name": name, "stream": {**content["stream"], **stream}}
    save_json(folder / "config.json", content)


def config_fields(config: DiTConfig) -> dict[str, Any]:
    """Size of a transformer as plain values."""
    fields = dataclasses.asdict(config)
    return fields | {"dtype": str(config.dtype), "param_dtype": str(config.param_dtype)}


def read_dit(folder: str | Path, expected: PyTree) -> PyTree:
    """A transformer's weights.

    Args:
        folder: that holds them.
        expected: abstract parameters.

    Raises:
        ValueError: they are those of another transformer.
    """
    params, _, _ = load_weights(folder, "dit")
    # A network without the motion packer may start from one with it.
    unused = [name for name in params if name.startswith("motion_") and name not in expected]
    params = {name: leaf for name, leaf in params.items() if name not in unused}
    got = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    want = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    wrong = [path for path in got | want if got.get(path) != want.get(path)]
    if wrong:
        raise ValueError(
            f"weights in {folder} do not fit the transformer: {wrong[0]} is "
            f"{got.get(wrong[0], 'missing')}, expected {want.get(wrong[0], 'nothing')}; set "
            f"config.model to its size, {load_header(folder, 'dit')[0]}."
        )
    return params


def _copy(path: Path, folder: Path) -> None:
    target = folder / path.name
    if path.exists() and path.resolve() != target.resolve():
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)
