"""Imports point one way: shapes <- models, diffusion <- weights <- streaming, training <- live."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a part may import of the project; everything may import itself and shapes.
MAY_IMPORT = {
    "models": set(),
    "diffusion": set(),
    "io": set(),
    "dialogue": set(),
    "weights": {"models", "diffusion"},
    "data": {"models", "weights", "io"},
    "streaming": {"models", "diffusion", "weights", "io"},
    "training": {"models", "diffusion", "weights", "data"},
    "live": {"streaming", "io"},
    "serving": {"weights", "streaming", "live", "dialogue", "io"},
    "planning": {"models", "diffusion", "weights", "data", "io", "streaming", "training"},
    "evaluation": {"models", "diffusion", "weights", "data", "io", "streaming", "training"},
}
FORBIDDEN = {"torch", "absl", "argparse", "conversion", "launch", "configs", "pickle"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_parts_import_only_what_lies_below(part):
    found = files(f"jax_avatar/{part}")
    assert found
    for path in found:
        for name in imported(path):
            if name.startswith("jax_avatar."):
                target = name.split(".")[1]
                allowed = MAY_IMPORT[part] | {part, "shapes"}
                assert target in allowed, f"{path}: {part} must not import {name}"


def test_the_package_knows_no_flags_torch_or_conversion():
    for path in files("jax_avatar"):
        for name in imported(path):
            assert name.split(".")[0] not in FORBIDDEN, f"{path} imports {name}"


def test_the_package_does_not_print():
    for path in files("jax_avatar"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno} prints"


def test_shard_map_stays_in_the_pipeline_and_around_kernels():
    users = [p.name for p in files("jax_avatar") if ".shard_map(" in p.read_text()]
    assert users == ["attention.py", "pipeline.py"]
