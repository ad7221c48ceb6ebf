"""Counts the structure of the package: statements, long functions, wide signatures, many fields.

    python benchmarks/structure.py
    python benchmarks/structure.py --json

Reads the source only; nothing is imported.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch import cli

ROOT = Path(__file__).parents[1]
PARTS = ("jax_avatar", "conversion", "configs", "launch", "benchmarks", "tests")
MOST_LINES, MOST_PARAMETERS, MOST_FIELDS = 60, 9, 16


@dataclass(frozen=True)
class Counts:
    """Sizes of a part of the tree, and what in it is larger than the limits.

    Attributes:
        lines: of all files.
        statements: without docstrings and imports.
        functions: in it, methods included.
        long_functions: above `MOST_LINES` lines, as "file:line name lines".
        wide_signatures: above `MOST_PARAMETERS` parameters, "self" aside.
        many_fields: classes that hold more than `MOST_FIELDS` fields, configs aside.
    """

    lines: int
    statements: int
    functions: int
    long_functions: list[str]
    wide_signatures: list[str]
    many_fields: list[str]


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser.parse_args(argv)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, nested ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters of a function, "self" and "cls" aside, "*args" and "**kwargs" included."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [a for a in (arguments.vararg, arguments.kwarg) if a]
    return len([a for a in named if a.arg not in ("self", "cls")]) + len(starred)


def statements(tree: ast.AST) -> int:
    """Statements, without docstrings and imports."""
    count = 0
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not is_text:
            count += not isinstance(node, ast.Import | ast.ImportFrom)
    return count


def fields(cls: ast.ClassDef) -> set[str]:
    """Names that instances hold: annotated in the class, or assigned to "self" in a method."""
    held = {
        node.target.id
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                held.add(node.attr)
    return held


def is_config(cls: ast.ClassDef) -> bool:
    """True for classes of settings, which may have as many as there are settings."""
    return cls.name.endswith(("Config", "Settings", "Options"))


def count(part: str) -> Counts:
    """Counts the Python files of a folder."""
    lines = total = number = 0
    long, wide, many = [], [], []
    for path in sorted((ROOT / part).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, where = ast.parse(text), path.relative_to(ROOT)
        lines += text.count("\n")
        total += statements(tree)
        for function in functions(tree):
            number += 1
            name = f"{where}:{function.lineno} {function.name}"
            length = function.end_lineno - function.lineno + 1
            if length > MOST_LINES:
                long.append(f"{name} {length}")
            if parameters(function) > MOST_PARAMETERS:
                wide.append(f"{name} {parameters(function)}")
        for cls in ast.walk(tree):
            if isinstance(cls, ast.ClassDef) and not is_config(cls):
                if len(fields(cls)) > MOST_FIELDS:
                    many.append(f"{where}:{cls.lineno} {cls.name} {len(fields(cls))}")
    return Counts(lines, total, number, long, wide, many)


def main(argv=None) -> None:
    arguments = parse_arguments(argv)
    counts = {part: asdict(count(part)) for part in PARTS}
    if arguments.json:
        print(json.dumps(counts))
        return
    for part, found in counts.items():
        print(f"{part}: {found['lines']} lines, {found['statements']} statements")
        for kind in ("long_functions", "wide_signatures", "many_fields"):
            for line in found[kind]:
                print(f"  {kind.replace('_', ' ')}: {line}")


if __name__ == "__main__":
    cli.run(main)
