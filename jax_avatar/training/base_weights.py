"""Origin of the weights that training starts from: adapters merged into them, and their identity.

A distilled LoRA merged into the base makes a teacher of four steps; distilling or training on
from that gives plausible losses and a wrong result.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_avatar.training.run.journal import warn
from jax_avatar.weights.files import load_header
from jax_avatar.weights.settings import read_config

__all__ = ["StageWeights", "check_not_merged", "merge_record", "trained_fps"]


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


def trained_fps(folder: str | Path) -> int | None:
    """Frames per second that the transformer in a folder was trained at by an earlier stage.

    None for others, as converted ones, and where there is nothing to read.
    """
    try:
        return load_header(folder, "dit")[1].get("fps")
    except ValueError:
        return None


def merge_record(folder: str | Path) -> dict[str, Any]:
    """Record of the adapters merged into the transformer of a folder.

    Returns:
        `{"merged": [adapter, ...]}`; empty if its conversion or training did not record it.
    """
    if not folder:
        return {"merged": []}  # random weights
    metadata = load_header(folder, "dit")[1]
    if "merged" in metadata:
        return {"merged": metadata["merged"]}
    if "lora" in metadata:  # an older conversion's record of one
        return {"merged": [{"file": metadata["lora"]}]}
    has_config = (Path(folder) / "config.json").is_file()
    kind = read_config(folder, ()).get("dit") if has_config else None
    return {"merged": []} if kind == "portrait" else {}  # for which there is no adapter


def check_not_merged(weights: Any) -> None:
    """Refuses folders whose transformer has an adapter merged into it; those absent pass.

    Args:
        weights: `StageWeights` or `DistillWeights`.

    Raises:
        ValueError: a folder's transformer has one; the message names setting and command.
    """
    for setting in ("model", "start", "teacher", "student"):
        folder = getattr(weights, setting, "")
        if not folder or not any((Path(folder) / f).exists() for f in ("dit", "dit.safetensors")):
            continue
        record = merge_record(folder)
        if record.get("merged"):
            names = ", ".join(str(adapter.get("file")) for adapter in record["merged"])
            raise ValueError(
                f"config.weights.{setting}={folder}: the adapter {names} was merged into its "
                "transformer, which is a distilled student then, no teacher or base. Convert the "
                "weights without it: python -m conversion.convert all --src ckpt --out DIR "
                "(without --merge), and name DIR."
            )
        if not record and setting != "model":
            _say_unknown(str(Path(folder).resolve()))


@functools.cache
def _say_unknown(folder: str) -> None:
    warn(
        f"{folder}: its history does not tell whether an adapter was merged into the transformer; "
        "a distilled one must not be a teacher or base. Convert it again to have it recorded."
    )
