"""README, contributing page and documentation site are compared with the code: what they name exists, what they show runs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import typer.main

import qbert_ray as qb
from qbert_ray.cli.main import app
from qbert_ray.config.loading import flatten, load_config
from qbert_ray.config.reference import fields
from qbert_ray.inputs.validation import HINTS
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.storage import columns
from tests import ROOT
from tests.small_run import ITEMS, LEVELS, USERS, make_run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app)


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language, also those inside tabs."""
    return [textwrap.dedent(found[3]) for found in FENCE.finditer(TEXT) if found[2] == language]


def code(text: str) -> Iterator[str]:
    """Lines of fenced blocks, and code between single backticks."""
    for found in FENCE.finditer(text):
        yield from re.sub(r" \\\n *", " ", textwrap.dedent(found[3])).splitlines()  # continued lines are one
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


# what is named exists


def test_commands_and_their_options_exist():
    lines = {line.strip() for line in code(TEXT) if line.strip().startswith("qbert-ray ") and "<stage>" not in line}
    assert len(lines) > 30
    for line in sorted(lines):
        words, command = shlex.split(line, comments=True)[1:], COMMANDS
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in code(TEXT) if line.startswith("make ")}
    assert named and named <= targets


def test_files_and_modules_exist():
    named = set(re.findall(r"\b((?:configs|jobs|cluster|tests|examples)/[\w./-]*\w)", TEXT))
    named |= {name.replace(".", "/") for name in re.findall(r"python -m ((?:tests|jobs)\.[\w.]*\w)", TEXT)}
    assert len(named) > 30
    assert [name for name in sorted(named) if not any((ROOT / f"{name}{end}").exists() for end in ("", ".py"))] == []


def test_links_of_the_pages_outside_the_site_lead_somewhere():
    """Those of the site are checked when it is built."""
    for page in PAGES[:2]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page.name}: {target}"


def test_symbols_exist():
    """`fusion/model.py:DynamicFusion._align` of the table from the paper to the code."""
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)
    assert len(named) > 30
    for file, symbol in named:
        body: list[ast.stmt] = ast.parse((ROOT / "qbert_ray" / file).read_text()).body
        for name in symbol.split("."):
            found = [node for node in body if name in _defined(node)]
            assert found, f"{file}:{symbol} is not there"
            body = getattr(found[0], "body", [])


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_settings_exist():
    known = flatten(load_config().model_dump(mode="json"))
    sections = {path.split(".")[0] for path in known}
    files = (".yaml", ".json", ".jsonl", ".parquet", ".py", ".onnx")
    named = {word for line in code(TEXT) for word in re.findall(r"(?<![\w./:])([a-z_]+(?:\.[\w<>]+)+)", line)}
    named = {word for word in named if word.split(".")[0] in sections and not word.endswith(files)}
    named -= {f"run.{name}" for name in vars(qb.FinishedRun)} | {"fusion.parameters"}  # of Python
    assert len(named) > 50
    for word in sorted(named):
        path = re.sub(r"^(data\.domains)\.[\w<>]+", r"\1.items", word)
        assert any(key == path or key.startswith((f"{path}.", f"{path}<")) or path.startswith(f"{key}.") for key in known), word


def test_every_reason_of_a_rejected_row_is_explained():
    page = (ROOT / "docs" / "own-data.md").read_text()
    assert [reason for reason in HINTS if reason not in page] == []


def test_every_public_name_is_in_the_api_reference():
    named = re.findall(r"^::: (qbert_ray[\w.]*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(set(qb.__all__) - {name.rpartition(".")[2] for name in named}) == []
    assert {name.rpartition(".")[2] for name in named if name.count(".") == 1} <= set(qb.__all__)


def test_the_readme_stays_short():
    assert 7_000 < len((ROOT / "README.md").read_text()) < 10_000


# what is shown loads, compiles and runs


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.split("\n")[0])
def test_configs_load(text, tmp_path):
    text = text.replace("extends: configs/", f"extends: {ROOT}/configs/")
    (tmp_path / "config.yaml").write_text(text)
    load_config([tmp_path / "config.yaml"])


@pytest.mark.parametrize("text", blocks("python"), ids=lambda text: text.split("\n")[0])
def test_python_compiles_and_names_what_is_public(text):
    tree = ast.parse(text)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "qb"}
    assert used <= set(qb.__all__)


READS = [text for text in blocks("python") if "runs/demo" in text and "qb.run(" not in text]  # test_api.py runs the other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run in runs/demo, recommendations, manifests, hidden counts and all."""
    folder = tmp_path_factory.mktemp("here")
    run = make_run(folder / "runs" / "demo")
    recommender = Recommender.load(run.uri)
    best = recommender.recommend([[item] for item in recommender.ids[:USERS]], k=5)
    rows = [("shop", f"user-{user}", rank, *one) for user, items in enumerate(best) for rank, one in enumerate(items, 1)]
    table = pa.table([pa.array(values) for values in zip(*rows, strict=True)], names=columns.RECOMMENDATIONS.names)
    for part in (0, 1):
        half = table.slice(part * USERS // 2 * 5, USERS // 2 * 5).cast(columns.RECOMMENDATIONS)
        run.write_part("score", f"shop-{part:05d}.parquet", half)
        run.write_json(f"score/.counts/shop-{part:05d}.parquet.json", {"users": USERS // 2})
    run.write_json("score/manifest.json", {"stage": "score"})
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    if importlib.util.find_spec("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # instead of one at home
    return folder


def rows_of(best):
    """The rows of whatever a block called `best`."""
    for name in ("to_pylist", "fetchall", "to_dicts", "to_list"):
        if hasattr(best, name):
            return getattr(best, name)()
    return best.to_dict("records") if hasattr(best, "to_dict") else list(best)


def test_there_are_blocks_for_each_library():
    for name in ("pandas", "polars", "duckdb", "datasets", "qbert_ray"):
        assert any(re.search(rf"^(import|from) {name}", text, re.MULTILINE) for text in READS), name


@pytest.mark.parametrize("text", READS, ids=lambda text: text.split("\n")[0])
def test_python_runs(here, text):
    for name in ("duckdb", "datasets"):
        if re.search(rf"^(import|from) {name}", text, re.MULTILINE):
            pytest.importorskip(name)
    names: dict[str, object] = {}
    exec(text, names)  # noqa: S102
    assert {"best", "codes"} & set(names)
    if "best" in names:
        rows = rows_of(names["best"])
        if "recommend(" in text:
            assert [len(row) for row in rows] == [5, 5]
        elif "group by" in text:
            assert sum(users for _, users in rows) == USERS
        else:
            assert len(rows) == USERS * 5
            assert [(row["user_id"], row["rank"]) for row in rows[:6]] == [*(("user-0", rank) for rank in range(1, 6)), ("user-1", 1)]
    if "codes" in names:
        assert names["codes"].shape == (ITEMS, LEVELS)


def test_lists_are_the_same_in_all_four(here):
    duckdb, datasets = pytest.importorskip("duckdb"), pytest.importorskip("datasets")
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    for table, column in (("semantic_ids", "codes"), ("fusion/embeddings", "embedding"), ("ingest/sequences", "train")):
        path = f"runs/demo/{table}/*.parquet"
        read = [
            pd.read_parquet(sorted(str(part) for part in Path("runs/demo", table).glob("*.parquet")))[column].tolist(),
            pl.read_parquet(path)[column].to_list(),
            [row[0] for row in duckdb.sql(f"select {column} from '{path}'").fetchall()],
            datasets.load_dataset("parquet", data_files=path, split="train")[column],
        ]
        first, *others = [[np.asarray(value).tolist() for value in values] for values in read]
        assert first and all(other == first for other in others)


# the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without warnings."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site):
    loading = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*rel=[\"']?(?:stylesheet|icon|preconnect)[^>]*//"
    )
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 13
    assert [page.name for page in pages if loading.search(page.read_text())] == []
    assert [sheet.name for sheet in site.rglob("*.css") if re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text())] == []
    assert loading.search('<script src="https://unpkg.com/x.js">') and loading.search('<link rel="stylesheet" href="https://fonts.x/css">')


def test_the_site_has_every_setting_and_the_contributing_page(site):
    page = (site / "configuration.html").read_text()
    escaped = (field.path.replace("<", "&lt;").replace(">", "&gt;") for field in fields())
    assert [path for path in escaped if f"<code>{path}</code>" not in page] == []
    assert "<!-- fields" not in page
    assert "Add a quantizer" in (site / "contributing.html").read_text()
