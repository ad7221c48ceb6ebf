"""Manifests: names and shapes of the published checkpoints against our networks of that size.

`manifest_*.json` is tensor name -> shape, or has such a table with shapes and types under
`parameters` and the official configuration under `model_config`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from conversion.cases import Case, Check
from conversion.networks import NetworkKind, Shapes, identify
from conversion.rules import check
from conversion.wan_dit import config_from_official
from jax_avatar.models.config import wan_s2v_14b
from jax_avatar.models.dit import DiT
from jax_avatar.models.lora import adapter_leaves
from jax_avatar.models.network import Network

__all__ = ["Manifests", "manifest_shapes"]


class Manifests:
    """Manifests of every network that is converted."""

    name = "manifest"

    def find(self, files: Sequence[Path]) -> list[Case]:
        """`manifest_*.json` with the tensors of a known network, in any spelling."""
        found = []
        for path in files:
            if path.suffix == ".json" and path.name.startswith("manifest_"):
                shapes = manifest_shapes(json.loads(path.read_text()))
                if kind := identify(shapes):
                    found.append(Case(path.stem, (path,), (kind, shapes)))
        return found

    def run(self, case: Case) -> Iterable[Check]:
        """Every tensor of the file is used, every parameter of that size is filled."""
        (path,), (kind, shapes) = case.files, case.data
        try:
            config = _config(kind, path, shapes)
            names = kind.names(shapes, config)
            shapes = {name: shapes[there] for name, there in names.items()}
            report = check(shapes, kind.table(config), _leaves(kind, config, shapes))
            wrong, note = 0, str(report)
        except ValueError as error:
            wrong, note = 1, str(error)
        yield Check("names and shapes", float(wrong), 0.0, note)


def manifest_shapes(content: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a manifest; none if it is none."""
    if not isinstance(content, dict):
        return {}
    entries = content.get("parameters", content)
    shapes = {n: e["shape"] if isinstance(e, dict) else e for n, e in entries.items()}
    return {n: tuple(shape) for n, shape in shapes.items() if isinstance(shape, list)}


def _config(kind: NetworkKind, path: Path, shapes: Shapes) -> Any:
    if kind.part != "dit":
        return kind.config(path, shapes)
    official = json.loads(path.read_text()).get("model_config")
    return config_from_official(official) if official else wan_s2v_14b()


def _leaves(kind: NetworkKind, config: Any, shapes: Shapes) -> dict[str, Any]:
    if kind.part == "lora":  # published for the transformer of the published size
        return adapter_leaves(Network.abstract(DiT, wan_s2v_14b()).params, config.rank)
    return kind.leaves(config, shapes)
