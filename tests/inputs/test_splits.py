"""The global temporal split: cuts, targets and histories worked by hand, and what each reader makes of missing targets."""

import json
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from qbert_ray.config.loading import ConfigError, load_config
from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import open_executor
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.inputs.k_core import CODE
from qbert_ray.inputs.sequences import times_seen
from qbert_ray.inputs.sources import SourceError
from qbert_ray.inputs.splits import TemporalSplit, _cut, as_date, by_period, leave_one_out, quantile
from qbert_ray.inputs.stage import ingest_domain
from qbert_ray.pipeline import run_stage
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import BY_NAME, STAGES
from tests.shop import small_config

DAY = 86_400
START = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp())
# user -> (day, item); validation from day 10, test from day 20
LOG = {
    "both": [(1, "a"), (2, "b"), (11, "c"), (12, "d"), (20, "e"), (21, "a"), (22, "b")],
    "no validation": [(3, "a"), (4, "b"), (25, "c")],
    "no test": [(5, "b"), (9, "c"), (10, "a")],
    "train alone": [(1, "c"), (2, "a")],
    "from validation on": [(12, "a"), (13, "b"), (30, "c")],
    "from test on": [(21, "b"), (22, "c")],
}


def write(root, log=LOG, seconds=1, start=START):
    root.mkdir(exist_ok=True)
    rows = [(user, item, (start + DAY * day) * seconds) for user, items in log.items() for day, item in items]
    frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    frame.write_parquet(root / "interactions.parquet")
    pl.DataFrame({"item_id": sorted(set(frame["item_id"])), "title": sorted(set(frame["item_id"]))}).write_parquet(root / "items.parquet")
    return root


def ingested(root, cuts=("2020-01-11", "2020-01-21"), rows_per_partition=500_000, name="run", **data):
    data = {"split": "temporal", "split_cuts": list(cuts), "min_interactions": 0, **data}
    config = Config.model_validate({"data": {"root": str(root), "domains": {"shop": {}}, **data}, "run": {"dir": str(root / name)}})
    run = RunDir(config.run.dir)
    return ingest_domain(config, "shop", run, LocalExecutor(), Quiet(), rows_per_partition), run


def histories(run):
    """user_id -> letters of train, valid, test, and of the histories up to each."""
    items = dict(run.read("ingest/items").select(["item_index", "item_id"]).to_pandas().itertuples(index=False))
    sequences = columns.to_sequences(run.read("ingest/sequences"))
    found = {}
    for number, user in enumerate(sequences.user_ids):
        targets = [items.get(int(each[number]), "-") for each in (sequences.valid, sequences.test)]
        found[user] = (*targets, *("".join(items[item] for item in sequences.history(number, upto)) for upto in ("valid", "test", "end")))
    assert sequences.lengths().tolist() == [len(sequences.history(user, "test")) for user in range(len(sequences.user_ids))]
    return found


def test_a_time_that_is_no_date_is_shown_as_its_number():
    assert as_date(2**63 - 1, "s") == "9223372036854775807" and as_date(0, "s") == "1970-01-01"


def ingested_with_source(root, **data):
    """Counts of a source domain whose interactions are all of 2020 in the run of a target of 2021, and its run."""
    write(root / "old")
    write(root / "new", start=START + 366 * DAY)
    domains = {"new": {"items": "new/items.parquet", "interactions": "new/interactions.parquet"}}
    domains["old"] = {"items": "old/items.parquet", "interactions": "old/interactions.parquet", "role": "source"}
    data = {"root": str(root), "domains": domains, "min_interactions": 0, **data}
    config = Config.model_validate({"data": data, "run": {"dir": str(root / "run")}})
    run = RunDir(config.run.dir)
    return ingest_domain(config, "old", run, LocalExecutor(), Quiet()), columns.to_sequences(run.read("ingest/sequences", "old"))


@pytest.mark.parametrize(
    "data", [{"split": "temporal", "split_cuts": ["2021-01-11", "2021-01-21"]}, {"split": "given"}], ids=["temporal", "given"]
)
def test_a_source_domain_needs_no_targets(tmp_path, data):
    counts, sequences = ingested_with_source(tmp_path, **data)
    assert not counts["warnings"] and counts["split"]["users_validated"] == counts["users_evaluated"] == 0
    assert len(sequences.items) == counts["interactions"] == sum(map(len, LOG.values()))


def test_users_of_a_source_domain_may_be_shorter_than_what_is_held_out(tmp_path):
    counts, sequences = ingested_with_source(tmp_path, split="last_n", split_last=[3, 4])
    assert len(sequences.items) == counts["interactions"] and not counts["warnings"]


def test_of_a_source_domain_too_only_what_is_before_the_first_cut_is_trained_on(tmp_path):
    counts, sequences = ingested_with_source(tmp_path, split="temporal", split_cuts=["2020-01-11", "2021-01-21"])
    assert len(sequences.items) == 8 and counts["users_evaluated"] == 0
    with pytest.raises(SourceError, match="leaves no interaction for training"):
        ingested_with_source(tmp_path, split="temporal", split_cuts=["2019-01-11", "2021-01-21"])


def test_targets_and_histories_by_hand(tmp_path):
    counts, run = ingested(write(tmp_path))
    assert histories(run) == {  # validation target, test target, histories up to validation, up to test, all
        "both": ("c", "e", "ab", "abcd", "abcdeab"),
        "no validation": ("-", "c", "ab", "ab", "abc"),
        "no test": ("a", "-", "bc", "bca", "bca"),
        "train alone": ("-", "-", "ca", "ca", "ca"),
        "from validation on": ("-", "c", "", "ab", "abc"),
        "from test on": ("-", "-", "", "", "bc"),
    }
    assert counts["users_evaluated"] == 3
    assert counts["split"] == {
        "validation_from": "2020-01-11",
        "test_from": "2020-01-21",
        "users_validated": 2,
        "users_only_later": 2,
        "items_only_later": 2,  # d and e
        "further_interactions": 7,  # d, a and b of the first; a and b of the fifth; b and c of the last
        "untrained_targets": 1,  # e
    }
    assert counts["interactions_read"] == counts["interactions"] == sum(map(len, LOG.values()))
    splits = pl.DataFrame(run.read("ingest/interactions")).filter(user_id="both").select("item_id", "split").rows()
    expected = ["train", "train", "valid", "further", "test", "further", "further"]
    assert splits == list(zip("abcdeab", expected, strict=True))
    assert run.read("ingest/sequences").schema.equals(columns.TEMPORAL_SEQUENCES)


@pytest.mark.parametrize("seconds", [1, 1_000, 1_000_000, 1_000_000_000], ids=["s", "ms", "us", "ns"])
def test_a_date_cuts_times_of_any_unit_at_the_same_place(tmp_path, seconds):
    plain = histories(ingested(write(tmp_path / "plain"))[1])
    counts, run = ingested(write(tmp_path / "other", seconds=seconds), ["2020-01-11T00:00:00Z", "2020-01-21 01:00+01:00"])
    assert histories(run) == plain and counts["split"]["test_from"] == "2020-01-21"


def test_shares_are_of_interactions_and_do_not_depend_on_partitions(tmp_path):
    root = write(tmp_path)
    counts, run = ingested(root, [0.5, 0.7])
    times = np.sort(np.array([day for items in LOG.values() for day, _ in items]))  # of 20
    assert (times[10], times[14]) == (12, 21)
    assert (counts["split"]["validation_from"], counts["split"]["test_from"]) == ("2020-01-13", "2020-01-22")
    other_counts, other = ingested(root, [0.5, 0.7], rows_per_partition=4, name="other")
    assert other_counts == counts and histories(other) == histories(run)


@pytest.mark.parametrize("values", [[5], [3, 3, 3], [1, 2, 2, 9, 9, 10**18], range(5000), [-7, 0, 10**6]], ids=str)
def test_a_quantile_is_that_of_the_sorted_times(values):
    values, executor = np.array(values, dtype=np.int64), LocalExecutor()
    pieces = [executor.put(np.sort(piece)) for piece in np.array_split(np.random.default_rng(0).permutation(values), 3)]
    for rank in range(0, len(values), max(1, len(values) // 7)):
        assert quantile(executor, pieces, rank, int(values.min()), int(values.max())) == values[rank]


def test_leave_one_out_by_hand():
    places = leave_one_out(np.array([0, 2, 3, 5]))
    assert [each.tolist() for each in places] == [[0, 2, 1, 3], [-1, -1, 1, 3], [-1, -1, 2, 4], [0, 2, 2, 4]]
    assert as_date(START + 3600, "s") == "2020-01-01T01:00:00"


def test_the_first_interaction_of_each_period_is_a_target_where_others_came_before_it():
    """Validation from 10, test from 20; the second and the last user have no interactions."""
    times = np.array([1, 12, 25, 11, 21, 3, 4, 21, 22, 9, 10, 19, 20])
    split = TemporalSplit(np.ones(1, bool), np.zeros(1, bool), 10, 20, "s")
    places = by_period(split.periods(pl.DataFrame({columns.TIMESTAMP: times})), np.array([3, 0, 2, 2, 2, 4, 0]))
    assert places.train.tolist() == [1, 0, 0, 2, 0, 1, 0]
    assert places.valid.tolist() == [1, -1, -1, -1, -1, 1, -1]
    assert places.test.tolist() == [2, -1, 1, -1, -1, 3, -1]
    assert places.later.tolist() == [2, 0, 1, 2, 0, 3, 0]


def test_what_becomes_of_users_is_counted_by_hand():
    """The second item has no interaction before the validation period: one of its three is a target."""
    split = TemporalSplit(np.array([True, False]), np.array([False, True]), 10, 20, "s")
    sequences = pl.DataFrame({"train": [[0, 0], [], []], "valid": [0, None, None]})
    rows = pl.DataFrame({"split": ["train", "train", "valid", "test", "further", "further", "test"], CODE: [0, 0, 0, 1, 1, 1, 0]})
    counts = split.counts(sequences, rows)
    assert counts == {"users_validated": 1, "users_only_later": 2, "further_interactions": 2, "untrained_targets": 1}
    of_all = counts | {"users_evaluated": 2}
    dates = {"validation_from": "1970-01-01T00:00:10", "test_from": "1970-01-01T00:00:20"}
    assert split.summary(of_all, "shop") == dates | counts | {"items_only_later": 1}
    assert of_all == {"users_evaluated": 2}  # the others are taken out
    none = {"users_validated": 1, "users_evaluated": 0}
    with pytest.raises(SourceError, match="domain shop: no user with interactions in the test period has any before it"):
        split.summary(none, "shop")


def test_a_date_is_the_first_time_of_its_period_in_every_unit():
    """A fraction of a second begins a period at the next whole second, and nanoseconds are exact."""
    first = {unit: _cut(LocalExecutor(), [], "2020-01-01T00:00:00.000001", 0, (0, 0), unit) for unit in ("s", "ms", "us", "ns")}
    assert first == {"s": START + 1, "ms": START * 1000 + 1, "us": START * 10**6 + 1, "ns": START * 10**9 + 1000}
    assert _cut(LocalExecutor(), [], "2020-01-01", 0, (0, 0), "s") == START
    assert all(type(time) is int for time in first.values())


def test_a_date_is_that_of_the_second_in_which_a_time_lies():
    assert as_date(START * 10**9 + 999_999_999, "ns") == "2020-01-01"
    assert as_date(START * 1000 - 1, "ms") == "2019-12-31T23:59:59"


def test_interactions_that_the_core_leaves_out_are_no_training(tmp_path):
    """The early buyer of d bought nothing else and is left out, so training has never seen d, the test item of another user."""
    ingested_log = LOG | {"left out": [(1, "d")], "late": [(2, "a"), (21, "d")]}
    counts, _ = ingested(write(tmp_path, ingested_log), min_interactions=2)
    assert counts["split"]["items_only_later"] == 1  # d; e was bought once and is left out
    assert counts["split"]["untrained_targets"] == 1  # d
    assert counts["interactions_read"] - counts["interactions"] == 2


def test_positions_are_no_times(tmp_path):
    log = {user: list(enumerate(items for _, items in rows)) for user, rows in LOG.items()}
    root = write(tmp_path, log, start=0)
    with pytest.raises(SourceError, match="domain shop: data.split=temporal .*from 0 to 518400, are no times, but look like positions"):
        ingested(root, [0.5, 0.7])
    half = pl.read_parquet(root / "interactions.parquet").with_row_index()
    unit = pl.when(pl.col("index") % 2 == 0).then(1_000).otherwise(1)
    half.with_columns((pl.col("timestamp") + START) * unit).drop("index").write_parquet(root / "interactions.parquet")
    with pytest.raises(SourceError, match="are of several units"):
        ingested(root, [0.5, 0.7])


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        (["2019-01-01", "2020-01-21"], "no interaction for training: validation begins at 2019-01-01, .* from 2020-01-02 to 2020-01-31"),
        (["2020-01-16", "2020-01-17"], "no interaction for validation"),
        (["2020-01-11", "2021-01-01"], "no interaction for test"),
        (["2020-01-02T12:00", "2020-01-03"], "no interaction for validation"),
        (["2020-01-11", "2020-01-27"], None),
    ],
)
def test_cuts_that_leave_nothing_are_refused_with_what_there_is(tmp_path, cuts, said):
    root = write(tmp_path)
    if said is None:
        assert ingested(root, cuts)[0]["users_evaluated"] == 1
        return
    with pytest.raises(SourceError, match=said):
        ingested(root, cuts)


def test_a_period_of_new_users_alone_is_refused(tmp_path):
    log = {"early": [(1, "a"), (2, "b")], "late": [(12, "a"), (25, "b")]}
    with pytest.raises(SourceError, match="no user with interactions in the validation period has any before it"):
        ingested(write(tmp_path, log))


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ("[0.9, 0.8]", "validation must begin before the test period"),
        ("[2020-01-02, 2020-01-01]", "validation must begin before the test period"),
        ("[0.8, 2020-01-01]", "give two dates or two shares"),
        ("[spring, autumn]", "write dates as 1998-03-01"),
        ("[0.8]", "at least 2 items"),
        ("[0.8, 1.5]", "between 0 and 1; times are written as dates"),
        ("[1, 893286638]", "between 0 and 1; times are written as dates"),
    ],
)
def test_cuts_are_checked_with_the_config(cuts, said):
    with pytest.raises(ConfigError, match=said):
        load_config([], [f"data.split_cuts={cuts}"])


def test_leave_one_out_does_not_depend_on_the_cuts_of_a_temporal_split():
    plain, cut, temporal, other = (
        BY_NAME["ingest"].depends_on(load_config([], settings))
        for settings in ([], ["data.split_cuts=[0.5, 0.6]"], ["data.split=temporal"], ["data.split=temporal", "data.split_cuts=[0.5, 0.6]"])
    )
    assert plain == cut and plain != temporal != other


def test_dates_on_the_command_line_stay_dates():
    assert load_config([], ["data.split_cuts=[1998-03-01, 1998-04-01]"]).data.split_cuts == ["1998-03-01", "1998-04-01"]


def test_every_stage_reads_users_without_a_validation_or_a_test_target(tmp_path, shop):
    """A whole run: of the demo shop, some users come late and some leave early."""
    settings = ["data.split=temporal", "data.split_cuts=[0.6, 0.8]", "compute.executor=local"]
    quick = ["features.modalities=[structure]", "quantizer.kind=kmeans", "fusion.epochs=1", "pretrain.enabled=false", "finetune.epochs=1"]
    config = small_config(shop, tmp_path / "run", *settings, *quick)
    run = RunDir(config.run.dir)
    with open_executor(config) as executor:
        for stage in STAGES:
            run_stage(stage, config, run, executor, Quiet())
    sequences = columns.to_sequences(run.read("ingest/sequences"))
    tested, validated = sequences.test >= 0, sequences.valid >= 0
    assert (tested & ~validated).any() and (validated & ~tested).any() and (~tested & ~validated).any()
    assert (np.diff(sequences.between.indptr) > 0).any() and (np.diff(sequences.after.indptr) > 0).any()
    ranks = pl.DataFrame(run.read("evaluate/ranks"))
    assert set(ranks["user_id"]) == {user for user, has in zip(sequences.user_ids, tested, strict=True) if has}
    assert run.read_json("ranking/manifest.json")["counts"]["demo"]["users"] == validated.sum()
    best = pl.DataFrame(run.read("score"))
    items = dict(run.read("ingest/items").select(["item_id", "item_index"]).to_pandas().itertuples(index=False))
    assert set(best["user_id"]) == set(sequences.user_ids)
    for number, user in enumerate(sequences.user_ids):
        had = set(sequences.history(number, "end").tolist())
        assert not had & {items[item] for item in best.filter(user_id=user)["item_id"]}
    counts = json.loads(run.read_bytes("ingest/manifest.json"))["counts"]["demo"]
    assert counts["users_evaluated"] == tested.sum() and counts["split"]["users_validated"] == validated.sum()


# a split of the user's own: (split, day, item); z is in no training
OWN = {
    "all": [("train", 1, "a"), ("train", 2, "b"), ("valid", 3, "c"), ("valid", 4, "z"), ("test", 5, "d"), ("test", 6, "a")],
    "random": [("train", 1, "b"), ("train", 9, "c"), ("valid", 4, "d"), ("test", 2, "a")],  # trained on later than tested
    "no validation": [("train", 1, "d"), ("test", 7, "z")],
    "no test": [("train", 2, "a"), ("valid", 3, "b")],
    "train alone": [("train", 1, "a"), ("train", 3, "c")],
    "test alone": [("test", 5, "b"), ("test", 6, "c")],
}
FILES = {"interactions": "interactions.csv", "validation": "validation.csv", "test": "test.csv"}
PART = {"train": "interactions", "valid": "validation", "test": "test"}


def write_own(root, log=OWN, files=True):
    root.mkdir(exist_ok=True)
    rows = [(user, item, START + DAY * day, part) for user, items in log.items() for part, day, item in items]
    frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "split"], orient="row")
    items = sorted(set(frame["item_id"]))
    pl.DataFrame({"item_id": items, "title": items}).write_parquet(root / "items.parquet")
    if files:
        for part, name in PART.items():
            frame.filter(split=part).drop("split").write_csv(root / f"{name}.csv")
    else:
        frame.write_csv(root / "interactions.csv")
    return root


def own(root, domain=None, **data):
    domain = domain or {"interactions": "interactions.csv", "validation": "validation.csv", "test": "test.csv"}
    return Config.model_validate(
        {"data": {"root": str(root), "domains": {"shop": domain}, "split": "given", **data}, "run": {"dir": str(root / "run")}}
    )


def ingested_own(root, domain=None, rows_per_partition=500_000, **data):
    config = own(root, domain, **data)
    run = RunDir(f"{config.run.dir}{rows_per_partition}")
    return ingest_domain(config, "shop", run, LocalExecutor(), Quiet(), rows_per_partition), run


OWN_HISTORIES = {
    "all": ("c", "d", "ab", "abcz", "abczda"),
    "random": ("d", "a", "bc", "bcd", "bcda"),
    "no validation": ("-", "z", "d", "d", "dz"),
    "no test": ("b", "-", "a", "ab", "ab"),
    "train alone": ("-", "-", "ac", "ac", "ac"),
    "test alone": ("-", "-", "", "", "bc"),
}


@pytest.mark.parametrize("rows_per_partition", [500_000, 4])
def test_three_files_by_hand(tmp_path, rows_per_partition):
    counts, run = ingested_own(write_own(tmp_path), rows_per_partition=rows_per_partition)
    assert histories(run) == OWN_HISTORIES
    assert counts["users"] == 6 and counts["users_evaluated"] == 3
    assert counts["split"] == {
        "users_validated": 3,
        "users_only_later": 1,
        "further_interactions": 4,  # z and a of the first, both of the last
        "untrained_targets": 1,  # z
        "users_without_validation": 3,
        "users_without_test": 3,
        "users_trained_on_later": 1,
        "in_train_and_validation": 0,
        "in_train_and_test": 1,  # a of the first
        "in_validation_and_test": 0,
        "train_rejected": 0,
        "validation_rejected": 0,
        "test_rejected": 0,
        "items_only_later": 1,
    }
    said = "\n".join(counts["warnings"])
    for words in (
        "3 of 6 users have no validation target",
        "3 of 6 users have no test target",
        "1 in train and test",
        "1 of 6 users have training",
    ):
        assert words in said
    rows = pl.DataFrame(run.read("ingest/interactions")).filter(pl.col("split") == "train")
    given = {(user, item) for user, items in OWN.items() for part, _, item in items if part == "train"}
    assert set(rows.select("user_id", "item_id").rows()) == given


@pytest.mark.parametrize("words", [("train", "valid", "test"), ("Training", "val", "TEST"), ("train", "dev", "testing")], ids="-".join)
def test_one_file_with_a_column(tmp_path, words):
    spelled = dict(zip(PART, words, strict=True))
    log = {user: [(spelled[part], day, item) for part, day, item in items] for user, items in OWN.items()}
    counts, run = ingested_own(write_own(tmp_path, log, files=False), {"interactions": "interactions.csv"})
    assert histories(run) == OWN_HISTORIES and counts["split"]["users_validated"] == 3


def test_a_split_of_ones_own_is_used_as_it_is(tmp_path):
    """No k-core by default; one that is asked for says what it takes from the targets."""
    assert own(tmp_path).data.min_interactions == 0 and own(tmp_path, min_interactions=3).data.min_interactions == 3
    assert load_config([], ["data.split=given"]).data.min_interactions == 0 and load_config([], []).data.min_interactions == 5
    counts, run = ingested_own(write_own(tmp_path), min_interactions=3, min_item_interactions=0)
    assert sorted(histories(run)) == ["all", "random"]
    assert [counts["split"][f"{name}_rejected"] for name in ("train", "validation", "test")] == [4, 1, 3]
    assert "rows rejected: 1 of validation, 3 of test" in "\n".join(counts["warnings"])


def test_an_interaction_of_several_files_is_not_trained_on(tmp_path):
    """The same user, item and time: the row of the last part is kept, and the others are rejected with this reason."""
    log = OWN | {"all": [*OWN["all"], ("train", 5, "d"), ("train", 3, "c"), ("train", 1, "a")]}
    counts, run = ingested_own(write_own(tmp_path, log))
    assert histories(run) == OWN_HISTORIES
    assert counts["interactions_rejected"] == {"also in a later part": 2, "duplicate interaction": 1}
    assert counts["split"]["train_rejected"] == 3


def test_a_row_without_a_known_part_is_rejected(tmp_path):
    log = OWN | {"all": [*OWN["all"], ("holdout", 8, "b"), (None, 9, "c")]}
    counts, run = ingested_own(write_own(tmp_path, log, files=False), {"interactions": "interactions.csv"})
    assert histories(run) == OWN_HISTORIES and counts["interactions_rejected"] == {"bad split": 1, "missing split": 1}


def test_nothing_of_validation_and_test_reaches_training(tmp_path):
    """Other items in the held-out files change no training sequence, weight or count, and the catalog's order neither."""
    log = {user: [(part, day, item if part == "train" else "c") for part, day, item in items] for user, items in OWN.items()}
    log["all"].append(("test", 9, "z"))  # so that the catalog is the same
    trained = [
        pl.DataFrame(ingested_own(write_own(tmp_path / name, each))[1].read("ingest/sequences"))
        .sort("user_id")
        .select("user_id", "train")
        .rows()
        for name, each in (("one", OWN), ("other", log))
    ]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("domain", "said"),
    [
        (FILES | {"test": "tests.csv"}, "domain shop: test: no Parquet, CSV or JSONL file at .*tests.csv; set data.domains.shop.test"),
        (FILES | {"interactions": "*.csv"}, "validation.csv is among the files of both interactions and validation; narrow data.domains.shop.interactions"),
        (FILES | {"test": "[v]alidation.csv"}, "validation.csv is among the files of both validation and test; give each files of its own"),
        ({"interactions": "interactions.csv"}, "has no column split, .*interaction_columns.split=<column>, or change data.split, or name files"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_the_split_are_refused(tmp_path, domain, said):
    root = write_own(tmp_path)
    with pytest.raises(SourceError, match=said):
        ingested_own(root, domain)


OWN_FILES = ["data.domains.items.test=a.csv", "data.domains.items.validation=b.csv"]


def test_a_split_by_users_is_refused(tmp_path):
    log = {"early": [("train", 1, "a"), ("train", 2, "b")], "held out": [("valid", 3, "a")], "tested": [("test", 3, "a")]}
    with pytest.raises(SourceError, match="no user has both interactions for training and one of validation"):
        ingested_own(write_own(tmp_path, log))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (OWN_FILES, "only read with data.split=given, and data.split is leave_one_out"),
        (["data.split=given", "data.domains.items.test=test.csv"], "data.domains.items.validation is not: give both"),
        (["data.split=given", "data.domains.items.test=a.csv", "data.domains.items.validation=a.csv"], "each needs files of its own"),
        (["data.split=given", *OWN_FILES, "data.domains.items.interaction_columns.split=part"], "choose one of the two"),
        (["data.split=last_n", "data.split_last=[0, 1]"], "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_files_of_a_split_are_checked_with_the_config(settings, said):
    with pytest.raises(ConfigError, match=said):
        load_config([], settings)


def test_the_last_n_of_each_user_by_hand(tmp_path):
    log = {"six": list(enumerate("abcdef")), "four": list(enumerate("abcd")), "three": list(enumerate("eaf"))}
    counts, run = ingested(write(tmp_path, log), split="last_n", split_last=[1, 2])
    assert histories(run) == {
        "six": ("d", "e", "abc", "abcd", "abcdef"),
        "four": ("b", "c", "a", "ab", "abcd"),
        "three": ("-", "-", "eaf", "eaf", "eaf"),  # not more than the three that are held out
    }
    assert counts["split"]["last"] == [1, 2] and counts["split"]["further_interactions"] == 2  # f and d
    with pytest.raises(SourceError, match="holds out 9 interactions of each user, and no user has more"):
        ingested(tmp_path, name="other", split="last_n", split_last=[4, 5])


def test_the_last_two_by_n_are_those_of_leave_one_out(tmp_path):
    root = write(tmp_path)
    one, other = (ingested(root, split=split, name=split)[1] for split in ("leave_one_out", "last_n"))
    assert histories(one) == histories(other)


def test_a_stage_depends_on_the_settings_of_its_own_split_alone():
    def keys(*settings):
        return {key for key in BY_NAME["ingest"].depends_on(load_config([], list(settings))) if key.startswith("data.split")}

    assert keys() == set()
    assert keys("data.split=last_n") == {"data.split", "data.split_last"}
    assert keys("data.split=temporal") == {"data.split", "data.split_cuts"}
    assert keys("data.split=given") == {"data.split"}


def test_every_stage_runs_on_files_of_ones_own(tmp_path, shop):
    frame = pl.read_parquet(shop / "interactions.parquet").sort("user_id", "timestamp")
    back = pl.len().over("user_id") - pl.int_range(pl.len()).over("user_id")
    for part, rows in {"train": back > 2, "valid": back == 2, "test": back == 1}.items():
        frame.filter(rows).write_parquet(tmp_path / f"{part}.parquet")
    given = {
        "items": str(shop / "items.parquet"),
        **{
            name: str(tmp_path / f"{part}.parquet") for part, name in (("train", "interactions"), ("valid", "validation"), ("test", "test"))
        },
    }
    settings = ["data.split=given", "compute.executor=local", *(f"data.domains.demo.{key}={file}" for key, file in given.items())]
    quick = ["features.modalities=[structure]", "quantizer.kind=kmeans", "fusion.epochs=1", "pretrain.enabled=false", "finetune.epochs=1"]
    config = small_config(shop, tmp_path / "run", *settings, *quick)
    run = RunDir(config.run.dir)
    with open_executor(config) as executor:
        for stage in STAGES:
            run_stage(stage, config, run, executor, Quiet())
    tested = frame.filter(back == 1)
    ranks = pl.DataFrame(run.read("evaluate/ranks")).filter(model="model")
    targets = dict(tested.select("user_id", "item_id").rows())
    assert dict(ranks.select("user_id", "target").rows()) == {user: targets[user] for user in ranks["user_id"]} and len(ranks) > 50
    files = run.read_json("ingest/manifest.json")["inputs"]
    assert {"data.domains.demo.validation", "data.domains.demo.test"} <= set(files)


def test_users_whose_times_begin_anew_in_each_part_are_not_of_one_time():
    times, ends = np.array([1, 2, 3, 1, 2, 1, 7, 7, 9]), np.array([0, 6, 8, 9])  # a user of three parts, one of one time, one of one row
    assert times_seen(times, ends)["users_at_one_time"] == 1
    assert times_seen(np.zeros(0), np.zeros(1, int))["users_at_one_time"] == 0
