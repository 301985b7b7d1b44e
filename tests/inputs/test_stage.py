"""Laws of the ingest: nothing is lost, and nothing but the data decides the tables."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from qbert_ray.config.schema import Config
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.inputs import stage
from qbert_ray.inputs.k_core import COLD_SALT
from qbert_ray.inputs.rows import stable_hash
from qbert_ray.inputs.sequences import sequences_of
from qbert_ray.inputs.stage import ingest, ingest_domain
from qbert_ray.inputs.validation import format_validation, validate
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir

pytestmark = pytest.mark.usefixtures("ray_session")
TABLES = {"items": None, "interactions": columns.INTERACTIONS, "sequences": columns.SEQUENCES, "rejected": columns.REJECTED}


def shop(users: int = 60, items: int = 40, rows: int = 500, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A catalog and interactions with many ties, some rare items and users."""
    random = np.random.default_rng(seed)
    catalog = pl.DataFrame({"item_id": [f"i{n}" for n in range(items)], "title": [f"Title {n}" if n % 3 else None for n in range(items)]})
    log = pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in (users * random.random(rows) ** 2).astype(int)],
            "item_id": [f"i{n}" for n in (items * random.random(rows) ** 2).astype(int)],
            "timestamp": random.integers(0, 10, rows),
            "rating": random.integers(1, 6, rows).astype(np.float32),
        }
    )
    return catalog, log.unique(["user_id", "item_id", "timestamp"], maintain_order=True)


def make_config(root: Path, domain: dict | None = None, **data) -> Config:
    return Config.model_validate(
        {"data": {"root": str(root), "domains": {"shop": domain or {}}, **data}, "run": {"dir": str(root / "run")}}
    )


def write(root: Path, catalog: pl.DataFrame, log: pl.DataFrame) -> Path:
    root.mkdir(exist_ok=True)
    catalog.write_parquet(root / "items.parquet")
    log.write_parquet(root / "interactions.parquet")
    return root


def ingested(root: Path, domain: dict | None = None, rows_per_partition: int = 500_000, name: str = "run", **data) -> tuple[dict, RunDir]:
    run = RunDir(str(root / name))
    return ingest_domain(make_config(root, domain, **data), "shop", run, RayExecutor(), Quiet(), rows_per_partition), run


def table(run: RunDir, name: str) -> pl.DataFrame:
    return pl.DataFrame(run.read(f"ingest/{name}"))


def naive_core(log: pl.DataFrame, min_user: int, min_item: int) -> pd.DataFrame:
    rows = log.to_pandas()
    while True:
        left = rows[rows.groupby("user_id").item_id.transform("size") >= min_user]
        left = left[left.groupby("item_id").item_id.transform("size") >= min_item]
        if len(left) == len(rows):
            return rows
        rows = left


@pytest.fixture
def plain(tmp_path) -> tuple[dict, RunDir, pl.DataFrame]:
    catalog, log = shop()
    return *ingested(write(tmp_path / "data", catalog, log), min_interactions=3), log


def test_tables_have_their_schemas_and_parts_line_up(plain):
    counts, run, _ = plain
    for name, schema in TABLES.items():
        assert schema is None or run.read(f"ingest/{name}").schema.equals(schema)
    assert run.read("ingest/items").schema.names == [*columns.ITEMS.names, "text.title"]
    assert run.parts("ingest/sequences") == run.parts("ingest/interactions")
    for part in run.parts("ingest/sequences"):
        users = pl.DataFrame(run.read_part("ingest/interactions", part))["user_id"].unique(maintain_order=True)
        assert users.to_list() == run.read_part("ingest/sequences", part)["user_id"].to_pylist()
    assert counts["users"] == len(table(run, "sequences"))


def test_item_index_is_a_permutation_that_does_not_follow_the_file(plain):
    _, run, _ = plain
    items = table(run, "items")
    assert items["item_index"].to_list() == list(range(len(items)))
    assert items["item_id"].to_list() != sorted(items["item_id"].to_list(), key=lambda item: int(item[1:]))


def test_train_valid_and_test_are_the_history(plain):
    _, run, _ = plain
    index = dict(table(run, "items").select("item_id", "item_index").iter_rows())
    rows = table(run, "interactions")
    for user in table(run, "sequences").iter_rows(named=True):
        mine = rows.filter(pl.col("user_id") == user["user_id"])
        held_out = [user["valid"], user["test"]] if user["test"] is not None else []
        assert [index[item] for item in mine["item_id"]] == user["train"] + held_out
        assert mine["split"].to_list() == ["train"] * len(user["train"]) + ["valid", "test"][: len(held_out)]
        assert mine["timestamp"].is_sorted()


def test_every_row_read_is_kept_or_rejected(plain):
    counts, run, log = plain
    rejected = table(run, "rejected")
    assert counts["interactions_read"] == len(log)
    assert len(rejected) == sum(sum(counts[f"{name}_rejected"].values()) for name in ("items", "interactions", "images")) > 0
    both = [json.loads(row) for row in rejected.filter(table="interactions")["row"]] + table(run, "interactions").to_dicts()
    keys = ["user_id", "item_id", "timestamp"]
    assert pl.DataFrame([{key: row[key] for key in keys} for row in both]).sort(keys).equals(log.select(keys).sort(keys))


@pytest.mark.parametrize(("seed", "min_user", "min_item"), [(1, 5, None), (2, 3, 8), (3, 6, 0), (4, 1, 1), (5, 8, 5)])
def test_the_core_is_that_of_a_naive_loop(tmp_path, seed, min_user, min_item):
    catalog, log = shop(seed=seed)
    data = {"min_interactions": min_user, "min_item_interactions": min_item}
    counts, run = ingested(write(tmp_path, catalog, log), rows_per_partition=100, **data)
    expected = naive_core(log, min_user, min_user if min_item is None else min_item)
    rows = table(run, "interactions")
    keys = ["user_id", "item_id", "timestamp"]
    assert rows.select(keys).sort(keys).rows() == list(expected[keys].sort_values(keys).itertuples(index=False, name=None))
    assert counts["items"] == (len(catalog) if min_item == 0 else expected.item_id.nunique())


def test_partitions_blocks_and_row_order_change_nothing(tmp_path, monkeypatch):
    catalog, log = shop(rows=800)
    counts, run = ingested(write(tmp_path, catalog, log), min_interactions=3)
    monkeypatch.setattr("qbert_ray.inputs.readers.FRAGMENT_ROWS", 100)
    monkeypatch.setattr(stage, "BYTES_PER_TASK", 500)
    (tmp_path / "other").mkdir()
    catalog.sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "other/items.parquet", row_group_size=15)
    log.sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "other/interactions.parquet", row_group_size=70)
    other_counts, other = ingested(tmp_path / "other", rows_per_partition=90, min_interactions=3)
    assert other_counts == counts
    for name in ("items", "interactions", "sequences"):
        assert table(other, name).equals(table(run, name))
    assert table(other, "rejected").sort("row").equals(table(run, "rejected").sort("row"))
    assert other.parts("ingest/items") == run.parts("ingest/items")


def test_ties_are_ordered_by_hash_and_not_by_the_file(tmp_path):
    log = pl.DataFrame({"user_id": ["u"] * 8, "item_id": list("abcdefgh"), "timestamp": [5] * 8})
    catalog = log.select("item_id", title="item_id")
    orders = [
        table(ingested(write(tmp_path / name, catalog, rows), min_interactions=0)[1], "interactions")["item_id"].to_list()
        for name, rows in [("x", log), ("y", log.reverse())]
    ]
    assert orders[0] == orders[1]
    assert orders[0] not in (list("abcdefgh"), list("hgfedcba"))


def test_bad_rows_are_rejected_with_their_reasons(tmp_path):
    log = [{"user_id": f"u{n % 3}", "item_id": f"i{n % 4}", "timestamp": n, "rating": 5} for n in range(12)]
    bad = [
        {"user_id": None, "item_id": "i0", "timestamp": 1, "rating": 5},
        {"user_id": "u0", "timestamp": 1, "rating": 5},
        {"user_id": "u0", "item_id": "i0", "timestamp": "later", "rating": 5},
        {"user_id": "u0", "item_id": "i0", "timestamp": 1, "rating": 2},
        {"user_id": "u0", "item_id": "unheard of", "timestamp": 1, "rating": 5},
        log[0],
    ]
    (tmp_path / "log.jsonl").write_text("\n".join([*map(json.dumps, log + bad), "{broken"]))
    items = [{"item_id": f"i{n}", "title": [f"T{n}", "x"]} for n in range(5)] + [{"item_id": "i0", "title": "later"}, {"title": "lost"}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    counts, run = ingested(tmp_path, {"items": "items.jsonl", "interactions": "log.jsonl"}, min_interactions=2, min_rating=3)
    reasons = {
        "missing user_id",
        "missing item_id",
        "bad timestamp",
        "below min_rating",
        "item not in items table",
        "duplicate interaction",
    }
    assert counts["interactions_rejected"] == dict.fromkeys(reasons | {"invalid JSON"}, 1)
    assert counts["items_rejected"] == {"duplicate item_id": 1, "missing item_id": 1, "below min_item_interactions": 1}
    assert (counts["interactions"], counts["items"], counts["users"]) == (12, 4, 3)
    assert table(run, "items").filter(item_id="i0")["text.title"].item() == "T0, x"
    duplicate = table(run, "rejected").filter(reason="duplicate interaction")["row"].item()
    assert json.loads(duplicate) == {"user_id": "u0", "item_id": "i0", "timestamp": 0, "rating": 5.0}


def test_of_duplicate_items_the_first_in_the_files_is_kept(tmp_path):
    _, log = shop(items=3, rows=60)
    (tmp_path / "items").mkdir()
    pl.DataFrame({"item_id": ["i0", "i1", "i0"], "title": ["first", "one", "third"]}).write_csv(tmp_path / "items/a.csv")
    pl.DataFrame({"item_id": ["i0", "i2"], "title": ["fourth", "two"]}).write_csv(tmp_path / "items/b.csv")
    log.write_parquet(tmp_path / "interactions.parquet")
    counts, run = ingested(tmp_path, {"items": "items"}, min_interactions=0)
    assert dict(table(run, "items").select("item_id", "text.title").iter_rows()) == {"i0": "first", "i1": "one", "i2": "two"}
    assert counts["items_rejected"] == {"duplicate item_id": 2}


def test_users_with_two_interactions_are_not_evaluated(tmp_path):
    log = pl.DataFrame({"user_id": ["u", "u", "v", "v", "v"], "item_id": ["a", "b", "a", "b", "c"], "timestamp": [2, 1, 1, 2, 3]})
    _, run = ingested(write(tmp_path, pl.DataFrame({"item_id": ["a", "b", "c"], "title": ""}), log), min_interactions=0)
    index = dict(table(run, "items").select("item_id", "item_index").iter_rows())
    users = {row["user_id"]: row for row in table(run, "sequences").iter_rows(named=True)}
    assert (users["u"]["train"], users["u"]["valid"], users["u"]["test"]) == ([index["b"], index["a"]], None, None)
    assert (users["v"]["train"], users["v"]["valid"], users["v"]["test"]) == ([index["a"]], index["b"], index["c"])
    assert table(run, "items")["text.title"].to_list() == [None] * 3


def test_rows_per_part_cuts_the_tables(tmp_path):
    _, run = ingested(write(tmp_path, *shop()), min_interactions=0, min_item_interactions=0, rows_per_part=7)
    sizes = [run.read_part("ingest/items", part).num_rows for part in run.parts("ingest/items")]
    assert sizes == [7] * 5 + [5]
    assert all(run.read_part("ingest/sequences", part).num_rows == 7 for part in run.parts("ingest/sequences")[:-1])


def test_raw_amazon_files_are_read_as_published(tmp_path):
    reviews = [{"reviewerID": f"u{n % 5}", "asin": f"B{n % 6}", "unixReviewTime": n, "overall": 5.0} for n in range(60)]
    meta = [
        {"asin": f"B{n}", "title": "Rock &amp; Roll", "category": ["A", "B"], "imageURLHighRes": ["https://x.com/1.jpg"]} for n in range(6)
    ]
    (tmp_path / "reviews.json").write_text("\n".join(map(json.dumps, reviews)))
    (tmp_path / "meta.json").write_text("\n".join(map(json.dumps, meta)))
    domain = {"items": "meta.json", "interactions": "reviews.json", "attributes": ["categories"], "image_column": "image"}
    counts, run = ingested(tmp_path, domain)
    assert (counts["items"], counts["users"], counts["interactions"]) == (6, 5, 60)
    row = table(run, "items").row(0, named=True)
    assert (row["text.title"], row["attribute.categories"], row["image_path"]) == ("Rock & Roll", "A, B", "https://x.com/1.jpg")


def test_an_unsafe_image_is_reported_and_its_item_kept(tmp_path):
    catalog, log = shop(items=3, rows=60)
    write(tmp_path, catalog.with_columns(image=pl.Series(["a.jpg", "../../etc/passwd", None])), log)
    counts, run = ingested(tmp_path, {"image_column": "image"}, min_interactions=0)
    assert counts["images_rejected"] == {"unsafe path": 1}
    assert dict(table(run, "items").select("item_id", "image_path").iter_rows()) == {"i0": f"{tmp_path}/a.jpg", "i1": None, "i2": None}
    assert json.loads(table(run, "rejected").filter(table="images")["row"].item()) == {"item_id": "i1", "image": "../../etc/passwd"}


@pytest.mark.parametrize(
    ("catalog", "log", "message"),
    [
        ({"item_id": [], "title": []}, {"user_id": ["u"], "item_id": ["a"], "timestamp": [1]}, "items.parquet has no rows"),
        (
            {"item_id": [None], "title": ["x"]},
            {"user_id": ["u"], "item_id": ["a"], "timestamp": [1]},
            "no row of .* can be used.*missing item_id",
        ),
        ({"item_id": ["a"], "title": ["x"]}, {"user_id": [], "item_id": [], "timestamp": []}, "interactions.parquet has no rows"),
        (
            {"item_id": ["a"], "title": ["x"]},
            {"user_id": ["u"], "item_id": ["A"], "timestamp": [1]},
            "nothing is left.*item not in items table.*capitals",
        ),
        (
            {"item_id": ["a"], "title": ["x"]},
            {"user_id": ["u"], "item_id": ["a"], "timestamp": [1]},
            "nothing is left.*data.min_interactions",
        ),
    ],
)
def test_files_that_leave_nothing_are_refused(tmp_path, catalog, log, message):
    write(tmp_path, pl.DataFrame(catalog), pl.DataFrame(log))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ingested(tmp_path)


def test_damage_found_while_reading_is_one_clear_line(tmp_path):
    write(tmp_path, *shop())
    rows = "\n".join(f"u{number * 7919 % 100_003},i1,{number}" for number in range(200_000))
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(f"user_id,item_id,timestamp\n{rows}".encode())[:-1000])
    with pytest.raises(ValueError, match=r"^domain shop: interactions: .*log\.csv\.gz is damaged[^\n]*$"):
        ingested(tmp_path, {"interactions": "log.csv.gz"})


def test_validation_reports_instead_of_raising(tmp_path):
    catalog, log = shop()
    write(tmp_path, catalog.with_columns(image=pl.lit("missing.jpg")), log)
    config = make_config(tmp_path, {"image_column": "image"}, min_interactions=3, min_item_interactions=0)
    page = format_validation(validate(config, RayExecutor()))
    for expected in (
        "shop: can be used",
        "text.title: 65%",
        "file not found -> image paths start",
        "-> data.min_interactions",
        "numbers, not dates",
    ):
        assert expected in page
    broken = make_config(tmp_path, {"items": "nothing.csv", "text_fields": ["name"]})
    assert "ERROR domain shop: items: no Parquet, CSV or JSONL file" in format_validation(validate(broken, RayExecutor()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interactions.parquet", "items.parquet"]


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("instruments", {}, (17_112, 6_250, 136_226)),
        ("scientific", {"min_interactions": 4}, (8_442, 4_385, 59_384)),
        ("scientific", {}, (8_438, 4_382, 59_356)),  # as published it holds two items with four interactions
        ("movielens", {"min_item_interactions": 0}, (943, 1_682, 100_000)),
    ],
)
def test_counts_of_public_data(real_data, tmp_path, name, data, expected):
    config = Config.model_validate({"data": {"root": str(real_data / name), **data}})
    (counts,) = ingest(config, RunDir(str(tmp_path)), RayExecutor(), Quiet()).values()
    assert (counts["users"], counts["items"], counts["interactions"]) == expected


@pytest.fixture
def held_out(tmp_path) -> tuple[dict, RunDir, pl.DataFrame]:
    catalog, log = shop(rows=800)
    return *ingested(write(tmp_path / "data", catalog, log), min_interactions=3, cold_share=0.3), log


@pytest.mark.parametrize("seed", range(4))
def test_sequences_are_those_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    size = [0, 1, 40, 400][seed]
    user = np.sort(rng.integers(0, 1 + size // 5, size))
    user = np.unique(user, return_inverse=True)[1].astype(np.uint32)
    rows = pl.DataFrame({
        "_user": user, "user_id": [f"u{number}" for number in user], "domain": ["shop"] * size, "cold": rng.random(size) < 0.3,
        "item_index": rng.integers(0, 9, size).astype(np.int32), "weight": rng.random(size).astype(np.float32),
    }, schema_overrides={"_user": pl.UInt32, "user_id": pl.String, "domain": pl.String, "cold": pl.Boolean})  # fmt: skip
    sequences, split = [], []
    for number in range(len(np.unique(user))):
        mine = [(item, cold) for item, cold, owner in zip(rows["item_index"], rows["cold"], user, strict=True) if owner == number]
        warm = [item for item, cold in mine if not cold]
        weights = rows.filter(pl.col("user_id") == f"u{number}", ~pl.col("cold"))["weight"].to_list()
        held = 2 if len(warm) >= 3 else 0
        names = ["train"] * (len(warm) - held) + ["valid", "test"][:held]
        seen, target, history = [], None, []
        for item, cold in mine:
            split.append("cold" if cold else names[len(seen)])
            if not cold:
                seen.append(item)
            elif seen:
                target, history = item, list(seen)
        valid, test = warm[-2:] if held else (None, None)
        kept = len(warm) - held
        sequences.append((f"u{number}", len(mine), warm[:kept], weights[:kept], valid, test, target, history))
    found, labelled = sequences_of(rows, None)
    assert found.select("user_id", "rows", "train", "train_weights", "valid", "test", "target", "history").rows() == sequences
    assert labelled["split"].to_list() == split
    assert labelled.drop("split").equals(rows)


def test_cold_items_are_in_no_sequence_and_no_row_is_lost(held_out):
    counts, run, log = held_out
    items, rows = table(run, "items"), table(run, "interactions")
    cold = set(items.filter("cold")["item_index"])
    assert cold == set(range(len(items) - len(cold), len(items)))  # the last of the catalog
    assert 0 < counts["cold_items"] == len(cold) < len(items) / 2
    for user in table(run, "sequences").iter_rows(named=True):
        assert not cold & {*user["train"], user["valid"], user["test"]}
    ids = set(items.filter("cold")["item_id"])
    assert [item in ids for item in rows["item_id"]] == (rows["split"] == "cold").to_list()
    assert counts["cold_interactions"] == rows.filter(split="cold").height > 0
    assert counts["interactions_read"] == len(log) == len(rows) + table(run, "rejected").filter(table="interactions").height


def test_the_core_does_not_know_cold_items(held_out):
    _, run, log = held_out
    cold = set(table(run, "items").filter("cold")["item_id"])
    share = np.uint64(0.3 * 2**64)
    hashed = set(log["item_id"].filter(stable_hash(log["item_id"], COLD_SALT) < share))
    expected = naive_core(log.filter(~pl.col("item_id").is_in(hashed)), 3, 3)
    rows = table(run, "interactions")
    keys = ["user_id", "item_id", "timestamp"]
    warm = rows.filter(pl.col("split") != "cold").select(keys).sort(keys).rows()
    assert warm == list(expected[keys].sort_values(keys).itertuples(index=False, name=None))
    bought = log.filter(pl.col("item_id").is_in(hashed) & pl.col("user_id").is_in(set(expected["user_id"])))
    assert cold == {item for item, count in bought["item_id"].value_counts().iter_rows() if count >= 3} <= hashed


def test_a_cold_history_is_what_came_before(held_out):
    _, run, _ = held_out
    index = dict(table(run, "items").select("item_id", "item_index").iter_rows())
    rows, targets = table(run, "interactions"), {}
    for (user,), mine in rows.group_by("user_id", maintain_order=True):
        history = []
        for item, split in mine.select("item_id", "split").iter_rows():
            if split != "cold":
                history.append(index[item])
            elif history:
                targets[user] = (list(history), index[item])
    found = {user: (history, target) for user, history, target in table(run, "cold").select("user_id", "history", "target").iter_rows()}
    assert found == targets
    assert run.read("ingest/cold").schema.equals(columns.COLD_SEQUENCES)


def test_source_domains_hold_nothing_out(tmp_path):
    catalog, log = shop()
    root = write(tmp_path, catalog, log)
    domains = {"shop": {"role": "source"}, "other": {}}
    config = Config.model_validate({"data": {"root": str(root), "domains": domains, "cold_share": 0.3}, "run": {"dir": str(root / "run")}})
    run = RunDir(config.run.dir)
    counts = ingest(config, run, RayExecutor(), Quiet())
    assert "cold_items" not in counts["shop"] and counts["other"]["cold_items"]
    assert run.parts("ingest/cold", "shop") == []
