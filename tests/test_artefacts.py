"""The measures of `tests/benchmarks/artefacts.py` and `tuned_ridge.py` on histories made by hand."""

from itertools import permutations

import numpy as np
import pytest

from qbert_ray.config.schema import Ranking
from tests.benchmarks.artefacts import Histories, ascending_pairs, evaluate, largest_of_three, shuffled
from tests.benchmarks.tuned_ridge import Regression


def histories(*given, order=None):
    items = np.concatenate([np.array(each, dtype=np.int64) for each in given])
    size = int(items.max()) + 1
    return Histories(np.cumsum([0, *map(len, given)]), items, np.arange(size) if order is None else np.array(order))


def test_pairs_and_last_items_are_compared_by_the_order_of_ids_within_a_user():
    found = histories([0, 1, 2, 1], [3, 3, 0], [2, 1])
    assert ascending_pairs(found) == pytest.approx(2 / 5)  # 01 12 up; 21 30 21 down; 33 is one item; none from user to user
    assert largest_of_three(found) == 0.0
    reverse = histories([0, 1, 2, 1], [3, 3, 0], [2, 1], order=[3, 2, 1, 0])
    assert ascending_pairs(reverse) == pytest.approx(3 / 5)
    assert largest_of_three(reverse) == pytest.approx(1 / 2)  # of the two users with three items, the second's


def test_three_neighbours_from_the_last_on_change_places_whatever_their_ids():
    given = [[5, 1, 2, 3, 0, 4, 2], [4, 5]]
    seen = {tuple(shuffled(histories(*given), seed).items.tolist()) for seed in range(200)}
    assert {each[0] for each in seen} == {5}
    assert {each[1:4] for each in seen} == set(permutations([1, 2, 3])) and {each[4:7] for each in seen} == set(permutations([0, 4, 2]))
    assert {each[7:] for each in seen} == {(4, 5), (5, 4)}


def test_direction_tells_what_comes_after_from_what_comes_before():
    """After 2 comes 3, for 9 users; before it comes 4, for 12: counts of both directions put 4 first, those of the right one do not see it."""
    rows = [[0, 1, 2, 3]] * 9 + [[1, 2, 3, 5, 0]] * 9 + [[4, 2, 5, 0]] * 12
    found = evaluate(histories(*rows), Ranking(following_window=1))
    assert (found.directed[:9] == 1).all()
    assert found.symmetric[:9] == pytest.approx(1 / np.log2(3))
    assert found.ascends.tolist() == [True] * 9 + [False] * 21


def test_ridge_ranks_what_goes_with_a_history_and_holds_out_what_it_is_asked_for():
    found = Regression(histories(*[[0, 1]] * 6, *[[0, 2]] * 3, [3, 0, 1, 2]), Ranking())
    assert found.items.tolist() == [0, 1] * 6 + [0, 2] * 3 + [3, 0] and len(found.whole) == 1
    # by the weights of 0 alone: 6 / (10 + 1) for item 1, 3 / 11 for item 2, 1 / 11 for item 3
    assert found.ranks(1.0, 1.0, 1).tolist() == [1], "1, after 3 and 0"
    assert found.ranks(1.0, 1.0, 0).tolist() == [1], "2, which alone is unseen"
    assert found.ranks(1.0, 1.0, 0, unseen=False).tolist() == [3], "behind 1, by 0, and 0, by 1"
