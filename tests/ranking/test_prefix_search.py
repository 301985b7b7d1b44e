"""Candidates from prefixes of semantic IDs: all prefixes find what the exact ranking finds, few find the best of them, scores never differ."""

import numpy as np
import pytest
import torch
from scipy import sparse

from qbert_ray.config.loading import ConfigError, with_values
from qbert_ray.config.schema import Config, Ranking
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.ranking import prefix_search
from qbert_ray.ranking.filters import Filter
from qbert_ray.ranking.loader import load_ranker
from qbert_ray.ranking.prefix_search import PrefixIndex, laid_out, linked
from qbert_ray.ranking.score import score
from qbert_ray.storage.catalog import catalog_codes, run_config
from tests.small_run import ITEMS, make_run

HISTORIES = [np.array([3, 1, 4, 1]), np.zeros(0, np.int64), np.array([38, 2])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def make_index(prefixes, size=200, seed=0):
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 4, (size, 4)))
    vectors = torch.from_numpy(rng.normal(size=(size, 8)).astype(np.float32)) + codes[:, :1]
    return PrefixIndex(codes, vectors, torch.from_numpy(rng.normal(size=size).astype(np.float32)), prefixes), codes


@pytest.mark.parametrize("most", [1, 2**25])
def test_the_best_items_of_the_best_prefixes_are_found(most, monkeypatch):
    monkeypatch.setattr(prefix_search, "MOST_GATHERED", most)
    index, codes = make_index(3)
    queries = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32))
    rows, items = index.best(queries, 6)
    length = next(length for length in range(1, 5) if len(index.sizes) == len(torch.unique(codes[:, :length], dim=0)))
    names, group = torch.unique(codes[:, :length], dim=0, return_inverse=True)
    place = index.order.argsort()  # of an item among the vectors
    vectors, bias = index.vectors[place], index.bias[place]
    for row, query in enumerate(queries):
        means = [float((vectors[group == each] @ query + bias[group == each]).mean()) for each in range(len(names))]
        chosen = np.argsort(means)[-3:]
        inside = np.flatnonzero(np.isin(group.numpy(), chosen))
        scores = (vectors[inside] @ query + bias[inside]).numpy()
        assert set(items[rows == row].tolist()) == set(inside[np.argsort(-scores)[:6]].tolist())


def test_all_prefixes_hold_every_item_once():
    index, _ = make_index(10_000)
    rows, items = index.best(torch.randn(2, 8), 10_000)
    for row in (0, 1):
        assert sorted(items[rows == row].tolist()) == list(range(200))


def test_linked_items_are_those_of_the_largest_summed_weights(monkeypatch):
    monkeypatch.setattr(prefix_search, "LINKED", 2)
    ridge, following = (
        sparse.csr_matrix(np.array(each, np.float32)) for each in ([[0, 1, 3, 0], [0, 0, 0, 0]], [[2.5, 1, 0, 0], [0, 0, 0, 1]])
    )
    rows, items = linked([ridge, following])
    assert sorted(zip(rows.tolist(), items.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 3)]


def test_candidates_are_laid_out_without_repetitions():
    table, padding = laid_out(np.array([2, 0, 2, 2]), np.array([5, 1, 3, 5]), 3, 9)
    assert table[~padding].tolist() == [1, 3, 5] and padding.sum(1).tolist() == [1, 2, 0]
    table, padding = laid_out(np.zeros(0, np.int64), np.zeros(0, np.int64), 2, 9)
    assert table.shape == (2, 1) and padding.all()


@pytest.mark.parametrize("remove_seen", [True, False])
@pytest.mark.parametrize("only", [Filter(), Filter(items=np.arange(ITEMS) % 3 != 0)], ids=["all", "filtered"])
@pytest.mark.parametrize("settings", [{"rerank": 0}, {"rerank": 6}, {"enabled": False}], ids=["blend", "reranked", "alone"])
def test_all_prefixes_rank_as_the_whole_catalog_does(run, settings, only, remove_seen):
    rank = load_ranker(run, "shop", Ranking(**settings))
    exact = rank.best(HISTORIES, 6, remove_seen, only)
    rank.search_prefixes(torch.from_numpy(catalog_codes(run, "shop")), 10_000)
    values, items = rank.best(HISTORIES, 6, remove_seen, only)
    assert torch.equal(items, exact[1])
    torch.testing.assert_close(values, exact[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"rerank": 0}, {"enabled": False}], ids=["blend", "alone"])
def test_few_prefixes_find_fewer_items_whose_scores_are_the_exact_ones(run, settings, monkeypatch):
    monkeypatch.setattr(prefix_search, "LINKED", 2)
    rank = load_ranker(run, "shop", Ranking(**settings))
    scores = rank.scores(HISTORIES)["model"]
    rank.search_prefixes(torch.from_numpy(catalog_codes(run, "shop")), 1)
    values, items = rank.best(HISTORIES, 2, False)
    assert (items >= 0).all()
    torch.testing.assert_close(values, scores.gather(1, items), atol=1e-4, rtol=1e-4)
    assert (values.diff(dim=1) <= 0).all()


def test_histories_with_too_few_candidates_and_filters_by_user_are_ranked_exactly(run):
    rank = load_ranker(run, "shop", Ranking(rerank=0))
    by_user = Filter(excluded=[np.array([5, 6]), np.array([1]), np.array([0])])
    exact = [rank.best(HISTORIES, k, True, only) for k, only in ((ITEMS, Filter()), (3, by_user))]
    rank.search_prefixes(torch.from_numpy(catalog_codes(run, "shop")), 1)
    for (k, only), expected in zip(((ITEMS, Filter()), (3, by_user)), exact, strict=True):
        found = rank.best(HISTORIES, k, True, only)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)


def test_the_stage_searches_prefixes_where_the_config_says_so(run):
    tables = []
    for prefixes in (None, 10_000):
        config = with_values(run_config(run), {"score.prefixes": prefixes, "run.dir": run.uri})
        score(config, run, LocalExecutor(), Quiet())
        tables.append(run.read("score", "shop"))
        run.delete("score")
    assert tables[0]["item_id"].equals(tables[1]["item_id"]) and tables[0]["user_id"].equals(tables[1]["user_id"])
    with pytest.raises((ConfigError, ValueError), match="score.prefixes needs sequencer.kind=masked"):
        Config.model_validate({"score": {"prefixes": 3}, "sequencer": {"kind": "generative"}})
