import ast

from benchmarks import structure

SOURCE = '''
import os

class Thing:
    """A docstring."""
    size: int

    def __init__(self, a, *, b=1, **more):
        self.a = a
        self.size = b

class ThingConfig:
    width: int
'''


def test_statements_parameters_and_fields_of_a_source():
    tree = ast.parse(SOURCE)
    thing, config = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    (init,) = structure.functions(tree)
    assert structure.parameters(init) == 3
    assert structure.fields(thing) == {"size", "a"}
    assert structure.is_config(config) and not structure.is_config(thing)
    # Two classes, two annotations, one function, two assignments; no import, no docstring.
    assert structure.statements(tree) == 7


def test_the_package_is_counted():
    counts = structure.count("jax_avatar")
    assert counts.statements > 1000 and counts.functions > 500
    assert all(": " not in line and line.startswith("jax_avatar/") for line in counts.many_fields)
