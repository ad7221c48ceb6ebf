"""The planted mistakes still fit the code; `python -m tests.planted` makes them."""

import ast
from xml.etree import ElementTree

import pytest

from tests.planted.__main__ import MISTAKES, ROOT, judge
from tests.planted.mistake import Mistake


def test_every_mistake_can_be_made_and_is_code(tmp_path):
    for mistake in MISTAKES:
        (path,) = [p for p in (mistake.file, f"jax_avatar/{mistake.file}") if (ROOT / p).exists()]
        planted = tmp_path / path
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.write_text((ROOT / path).read_text())
        mistake.plant(tmp_path)
        assert planted.read_text() != (ROOT / path).read_text()
        ast.parse(planted.read_text(), mistake.what)


def test_a_text_that_is_gone_or_not_alone_is_named(tmp_path):
    (tmp_path / "jax_avatar").mkdir()
    (tmp_path / "jax_avatar" / "a.py").write_text("x = x\n")
    for old, count in (("y", 0), ("x", 2)):
        with pytest.raises(ValueError, match=rf"3, wrong: '{old}' is {count} times in a\.py"):
            Mistake(3, "wrong", "a.py", old, "z", ()).plant(tmp_path)


def test_every_invariant_has_a_mistake_and_every_test_is_there():
    words = {"input", "run", "setting", "ignored", "talk"}
    assert {mistake.number for mistake in MISTAKES} == {*range(1, 22), *words}
    for mistake in MISTAKES:
        assert mistake.tests
        for test in mistake.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test


TEST = "tests/training/test_a.py::test_b"


@pytest.mark.parametrize(
    ("cases", "noticed", "said"),
    [
        ([("test_b", "failure", "AssertionError: 1 is not 2")], True, "1 is not 2"),
        ([("test_b[1]", "", ""), ("test_b[2]", "failure", "Failed: DID NOT RAISE")], True, "RAISE"),
        ([("test_b", "", "")], False, "passed"),
        ([("test_bc", "failure", "AssertionError")], False, "not found"),
        ([("test_b", "error", "failed on setup")], False, "could not be set up"),
        ([("test_b", "failure", "NameError: name 'x' is not defined")], False, "NameError"),
        ([("test_b", "failure", "jaxtyping.TypeCheckError: int")], False, "TypeCheckError"),
        ([], False, "not found"),
    ],
)
def test_only_a_test_that_ran_and_failed_has_noticed(cases, noticed, said):
    report = ElementTree.Element("testsuites")
    for name, kind, message in cases:
        case = ElementTree.SubElement(
            report, "testcase", classname="tests.training.test_a", name=name
        )
        if kind:
            ElementTree.SubElement(case, kind, message=message)
    outcome = judge([TEST], report)
    assert outcome.is_noticed == noticed and said in outcome.said


def test_each_of_several_tests_must_notice():
    report = ElementTree.Element("testsuites")
    for name, failed in (("test_b", True), ("test_c", False)):
        case = ElementTree.SubElement(
            report, "testcase", classname="tests.training.test_a", name=name
        )
        if failed:
            ElementTree.SubElement(case, "failure", message="AssertionError")
    assert judge([TEST], report).is_noticed
    assert not judge([TEST, TEST.replace("test_b", "test_c")], report).is_noticed
