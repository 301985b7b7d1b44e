"""Ranks of cold items on a small run: again in plain loops, and of the baselines: neighbours by text, and a random order."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from qbert_ray import metrics
from qbert_ray.config.schema import Config, Ranking
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.features.vectors import features_table
from qbert_ray.ranking.cold_items import evaluate_cold, summarise_cold
from qbert_ray.ranking.loader import load_ranker
from qbert_ray.sequence.item_table import nearest_trained_items
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import content_vectors
from tests.ranking.test_evaluate import plain_rank
from tests.small_run import COLD, ITEMS, make_run

TEXT_WIDTH, LATEST, CUTOFFS = 5, 2, [1, 3]
HISTORIES = [[3, 7, 7, 1], [5], [0, 2, 4, 6, 8, 10], [9, 3]]
TARGETS = [36, 39, 37, 38]


def make_cold_run(folder, text=True):
    run = make_run(folder)
    rng = np.random.default_rng(2)
    if text:
        vectors = rng.standard_normal((ITEMS, 1, TEXT_WIDTH)).astype(np.float32)
        begin = 0
        for name in run.parts("ingest/items"):
            items = run.read_part("ingest/items", name)
            rows = slice(begin, begin + items.num_rows)
            run.write_part("features/text", name, features_table(items, vectors[rows], np.ones((items.num_rows, 1), bool)))
            begin += items.num_rows
    for number, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 4))):  # the second part has no user
        users = [f"user-{user}" for user in range(*rows.indices(4))]
        arrays = [pa.array(["shop"] * len(users), pa.string()), pa.array(users, pa.string())]
        arrays += [pa.array(HISTORIES[rows], pa.list_(pa.int32())), pa.array(TARGETS[rows], pa.int32())]
        run.write_part("ingest/cold", f"shop-{number:05d}.parquet", pa.table(arrays, schema=columns.COLD_SEQUENCES))
    settings = {"run": {"dir": run.uri}, "data": {"domains": {"shop": {}}}}
    config = Config.model_validate(settings | {"evaluate": {"cutoffs": CUTOFFS, "co_occurrence_history": LATEST}})
    return config, run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    config, run = make_cold_run(tmp_path_factory.mktemp("run"))
    return evaluate_cold(config, run, "shop", LocalExecutor(), Quiet()), config, run


def text_vectors(run):
    """Centred on the items that training may see, of length 1."""
    vectors = columns.to_numpy(run.read("features/text", "shop")["vectors"])[:, 0].astype(np.float64)
    vectors = vectors - vectors[: ITEMS - COLD].mean(0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_cold_targets_rank_as_in_plain_loops(evaluated):
    _, config, run = evaluated
    text = text_vectors(run)
    found = load_ranker(run, "shop", config.ranking).scores([np.array(history) for history in HISTORIES])
    scores = {name: found[name].tolist() for name in ("model", "sequencer")}
    scores["text_mean"] = [(text @ text[history[-LATEST:]].mean(0)).tolist() for history in HISTORIES]
    scores["text_nearest"] = [(text @ text[history[-LATEST:]].T).max(1).tolist() for history in HISTORIES]
    expected = {}
    for user, (history, target) in enumerate(zip(HISTORIES, TARGETS, strict=True)):
        for name, each in scores.items():
            unseen = plain_rank(each[user], target, set(history))
            cold = plain_rank(each[user][ITEMS - COLD :], target - (ITEMS - COLD))
            among = ITEMS - len(set(history)), COLD
            expected[f"user-{user}", name] = ("shop", f"shop-item-{target}", unseen, cold, *among)
    table = run.read("evaluate/cold", "shop")
    assert table.schema.equals(columns.COLD_RANKS) and len(table) == len(expected)
    names = ("domain", "target", "rank_unseen", "rank_cold", "among_unseen", "among_cold")
    assert {(row["user_id"], row["model"]): tuple(row[name] for name in names) for row in table.to_pylist()} == expected


def test_figures_are_those_of_the_ranks_and_of_a_random_order(evaluated):
    figures, _, run = evaluated
    table = run.read("evaluate/cold", "shop").to_pylist()
    assert figures["users"] == len(TARGETS) and figures.keys() == {"users", "protocols"}
    for protocol in ("unseen", "cold"):
        models = figures["protocols"][protocol]
        assert list(models) == ["model", "sequencer", "text_mean", "text_nearest", "random"]
        for name in list(models)[:-1]:
            ranks = np.array([row[f"rank_{protocol}"] for row in table if row["model"] == name])
            assert models[name] == metrics.summarise(ranks, CUTOFFS)
        among = np.array([row[f"among_{protocol}"] for row in table if row["model"] == "model"])
        assert models["random"] == metrics.expected_at_random(among, CUTOFFS)
    assert figures["protocols"]["cold"]["random"]["hr@1"]["value"] == 1 / COLD


def test_users_are_counted_by_part(evaluated):
    _, _, run = evaluated
    assert [run.read_json(f"evaluate/cold/.counts/{name}.json") for name in run.parts("evaluate/cold")] == [
        {"users": 3},
        {"users": 0},
        {"users": 1},
    ]


def test_without_texts_there_are_no_neighbours_by_text(tmp_path):
    config, run = make_cold_run(tmp_path, text=False)
    figures = evaluate_cold(config, run, "shop", LocalExecutor(), Quiet())
    assert list(figures["protocols"]["cold"]) == ["model", "sequencer", "random"]


def test_a_run_that_holds_no_item_out_has_no_figures(tmp_path):
    run = make_run(tmp_path)
    assert evaluate_cold(Config(), run, "shop", LocalExecutor(), Quiet()) is None


def test_a_random_order_is_that_of_the_models_candidates():
    rows = {"model": ["model", "text_mean"], "rank_unseen": [2, 1], "rank_cold": [1, 1], "among_unseen": [8, 99], "among_cold": [4, 99]}
    found = summarise_cold(pa.table(rows), [2])
    assert found["users"] == 1
    assert [found["protocols"][name]["random"]["hr@2"]["value"] for name in ("unseen", "cold")] == [2 / 8, 2 / 4]


def test_words_place_cold_items_by_their_neighbours(tmp_path):
    """Without codes nothing else tells cold items apart: each gets the mean of its nearest trained items, by the fused embedding."""
    words = {"tokens": "word", "num_levels": 0, "content_width": 0, "item_embeddings": {"shop": ITEMS - COLD}, "logits": "dot"}
    run = make_run(tmp_path / "run", **words)
    ranker = load_ranker(run, "shop", Ranking(enabled=False))
    fused = content_vectors(run, "shop")
    cold = nearest_trained_items(fused, torch.arange(ITEMS - COLD, ITEMS), torch.arange(ITEMS - COLD))
    assert ranker.vectors[ITEMS - COLD :].std(0).min() > 0
    expected = (ranker.vectors[cold.nearest] * cold.weights[..., None]).sum(1)
    torch.testing.assert_close(ranker.vectors[cold.rows], expected)
