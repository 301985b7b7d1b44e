import math

import numpy as np
import pytest
import torch

from qbert_ray.ranking.reranker import (
    DESCRIBED,
    FEWEST,
    INPUTS,
    CandidateLists,
    Reranker,
    candidate_inputs,
    fit_reranker,
    inputs_of,
    reorder,
)
from qbert_ray.ranking.score_features import SCORE_FEATURES
from tests.ranking.test_item_item import make_item_item


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
    found = lists(500, on_both)
    model, ndcg = fit_reranker(found, seed=0)
    assert model is not None and ndcg["reranked"] > ndcg["blended"] + 0.1
    fresh = lists(300, on_both, seed=1)
    with torch.no_grad():
        first = (fresh.blended + model(fresh.inputs, fresh.description)).argmax(1)
    assert fresh.is_target[torch.arange(300), first].float().mean() > 0.5


def test_chance_is_not_followed():
    model, ndcg = fit_reranker(lists(200, lambda blended, inputs: torch.zeros(200, dtype=torch.int64)), seed=0)
    assert model is None and ndcg["blended"] == 1.0


@pytest.mark.parametrize("users", [0, 1, FEWEST - 1])
def test_few_histories_prove_nothing(users):
    assert fit_reranker(lists(users, on_both), seed=0) == (None, {})


def test_targets_that_are_no_candidates_do_not_matter_to_the_fit():
    found = lists(200, on_both)
    model, ndcg = fit_reranker(found._replace(is_target=torch.zeros_like(found.is_target)), seed=0)
    assert model is None and ndcg["blended"] == ndcg["reranked"] == 0


def test_a_fit_is_repeatable_and_leaves_the_random_state_alone():
    found = lists(200, on_both)
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
    found = lists(200, on_both)
    moved = torch.arange(found.blended.shape[1]).expand_as(found.moved) < 8
    found = found._replace(moved=moved, is_target=found.is_target & moved)
    (one, _), (two, _) = (fit_reranker(each, seed=0) for each in (found, found._replace(blended=torch.where(moved, found.blended, 50.0))))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_what_a_candidate_is_described_by_is_read_by_name():
    rng = np.random.default_rng(3)
    model, histories = make_item_item(rng), [rng.choice(40, size) for size in (6, 2)]
    whole, last = model.features_and_last(histories)
    items = torch.tensor([[4, 9, 31], [0, 39, 9]])
    blended, sequence = torch.tensor([[5.0, 2.0, -torch.inf], [3.0, 1.0, 0.5]]), torch.randn(2, 3)
    popularity = torch.arange(40.0)
    found = candidate_inputs(blended, sequence, whole, last, popularity, items)
    assert found.shape == (2, 3, len(INPUTS))
    expected = {"blended": torch.tensor([[5.0, 2.0, 0.0], [3.0, 1.0, 0.5]]), "sequencer": sequence}  # a hidden item's score is no number
    for number, name in enumerate(SCORE_FEATURES[1:]):
        expected[name] = whole.dense()[number].gather(1, items)
        expected[f"last {name}"] = last.dense()[number].gather(1, items)
    expected["popularity"] = torch.tensor([[math.log(1 + item) for item in row] for row in items.tolist()])
    for number, name in enumerate(INPUTS):
        torch.testing.assert_close(found[..., number], expected[name], msg=name)


def test_of_the_last_item_alone_all_but_the_sequence_score_and_seen_items_are_read():
    found = inputs_of(("sequencer", "ridge", "text", "seen"))
    assert found == ("blended", "sequencer", "ridge", "text", "seen", "last ridge", "last text", "popularity")


def test_the_network_has_two_hidden_layers_and_one_correction():
    """Runs on disk hold weights of these sizes."""
    inputs = len(INPUTS) + DESCRIBED
    shapes = [tuple(layer.weight.shape) for layer in Reranker().layers if hasattr(layer, "weight")]
    assert shapes == [(32, inputs), (32, 32), (1, 32)]
    assert [layer.p for layer in Reranker(dropout=0.3).layers if hasattr(layer, "p")] == [0.3, 0.3]
    assert [layer.p for layer in Reranker().layers if hasattr(layer, "p")] == [0.2, 0.2]
