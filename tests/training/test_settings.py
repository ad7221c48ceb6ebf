"""Every setting of training has a fast test that fails where it is ignored."""

import ast
import dataclasses
import functools
from pathlib import Path

import pytest

from jax_avatar.data.encode import EncodeConfig
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages import build as stages
from tests.training.settings_table import FILES, SETTINGS, Noticed

ROOT = Path(__file__).parents[2]
SECTIONS = {kind for stage in stages._SECTIONS.values() for kind in stage.values() if kind}
CONFIGS = {kind.__name__: kind for kind in SECTIONS | {LoopConfig, EncodeConfig}}
HOW = (
    "write a fast test that fails where the setting is ignored (set it to another value than its "
    "default, and see what it does), and name it in tests/training/settings_table.py; then "
    "`python -m tests.planted ignored --what NAME` must say that it is noticed."
)


def test_every_config_is_in_the_table():
    assert set(SETTINGS) == set(CONFIGS), HOW
    for name, kind in CONFIGS.items():
        assert kind.__module__ == f"jax_avatar.{FILES[name][:-3].replace('/', '.')}"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_test(name):
    fields = {field.name for field in dataclasses.fields(CONFIGS[name])}
    untested, gone = sorted(fields - set(SETTINGS[name])), sorted(set(SETTINGS[name]) - fields)
    assert not untested, f"{name}.{', '.join(untested)}: {HOW}"
    assert not gone, f"{name} has no {', '.join(gone)}; take it from settings_table.py."


@functools.cache
def functions(file):
    return {
        node.name: [ast.unparse(decorator) for decorator in node.decorator_list]
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_the_tests_of_the_table_exist_and_are_fast(name):
    for field, row in SETTINGS[name].items():
        if not isinstance(row, Noticed):
            assert len(row.reason) > 10
            continue
        file, _, function = row.test_id.partition("::")
        found = functions(file)
        assert function in found, f"{name}.{field}: {row.test_id} is gone; {HOW}"
        assert "pytest.mark.slow" not in found[function], f"{name}.{field}: {row.test_id} is slow"
