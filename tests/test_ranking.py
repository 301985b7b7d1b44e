import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert_ray.ranking import hide, ranks, top_k

scores_with_ties = st.integers(2, 12).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=5)
)


@settings(max_examples=80, deadline=None)
@given(scores_with_ties)
def test_ranks_equal_a_plain_sort(rows):
    scores = torch.tensor(rows, dtype=torch.float32)
    for target in range(scores.shape[1]):
        got = ranks(scores, torch.full((len(rows),), target))
        for row, values in enumerate(rows):
            order = sorted(range(len(values)), key=lambda item: (-values[item], item))
            assert got[row] == order.index(target) + 1


@settings(max_examples=80, deadline=None)
@given(scores_with_ties, st.integers(1, 12))
def test_top_k_equals_a_plain_sort(rows, k):
    values, indices = top_k(torch.tensor(rows, dtype=torch.float32), k)
    for row, scores in enumerate(rows):
        order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))[:k]
        assert indices[row].tolist() == order
        assert values[row].tolist() == [scores[item] for item in order]


def test_seen_items_leave_the_ranking_but_a_seen_target_stays():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    assert ranks(scores, torch.tensor([2])).tolist() == [3]
    assert ranks(scores, torch.tensor([2]), seen=[np.array([0, 1])]).tolist() == [1]
    assert ranks(scores, torch.tensor([2]), seen=[np.array([0, 2])]).tolist() == [2]


def test_hidden_items_are_not_recommended():
    values, indices = top_k(hide(torch.tensor([[5.0, 4.0, 3.0]]), [np.array([0, 2])]), 3)
    assert indices.tolist() == [[1, -1, -1]]
    assert values[0, 0] == 4.0
