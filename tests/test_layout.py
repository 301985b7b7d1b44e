"""The rules of the house, read from the source: who imports whom, how large things are, that the README tells the truth.

No module is imported here but in a subprocess, so that a broken one fails its own test and not these.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests import ROOT

PACKAGE = "qbert_ray"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text() for page in PAGES if page.name != "config.md")  # which test_reference.py holds

MOST_LINES, MOST_FUNCTION_LINES = 400, 60
LONG_MODULES: dict[str, str] = {}  # path -> why it may be longer
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
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
    stages = {name for name, panel in commands().items() if panel.startswith(("Whole run", "Stage"))}
    assert stages <= {_job_command(path) for path in JOBS}


# the README


def _config_paths() -> dict[str, object]:
    overlays = importlib.import_module(f"{PACKAGE}.config.loading")
    return overlays.flatten(overlays.load_config().model_dump(mode="json"))


def _code(text: str) -> Iterator[str]:
    """Lines of fenced blocks, and code between single backticks."""
    for number, piece in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
        yield from piece.splitlines() if number % 2 else re.findall(r"`([^`\n]+)`", piece)


def test_readme_commands_and_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line.strip().removeprefix("$ ").split() for line in _code(README)]
    named = {(line[0], line[1]) for line in lines if len(line) > 1 and line[0] in ("qbert-ray", "make")}
    assert named
    assert {name for program, name in named if program == "qbert-ray"} <= set(commands())
    assert {name for program, name in named if program == "make"} <= targets


def test_readme_files_exist() -> None:
    named = set(re.findall(r"\b((?:configs|jobs|cluster|tests)/[\w./-]*\w)", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_readme_symbols_exist() -> None:
    """`fusion.py:DynamicFusion` and `pipelines/training.py:Loop.save` of "Locating the code"."""
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", README)
    assert named
    for file, symbol in named:
        body: list[ast.stmt] = parse(ROOT / PACKAGE / file).body
        for name in symbol.split("."):
            found = [node for node in body if name in _defined(node)]
            assert found, f"README names {file}:{symbol}, which is not there"
            body = getattr(found[0], "body", [])


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_readme_config_keys_exist() -> None:
    known = _config_paths()
    sections = {path.split(".")[0] for path in known}
    named = {word for code in _code(README) for word in re.findall(r"(?<![\w./:])([a-z_]+(?:\.[\w<>]+)+)", code)}
    named = {
        word
        for word in named
        if word.split(".")[0] in sections and not word.endswith((".yaml", ".json", ".jsonl", ".parquet", ".py", ".onnx"))
    }
    assert named
    for word in named:
        path = re.sub(r"^(data\.domains)\.[\w<>]+", r"\1.items", word)
        assert any(key == path or key.startswith((f"{path}.", f"{path}<")) or path.startswith(f"{key}.") for key in known), word


def test_readme_states_the_defaults() -> None:
    """Rows of the table of knobs: | `key` | default | ..."""
    rows = dict(re.findall(r"^\| `([a-z_]+\.[a-z_.]+)` \| `([^`]*)` \|", README, re.MULTILINE))
    known = _config_paths()
    assert rows
    assert {key: yaml.safe_load(given) for key, given in rows.items()} == {key: known[key] for key in rows}


@pytest.mark.parametrize("text", re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
def test_readme_configs_are_valid(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    importlib.import_module(f"{PACKAGE}.config.loading").load_config([tmp_path / "config.yaml"])
