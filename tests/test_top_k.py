import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert_ray.top_k import better, hide, rank_pairs, ranks, top_k

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


def test_long_rows_with_many_ties_are_cut_as_a_plain_sort_does():
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (20, 1000))).float()
    scores[:, 500:] -= 4
    values, indices = top_k(scores, 7)
    for row, found in zip(scores.tolist(), indices.tolist(), strict=True):
        assert found == sorted(range(1000), key=lambda item: (-row[item], item))[:7]
    assert torch.equal(values, scores.gather(1, indices))


@settings(max_examples=60, deadline=None)
@given(scores_with_ties, st.integers(1, 12), st.lists(st.integers(1, 11), max_size=4))
def test_a_running_top_k_over_blocks_is_that_of_the_whole(rows, k, cuts):
    scores = torch.tensor(rows, dtype=torch.float32)
    scores[scores == 0] = -torch.inf  # hidden items
    edges = sorted({0, scores.shape[1], *(cut for cut in cuts if cut < scores.shape[1])})
    best = None
    for begin, end in zip(edges, edges[1:], strict=False):
        best = better(best, scores[:, begin:end], begin, k)
    expected = top_k(scores, k)
    assert torch.equal(best[0], expected[0]) and torch.equal(best[1], expected[1])


def test_ranks_among_the_unseen_are_those_of_hidden_scores():
    rng = np.random.default_rng(1)
    scores = torch.from_numpy(rng.integers(0, 5, (30, 20))).float()
    target, seen = torch.from_numpy(rng.integers(0, 20, 30)), [rng.integers(0, 20, size) for size in rng.integers(0, 9, 30)]
    found = rank_pairs(scores, target, seen)
    hidden = hide(scores, seen)
    hidden.scatter_(1, target[:, None], scores.gather(1, target[:, None]))
    assert torch.equal(found[:, 0], ranks(scores, target)) and torch.equal(found[:, 1], ranks(hidden, target))
    assert torch.equal(found[:, 1], ranks(scores, target, seen))
