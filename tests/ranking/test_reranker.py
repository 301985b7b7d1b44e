import pytest
import torch

from qbert_ray.ranking.reranker import DESCRIBED, FEWEST, INPUTS, CandidateLists, Reranker, fit_reranker, reorder


def lists(users, best, candidates=12, seed=0):
    """Random candidates; `best` gives the column of the target by blended scores [V, C] and inputs [V, C, R]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(users, candidates, len(INPUTS), generator=generator)
    blended = inputs[..., 0] = inputs[..., 0].sort(descending=True).values
    description = torch.cat([torch.ones(users, 1), torch.randn(users, DESCRIBED, generator=generator)], dim=1)
    is_target = torch.zeros(users, candidates, dtype=torch.bool).scatter_(1, best(blended, inputs)[:, None], True)
    nothing = torch.zeros_like(is_target)
    return CandidateLists(blended, inputs, description, is_target, nothing, ~nothing)


def on_both(blended, inputs):
    """The target is the item of the largest product of two inputs, which no weighted sum expresses."""
    return (inputs[..., 3] * inputs[..., 4]).argmax(1)


def test_it_learns_what_no_weighted_sum_expresses():
    found = lists(1500, on_both)
    model, ndcg = fit_reranker(found, seed=0)
    assert model is not None and ndcg["reranked"] > ndcg["blended"] + 0.1
    fresh = lists(300, on_both, seed=1)
    with torch.no_grad():
        first = (fresh.blended + model(fresh.inputs, fresh.description)).argmax(1)
    assert fresh.is_target[torch.arange(300), first].float().mean() > 0.5


def test_chance_is_not_followed():
    model, ndcg = fit_reranker(lists(600, lambda blended, inputs: torch.zeros(600, dtype=torch.int64)), seed=0)
    assert model is None and ndcg["blended"] == 1.0


@pytest.mark.parametrize("users", [0, 1, FEWEST - 1])
def test_few_histories_prove_nothing(users):
    assert fit_reranker(lists(users, on_both), seed=0) == (None, {})


def test_targets_that_are_no_candidates_do_not_matter_to_the_fit():
    found = lists(200, on_both)
    model, ndcg = fit_reranker(found._replace(is_target=torch.zeros_like(found.is_target)), seed=0)
    assert model is None and ndcg["blended"] == ndcg["reranked"] == 0


def test_a_fit_is_repeatable_and_leaves_the_random_state_alone():
    found = lists(300, on_both)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, _ = fit_reranker(found, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second, _ = fit_reranker(found, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_without_a_fit_it_changes_nothing():
    assert (Reranker().eval()(torch.randn(2, 5, len(INPUTS)), torch.randn(2, 3)) == 0).all()


def test_existing_scores_are_reassigned_in_the_order_of_the_corrected_ones():
    values, corrected = torch.tensor([[9.0, 7, 5, 3]]), torch.tensor([[1.0, 4, 2, 3]])
    every = torch.ones(1, 4, dtype=torch.bool)
    assert reorder(values, corrected, every).tolist() == [[3, 9, 5, 7]]
    assert reorder(values, corrected, ~every).tolist() == values.tolist()
    second = torch.tensor([[True, False, True, True]])
    assert reorder(values, corrected, second).tolist() == [[3, 7, 5, 9]]  # the second, a cold item, keeps its score
    hidden = torch.tensor([[9.0, 7, -torch.inf, -torch.inf]])
    assert reorder(hidden, corrected, every).tolist() == [[7, 9, -torch.inf, -torch.inf]]


def test_items_that_are_not_moved_do_not_matter_to_the_fit():
    found = lists(300, on_both)
    moved = torch.arange(found.blended.shape[1]).expand_as(found.moved) < 8
    found = found._replace(moved=moved, is_target=found.is_target & moved)
    (one, _), (two, _) = (fit_reranker(each, seed=0) for each in (found, found._replace(blended=torch.where(moved, found.blended, 50.0))))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
