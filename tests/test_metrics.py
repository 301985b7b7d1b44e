from math import log2, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbert_ray.metrics import (
    codebook_usage,
    collision_rate,
    entropy,
    expected_at_random,
    gini,
    half_over_seeds,
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
    assert np.isclose(perplexity(np.array([[0], [1], [2], [3]]))[0], 4)
    assert np.isclose(perplexity(np.array([[2], [2]]))[0], 1)


def test_an_interval_is_that_of_the_normal_distribution():
    """1.96 standard errors to either side, cut at 0 and 1."""
    values = np.array([0.5, 0.25, 0.5, 0.75])
    deviation = sqrt((0 + 0.0625 + 0 + 0.0625) / 3)
    found = interval(values)
    assert found["value"] == 0.5
    assert found["low"] == pytest.approx(0.5 - 1.959964 * deviation / 2, abs=1e-6)
    assert found["high"] == pytest.approx(0.5 + 1.959964 * deviation / 2, abs=1e-6)
    assert interval(np.array([1.0, 0.0])) == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert interval(np.array([0.25])) == {"value": 0.25, "low": 0.25, "high": 0.25}
    two = interval(np.array([0.4, 0.5]))
    assert two["high"] - two["low"] == pytest.approx(2 * 1.959964 * 0.05)


def test_an_interval_holds_the_mean_of_95_in_100_samples():
    samples = np.random.default_rng(0).random((2000, 200))
    held = [found["low"] <= 0.5 <= found["high"] for found in map(interval, samples)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_half_an_interval_over_seeds_is_students():
    assert half_over_seeds(0.3, 2) == pytest.approx(12.7062047 * 0.3 / sqrt(2))
    assert half_over_seeds(0.3, 5) == pytest.approx(2.7764451 * 0.3 / sqrt(5))
    assert half_over_seeds(0.3, 1) is None and half_over_seeds(None, 5) is None


def test_a_summary_names_every_cutoff_and_leaves_out_ndcg_at_1():
    rank = np.array([1, 2, 4, 20])
    table = summarise(rank, [1, 5, 10])
    assert list(table) == ["hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10"]
    assert table["ndcg@5"] == interval(np.array([1, 1 / log2(3), 1 / log2(5), 0]))
    assert table["hr@5"] == interval(np.array([1.0, 1, 1, 0]))
    assert hit_rate(rank, 2).dtype == np.float64
    assert list(summarise(rank, [2])) == ["hr@2", "ndcg@2"]


def test_a_random_order_of_few_candidates_by_hand():
    found = expected_at_random(np.array([2, 4]), [1, 3])
    assert list(found) == ["hr@1", "hr@3", "ndcg@3"]
    assert found["hr@1"] == interval(np.array([1 / 2, 1 / 4])) and found["hr@3"] == interval(np.array([1, 3 / 4]))
    gains = 1 + 1 / log2(3), 1 + 1 / log2(3) + 1 / 2
    assert found["ndcg@3"]["value"] == pytest.approx((gains[0] / 2 + gains[1] / 4) / 2)


def test_spread_of_codes_by_hand():
    codes = np.array([[0, 3], [0, 3], [1, 3], [2, 3]])
    assert entropy(codes) == [1.5, 0]  # shares 1/2, 1/4, 1/4
    assert perplexity(codes) == pytest.approx([2**1.5, 1])
    # counts 0, 1, 1, 2 in order: 2 (2 + 3 + 8) / (4 * 4) - 5 / 4
    assert gini(codes, 4) == pytest.approx([26 / 16 - 5 / 4, 3 / 4])
    assert codebook_usage(codes, 8) == [3 / 8, 1 / 8]
    assert collision_rate(codes) == 1 / 4 and collision_rate(codes[:0]) == 0
    assert collision_rate(np.array([[1, 0], [0, 1], [1, 0], [0, 0]])) == 1 / 4
    nothing = codes[:0]
    assert entropy(nothing) == [0, 0] and str(entropy(nothing)[0]) == "0.0"
    assert gini(nothing, 4) == pytest.approx([-5 / 4] * 2)
