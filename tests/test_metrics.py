from math import log2

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qbert_ray.metrics import (
    codebook_usage,
    collision_rate,
    expected_at_random,
    hit_rate,
    interval,
    ndcg,
    perplexity,
    summarise,
)


def test_hand_worked_values():
    rank = np.array([1, 3, 10, 11])
    assert hit_rate(rank, 10).tolist() == [1, 1, 1, 0]
    assert np.allclose(ndcg(rank, 10), [1, 1 / 2, 1 / log2(11), 0])
    table = summarise(rank, [1, 10])
    assert table["hr@1"]["value"] == 1 / 4
    assert table["hr@10"]["value"] == 3 / 4


@given(st.integers(1, 30), st.integers(1, 40))
def test_the_expectation_at_random_is_the_mean_over_all_ranks(candidates, k):
    found = expected_at_random(np.array([candidates]), [1, k])
    every = summarise(np.arange(1, candidates + 1), [1, k])
    assert found.keys() == every.keys()
    assert all(np.isclose(found[name]["value"], every[name]["value"]) for name in every)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 20))
def test_ndcg_is_at_most_the_hit_rate_and_both_grow_with_k(rank, k):
    rank = np.array(rank)
    assert (ndcg(rank, k) <= hit_rate(rank, k)).all()
    assert (hit_rate(rank, k) <= hit_rate(rank, k + 1)).all()


def test_the_interval_holds_the_mean_and_shrinks_with_users():
    few, many = interval(np.array([0.0, 1.0] * 10)), interval(np.array([0.0, 1.0] * 1000))
    assert few["low"] < few["value"] < few["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]
    assert interval(np.zeros(0)) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_quality_of_codes():
    codes = np.array([[0, 0], [0, 1], [0, 1], [1, 2]])
    assert collision_rate(codes) == 1 / 4
    assert codebook_usage(codes, 4) == [2 / 4, 3 / 4]
    assert np.isclose(perplexity(np.array([[0], [1], [2], [3]]), 4)[0], 4)
    assert np.isclose(perplexity(np.array([[2], [2]]), 4)[0], 1)
