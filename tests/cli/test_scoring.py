"""`qbert-ray score` with newer interactions and with histories of other users, on a copy of a finished run."""

import re
import shutil

import polars as pl
import pytest
import yaml

from qbert_ray import pipeline
from qbert_ray.cli.main import main
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.storage.catalog import run_config
from qbert_ray.storage.directory import Manifest, RunDir


@pytest.fixture
def copied(finished, tmp_path):
    """Arguments of a command on a copy of a finished run, the copy, and a folder."""
    config, run = finished
    shutil.copytree(run.uri, tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return (
        ["-c", str(tmp_path / "config.yaml"), f"run.dir={tmp_path / 'run'}", "compute.executor=local"],
        RunDir(str(tmp_path / "run")),
        tmp_path,
    )


def call(words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code


def recommended(table):
    found = {}
    for row in table.to_pylist():
        found.setdefault(row["user_id"], []).append(row["item_id"])
    return found


def test_histories_of_other_users_are_scored_next_to_the_run(copied, capsys, monkeypatch):
    arguments, run, folder = copied
    before, recommender, settings = run.read("score"), Recommender.load(run.uri), run_config(run)
    histories = {"new-1": recommender.ids[:4], "new-2": [], "new-3": recommender.ids[7:9]}
    for number in range(2):  # another request takes the place of the one before, without a word
        pl.DataFrame({"user_id": list(histories), "history": list(histories.values())}).write_parquet(folder / f"new{number}.parquet")
        monkeypatch.chdir(folder)
        call(["score", "--histories", f"new{number}.parquet", *arguments])
        found = recommended(run.read("score_histories"))
        best = recommender.recommend(histories.values(), 10)
        assert found == {user: [item for item, _ in items] for user, items in zip(histories, best, strict=True)}
        histories.pop("new-2", None)
    manifest = Manifest.load(run, "score_histories")
    assert manifest.counts["demo"]["score.histories"]["users"] == 2 and "score.histories of demo" in manifest.inputs
    written = run.read_bytes("score_histories/manifest.json")
    call(["score", "--histories", "new1.parquet", *arguments])
    assert run.read_bytes("score_histories/manifest.json") == written  # it is done
    assert run.read("score").equals(before)
    call(["score", "--redo", *arguments])
    assert run.read_bytes("score_histories/manifest.json") == written, "they do not read the run's own lists"
    assert run_config(run).score == settings.score, "the next score of the run is of its own users"


def test_newer_interactions_are_scored_without_training(copied, shop, capsys):
    """Also where the run's own file has grown: nothing else reads it."""
    arguments, run, folder = copied
    trained = run.read_bytes("finetune/manifest.json")
    own = pl.read_parquet(shop / "interactions.parquet")
    user = run.read("ingest/sequences", "demo")["user_id"][0].as_py()
    last = own.filter(pl.col("user_id") == user).sort("timestamp").tail(1)
    items = run.read("ingest/items", "demo")["item_id"].to_pylist()
    fresh = next(item for item in items if item not in set(own.filter(pl.col("user_id") == user)["item_id"]))
    more = last.with_columns(pl.lit(fresh).alias("item_id"), pl.col("timestamp") + (own["timestamp"].max() - own["timestamp"].min()))
    (folder / "log").mkdir()
    pl.concat([own, more.select(own.columns)]).write_parquet(folder / "log" / "grown.parquet")
    call(["score", "--redo", *arguments, f"score.interactions={folder / 'log'}"])
    manifest = Manifest.load(run, "score")
    counts = manifest.counts["demo"]["score.interactions"]
    assert counts["rows"] == counts["new"] + counts["known"] + sum(counts["rejected"].values()) == len(own) + 1
    assert counts["known"] == run.read("ingest/interactions", "demo").num_rows
    assert "score.interactions of demo" in manifest.inputs and manifest.config["score.interactions"] == str(folder / "log")
    assert run.read_bytes("finetune/manifest.json") == trained
    table = recommended(run.read("score", "demo"))
    history = next(row["history"] for row in run.read("score/histories", "demo").to_pylist() if row["user_id"] == user)
    assert items[history[-1]] == fresh and fresh not in table[user]
    expected = Recommender.load(run.uri).recommend([[items[item] for item in history]], 10)[0]
    assert table[user] == [item for item, _ in expected]


def test_tables_that_name_nothing_of_the_run_are_pointed_out(copied, capsys):
    arguments, run, folder = copied
    users, items = (
        run.read(table, "demo")[name].to_pylist() for table, name in (("ingest/sequences", "user_id"), ("ingest/items", "item_id"))
    )
    tables = {"strange": [(f"no {user}", item) for user in users for item in items[:3]], "mixed": [(users[0], items[0]), (None, items[1])]}
    for name, rows in tables.items():
        pl.DataFrame(rows, ["user_id", "item_id"], orient="row").write_csv(folder / f"{name}.csv")
    said = {
        f"score.exclude={folder / 'strange.csv'}": "users who were scored has a row in score.exclude=",
        f"score.allow={folder / 'strange.csv'}": "leave nothing to recommend to any of the",
        f"score.exclude={folder / 'mixed.csv'}": "1 rows of .* lack an item_id or a user_id",
    }
    for setting, expected in said.items():
        call(["score", "--redo", *arguments, setting])
        warnings = Manifest.load(run, "score").counts["warnings"]
        assert re.search(expected, " ".join(warnings)), setting
    assert Manifest.load(run, "score").counts["demo"]["users_with_rules"] == 1
    pl.DataFrame({"user_id": ["new"], "history": [["no", "such"]]}).write_parquet(folder / "new.parquet")
    call(["score", "--histories", str(folder / "new.parquet"), *arguments])
    (warning,) = Manifest.load(run, "score_histories").counts["warnings"]
    assert "2 item not in items table" in warning and items[0] in warning


def test_users_are_scored_again_after_the_items_files_have_changed(copied, capsys, monkeypatch):
    """A price or a stock that a condition reads; what is trained does not."""
    arguments, _, _ = copied
    fingerprints = pipeline._input_fingerprints

    def changed(*given):
        return {name: "changed" if name.endswith(".items") else value for name, value in fingerprints(*given).items()}

    monkeypatch.setattr(pipeline, "_input_fingerprints", changed)
    with pytest.raises(SystemExit):
        main(["evaluate", "--redo", *arguments])
    assert "was made from other" in capsys.readouterr().err
    call(["score", "--redo", *arguments])
    assert capsys.readouterr().out.count("the items files have changed since they were ingested") == 1
