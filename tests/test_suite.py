"""Rules for the tests themselves: each compares something, and no list of parameters is empty."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT, mutants

FILES = sorted((ROOT / "tests").rglob("*.py"))
TEST_FILES = [path for path in FILES if path.name.startswith("test_")]
RAISERS = {"raises", "warns", "fail", "gradcheck"}  # calls that fail by themselves
# Tests that pass by not raising, with what would raise.
MAY_JUST_RUN = {
    "tests/config/test_reference.py::test_the_schema_takes_every_config_file": "jsonschema.validate",
    "tests/test_docs.py::test_configs_load": "load_config",
}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text(), str(path))) if isinstance(node, ast.FunctionDef))


def called(node: ast.AST) -> set[str]:
    """Last names of everything that is called."""
    calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def compares(node: ast.FunctionDef) -> bool:
    names = called(node)
    asserts = any(isinstance(each, ast.Assert) for each in ast.walk(node))
    return asserts or bool(names & RAISERS) or any(name.startswith("assert_") for name in names)


# Helpers that compare, and helpers that call those.
COMPARING = {node.name for path in FILES for node in functions(path) if compares(node)}
COMPARING |= {node.name for path in FILES for node in functions(path) if called(node) & COMPARING}


def test_every_test_compares_something() -> None:
    tests = [(path.relative_to(ROOT).as_posix(), node) for path in TEST_FILES for node in functions(path) if node.name.startswith("test_")]
    assert len(tests) > 300
    idle = [f"{path}::{node.name}" for path, node in tests if not compares(node) and not called(node) & COMPARING]
    assert sorted(set(idle)) == sorted(MAY_JUST_RUN)


def test_an_empty_list_of_parameters_fails_the_collection(request: pytest.FixtureRequest) -> None:
    assert request.config.getini("empty_parameter_set_mark") == "fail_at_collect"


def test_deprecations_are_errors_here(request: pytest.FixtureRequest) -> None:
    assert "error::DeprecationWarning:(qbert_ray|tests)" in request.config.getini("filterwarnings")
    with pytest.raises(DeprecationWarning):
        warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_modules_that_are_mutated_and_their_tests_are_there() -> None:
    for module, tests in mutants.TESTS.items():
        assert tests and all((ROOT / path).exists() for path in (module, *tests)), module


def test_functions_without_gradients_are_mutated_too() -> None:
    """mutmut leaves decorated functions alone, so these decorators become `with` statements."""
    before = ["class A:", "    @torch.no_grad()", "    def f(self, x):", "        if x:", "            return 1", "", "        return 2"]
    after = ["class A:", "    def f(self, x):", "        with torch.no_grad():", "            if x:", "                return 1", ""]
    rest = ["", "    @property", "    def g(self):", "        return 3", ""]
    source, expected = "\n".join([*before, *rest]), "\n".join([*after, "            return 2", *rest])
    assert mutants.without_decorators(source) == expected
