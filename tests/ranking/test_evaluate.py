"""The evaluate stage on a small run: every rank again in plain loops over the scores, and what is written of them."""

import numpy as np
import pyarrow as pa
import pytest

from qbert_ray import metrics
from qbert_ray.config.schema import Config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.features.structure import co_occurrence
from qbert_ray.ranking.evaluate import _sample, evaluate, summarise
from qbert_ray.ranking.item_item import popularity
from qbert_ray.ranking.loader import load_ranker
from qbert_ray.storage import columns
from tests.small_run import ITEMS, USERS, make_run

MODELS = ["model", "sequencer", "ridge", "transitions", "popularity", "co_occurrence"]
SHORT = 3  # users without a test item
LATEST = 2


class Notes(Quiet):
    """The progress of a stage, of which the notes are kept."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The shop is the second of two domains; one of its test items is the first of the catalog, and one cold item was bought."""
    run = make_run(tmp_path_factory.mktemp("run"), domains=("other", "shop"))
    table = run.read("ingest/sequences", "shop")
    items = [None, None, None, 0, *table["test"].to_pylist()[SHORT + 1 :]]
    table = table.set_column(table.column_names.index("test"), table.schema.field("test"), pa.array(items, pa.int32()))
    for number, begin in enumerate(range(0, USERS, 5)):  # three parts
        run.write_part("ingest/sequences", f"shop-{number:05d}.parquet", table.slice(begin, 5))
    cold = [pa.array(["shop"]), pa.array(["user-1"]), pa.array([[3, 4]], pa.list_(pa.int32())), pa.array([ITEMS - 1], pa.int32())]
    run.write_part("ingest/cold", "shop-00000.parquet", pa.table(cold, schema=columns.COLD_SEQUENCES))
    settings = {"run": {"dir": run.uri}, "data": {"domains": {"other": {}, "shop": {}}}}
    config = Config.model_validate(settings | {"evaluate": {"cutoffs": [2, 10], "co_occurrence_history": LATEST}})
    progress = Notes()
    counts = evaluate(config, run, LocalExecutor(), progress)
    assert progress.notes == ["other", "shop"]
    return counts, config, run


def plain_rank(scores, target, left_out=()):
    """1-based, equal scores by item_index; the target itself is never left out."""
    others = [item for item in range(len(scores)) if item != target and item not in left_out]
    return 1 + sum((-scores[item], item) < (-scores[target], target) for item in others)


def test_ranks_are_those_of_plain_loops_over_each_models_scores(evaluated):
    _, config, run = evaluated
    sequences = columns.to_sequences(run.read("ingest/sequences", "shop"))
    histories = [sequences.history(user, "test") for user in range(USERS)]
    scores = {name: each.tolist() for name, each in load_ranker(run, "shop", config.ranking).scores(histories).items()}
    popular = popularity(sequences.indptr, sequences.items, ITEMS).tolist()
    together = co_occurrence(sequences.indptr, sequences.items, ITEMS).toarray()
    scores["popularity"] = [popular] * USERS
    scores["co_occurrence"] = [sum(together[item] for item in history[-LATEST:]).tolist() for history in histories]
    expected = {}
    for user in range(SHORT, USERS):
        target = int(sequences.test[user])
        for name in MODELS:
            pair = plain_rank(scores[name][user], target), plain_rank(scores[name][user], target, set(histories[user].tolist()))
            expected[f"user-{user}", name] = ("shop", f"shop-item-{target}", *pair)
    table = run.read("evaluate/ranks", "shop")
    assert table.schema.equals(columns.RANKS)
    found = {
        (row["user_id"], row["model"]): (row["domain"], row["target"], row["rank_all"], row["rank_unseen"]) for row in table.to_pylist()
    }
    assert found == expected and len(table) == len(expected)
    assert any(all_items != unseen for _, _, all_items, unseen in expected.values())


def test_users_without_a_test_item_are_counted_and_not_ranked(evaluated):
    counts, _, run = evaluated
    assert counts["shop"] == {"users": USERS, "ranked": USERS - SHORT, "without_target": SHORT}
    assert counts["other"] == {"users": USERS, "ranked": USERS, "without_target": 0} and counts.keys() == {"other", "shop"}
    report = run.read_json("evaluate/metrics.json")
    assert report["shop"]["users"] == USERS - SHORT and report["other"]["users"] == USERS
    assert run.parts("evaluate/ranks") == run.parts("ingest/sequences")
    assert len(run.names("evaluate/ranks/.counts")) == 4


def test_a_sample_of_the_users_is_ranked_as_all_are_and_said(evaluated):
    _, config, run = evaluated
    whole, report = run.read("evaluate/ranks", "shop").to_pylist(), run.read_json("evaluate/metrics.json")
    sampled = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"users": 4})})
    for folder in run.folders("evaluate"):
        run.delete(f"evaluate/{folder}")
    try:
        counts = evaluate(sampled, run, LocalExecutor(), Notes())
        few, figures = run.read("evaluate/ranks", "shop").to_pylist(), run.read_json("evaluate/metrics.json")["shop"]
    finally:  # the fixture is that of the whole module
        for folder in run.folders("evaluate"):
            run.delete(f"evaluate/{folder}")
        evaluate(config, run, LocalExecutor(), Notes())
    chosen = {row["user_id"] for row in few}
    assert len(chosen) == 4
    assert sorted(map(str, few)) == sorted(str(row) for row in whole if row["user_id"] in chosen)
    assert counts["shop"] == {"users": USERS, "ranked": 4, "without_target": SHORT, "not_sampled": USERS - SHORT - 4}
    assert figures["users"] == 4 and figures["sampled_from"] == USERS - SHORT
    assert "sampled_from" not in report["shop"]
    assert run.read_json("evaluate/metrics.json") == report


def test_a_sample_is_of_users_with_a_test_item_and_a_larger_one_holds_it(evaluated):
    _, _, run = evaluated
    parts, ranked = run.parts("ingest/sequences", "shop"), USERS - SHORT
    has = {part: run.read_part("ingest/sequences", part)["test"].to_pylist() for part in parts}
    before = set()
    for users in range(1, ranked):
        count, rows = _sample(run, parts, users)
        chosen = {(part, row) for part, each in rows.items() for row in each.tolist()}
        assert count == ranked and len(chosen) == users and before < chosen and list(rows) == parts
        assert all(row >= 0 and has[part][row] is not None for part, row in chosen)
        before = chosen
    for users in (ranked, ranked + 1, None):
        assert _sample(run, parts, users) == (ranked, None)
    assert _sample(run, [], 3) == (0, None)


def test_a_domain_that_holds_items_out_has_their_figures_too(evaluated):
    report = evaluated[2].read_json("evaluate/metrics.json")
    assert report["shop"]["cold"]["users"] == 1 and report["shop"]["cold"]["protocols"].keys() == {"unseen", "cold"}
    assert "cold" not in report["other"]


def test_the_report_holds_every_model_under_both_protocols(evaluated):
    _, config, run = evaluated
    report = run.read_json("evaluate/metrics.json")["shop"]
    assert report.keys() == {"users", "protocols", "cold"} and list(report["protocols"]) == ["all", "unseen"]
    table = run.read("evaluate/ranks", "shop").to_pylist()
    for protocol, column in (("all", "rank_all"), ("unseen", "rank_unseen")):
        assert list(report["protocols"][protocol]) == MODELS
        for name in MODELS:
            ranks = np.array([row[column] for row in table if row["model"] == name])
            assert report["protocols"][protocol][name] == metrics.summarise(ranks, [2, 10])


def test_a_part_of_users_without_a_test_item_has_no_ranks(evaluated):
    _, _, run = evaluated
    sizes = [run.read_part("evaluate/ranks", name).num_rows for name in run.parts("evaluate/ranks", "shop")]
    assert sizes == [(5 - SHORT) * len(MODELS), 5 * len(MODELS), 2 * len(MODELS)]


def test_metrics_are_those_of_a_table_of_ranks():
    rows = [("a", "model", 1, 1), ("a", "popularity", 4, 2), ("b", "model", 3, 2), ("b", "popularity", 1, 1)]
    table = pa.table({"model": [row[1] for row in rows], "rank_all": [row[2] for row in rows], "rank_unseen": [row[3] for row in rows]})
    found = summarise(table, [2])
    assert found["users"] == 2
    value = {(protocol, name): each["hr@2"]["value"] for protocol, models in found["protocols"].items() for name, each in models.items()}
    assert value == {("all", "model"): 0.5, ("all", "popularity"): 0.5, ("unseen", "model"): 1.0, ("unseen", "popularity"): 1.0}
