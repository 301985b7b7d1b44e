"""Every command in the headers of configs, in the README and on the pages of the site can be run as it is written.

What takes hours is not run: its options are known, its files are there, and its config, that of each row of a table included, is valid.
"""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from qbert_ray.cli.main import app
from qbert_ray.config.loading import load_config, settings_of, with_values
from qbert_ray.sweeps.tables import impossible_rows, load_table
from qbert_ray.sweeps.trials import Plan
from tests import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "benchmarks" / "README.md"]
FENCE = re.compile(r"^( *)```\w*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app)


def texts(within_lines: bool) -> Iterator[tuple[Path, str]]:
    """File and text of each comment and fenced block, and of each piece of code within a line, which may name a command in passing."""
    for file in CONFIGS:
        yield file, "\n".join(re.sub(r"^# ?", "", line) for line in file.read_text().splitlines() if line.startswith("#"))
    for file in PAGES:
        text = file.read_text()
        for block in FENCE.finditer(text):
            yield file, textwrap.dedent(block[2])
        for piece in re.findall(r"`([^`]+)`", FENCE.sub("", text)) if within_lines else []:
            yield file, piece


def commands(start: str, within_lines: bool = True) -> list[tuple[Path, list[str]]]:
    """File and words of each command that starts so; what stands for a value of the reader's is a word."""
    found: dict[tuple[Path, str], list[str]] = {}
    for file, text in texts(within_lines):
        for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
            line = re.sub(r"<[^<>]*>", "VALUE", line.strip())
            line = re.split(r" {3,}\(| \| | && |; ", line)[0]
            if line.startswith(start):
                found[file, line] = shlex.split(line, comments=True)
    return [(file, words) for (file, _), words in found.items()]


def parsed(words: list[str]) -> tuple[list[str], dict[str, object]]:
    """Names and parameters of a command, as the command line reads them."""
    command, names = COMMANDS, []
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, name
        command, names = command.commands[name], [*names, name]
    context = command.make_context(names[-1], ["--append=new" if word == "--append" else word for word in words])
    return names, context.params


OURS = [(file, words[1:]) for file, words in commands("qbert-ray ")]
RUNNABLE = [
    (file, words)
    for file, words in OURS
    if "-c" in words and all((ROOT / words[place + 1]).exists() for place, word in enumerate(words) if word == "-c")
]
OTHERS = [
    (file, words[1:])
    for file, words in commands("qbert-ray ", within_lines=False)
    if (file, words[1:]) not in RUNNABLE and words[1:] != ["--version"] and words[1] != "VALUE"
]
MODULES = commands("python -m tests")


def told(case: object) -> str | None:
    """The name of a case: its file and command."""
    return f"{case.stem}" if isinstance(case, Path) else " ".join(case)[:60] if isinstance(case, list) else None


def test_commands_are_found():
    assert len(OURS) > 60 and len(RUNNABLE) > 20 and len(OTHERS) > 10 and len(MODULES) > 20
    assert sum(words[0] == "reproduce" for _, words in RUNNABLE) >= len(list((ROOT / "configs" / "tables").glob("*.yaml")))


@pytest.mark.parametrize(("file", "words"), RUNNABLE, ids=told)
def test_a_command_on_our_configs_is_valid(file, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names, given = parsed(list(words))
    config = load_config([Path(each) for each in given["config"]], [*(given["overrides"] or []), f"run.dir={tmp_path}"])
    if names == ["reproduce"]:
        table = load_table(Path(given["table"]))
        left_out = impossible_rows(config, table)
        assert len(table.variants) - len(left_out) > 1, f"of the rows only the reference is left: {left_out}"
        variants = {name: overlay for name, overlay in table.variants.items() if name not in left_out}
        compared = {"name": "t", "stage": "evaluate", "search": "variants", "variants": variants, "seeds": [0]}
        plan = Plan(with_values(config, {"sweep": compared}))
        assert set(plan.names.values()) == set(variants)
        for name, overlay in variants.items():
            merged = with_values(config, settings_of(overlay))
            assert merged.data == config.data, name
    if names == ["sweep"]:
        assert Plan(config).trials


@pytest.mark.parametrize(("file", "words"), OTHERS, ids=told)
def test_a_command_on_files_of_the_reader_is_parsed(file, words):
    names, given = parsed(list(words))
    assert names and given is not None


@pytest.mark.parametrize(("file", "words"), MODULES, ids=told)
def test_a_command_of_the_tests_names_a_module_and_its_options(file, words):
    path = ROOT / words[2].replace(".", "/")
    source = next(each for each in (path.with_suffix(".py"), path / "__main__.py") if each.exists())
    nodes = list(ast.walk(ast.parse(source.read_text())))
    for module in [node.module for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.")]:
        nodes += ast.walk(ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text()))  # its parser may be shared
    known = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    known |= {each for text in known for each in re.findall(r"--[a-z-]+", text)}
    given = {word.partition("=")[0] for word in words[3:] if word.startswith("-")}
    assert given - {"-c"} <= known, source
