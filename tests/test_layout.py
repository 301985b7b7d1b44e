"""The rules of the house, read from the source: what a module may hold, how large things are, what each job runs.

No module is imported here but in a subprocess, so that a broken one fails its own test and not these.
"""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = "qbert_ray"

MOST_LINES, MOST_FUNCTION_LINES = 400, 60
LONG_MODULES: dict[str, str] = {}  # path -> why it may be longer
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
BETWEEN_PROCESSES = {"ray_streaming.py"}  # it unpickles what processes of the same pass pickled, as Ray does with arguments, and no file
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
WITH_RAY = [path for path in MODULES if path.parent.name == "sweeps" or path.stem.startswith("ray_")]
JOBS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__")
each_module = pytest.mark.parametrize("path", MODULES, ids=relative)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of all that a module imports, inside functions too; `from a import b` counts as a.b."""
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{relative(path)}: import absolutely, as the rest does"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@each_module
def test_packages_are_empty_and_names_say_something(path: Path) -> None:
    assert path.stem not in VAGUE
    assert path.stem != "__init__" or path.parent.name == PACKAGE or not imports(path)


IMPORT_EVERYTHING = """
import importlib, logging, os, sys, threading
roots, pipelines = sys.argv[1].split(","), sys.argv[2].split(",")
for name in roots:
    importlib.import_module(name)
    assert "ray" not in sys.modules, f"{name} brings ray"
for name in pipelines:
    importlib.import_module(name)
import ray
assert not ray.is_initialized(), "Ray was started"
assert not logging.getLogger().handlers, "logging was set up"
assert not [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()], "a thread runs"
"""


def test_importing_starts_nothing(tmp_path: Path) -> None:
    """No Ray, no logging set-up, no thread, and no file in the working folder or at home."""
    names = [
        ",".join(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
        for paths in ([path for path in MODULES if path not in WITH_RAY], WITH_RAY)
    ]
    names = [part.replace(".__init__", "") for part in names]
    dropped = ("XDG_", "HF_", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, *names], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*")) == []


# how large things are


@each_module
def test_modules_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < MOST_LINES or relative(path) in LONG_MODULES


@each_module
def test_functions_are_short(path: Path) -> None:
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length >= MOST_FUNCTION_LINES} == {}


# nothing is unpickled or evaluated


@each_module
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    if path.name not in BETWEEN_PROCESSES:
        assert not {name.split(".")[0] for name in imports(path)} & UNPICKLERS
    assert [call for call in map(_danger, ast.walk(parse(path))) if call] == []


def _danger(node: ast.AST) -> str:
    """The call as source, if it can run what a file says."""
    if not isinstance(node, ast.Call):
        return ""
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    dangerous = (
        called in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
        or (called == "torch.load" and given.get("weights_only") != "True")
        or (called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
    )
    return f"line {node.lineno}: {ast.unparse(node)}" if dangerous else ""


def test_dangerous_calls_are_seen() -> None:
    calls = ["eval('1')", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "yaml.load(f)"]
    assert all(_danger(ast.parse(call, mode="eval").body) for call in calls)
    assert not any(_danger(ast.parse(call, mode="eval").body) for call in ("torch.load(f, weights_only=True)", "model.eval()"))


# jobs and commands


@cache
def commands() -> dict[str, str]:
    """Command -> panel of its help."""
    app = importlib.import_module(f"{PACKAGE}.cli.main").app
    alone = {command.name or command.callback.__name__: command.rich_help_panel for command in app.registered_commands}
    return alone | {group.typer_instance.info.name: group.rich_help_panel for group in app.registered_groups}


def _job_command(path: Path) -> str:
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "main"]
    assert len(calls) == 1, f"{relative(path)} calls main once"
    arguments = calls[0].args[0]
    assert isinstance(arguments, ast.List) and isinstance(arguments.elts[0], ast.Constant)
    return str(arguments.elts[0].value)


@pytest.mark.parametrize("path", JOBS, ids=relative)
def test_jobs_are_a_few_lines_around_a_command(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 12
    assert imports(path) <= {"sys", f"{PACKAGE}.cli.main.main"}
    command = _job_command(path)
    assert command in commands()
    assert path.stem == ("run_pipeline" if command == "run" else command.replace("-", "_"))


def test_every_stage_can_be_submitted_as_a_job() -> None:
    stages = {name for name, panel in commands().items() if panel.startswith(("Whole run", "Stage"))} - {"demo"}
    assert stages <= {_job_command(path) for path in JOBS}
