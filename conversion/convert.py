"""Converts downloaded weights into a model folder that `launch/stream.py --checkpoint` streams.

    python -m conversion.convert all --src ckpt --out model --merge
    python -m conversion.convert wan_s2v --src ckpt/Wan2.2-S2V-14B --out model --dtype fp8

Tensor after tensor goes from the mapped file into an Orbax checkpoint, so that a few gigabytes of
memory are enough for any size. Names and shapes are accounted for before anything is written. An
interrupted run goes on when the command is repeated, and nothing half-written loads.
"""

import argparse
import hashlib
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
from tqdm import tqdm

from conversion.networks import (
    NETWORKS,
    NetworkKind,
    find_weights,
    recognise,
    weight_files,
)
from conversion.readers import open_weights
from conversion.rules import Move, Report, plan
from conversion.wan_dit import SCALING, MergedLora
from jax_avatar.models.lora import is_adapted
from jax_avatar.models.quantise import quantise, quantised_leaves
from jax_avatar.streaming.prompts import TOKENIZER
from jax_avatar.weights.checkpoint_writer import ResumableCheckpointWriter
from jax_avatar.weights.checksums import check_files, keep_checksums
from jax_avatar.weights.fields import plain_fields
from jax_avatar.weights.settings import LIVE_AVATAR, add_to_config
from jax_avatar.weights.whole_file import BrokenFile, check_whole, unfinished_downloads
from launch import cli

__all__ = ["Options", "convert_network", "main"]

_FLOATS = {"bf16": "bfloat16", "f32": "float32"}
_EIGHT_BITS = ("int8", "fp8")


@dataclass(frozen=True)
class Options:
    """Choices of one conversion.

    Attributes:
        dtype: "bf16", "f32", "int8" or "fp8"; "" keeps what the file has.
        lora: file of an adapter to merge into the transformer; None for none.
        scaling: alpha over rank of the adapter.
        command: what was typed, for the checkpoint's history.
    """

    dtype: str = ""
    lora: Path | None = None
    scaling: float = SCALING
    command: str = ""

    def __post_init__(self):
        if not math.isfinite(self.scaling):
            raise ValueError(f"--lora-scaling {self.scaling}: expected a finite number.")


@dataclass(frozen=True)
class _Job:
    """One network, ready to be written."""

    weights: Mapping[str, np.ndarray]
    moves: list[Move]
    report: Report
    leaves: dict[str, Any]
    config: dict[str, Any]
    history: dict[str, Any] = field(default_factory=dict)


def convert_network(
    kind: NetworkKind, source: str | Path, out: str | Path, options: Options | None = None
) -> Report:
    """Converts one network into its place in a model folder.

    Args:
        kind: of `NETWORKS`.
        source: file or downloaded folder.
        out: model folder; made or added to.
        options: choices.

    Returns:
        What became of every source tensor.

    Raises:
        ValueError: the file is unreadable, not of this network, or not whole; nothing is left.
    """
    out = Path(out)
    job = _prepare(kind, find_weights(kind, source), options or Options())
    if kind.part == "text":
        _tokenizer_files(job.weights.files[0].parent)  # said before the weights take their time
    _need_space(out, job.leaves)
    writer = ResumableCheckpointWriter(out / kind.part, job.leaves, job.config, job.history)
    sizes = {
        name: _size(job.weights.shapes[name], job.weights.dtypes[name]) for name in job.weights
    }
    total = sum(sizes[move.source] for move in job.moves)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc=kind.name) as progress:
            for move in job.moves:
                if move.source not in writer.done:
                    array = move.apply(job.weights[move.source])
                    writer.write(move.source, _parts(move, array, job))
                progress.update(sizes[move.source])
        if job.report.kept:
            writer.keep({name: job.weights[name] for name in job.report.kept})
    except (KeyboardInterrupt, OSError):
        writer.pause()
        raise
    except ValueError:
        writer.discard()
        raise
    keep_checksums(out)
    writer.finish()
    if kind.part == "text":
        _copy_tokenizer(job.weights.files[0].parent, out / TOKENIZER)
    add_to_config(
        out, {kind.part: kind.kind}, name="Live Avatar 14B", stream=plain_fields(LIVE_AVATAR)
    )
    return job.report


def _copy_tokenizer(download: Path, target: Path) -> None:
    """The tokenizer's files, which lie in a subfolder beside the encoder's weights."""
    found = _tokenizer_files(download)
    if not found:
        print(
            f"note: no tokenizer (spiece.model or tokenizer.json) below {download}; prompts need "
            f"one, so copy it to {target}."
        )
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in found:
        shutil.copyfile(file, target / file.name)


def _tokenizer_files(download: Path) -> list[Path]:
    """Those of the first folder that has any, each looked at."""
    names = ("spiece.model", "tokenizer.json")
    folders = [file.parent for name in names for file in sorted(download.rglob(name))]
    files = [folders[0] / name for name in names] if folders else []
    files = [file for file in files if file.is_file()]
    for file in files:
        check_whole(file, is_text=True)
    return files


def _prepare(kind: NetworkKind, path: Path, options: Options) -> _Job:
    """Everything that can go wrong before anything is written."""
    weights, config = kind.open(path)
    check_files(path.parent, [file.name for file in weights.files])  # of an export
    history = {
        "source": path.name,
        "fingerprint": _fingerprint(weights),
        "licence": kind.licence,
        "command": options.command,
    }
    if getattr(weights, "spelling", None):
        history["spelling"] = weights.spelling  # an export is spelled alike
    if options.lora is not None:
        adapter = open_weights(options.lora)
        weights = MergedLora(weights, adapter, options.scaling)
        history["lora"] = f"{options.lora.name}, scaling {options.scaling}, merged"
        history["lora_fingerprint"] = _fingerprint(adapter)
    if kind.part == "dit":  # a teacher must not have one: see jax_avatar.training.base_weights
        history["merged"] = [] if options.lora is None else [_record(options, history)]
    leaves = kind.leaves(config, weights.shapes)
    moves, report = plan(weights.shapes, kind.table(config), leaves)
    leaves = _as_stored(leaves, moves, weights.dtypes)
    fields = plain_fields(config)
    if options.dtype in _EIGHT_BITS:
        if kind.part != "dit":
            raise ValueError(
                f"--dtype {options.dtype}: only the transformer (wan_s2v) has eight-bit weights; "
                "convert the other networks without it."
            )
        leaves = quantised_leaves(leaves, options.dtype)
        fields["weights"] = options.dtype
    elif options.dtype:
        dtype = np.dtype(_FLOATS[options.dtype])
        leaves = {p: jax.ShapeDtypeStruct(leaf.shape, dtype) for p, leaf in leaves.items()}
        if "param_dtype" in fields:
            fields["param_dtype"] = str(dtype)
    return _Job(weights, moves, report, leaves, fields, history)


def _record(options: Options, history: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "file": options.lora.name,
        "scaling": options.scaling,
        "fingerprint": history["lora_fingerprint"],
    }


def _as_stored(
    leaves: Mapping[str, Any], moves: Sequence[Move], dtypes: Mapping[str, np.dtype]
) -> dict[str, Any]:
    """Leaves in the types of the file, so that nothing is rounded."""
    found: dict[str, dict[np.dtype, str]] = {}
    for move in moves:
        found.setdefault(move.target, {})[dtypes[move.source]] = move.source
    mixed = [
        f"{path}: " + ", ".join(f"{name} is {dtype}" for dtype, name in kinds.items())
        for path, kinds in found.items()
        if len(kinds) > 1
    ]
    if mixed:
        raise ValueError(
            "layers of one stack have different types; pass --dtype bf16 or f32 to give them "
            "one:\n  " + "\n  ".join(mixed)
        )
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, next(iter(found[path])))
        for path, leaf in leaves.items()
    }


def _parts(move: Move, array: np.ndarray, job: _Job) -> dict[tuple[str, tuple], np.ndarray]:
    path, kind = move.target, job.config.get("weights", "")
    if kind and is_adapted(path):
        values, scale = quantise(array, kind, axis=-2)
        return {
            (path, move.slot): np.asarray(values),
            (f"{path}_scale", move.slot): np.asarray(scale)[0],
        }
    return {(path, move.slot): array.astype(job.leaves[path].dtype, copy=False)}


def _fingerprint(weights: Any) -> str:
    """Tells two downloads apart without reading all of them: names, sizes, and some bytes."""
    digest = hashlib.sha256()
    digest.update(
        repr(sorted((n, s, str(weights.dtypes[n])) for n, s in weights.shapes.items())).encode()
    )
    for path in weights.files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(1, size // 64)):
                file.seek(place)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _size(shape: Sequence[int], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _need_space(out: Path, leaves: Mapping[str, Any]) -> None:
    needed = sum(_size(leaf.shape, leaf.dtype) for leaf in leaves.values())
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"--out {out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; make "
            "room, or choose another disk."
        )


def _convert_all(source: Path, out: Path, options: Options, *, merge: bool) -> dict[str, Report]:
    """Every network below a folder of downloads."""
    if not source.is_dir():
        raise ValueError(f"--src {source}: no such folder.")
    found: dict[str, Path] = {}
    broken = []
    for path in weight_files(source, below=True):
        try:
            kind, problem = recognise(path)
        except BrokenFile as error:
            broken.append(str(error))
            continue
        if kind and kind.name not in found:
            found[kind.name] = path
        elif not kind:
            print(f"passed over {path}: {problem}")
    if broken:
        raise BrokenFile("\n".join(broken))
    if not found:
        raise ValueError(
            f"--src {source} holds no weights of {', '.join(NETWORKS)}; download them first "
            "(docs/weights.md)."
            + "".join(f" Unfinished: {path}." for path in unfinished_downloads(source))
        )
    adapter = found.pop("live_avatar", None) if merge else None
    reports = {}
    for name, path in found.items():
        lora = adapter if name == "wan_s2v" else None
        dtype = options.dtype if name == "wan_s2v" or options.dtype not in _EIGHT_BITS else ""
        own = Options(dtype, lora, options.scaling, options.command)
        reports[name] = convert_network(NETWORKS[name], path, out, own)
        _tell(name, path, reports[name], out)
    missing = [name for name in NETWORKS if name not in found and name != "live_avatar"]
    if missing:
        print(f"not found below {source}: {', '.join(missing)}")
    return reports


def _tell(name: str, path: Path, report: Report, out: Path) -> None:
    print(f"{name}: {path} -> {out / NETWORKS[name].part}: {report}, none missing")
    for source, reason in report.ignored.items():
        print(f"  ignored {source}: {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m conversion.convert",
        description="Converts downloaded weights into a model folder. Tells what was used, ignored "
        "and missing; an interrupted run goes on when the command is repeated.",
    )
    add = parser.add_argument
    add("network", choices=[*NETWORKS, "all"], help="what to convert; all: whatever --src holds")
    add("--src", required=True, type=Path, metavar="DIR", help="downloaded folder, or one file")
    add("--out", required=True, type=Path, metavar="DIR", help="model folder to make or add to")
    add("--lora", type=Path, metavar="FILE", help="adapter of the transformer (wan_s2v)")
    add(
        "--merge",
        action="store_true",
        help="add the LoRA to the weights now; without it, it is kept apart and added when loaded",
    )
    add(
        "--lora-scaling", type=float, default=SCALING, help="its alpha / rank (default %(default)s)"
    )
    add(
        "--dtype",
        choices=[*_FLOATS, *_EIGHT_BITS],
        default="",
        help="type of the weights; int8 and fp8 are for the transformer's large products "
        "(default: as in the file, so that an export gives back every bit)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    command = "python -m conversion.convert " + " ".join(map(str, typed))
    if flags.lora and flags.network != "wan_s2v":
        parser.error("--lora belongs to wan_s2v; with all, the adapter is found below --src.")
    if flags.merge and not flags.lora and flags.network != "all":
        parser.error("--merge needs --lora FILE, or the network all.")
    if flags.dtype in _EIGHT_BITS and flags.lora and not flags.merge:
        parser.error(f"--dtype {flags.dtype} cannot take an adapter later; add --merge.")
    return cli.exit_code(lambda: _run(flags, command), hint="repeat the command to go on")


def _run(flags: argparse.Namespace, command: str) -> None:
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns of what is meant here
    options = Options(flags.dtype, None, flags.lora_scaling, command)
    if flags.network == "all":
        _convert_all(flags.src, flags.out, options, merge=flags.merge)
        return
    jobs = [(flags.network, flags.src)]
    if flags.lora and flags.merge:
        options = Options(flags.dtype, flags.lora, flags.lora_scaling, command)
    elif flags.lora:
        jobs.append(("live_avatar", flags.lora))
    for name, source in jobs:
        kind = NETWORKS[name]
        _tell(name, source, convert_network(kind, source, flags.out, options), flags.out)


if __name__ == "__main__":
    sys.exit(main())
