import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert_ray.top_k import add_to_seen, better, hide, pairs, rank_pairs, ranks, top_k

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


def test_what_is_added_to_repeats_counts_where_they_are_ranked():
    scores, target, seen = torch.tensor([[5.0, 4.0, 3.0, 2.0]] * 2), torch.tensor([2, 1]), [np.array([0, 0, 3]), np.array([0, 1])]
    assert rank_pairs(scores, target, seen).tolist() == [[3, 2], [2, 1]]
    assert rank_pairs(scores, target, seen, repeats=-2.5).tolist() == [[2, 2], [4, 1]]  # of 2.5, 4, 3, -.5, and of 2.5, 1.5, 3, 2


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


def plain_best(row, k):
    """(score, index) of the k best, the largest first, equal scores by index, hidden items as -1."""
    order = sorted(range(len(row)), key=lambda item: (-row[item], item))[:k]
    return [(row[item], -1 if row[item] == -np.inf else item) for item in order]


def found_by(pair):
    return [list(zip(scores, items, strict=True)) for scores, items in zip(pair[0].tolist(), pair[1].tolist(), strict=True)]


def test_a_block_changes_the_rows_that_it_has_something_better_for():
    """The first row has nothing above its third best, the second one item, the third more than four times as many as are kept."""
    rows = [[9.0, 8, 7, 7, 1, 0] + [2.0] * 14, [3.0, 2, 1, 5, 0, 0] + [0.0] * 14, [1.0, 1, 1, *(4.0 + n % 3 for n in range(17))]]
    scores = torch.tensor(rows)
    best = better(None, scores[:, :3], 0, 3)
    assert found_by(best) == [plain_best(row[:3], 3) for row in rows]
    for width in (1, 4, 17):
        best = better(None, scores[:, :3], 0, 3)
        for begin in range(3, 20, width):
            best = better(best, scores[:, begin : begin + width], begin, 3)
        assert found_by(best) == [plain_best(row, 3) for row in rows]


def test_blocks_smaller_than_the_list_fill_it_up():
    rows = [[1.0, 5, 5, 2, 7], [4.0, 4, 4, 4, 4], [0.0, -np.inf, 3, -np.inf, 1]]
    scores, best = torch.tensor(rows), None
    for begin in range(5):
        best = better(best, scores[:, begin : begin + 1], begin, 4)
        assert found_by(best) == [plain_best(row[: begin + 1], 4) for row in rows]


def test_a_catalog_of_groups_and_a_rest_is_cut_as_a_plain_sort_does():
    """32 neighbours make a group; the rest, and equal scores in different groups, count as all others do."""
    rng = np.random.default_rng(3)
    for size, k in ((32 * 41 + 5, 10), (32 * 41, 10), (32 * 40 + 31, 10), (700, 5)):
        scores = torch.from_numpy(rng.integers(0, 40, (6, size))).float()
        scores[0, -3:] = 99.0
        scores[1] = 1.0
        scores[2, ::2] = -torch.inf
        scores[3] = torch.arange(size)
        assert found_by(top_k(scores, k)) == [plain_best(row, k) for row in scores.tolist()]


def test_equal_scores_before_the_target_count_and_those_after_it_do_not():
    scores = torch.tensor([[2.0, 3, 2, 2, 1], [5.0, 1, 1, 1, 1]])
    assert ranks(scores, torch.tensor([2, 0])).tolist() == [3, 1]
    assert ranks(scores, torch.tensor([3, 4])).tolist() == [4, 5]
    assert ranks(scores, torch.tensor([3, 4]), seen=[np.array([0, 1, 1]), np.array([], int)]).tolist() == [2, 5]
    assert rank_pairs(scores, torch.tensor([3, 4]), [np.array([0, 1, 3, 4]), np.array([1, 2])]).tolist() == [[4, 2], [5, 3]]


def test_a_pair_of_user_and_item_is_there_once():
    user, item = pairs([np.array([3, 1, 3]), np.array([], int), np.array([0])], 4)
    assert user.tolist() == [0, 0, 2] and item.tolist() == [1, 3, 0]
    nothing = pairs([np.array([], int)], 4)
    assert [each.tolist() for each in nothing] == [[], []]
    assert hide(torch.ones(2, 3), [np.array([2]), np.array([], int)]).tolist() == [[1, 1, -np.inf], [1, 1, 1]]


def test_more_items_than_there_are_are_not_asked_for():
    values, indices = top_k(torch.tensor([[1.0, 2.0]]), 5)
    assert values.tolist() == [[2, 1]] and indices.tolist() == [[1, 0]]


def test_a_value_is_added_once_to_each_seen_item():
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert add_to_seen(scores, [np.array([2, 2, 0]), np.zeros(0, np.int64)], -1.5).tolist() == [[-0.5, 2, 1.5], [4, 5, 6]]
    assert scores.tolist() == [[1, 2, 3], [4, 5, 6]]
