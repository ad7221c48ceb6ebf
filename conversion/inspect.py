"""Tells what a checkpoint is: kind, size, types, what is missing, and its licence.

    python -m conversion.inspect PATH

PATH is a downloaded file or folder, one network of a model folder, or a whole model folder. Only
headers are read.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np

from conversion.networks import NETWORKS, identify, weight_files
from conversion.readers import SafetensorsFile, open_weights
from conversion.rules import check
from jax_avatar.weights.fields import plain_fields
from jax_avatar.weights.files import load_json
from jax_avatar.weights.kinds import KINDS
from jax_avatar.weights.orbax import StoredWeights
from jax_avatar.weights.settings import read_config
from jax_avatar.weights.whole_file import BrokenFile, unfinished_downloads
from launch import cli

__all__ = ["describe", "main"]


def describe(path: str | Path) -> Iterator[str]:
    """Lines about whatever is there.

    Args:
        path: file or folder.

    Raises:
        ValueError: nothing that this project can read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder.")
    if (path / "_CHECKPOINT_METADATA").is_file():
        yield from _stored(path)
    elif (path / "config.json").is_file() and "stream" in load_json(path / "config.json"):
        yield from _model(path)
    else:
        files = [path] if path.is_file() else weight_files(path, below=True)
        unfinished = [] if path.is_file() else unfinished_downloads(path)
        if not (files or unfinished):
            raise ValueError(
                f"{path} holds neither weights (.safetensors, .pth, .bin) nor a model folder's "
                "config.json."
            )
        for file in files:
            yield from _download(file) if file == path else _as_far_as_whole(_download(file))
        for file in unfinished:
            yield f"{file}: NOT USABLE: an unfinished download; repeat it to complete it"


def _model(folder: Path) -> Iterator[str]:
    content = read_config(folder, ())
    yield f"{folder}: model folder '{content.get('name', '')}'"
    for part in (*KINDS, "lora"):
        file, orbax = folder / f"{part}.safetensors", folder / part
        if file.is_file():
            yield from (f"  {line}" for line in _as_far_as_whole(_ours(file)))
        elif orbax.is_dir():
            yield from (f"  {line}" for line in _as_far_as_whole(_stored(orbax)))
        elif part in content:
            yield f"  {part}: named in config.json, but MISSING"
        elif part in ("dit", "vae", "speech"):
            yield f"  {part}: MISSING; convert it before streaming"
    for partial in sorted(folder.glob(".*.partial")):
        yield f"  {partial.name}: an interrupted conversion; repeat its command to go on"


def _as_far_as_whole(lines: Iterator[str]) -> Iterator[str]:
    """Report lines of one file of several; a broken file does not stop the others."""
    try:
        yield from lines
    except BrokenFile as error:
        yield f"NOT USABLE: {error}"


def _stored(folder: Path) -> Iterator[str]:
    stored = StoredWeights(folder)
    shapes = {path: leaf.shape for path, leaf in stored.leaves.items()}
    dtypes = {path: leaf.dtype for path, leaf in stored.leaves.items()}
    yield f"{folder.name}: Orbax checkpoint of this project; {_amount(shapes, dtypes)}"
    yield from _history(stored.config, stored.metadata)


def _ours(path: Path) -> Iterator[str]:
    file = SafetensorsFile(path)
    yield f"{path.name}: weights of this project; {_amount(file.shapes, file.dtypes)}"


def _history(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[str]:
    yield "  config: " + ", ".join(f"{name}={value}" for name, value in config.items())
    for name, value in metadata.items():
        many = isinstance(value, Mapping)
        yield f"  {name}: {f'{len(value)} names as in the download' if many else value}"


def _download(path: Path) -> Iterator[str]:
    weights = open_weights(path)
    kind = identify(weights.shapes)
    amount = _amount(weights.shapes, weights.dtypes)
    if kind is None:
        known = ", ".join(NETWORKS)
        yield f"{path}: unknown weights; {amount}; known networks: {known}"
        return
    yield f"{path}: {kind.name}; {amount}"
    yield f"  licence: {kind.licence}"
    yield f"  next: python -m conversion.convert {kind.name} --src {path} --out DIR"
    try:
        weights, config = kind.open(path)
        leaves = kind.leaves(config, weights.shapes)
        report = check(weights.shapes, kind.table(config), leaves)
    except ValueError as error:
        yield from (f"  NOT USABLE: {line}" for line in str(error).splitlines())
        return
    yield "  config: " + ", ".join(f"{name}={v}" for name, v in plain_fields(config).items())
    yield f"  complete: {report}"


def _amount(shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, Any]) -> str:
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
    types = Counter()
    for name, size in sizes.items():
        types[str(np.dtype(dtypes[name]))] += size
    total = sum(size * np.dtype(dtypes[name]).itemsize for name, size in sizes.items())
    kinds = ", ".join(
        f"{dtype} {count / max(1, sum(sizes.values())):.0%}" for dtype, count in types.items()
    )
    return (
        f"{len(sizes)} tensors, {sum(sizes.values()):,} parameters, {total / 1e9:.3f} GB ({kinds})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = cli.Parser(prog="python -m conversion.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="file or folder")
    flags = parser.parse_args(arguments)
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns of what is meant here
    return max(cli.exit_code(lambda path=path: _run(path)) for path in flags.paths)


def _run(path: Path) -> int:
    """Prints what a checkpoint is; 1 if it cannot be used."""
    lines = []
    for line in describe(path):
        print(line)
        lines.append(line)
    is_usable = not any("NOT USABLE" in line or "MISSING" in line for line in lines)
    return cli.DONE if is_usable else cli.FAILED


if __name__ == "__main__":
    sys.exit(main())
