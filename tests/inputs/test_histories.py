"""Histories from a file of `score`: what is newer comes on top of the run's, in the order and spelling of the ingest."""

import json

import polars as pl
import pytest

from qbert_ray.config.schema import Config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.inputs import histories as module
from qbert_ray.inputs.histories import open_histories, write_histories
from qbert_ray.inputs.sources import SourceError
from qbert_ray.inputs.stage import ingest
from qbert_ray.storage import columns
from qbert_ray.storage.directory import Manifest, RunDir

START = 1_600_000_000
ROWS = [(user, item, START + 60 * place) for user in range(6) for place, item in enumerate(range(user, user + 5))]
ROWS += [(9, 0, START)]  # has too few interactions for the run


@pytest.fixture
def shop(tmp_path):
    """A run of the stage ingest on a shop of ten items, its config and its folder."""
    pl.DataFrame({"item_id": [f"i{item}" for item in range(12)], "title": "T"}).write_parquet(tmp_path / "items.parquet")
    write(tmp_path / "interactions.parquet", ROWS)
    given = {"root": str(tmp_path), "domains": {"shop": {}}, "min_interactions": 2, "min_item_interactions": 0, "rows_per_part": 4}
    config = Config.model_validate({"data": given, "run": {"dir": str(tmp_path / "run")}})
    run = RunDir(config.run.dir)
    ingest(config, run, LocalExecutor(), Quiet())
    return config, run, tmp_path


def write(path, rows):
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame = frame.with_columns(pl.format("u{}", "user_id").alias("user_id"), pl.format("i{}", "item_id").alias("item_id"))
    frame.write_parquet(path) if path.suffix == ".parquet" else frame.write_csv(path)


def written(shop, file, newer=True):
    config, run, _ = shop
    run.delete("score/histories")
    key = "score.interactions" if newer else "score.histories"
    counts = write_histories(config, run, "shop", open_histories(config, "shop", file, key), "score", LocalExecutor(), newer)
    return counts, by_user(run, run.read("score/histories", "shop"))


def finished(shop, interactions):
    """A run of the stage ingest on other interactions, with its manifest."""
    config, _, folder = shop
    (folder / "log.csv").write_text(interactions)
    data = config.data.model_copy(update={"domains": {"shop": config.data.domains["shop"].model_copy(update={"interactions": "log.csv"})}})
    config, run = config.model_copy(update={"data": data}), RunDir(str(folder / "finished"))
    Manifest("ingest", {}, {}, "1", counts=ingest(config, run, LocalExecutor(), Quiet())).save(run, "ingest")
    return config, run, folder


def by_user(run, table):
    items = run.read("ingest/items", "shop")["item_id"].to_pylist()
    users, histories = columns.to_histories(table)
    assert len(set(users)) == len(users)
    return {user: [items[item] for item in history] for user, history in zip(users, histories, strict=True)}


@pytest.mark.parametrize("per_partition", [500_000, 5])
def test_the_run_s_own_file_adds_nothing_to_its_users(shop, monkeypatch, per_partition):
    monkeypatch.setattr(module, "ROWS_PER_PARTITION", per_partition)
    counts, found = written(shop, "interactions.parquet")
    expected = by_user(shop[1], shop[1].read("ingest/sequences", "shop"))
    assert len(expected) == 6 and found == expected | {"u9": ["i0"]}
    assert counts.pop("file").endswith("interactions.parquet")
    assert counts == {"rows": 31, "new": 1, "known": 30, "rejected": {}, "users": 7, "new_users": 1}


def test_newer_rows_come_at_their_time_and_others_are_counted(shop):
    folder = shop[2]
    rows = [(0, 9, START + 1000), (0, 11, START + 30), (7, 3, START), (7, 2, START - 5), (0, 0, START), (1, 99, START), (8, 99, START)]
    write(folder / "today.csv", rows)
    counts, found = written(shop, "today.csv")
    assert found["u0"] == ["i0", "i11", "i1", "i2", "i3", "i4", "i9"]
    assert found["u7"] == ["i2", "i3"] and found["u8"] == []  # of whom no item is known
    assert found["u1"] == ["i1", "i2", "i3", "i4", "i5"]
    del counts["file"]
    assert counts == {"rows": 7, "new": 4, "known": 1, "rejected": {"item not in items table": 2}, "users": 8, "new_users": 2}
    assert counts["rows"] == counts["new"] + counts["known"] + sum(counts["rejected"].values())
    rejected = shop[1].read("score/rejected", "shop").to_pylist()
    assert {json.loads(row["row"])["item_id"] for row in rejected} == {"i99"} and len(rejected) == 2


def test_rows_that_the_file_has_twice_are_not_known_to_the_run(shop):
    write(shop[2] / "twice.csv", [(0, 9, START + 1000), (0, 9, START + 1000), (0, 0, START), (0, 0, START)])
    counts, _ = written(shop, "twice.csv")
    assert (counts["new"], counts["known"], counts["rejected"]) == (1, 2, {"duplicate interaction": 1})


def test_an_interaction_of_the_run_with_a_larger_weight_is_known(shop):
    rows = {"user_id": "u0", "item_id": ["i0", "i9"], "timestamp": [START, START + 1000], "interaction_weight": [2.0, 2.0]}
    pl.DataFrame(rows).write_csv(shop[2] / "heavy.csv")
    counts, _ = written(shop, "heavy.csv")
    assert (counts["new"], counts["known"], counts["rejected"]) == (1, 1, {})


def test_days_are_told_from_months_as_in_the_run(shop):
    run_of_it = finished(shop, "user_id,item_id,timestamp\nu,i1,31/01/2024\nu,i2,01/02/2024\n")
    (shop[2] / "today.csv").write_text("user_id,item_id,timestamp\nu,i4,05/05/2024\nu,i3,09/04/2024\n")
    assert written(run_of_it, "today.csv")[1] == {"u": ["i1", "i2", "i3", "i4"]}


def test_whole_seconds_fit_a_run_with_fractions_of_them(shop):
    run_of_it = finished(shop, f"user_id,item_id,timestamp\nu,i1,{START}.5\nu,i2,{START + 1}.25\n")
    pl.DataFrame({"user_id": ["u"], "item_id": ["i3"], "timestamp": [START + 1]}).write_parquet(shop[2] / "today.parquet")
    assert written(run_of_it, "today.parquet")[1] == {"u": ["i1", "i3", "i2"]}


def test_times_of_another_unit_are_refused(shop):
    write(shop[2] / "ms.csv", [(0, 9, (START + 5) * 1000)])
    with pytest.raises(SourceError, match="are in ms, those of the run in s, so histories would be in the wrong order"):
        written(shop, "ms.csv")


@pytest.mark.parametrize("time", [7, 20_260_131, 46_000], ids=["running number", "day as a number", "day of a spreadsheet"])
def test_times_of_no_unit_are_refused_where_the_run_has_one(shop, time):
    write(shop[2] / "odd.csv", [(0, 9, time)])
    with pytest.raises(SourceError, match="are in no unit that is known, those of the run in s, so histories would be in the wrong order"):
        written(shop, "odd.csv")


def test_running_numbers_follow_running_numbers(shop):
    run_of_it = finished(shop, "user_id,item_id,timestamp\nu,i1,1\nu,i2,2\n")
    pl.DataFrame({"user_id": ["u"], "item_id": ["i3"], "timestamp": [3]}).write_parquet(shop[2] / "today.parquet")
    assert written(run_of_it, "today.parquet")[1] == {"u": ["i1", "i2", "i3"]}


def test_other_histories_stand_alone(shop):
    write(shop[2] / "others.csv", [(0, 5, START + 2), (0, 4, START + 1)])
    counts, found = written(shop, "others.csv", newer=False)
    assert found == {"u0": ["i4", "i5"]} and "new_users" not in counts


def test_histories_may_be_lists(shop):
    folder, lists = shop[2], {"a": ["i3", "i1", "i3"], "b": [], "c": ["i77"], "d": None}
    pl.DataFrame({"user_id": list(lists), "history": list(lists.values())}).write_parquet(folder / "lists.parquet")
    (folder / "lists.jsonl").write_text("\n".join(json.dumps({"user_id": user, "history": items}) for user, items in lists.items()))
    for name in ("lists.parquet", "lists.jsonl"):
        counts, found = written(shop, name, newer=False)
        assert found == {"a": ["i3", "i1", "i3"], "b": [], "c": [], "d": []}
        assert counts["rejected"] == {"item not in items table": 1} and counts["users"] == 4
    texts = {user: json.dumps(items) if items is not None else None for user, items in lists.items()}  # as a table in CSV leaves them
    pl.DataFrame({"user_id": list(texts), "history": list(texts.values())}).write_parquet(folder / "texts.parquet")
    again, found_again = written(shop, "texts.parquet", newer=False)
    assert found_again == found and again["rejected"] == counts["rejected"]
    (folder / "lists.csv").write_text('user_id,history\na,"i3,i1"\n')
    with pytest.raises(SourceError, match="is a list, which Parquet and JSON lines can hold"):
        written(shop, "lists.csv", newer=False)
    pl.DataFrame({"user": ["a"], "history": [["i1"]]}).write_parquet(folder / "named.parquet")
    with pytest.raises(SourceError, match="needs the columns user_id and history; columns found: user, history"):
        written(shop, "named.parquet", newer=False)


@pytest.mark.parametrize("rows_per_block", [1, 8192])
def test_several_lists_of_a_user_follow_each_other(shop, monkeypatch, rows_per_block):
    folder, read = shop[2], module.readers.read

    def blocks(*given):
        return ((first + n, raw[n : n + rows_per_block]) for first, raw in read(*given) for n in range(0, len(raw), rows_per_block))

    monkeypatch.setattr(module.readers, "read", blocks)
    lists = [("a", ["i5", "i4"]), ("b", ["i1"]), ("a", ["i0", "i9", "i4"]), ("a", None), ("a", ["i2"])]
    pl.DataFrame(lists, schema=["user_id", "history"], orient="row").write_parquet(folder / "one.parquet")
    (folder / "one.jsonl").write_text("\n".join(json.dumps({"user_id": user, "history": items}) for user, items in lists))
    for name in ("one.parquet", "one.jsonl"):
        assert written(shop, name, newer=False)[1] == {"a": ["i5", "i4", "i0", "i9", "i4", "i2"], "b": ["i1"]}


def test_lists_are_not_laid_over_the_histories_of_the_run(shop):
    pl.DataFrame({"user_id": ["u0"], "history": [["i9"]]}).write_parquet(shop[2] / "lists.parquet")
    with pytest.raises(SourceError, match="^domain shop: score.interactions.*item_id"):
        open_histories(shop[0], "shop", "lists.parquet", "score.interactions")


def test_a_file_that_cannot_be_used_is_named_with_its_key(shop):
    with pytest.raises(SourceError, match="score.histories: no Parquet, CSV or JSONL file at .*nothing.csv; set score.histories"):
        open_histories(shop[0], "shop", "nothing.csv", "score.histories")
    (shop[2] / "bare.csv").write_text("user_id,timestamp\na,1\n")
    with pytest.raises(SourceError, match="has no column item_id"):
        open_histories(shop[0], "shop", "bare.csv", "score.histories")


def test_several_domains_need_a_path_each():
    domains = {"domains": {"shop": {}, "toys": {}}}
    with pytest.raises(ValueError, match=r"score.histories is 'new.csv'; with the target domains shop, toys it must contain \{domain\}"):
        Config.model_validate({"data": domains, "score": {"histories": "new.csv"}})
    Config.model_validate({"data": domains, "score": {"histories": "{domain}/new.csv"}})
