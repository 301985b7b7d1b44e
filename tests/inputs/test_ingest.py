"""What the ingest writes and says of items, images and files that cannot be used, by the local executor."""

import json

import polars as pl
import pytest

from qbert_ray.config.schema import Config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.inputs import stage
from qbert_ray.inputs.sources import SourceError
from qbert_ray.inputs.stage import ingest
from qbert_ray.storage.directory import RunDir
from tests.inputs.test_k_core import items_file, make_log

SHOP = {"text_fields": ["title"]}


class Steps(Quiet):
    """The progress of a stage, of which the steps are counted."""

    def __init__(self):
        self.total = self.done = 0

    def start(self, total, done=0):
        self.total += total

    def advance(self, steps=1):
        self.done += steps


def write(folder, items, log):
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(items).write_parquet(folder / "items.parquet")
    pl.DataFrame(log).write_parquet(folder / "interactions.parquet")


def ingested(tmp_path, domains=None, progress=None, name="run", **data):
    run = RunDir(str(tmp_path / name))
    data = {"root": str(tmp_path / "data"), "domains": domains or {"shop": SHOP}, "min_interactions": 1, "cold_share": 0.0, **data}
    config = Config.model_validate({"data": data, "run": {"dir": run.uri}})
    return ingest(config, run, LocalExecutor(), progress or Quiet()), run


def log_of(*pairs):
    users, items = zip(*pairs, strict=True)
    return {"user_id": list(users), "item_id": list(items), "timestamp": list(range(len(pairs)))}


def test_items_and_images_that_cannot_be_used_are_written_with_their_reason_and_row(tmp_path):
    items = {"item_id": ["b", "a", None, "b", "c", "d"], "title": ["B", "A", "lost", "again", "rare", "D"]}
    items["image"] = ["b.jpg", "../../etc/passwd", "x.jpg", "y.jpg", "/etc/shadow", None]
    write(tmp_path / "data", items, log_of(("u", "a"), ("u", "b"), ("v", "a"), ("v", "d"), ("w", "a")))
    counts, run = ingested(tmp_path, {"shop": SHOP | {"image_column": "image"}}, min_item_interactions=1)
    rejected = [(row["table"], row["reason"], json.loads(row["row"]), row["domain"]) for row in run.read("ingest/rejected").to_pylist()]
    lost = {"item_id": None, "title": "lost", "image": "x.jpg"}
    assert rejected[:4] == [
        ("images", "unsafe path", {"item_id": "a", "image": "../../etc/passwd"}, "shop"),
        ("items", "missing item_id", lost, "shop"),
        ("items", "duplicate item_id", {"item_id": "b", "text.title": "again"}, "shop"),
        ("items", "below min_item_interactions", {"item_id": "c", "text.title": "rare"}, "shop"),  # its image does not matter
    ]
    assert len(rejected) == 4
    assert counts["shop"]["items_rejected"] == {"below min_item_interactions": 1, "duplicate item_id": 1, "missing item_id": 1}
    assert counts["shop"]["images_rejected"] == {"unsafe path": 1} and counts["shop"]["items_read"] == 6
    kept = {row["item_id"]: (row["text.title"], row["image_path"]) for row in run.read("ingest/items").to_pylist()}
    assert kept == {"a": ("A", None), "b": ("B", str(tmp_path / "data" / "b.jpg")), "d": ("D", None)}


def test_a_stage_has_four_steps_for_each_domain_and_says_which_domain_a_warning_is_of(tmp_path):
    for name in ("shop", "other"):
        write(tmp_path / "data" / name, items_file(), make_log(4).with_columns(timestamp=pl.lit(7)))
    files = {name: SHOP | {"items": f"{name}/items.parquet", "interactions": f"{name}/interactions.parquet"} for name in ("shop", "other")}
    progress = Steps()
    counts, run = ingested(tmp_path, files, progress)
    assert (progress.total, progress.done) == (8, 8)
    assert list(counts) == ["shop", "other", "warnings"]
    assert {warning.partition(":")[0] for warning in counts["warnings"]} == {"domain shop", "domain other"}
    assert counts["shop"] == counts["other"] and counts["shop"]["core_rounds"] >= 1 and "warnings" not in counts["shop"]
    both = [run.read("ingest/sequences", name).drop_columns("domain") for name in ("shop", "other")]
    assert both[0].equals(both[1]) and set(run.read("ingest/items", "other")["domain"].to_pylist()) == {"other"}


def test_where_nothing_is_left_every_reason_is_said_with_its_number(tmp_path):
    items = {"item_id": ["A1", "A2", None], "title": ["x", "y", "z"]}
    write(tmp_path / "data", items, log_of(("u", "a1"), ("u", "a2"), ("v", "A1"), ("w", "A1")))
    with pytest.raises(SourceError) as failure:
        ingested(tmp_path, min_interactions=3)
    message = str(failure.value)
    for part in (
        "domain shop: nothing is left of 4 interactions",
        "interactions: 2 item not in items table",
        "capitals",
        "items: 1 of 3 missing item_id",
        "the other 2 are of users or items with too few interactions",
    ):
        assert part in message, message


def test_a_catalog_of_which_no_row_can_be_used_is_refused_with_the_reasons(tmp_path):
    write(tmp_path / "data", {"item_id": [None, " "], "title": ["x", "y"]}, log_of(("u", "a")))
    with pytest.raises(SourceError, match=r"(?s)domain shop: items: no row of .*items.parquet can be used: .*2 of 2 missing item_id"):
        ingested(tmp_path)


def test_a_file_without_rows_is_named(tmp_path):
    write(tmp_path / "data", items_file(), {"user_id": [], "item_id": [], "timestamp": []})
    with pytest.raises(SourceError, match=r"interactions: .*interactions.parquet has no rows"):
        ingested(tmp_path)


def test_tables_do_not_depend_on_how_many_tasks_write_them(tmp_path, monkeypatch):
    write(tmp_path / "data", items_file(), make_log(4))
    _, one = ingested(tmp_path, name="one", rows_per_part=3)
    monkeypatch.setattr(stage, "BYTES_PER_TASK", 200)
    _, many = ingested(tmp_path, name="many", rows_per_part=3)
    assert len(many.parts("ingest/rejected")) > len(one.parts("ingest/rejected")) == 2
    for table in ("items", "sequences", "interactions"):
        assert many.parts(f"ingest/{table}") == one.parts(f"ingest/{table}")
        for name in one.parts(f"ingest/{table}"):
            assert many.read_part(f"ingest/{table}", name).equals(one.read_part(f"ingest/{table}", name))
    rows = [sorted(run.read("ingest/rejected").to_pylist(), key=str) for run in (one, many)]
    assert rows[0] == rows[1]
