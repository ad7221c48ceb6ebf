"""Imports point one way: shapes <- models, diffusion <- weights <- streaming, training <- live."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import jax_avatar

ROOT = Path(__file__).parents[1]
# What a part may import of the project; everything may import itself, shapes, layout and pixels.
MAY_IMPORT = {
    "models": set(),
    "diffusion": set(),
    "io": set(),
    "portraits": {"io"},
    "dialogue": {"live"},
    "weights": {"models", "diffusion"},
    "data": {"models", "weights", "io", "portraits"},
    "streaming": {"models", "diffusion", "weights", "io"},
    "training": {"models", "diffusion", "weights", "data"},
    "live": {"streaming", "io"},
    "serving": {"weights", "streaming", "live", "dialogue", "io", "portraits"},
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
                allowed = MAY_IMPORT[part] | {part, "shapes", "layout", "pixels"}
                assert target in allowed, f"{path}: {part} must not import {name}"


def test_no_file_of_models_imports_itself_by_way_of_others():
    names = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files("jax_avatar/models")
    }
    below = {name: {n for n in imported(path) if n in names} for name, path in names.items()}
    while free := {name for name, needed in below.items() if not needed}:
        below = {name: needed - free for name, needed in below.items() if name not in free}
    assert not below


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


def test_the_package_exports_its_public_names_and_imports_them_late():
    for name in jax_avatar.__all__:
        assert inspect.getdoc(getattr(jax_avatar, name))
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        jax_avatar.load_modell  # noqa: B018
    code = "import sys, jax_avatar; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
