"""Moves weights between two naming schemes by a table, and accounts for every one of them.

    blocks.7.self_attn.q.weight --Rule, transform--> blocks/self_attn/query/kernel, slot 7

A table is a sequence of `Rule` and `Ignore`. `convert` reads it forwards, `export` backwards.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.weights.finite import all_finite

__all__ = [
    "Ignore",
    "Move",
    "Report",
    "Rule",
    "Transform",
    "check",
    "conv",
    "convert",
    "export",
    "infer_leaves",
    "keep",
    "patch",
    "plan",
    "plan_export",
    "squeeze",
    "transpose",
]


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse; both take and return one array.

    Only array methods (`transpose`, `reshape`) may be used, so that shapes can be followed
    without data.
    """

    name: str
    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any]

    def then(self, other: "Transform") -> "Transform":
        """Composition of two transforms, `other` last."""
        return Transform(
            f"{self.name}, {other.name}",
            lambda array: other.forward(self.forward(array)),
            lambda array: self.backward(other.backward(array)),
        )


keep = Transform("keep", lambda array: array, lambda array: array)
"""Same layout on both sides: biases, scales."""

transpose = Transform("transpose", lambda array: array.transpose(), lambda array: array.transpose())
"""Linear weight `[out, in]` <-> kernel `[in, out]`."""

conv = Transform(
    "conv",
    lambda array: array.transpose(*range(2, array.ndim), 1, 0),
    lambda array: array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2)),
)
"""Convolution weight `[out, in, *window]` <-> kernel `[*window, in, out]`, any number of axes."""


def squeeze(leading: int = 0, trailing: int = 0) -> Transform:
    """Drops axes of length one at the ends: `[C, 1, 1, 1]` <-> `[C]` with `trailing=3`."""

    def forward(array):
        keep_axes = array.shape[leading : array.ndim - trailing]
        return array.reshape(keep_axes)

    def backward(array):
        return array.reshape((1,) * leading + tuple(array.shape) + (1,) * trailing)

    return Transform(f"squeeze {leading} leading, {trailing} trailing axes", forward, backward)


def patch(*window: int) -> Transform:
    """Patch convolution `[out, in, *window]` <-> linear kernel `[prod(window) * in, out]`.

    Inside a patch the channel runs fastest.
    """

    def forward(array):
        if tuple(array.shape[2:]) != window:
            raise ValueError(f"window {tuple(array.shape[2:])} where {window} was expected")
        kernel = conv.forward(array)
        return kernel.reshape(-1, kernel.shape[-1])

    def backward(array):
        channels = array.shape[0] // math.prod(window)
        return conv.backward(array.reshape(*window, channels, array.shape[1]))

    return Transform(f"patch {window}", forward, backward)


@dataclass(frozen=True)
class Rule:
    """One family of tensors: source names, our path, and the change of layout between them.

    An index such as `{i}` stands for a number. If the target path has it too, each number is a
    leaf of its own. If not, the numbers are positions along the leading axes of one stacked leaf,
    in the order in which they stand in the source name.

    Attributes:
        source: source name, for example `blocks.{i}.self_attn.q.weight`.
        target: our path, for example `blocks/self_attn/query/kernel`.
        transform: source layout -> layout of one slot.
    """

    source: str
    target: str
    transform: Transform = keep

    @property
    def stacked(self) -> tuple[str, ...]:
        """Indices that become leading axes of the target."""
        inside = _indices(self.target)
        return tuple(name for name in _indices(self.source) if name not in inside)

    def __post_init__(self):
        unbound = set(_indices(self.target)) - set(_indices(self.source))
        if unbound:
            raise ValueError(
                f"rule {self.source!r} -> {self.target!r}: the target's index {sorted(unbound)} "
                "is not in the source name."
            )


@dataclass(frozen=True)
class Ignore:
    """Source tensors that are left out on purpose.

    Attributes:
        source: source name; `{i}` stands for a number, `{*}` for anything.
        reason: why nothing is lost, shown in the report.
        kept: whether it lies beside the converted weights, so that an export has it again.
    """

    source: str
    reason: str
    kept: bool = False


Table = Sequence[Rule | Ignore]


@dataclass(frozen=True)
class Report:
    """Outcome for every source tensor.

    Attributes:
        used: source name -> our path, with the slot in brackets if the leaf is stacked.
        ignored: source name -> reason.
        kept: those of the ignored that lie beside the converted weights.
    """

    used: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = f" ({len(self.kept)} of them kept for an export)" if self.kept else ""
        return f"{len(self.used)} tensors used, {len(self.ignored)} ignored{kept}"


@dataclass(frozen=True)
class Move:
    """Move of one tensor from source to target.

    Attributes:
        source: its name.
        target: our path.
        slot: its place along the leading axes of a stacked leaf.
        rule: that sends it there.
    """

    source: str
    target: str
    slot: tuple[int, ...]
    rule: Rule

    @property
    def label(self) -> str:
        """Target of the rule, for reports."""
        return self.target + (str(list(self.slot)) if self.slot else "")

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The tensor in our layout.

        Raises:
            ValueError: it is not of numbers, or some are not finite.
        """
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{self.source} holds {array.dtype}, expected floating-point weights; is it of a "
                "quantised checkpoint? Convert the original one."
            )
        if not all_finite(array):
            raise ValueError(
                f"{self.source} holds NaN or infinity; download the checkpoint again, or train on "
                "from an earlier one."
            )
        return self.rule.transform.forward(array)


def convert(
    source: Mapping[str, np.ndarray], table: Table, target: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], Report]:
    """Fills the parameters of a network from foreign weights.

    Nothing is read before the names and shapes are known to fit, then one tensor at a time, so
    `source` may be a lazy mapping over a file. If it has a `shapes` mapping, names and shapes come
    from there.

    Args:
        source: name -> array.
        table: the rules.
        target: our flat path -> anything with `shape` and `dtype`, for example
            `flatten(Network.abstract(...).params)`.

    Returns:
        Our flat path -> array in the target's type, and the report.

    Raises:
        ValueError: an unused source tensor, an unfilled target, or shapes that do not fit; the
            message lists all of them. Also a tensor with NaN or infinity.
    """
    shapes = getattr(source, "shapes", None)
    if shapes is None:
        shapes = {name: tuple(array.shape) for name, array in source.items()}
    moves, report = plan(shapes, table, target)
    params = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in target.items()}
    for move in moves:
        params[move.target][move.slot] = move.apply(source[move.source])
    return params, report


def check(shapes: Mapping[str, tuple[int, ...]], table: Table, target: Mapping[str, Any]) -> Report:
    """Like `convert`, from names and shapes alone: does a checkpoint fit a network?

    Args:
        shapes: source name -> shape.
        table: the rules.
        target: our flat path -> anything with `shape`.

    Raises:
        ValueError: as `convert`.
    """
    return plan(shapes, table, target)[1]


def infer_leaves(
    shapes: Mapping[str, tuple[int, ...]], table: Table
) -> dict[str, jax.ShapeDtypeStruct]:
    """Our leaves for a file of unknown size: as many layers as it names.

    Args:
        shapes: source name -> shape.
        table: the rules.

    Returns:
        Flat path -> shape. Layers counted by the same part of the name have the same number
        everywhere, so that `plan` misses what is absent in one of them.
    """
    patterns = [(entry, _pattern(entry.source)) for entry in table]
    counts: dict[str, int] = {}
    found = []
    for name, shape in shapes.items():
        rule, indices = _match(patterns, name)
        if isinstance(rule, Rule) and not _shape_problem(rule.transform, tuple(shape), None):
            found.append((rule, indices, tuple(shape)))
            for index in rule.stacked:
                counter = rule.source.split(f"{{{index}}}")[0]
                counts[counter] = max(counts.get(counter, 0), indices[index] + 1)
    leaves = {}
    for rule, indices, shape in found:
        stack = [counts[rule.source.split(f"{{{index}}}")[0]] for index in rule.stacked]
        slot = _transformed(rule.transform, shape)
        leaves[_fill(rule.target, indices)] = jax.ShapeDtypeStruct((*stack, *slot), jnp.float32)
    return leaves


def export(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """Turns parameters back into the foreign naming and layout; the inverse of `convert`.

    Arguments and errors as in `plan_export`.
    """
    exported = {}
    for move in plan_export(params, table):
        array = np.asarray(params[move.target])[move.slot]
        exported[move.source] = np.ascontiguousarray(move.rule.transform.backward(array))
    return exported


def plan_export(leaves: Mapping[str, Any], table: Table) -> list[Move]:
    """Origin of every foreign tensor.

    Args:
        leaves: our flat path -> anything with `shape`.
        table: the rules; ignored tensors do not come back.

    Raises:
        ValueError: a parameter no rule speaks of; the message lists all of them.
    """
    rules = [entry for entry in table if isinstance(entry, Rule)]
    moves, unknown = [], []
    for path, leaf in leaves.items():
        found = False
        for rule, indices in _rules_for_target(rules, path):
            found = True
            for slot in np.ndindex(tuple(leaf.shape[: len(rule.stacked)])):
                name = _fill(rule.source, indices | dict(zip(rule.stacked, slot, strict=True)))
                moves.append(Move(name, path, slot, rule))
        if not found:
            unknown.append(path)
    if unknown:
        raise ValueError(
            f"{len(unknown)} parameters have no rule and cannot be exported; add rules for: "
            + ", ".join(sorted(unknown))
        )
    return moves


def plan(
    shapes: Mapping[str, tuple[int, ...]], table: Table, target: Mapping[str, Any]
) -> tuple[list[Move], Report]:
    """Every move needed, or one error with everything that does not fit.

    Arguments as in `check`; `convert` carries the moves out in memory.
    """
    moves, report = [], Report()
    unknown, mismatched, doubled = [], [], []
    filled: dict[tuple[str, tuple[int, ...]], str] = {}
    patterns = [(entry, _pattern(entry.source)) for entry in table]
    for name, shape in shapes.items():
        entry, indices = _match(patterns, name)
        if entry is None:
            unknown.append(f"{name} {tuple(shape)}: no rule")
            continue
        if isinstance(entry, Ignore):
            report.ignored[name] = entry.reason
            if entry.kept:
                report.kept.append(name)
            continue
        path = _fill(entry.target, indices)
        move = Move(name, path, tuple(indices[index] for index in entry.stacked), entry)
        if path not in target:
            unknown.append(f"{name} {tuple(shape)}: its target {path} is not in the network")
            continue
        leaf_shape = tuple(target[path].shape)
        stack, slot_shape = leaf_shape[: len(move.slot)], leaf_shape[len(move.slot) :]
        if any(index >= size for index, size in zip(move.slot, stack, strict=True)):
            unknown.append(f"{name} {tuple(shape)}: {move.label} is outside the stack {stack}")
            continue
        if (path, move.slot) in filled:
            doubled.append(f"{move.label}: both {filled[path, move.slot]} and {name}")
            continue
        filled[path, move.slot] = name
        wrong = _shape_problem(entry.transform, tuple(shape), slot_shape)
        if wrong:
            mismatched.append(f"{name} -> {move.label}: {wrong}")
            continue
        report.used[name] = move.label
        moves.append(move)
    rules = [entry for entry in table if isinstance(entry, Rule)]
    missing = [line for path in target for line in _unfilled(rules, path, target[path], filled)]
    problems = [
        (unknown, "unused source tensors (add a rule, or an Ignore with its reason)"),
        (missing, "unfilled parameters (is the checkpoint whole, and of this size?)"),
        (mismatched, "shapes that do not fit (compare the config with the checkpoint)"),
        (doubled, "parameters filled twice (two rules lead to the same place)"),
    ]
    if any(lines for lines, _ in problems):
        raise ValueError(
            "the checkpoint does not fit the network.\n"
            + "\n".join(
                f"{len(lines)} {title}:\n  " + "\n  ".join(lines)
                for lines, title in problems
                if lines
            )
        )
    return moves, report


def _unfilled(
    rules: Sequence[Rule], path: str, leaf: Any, filled: Mapping[tuple, str]
) -> Iterator[str]:
    found = False
    for rule, indices in _rules_for_target(rules, path):
        found = True
        for slot in np.ndindex(tuple(leaf.shape[: len(rule.stacked)])):
            if (path, slot) not in filled:
                name = _fill(rule.source, indices | dict(zip(rule.stacked, slot, strict=True)))
                label = path + (str(list(slot)) if slot else "")
                yield f"{label} {tuple(leaf.shape)}: no {name}"
    if not found:
        yield f"{path} {tuple(leaf.shape)}: no rule leads to it"


def _transformed(transform: Transform, shape: tuple) -> tuple:
    # Shapes only: at full size a copy per tensor would take minutes and gigabytes.
    return tuple(jax.eval_shape(transform.forward, jax.ShapeDtypeStruct(shape, jnp.float32)).shape)


def _shape_problem(transform: Transform, shape: tuple, expected: tuple | None) -> str:
    try:
        got = _transformed(transform, shape)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return f"{shape} cannot be changed by '{transform.name}' ({reason}), expected {expected}"
    if expected is not None and got != expected:
        return f"{shape} becomes {got} by '{transform.name}', expected {expected}"
    return ""


def _indices(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))


def _pattern(template: str) -> re.Pattern:
    parts, seen = [], set()
    for part in re.split(r"(\{\w+\}|\{\*\})", template):
        name = part[1:-1] if part.startswith("{") else ""
        if name == "*":
            parts.append(".*")
        elif name in seen:
            parts.append(f"(?P={name})")
        elif name:
            seen.add(name)
            # No leading zeros, so that a name and its index determine each other.
            parts.append(rf"(?P<{name}>0|[1-9]\d*)")
        else:
            parts.append(re.escape(part))
    return re.compile("".join(parts))


def _match(patterns: list, name: str) -> tuple[Rule | Ignore | None, dict[str, int]]:
    for entry, pattern in patterns:
        found = pattern.fullmatch(name)
        if found:
            return entry, {index: int(value) for index, value in found.groupdict().items()}
    return None, {}


def _rules_for_target(rules: Sequence[Rule], path: str) -> Iterator[tuple[Rule, dict[str, int]]]:
    for rule in rules:
        found = _pattern(rule.target).fullmatch(path)
        if found:
            yield rule, {index: int(value) for index, value in found.groupdict().items()}


def _fill(template: str, indices: Mapping[str, int]) -> str:
    for name in _indices(template):
        template = template.replace(f"{{{name}}}", str(indices[name]))
    return template
