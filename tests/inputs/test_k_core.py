"""The k-core, the split and the tables of the ingest by the local executor, against plain loops over the same rows."""

import json
from collections import Counter

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from qbert_ray.config.schema import Config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.inputs.k_core import CODE, HASH, ITEM_SALT, TIE_SALT, USER, USER_SALT, _in_order, core, partition, survivors
from qbert_ray.inputs.readers import REASON, ROW
from qbert_ray.inputs.rows import mix, stable_hash
from qbert_ray.inputs.sources import POSITION
from qbert_ray.inputs.stage import ingest_domain
from qbert_ray.storage.directory import RunDir

MIN_USER, MIN_ITEM = 3, 2


def make_log(seed=0, users=50, items=30, rows=300):
    """Interactions with many ties in time, some repeated ones, and items that no catalog knows."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in (users * rng.random(rows) ** 2).astype(int)],
            "item_id": [f"i{n}" for n in (items * rng.random(rows) ** 2).astype(int)],
            "timestamp": rng.integers(0, 5, rows),
            "rating": rng.integers(1, 6, rows).astype(np.float32),
        }
    )


def as_blocks(log, cuts):
    """Tables as the ingest's readers give them."""
    rows = log.with_columns(
        pl.lit(1.0, pl.Float32).alias("weight"),
        pl.Series(POSITION, np.arange(len(log)), pl.Int64),
        pl.Series(REASON, [None] * len(log), pl.String),
        pl.Series(ROW, [None] * len(log), pl.String),
    )
    edges = [0, *cuts, len(log)]
    return [rows[begin:end].to_arrow() for begin, end in zip(edges, edges[1:], strict=False)]


def make_catalog(size=28):
    names = pl.Series("item_id", [f"i{n}" for n in range(size)])
    frame = pl.DataFrame([names, pl.Series(HASH, stable_hash(names, ITEM_SALT))])
    return frame.sort(HASH, "item_id")


def number(text, salt):
    return int(stable_hash(pl.Series([text]), salt)[0])


def plain_rows(log, catalog):
    """(user, item, timestamp) in order of the user's hash, time and the tie's hash, without unknown items and repetitions."""
    known, hashes = set(catalog["item_id"]), dict(catalog.iter_rows())

    def key(row):
        user, item, time = row
        tie = int(mix(np.array([number(user, USER_SALT)], np.uint64) ^ mix(np.array([hashes[item]], np.uint64)), TIE_SALT)[0])
        return number(user, USER_SALT), user, time, tie

    return sorted({row for row in log.select("user_id", "item_id", "timestamp").iter_rows() if row[1] in known}, key=key)


def plain_core(rows, cold, min_user, min_item):
    """Items that are left, by taking rare users and items away one pass after the other."""
    items = {item for _, item, _ in rows} - cold
    while True:
        per_user = Counter(user for user, item, _ in rows if item in items)
        left = [(user, item) for user, item, _ in rows if per_user[user] >= min_user]
        counts = Counter(item for _, item in left)
        fewer = {item for item in items if counts[item] >= min_item}
        if fewer == items:
            return items, {item for item in cold if counts[item] >= min_item}, {user for user, _ in left if per_user[user] >= min_user}
        items = fewer


class Told(LocalExecutor):
    """Keeps how many values each function is said to return, as Ray has to know it."""

    def __init__(self):
        self.returns = {}

    def submit(self, function, *arguments, num_returns=1, workers=None):
        self.returns[function.__name__] = num_returns
        return function(*arguments)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("cuts", [[], [1, 100, 101]], ids=["one block", "four blocks"])
def test_partitions_together_are_the_rows_in_order(count, cuts):
    log, catalog = make_log(), make_catalog()
    executor = Told()
    parts = partition(executor, as_blocks(log, cuts), catalog.to_arrow(), count)
    assert len(parts) == count and executor.returns == {"split_users": count, "merge_rows": 2}
    found = pl.concat([pl.DataFrame(part.kept) for part in parts])
    assert set(found.columns) == {"user_id", "timestamp", "rating", "weight", POSITION, CODE, USER}
    names = catalog["item_id"].to_list()
    rows = [(user, names[code], time) for user, code, time in found.select("user_id", CODE, "timestamp").iter_rows()]
    assert rows == plain_rows(log, catalog)
    for part in parts:
        kept = pl.DataFrame(part.kept)
        assert kept[USER].to_list() == np.unique(kept["user_id"].rle_id(), return_inverse=True)[1].tolist()
    if count == 7:
        assert sum(len(part.kept) > 0 for part in parts) > 4
        bounds = [[number(user, USER_SALT) for user in set(part.kept["user_id"].to_pylist())] for part in parts]
        for place, hashes in enumerate(bounds):
            assert all(place * 2**64 // 7 <= each < (place + 1) * 2**64 // 7 + 2**34 for each in hashes)


def test_users_of_one_hash_are_kept_apart():
    rows = pl.DataFrame({HASH: np.full(4, 7, np.uint64), "user_id": list("bab") + ["a"], "timestamp": [1, 2, 3, 4], CODE: [0, 0, 1, 1]})
    rows = rows.with_columns(pl.Series(POSITION, [0, 1, 2, 3]), pl.lit(1.0, pl.Float32).alias("weight"))
    found = _in_order(rows, np.arange(2, dtype=np.uint64))
    assert found["user_id"].to_list() == list("aabb") and found["timestamp"].to_list() == [2, 4, 1, 3]
    assert found[USER].to_list() == [0, 0, 1, 1]


def test_what_is_not_kept_has_its_reason_and_its_row():
    log = pl.DataFrame(
        {
            "user_id": ["a", "a", "a", "b"],
            "item_id": ["i1", "i1", "i99", "i1"],
            "timestamp": [1, 1, 2, 1],
            "rating": np.array([1, 2, 3, 4], np.float32),
        }
    )
    blocks = as_blocks(log, [])
    refused = pl.DataFrame(blocks[0]).with_columns(
        pl.Series(REASON, [None, None, None, "bad row"]), pl.Series(ROW, [None, None, None, "as it was"])
    )
    (part,) = partition(LocalExecutor(), [refused.to_arrow()], make_catalog().to_arrow(), 1)
    assert pl.DataFrame(part.kept).select("user_id", "timestamp", POSITION).rows() == [("a", 1, 0)]
    rejected = {position: (reason, row) for position, reason, row in pl.DataFrame(part.rejected).iter_rows()}
    assert rejected[3] == ("bad row", "as it was")
    assert rejected[2][0] == "item not in items table" and rejected[1][0] == "duplicate interaction"
    assert json.loads(rejected[2][1]) == {"user_id": "a", "item_id": "i99", "timestamp": 2, "rating": 3.0}
    assert rejected.keys() == {1, 2, 3}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_core_is_that_of_plain_loops(seed, count, share):
    log, catalog = make_log(seed), make_catalog()
    names = catalog["item_id"].to_list()
    cold = np.random.default_rng(seed).random(len(names)) < share
    parts = partition(LocalExecutor(), as_blocks(log, [50]), catalog.to_arrow(), count)
    found = core(LocalExecutor(), parts, cold, MIN_USER, MIN_ITEM)
    items, cold_left, users = plain_core(plain_rows(log, catalog), {names[n] for n in np.flatnonzero(cold)}, MIN_USER, MIN_ITEM)
    assert {names[n] for n in np.flatnonzero(found.items)} == items
    assert {names[n] for n in np.flatnonzero(found.cold)} == cold_left
    assert sum(found.users) == len(users) and len(found.users) == count


def test_a_core_is_counted_again_until_nothing_more_goes():
    """Item i3 is rare, so user c goes, so item i2 is rare, so user b goes: then a and d are left with i0 and i1."""
    baskets = {"a": "01", "b": "12", "c": "23", "d": "01"}
    pairs = [(user, f"i{item}") for user, items in baskets.items() for item in items]
    log = pl.DataFrame(
        {
            "user_id": [user for user, _ in pairs],
            "item_id": [item for _, item in pairs],
            "timestamp": [1] * 8,
            "rating": np.ones(8, np.float32),
        }
    )
    catalog = make_catalog(4)
    parts = partition(LocalExecutor(), as_blocks(log, []), catalog.to_arrow(), 2)
    found = core(LocalExecutor(), parts, np.zeros(4, bool), 2, 2)
    assert {catalog["item_id"][int(n)] for n in np.flatnonzero(found.items)} == {"i0", "i1"}
    assert sum(found.users) == 2 and found.rounds == 3


def test_a_core_that_takes_everything_away_ends():
    log, catalog = make_log(rows=40), make_catalog()
    parts = partition(LocalExecutor(), as_blocks(log, []), catalog.to_arrow(), 1)
    found = core(LocalExecutor(), parts, np.zeros(len(catalog), bool), 30, 30)
    assert not found.items.any() and found.users == [0]


def test_survivors_by_hand():
    """Users 0 and 1 have two warm rows and one; item 2 is cold, item 3 is gone."""
    kept = pa.table({CODE: pa.array([0, 2, 1, 0, 2, 3]), USER: pa.array([0, 0, 0, 1, 1, 1])})
    items, cold = np.array([True, True, False, False]), np.array([False, False, True, False])
    assert survivors(kept, items, cold, 2).tolist() == [True, True, True, False, False, False]
    assert survivors(kept, items, cold, 1).tolist() == [True, True, True, True, True, False]
    one_cold_row = pa.table({CODE: pa.array([2]), USER: pa.array([0])})
    assert survivors(one_cold_row, items, cold, 0).tolist() == [False]  # a user without a warm row is none


def ingested(tmp_path, log, catalog, name="run", rows_per_partition=500_000, **data):
    root = tmp_path / "data"
    root.mkdir(exist_ok=True)
    catalog.write_parquet(root / "items.parquet")
    log.write_parquet(root / "interactions.parquet")
    run = RunDir(str(tmp_path / name))
    data = {"root": str(root), "domains": {"shop": {"text_fields": ["title"]}}, "min_interactions": MIN_USER, **data}
    config = Config.model_validate({"data": data, "run": {"dir": run.uri}})
    return ingest_domain(config, "shop", run, LocalExecutor(), Quiet(), rows_per_partition), run


def items_file(size=28):
    return pl.DataFrame({"item_id": [f"i{n}" for n in range(size)], "title": [f"Title {n}" for n in range(size)]})


def plain_split(rows, items, users):
    """user -> (train, valid, test) of item_id, of what is left of plain_rows."""
    histories = {}
    for user, item, _ in rows:
        if user in users and item in items:
            histories.setdefault(user, []).append(item)
    return {user: (each[:-2], *each[-2:]) if len(each) >= 3 else (each, None, None) for user, each in histories.items()}


@pytest.mark.parametrize("rows_per_partition", [500_000, 60])
@pytest.mark.parametrize("min_user", [3, 1])
def test_the_last_item_is_the_test_the_one_before_it_the_validation(tmp_path, rows_per_partition, min_user):
    log, catalog = make_log(4), make_catalog()
    counts, run = ingested(
        tmp_path, log, items_file(), rows_per_partition=rows_per_partition, min_interactions=min_user, min_item_interactions=MIN_ITEM, cold_share=0.0
    )  # fmt: skip
    rows = plain_rows(log, catalog)
    items, _, users = plain_core(rows, set(), min_user, MIN_ITEM)
    expected = plain_split(rows, items, users)
    table = run.read("ingest/items")
    ids = table["item_id"].to_pylist()
    assert table["item_index"].to_pylist() == list(range(len(ids)))
    assert ids == [name for name in catalog["item_id"] if name in items]  # in order of their hash
    found = run.read("ingest/sequences").to_pylist()
    assert [row["user_id"] for row in found] == list(expected)
    for row in found:
        held = [None if row[name] is None else ids[row[name]] for name in ("valid", "test")]
        assert ([ids[item] for item in row["train"]], *held) == expected[row["user_id"]]
    assert any(row["test"] is None for row in found) == (min_user == 1)
    splits = Counter((row["user_id"], row["split"]) for row in run.read("ingest/interactions").to_pylist())
    for user, (train, valid, _) in expected.items():
        assert splits[user, "train"] == len(train)
        assert splits[user, "valid"] == splits[user, "test"] == (valid is not None)
    assert counts["users"] == len(expected) and counts["items"] == len(ids)
    assert counts["interactions_read"] == len(log) == counts["interactions"] + sum(counts["interactions_rejected"].values())


def test_cold_items_are_the_last_of_the_catalog_and_have_histories_of_warm_items_before_them(tmp_path):
    log, catalog = make_log(5, rows=500), make_catalog()
    share = 0.3
    counts, run = ingested(tmp_path, log, items_file(), min_item_interactions=MIN_ITEM, cold_share=share)
    rows = plain_rows(log, catalog)
    table = run.read("ingest/items").to_pylist()
    held_out = {row["item_id"] for row in table if row["cold"]}
    assert 0 < counts["cold_items"] == len(held_out) and {row["item_index"] for row in table if row["cold"]} == set(
        range(len(table) - len(held_out), len(table))
    )
    from qbert_ray.inputs.k_core import COLD_SALT

    hashed = {name for name in catalog["item_id"] if number(name, COLD_SALT) < share * 2**64}
    items, cold, users = plain_core(rows, hashed, MIN_USER, MIN_ITEM)
    assert held_out == cold and {row["item_id"] for row in table} == items | cold
    ids = [row["item_id"] for row in table]
    expected = {}
    for user in users:
        history = []
        for _, item, _ in (row for row in rows if row[0] == user):
            if item in cold and history:
                expected[user] = (list(history), item)
            elif item in items:
                history.append(item)
    found = {row["user_id"]: ([ids[item] for item in row["history"]], ids[row["target"]]) for row in run.read("ingest/cold").to_pylist()}
    assert found == expected and found


def test_parts_have_the_rows_that_are_asked_for(tmp_path):
    _, run = ingested(tmp_path, make_log(4), items_file(), min_item_interactions=MIN_ITEM, cold_share=0.0, rows_per_part=5)
    for table in ("items", "sequences"):
        sizes = [run.read_part(f"ingest/{table}", name).num_rows for name in run.parts(f"ingest/{table}")]
        assert set(sizes[:-1]) == {5} and 0 < sizes[-1] <= 5 and len(sizes) > 2
    for name in run.parts("ingest/sequences"):
        owners = pl.DataFrame(run.read_part("ingest/interactions", name))["user_id"].unique(maintain_order=True).to_list()
        assert owners == run.read_part("ingest/sequences", name)["user_id"].to_pylist()


def test_every_rejected_row_says_why(tmp_path):
    catalog = pl.concat([items_file(), items_file(2)])
    log = make_log(4)
    counts, run = ingested(tmp_path, log, catalog, min_item_interactions=MIN_ITEM, cold_share=0.0)
    rejected = pl.DataFrame(run.read("ingest/rejected"))
    reasons = Counter(zip(rejected["table"], rejected["reason"], strict=True))
    assert reasons["items", "duplicate item_id"] == 2
    known = {f"i{n}" for n in range(28)}
    rows = log.select("user_id", "item_id", "timestamp").rows()
    assert reasons["interactions", "item not in items table"] == sum(item not in known for _, item, _ in rows)
    unique = {row for row in rows if row[1] in known}
    assert reasons["interactions", "duplicate interaction"] == sum(row[1] in known for row in rows) - len(unique)
    items, _, users = plain_core(plain_rows(log, make_catalog()), set(), MIN_USER, MIN_ITEM)
    assert reasons["interactions", "item below min_item_interactions"] == sum(row[1] not in items for row in unique)
    assert reasons["interactions", "user below min_interactions"] == sum(row[1] in items and row[0] not in users for row in unique)
    assert reasons["items", "below min_item_interactions"] == 28 - len(items)
    for table in ("items", "interactions"):
        assert counts[f"{table}_rejected"] == {reason: count for (of, reason), count in reasons.items() if of == table}
