"""The pages say how results are read in pandas, polars, DuckDB and datasets: what they say is run here."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qbert_ray.ranking.recommender import Recommender
from qbert_ray.storage import columns
from tests import ROOT
from tests.small_run import ITEMS, LEVELS, USERS, make_run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [code for page in PAGES for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)]
BLOCKS = [code for code in BLOCKS if '"runs/demo' in code or "'runs/demo" in code]


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
        assert any(re.search(rf"^(import|from) {name}", code, re.MULTILINE) for code in BLOCKS), name


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split("\n")[0])
def test_what_the_pages_say_runs(here, code):
    for name in ("duckdb", "datasets"):
        if re.search(rf"^(import|from) {name}", code, re.MULTILINE):
            pytest.importorskip(name)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    if "best" in names:
        rows = rows_of(names["best"])
        if "recommend(" in code:
            assert [len(row) for row in rows] == [5, 5]
        elif "group by" in code:
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
