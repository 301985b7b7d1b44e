from itertools import pairwise

import numpy as np
import pytest
import torch

from qbert_ray.ranking import blend as blend_module
from qbert_ray.ranking import item_item
from qbert_ray.ranking.blend import (
    SHRINKAGES,
    START,
    Blend,
    BlendedScores,
    Candidates,
    Shrinkage,
    _ndcg,
    blended_at,
    candidates,
    choose_shrinkage,
    describe,
    fit_blend,
    join_candidates,
    no_candidates,
    sequence_alone,
    without_network,
)
from qbert_ray.ranking.score_features import SCORE_FEATURES
from qbert_ray.top_k import hide
from tests.ranking.test_item_item import make_item_item, means_of_two


def sample(rng, follows, users=400, num_items=40, cold=0):
    """Histories whose target `follows(scores, features)` gives, as the fit sees them; the last items are simulated cold ones."""
    model = make_item_item(rng, num_items)
    histories = [rng.choice(num_items, 5, replace=False) for _ in range(users)]
    features, scores = model.features(histories).dense(), torch.from_numpy(rng.standard_normal((users, num_items))).float()
    target = follows(scores, features)
    is_cold = torch.arange(num_items) >= num_items - cold
    return candidates(scores, features, torch.full((users,), 5), target, is_cold, model.available, 20)


def only(found, users):
    return Candidates(*(each[:users] for each in found))


def by(name):
    return lambda scores, features: (features[SCORE_FEATURES.index(name) - 1] - 100 * features[-1]).argmax(1)


def test_the_blend_weights_what_predicts():
    from_scores = fit_blend(sample(np.random.default_rng(3), lambda scores, features: scores.argmax(1)))
    ridge, sequencer = SCORE_FEATURES.index("ridge"), SCORE_FEATURES.index("sequencer")
    from_ridge = fit_blend(sample(np.random.default_rng(3), by("ridge")))
    assert from_ridge.weights[0, ridge] > 3 * from_scores.weights[0, ridge]
    assert from_scores.weights[0, sequencer] > 3 * from_ridge.weights[0, sequencer]
    assert from_ridge.weights[0, SCORE_FEATURES.index("seen")] < -1  # no target was seen before
    from_text = fit_blend(sample(np.random.default_rng(3), by("text")))
    assert from_text.weights[0, SCORE_FEATURES.index("text")] > 3 > abs(from_ridge.weights[0, SCORE_FEATURES.index("text")])


def test_cold_items_have_weights_of_their_own():
    """Targets are the trained item of the largest score or, for every other history, the cold item with the nearest text."""

    def follows(scores, features):
        trained, text = scores[:, :30].argmax(1), 30 + features[SCORE_FEATURES.index("text") - 1, :, 30:].argmax(1)
        return torch.where(torch.arange(len(scores)) % 2 == 0, trained, text)

    blend = fit_blend(sample(np.random.default_rng(6), follows, users=1000, cold=10))
    trained, cold = blend.weights[0, : len(SCORE_FEATURES)], blend.weights[0, len(SCORE_FEATURES) : -1]
    sequencer, text = SCORE_FEATURES.index("sequencer"), SCORE_FEATURES.index("text")
    assert trained[sequencer] > 3 * cold[sequencer] and cold[text] > 3 * abs(trained[text])


def test_features_that_are_not_there_are_not_used():
    blend = fit_blend(sample(np.random.default_rng(3), by("text")))
    assert blend.used() == ["sequencer", "ridge", "following", "text", "seen"]


def test_a_blend_without_network_reads_item_item_weights_text_and_seen_items_alone():
    """Whatever the sequence model and the fused embeddings say, the fit and its scores are the same."""
    found = sample(np.random.default_rng(3), by("text"))
    networks = [SCORE_FEATURES.index(name) for name in ("sequencer", "content", "image")]
    other = found._replace(features=found.features.clone())
    other.features[..., networks] = torch.randn(*found.repeated.shape, 3)
    one, two = (fit_blend(without_network(each)) for each in (found, other))
    assert torch.equal(one.weights, two.weights)
    assert one.weights[0, SCORE_FEATURES.index("text")] > 3
    unread = [place + shift for place in networks[1:] for shift in (0, len(SCORE_FEATURES))]
    assert not one.weights[:, unread].any()
    assert found.features[..., networks[0]].any()  # the candidates of the model's own blend are not changed


def gradient_of_objective(found, blend):
    """The objective again: mean cross-entropy of targets among candidates that come once, and the squared distance from the start."""
    count, users = len(SCORE_FEATURES), len(found.target)
    weights = blend.weights.double().requires_grad_()
    unit = found.features[~found.repeated].double().std(0, unbiased=False)
    unit = torch.where(unit > 1e-6, unit, 1.0)
    unit = torch.cat([unit, unit, torch.ones(1)])
    start = torch.zeros(3, 2 * count + 1, dtype=torch.float64)
    start[0, :-1] = torch.tensor([*START, *START])
    objective = (1e-3 + 1 / users) * ((weights - start) * unit).square().sum()
    described = ((found.description - blend.centre) / blend.spread).double()
    for row in range(users):
        once = ~found.repeated[row]
        features, cold, own = found.features[row, once].double(), found.cold[row, once], described[row] @ weights
        scores = torch.where(cold, features @ own[count:-1] + own[-1], features @ own[:count])
        place = int(once[: found.target[row]].sum())
        objective = objective - scores.log_softmax(0)[place] / users
    (gradient,) = torch.autograd.grad(objective, weights)
    assert (blend.weights - start).abs().max() > 0.1
    return gradient / unit


def test_a_fit_is_where_the_gradient_of_its_objective_is_zero():
    found = sample(np.random.default_rng(6), by("text"), users=80, cold=10)
    assert gradient_of_objective(found, fit_blend(found)).abs().max() < 0.01
    assert found.cold[torch.arange(len(found.target)), found.target].any()


def test_a_fit_to_a_handful_of_candidates_has_that_objective_too():
    """Six candidates: how their spread is estimated matters here."""
    features = torch.randn(2, 3, len(SCORE_FEATURES), generator=torch.Generator().manual_seed(1))
    rows, description = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[1.0, 0.5, 0.2], [1.0, 1.5, 0.1]])
    found = Candidates(features, rows, rows.clone(), torch.tensor([2, 0]), description)
    assert gradient_of_objective(found, fit_blend(found)).abs().max() < 0.001


def test_without_cold_candidates_the_weights_of_cold_items_are_those_of_the_start():
    """To the last digit: what is not read must not look as if it had been fitted."""
    blend, count = fit_blend(sample(np.random.default_rng(3), by("text"), users=60)), len(SCORE_FEATURES)
    assert torch.equal(blend.weights[0, count:-1], torch.tensor(START)) and not blend.weights[1:, count:].any()


def test_targets_are_ranked_among_candidates_that_the_history_does_not_hold():
    """By the sequence model's score alone the target, of score 1, comes after 3 and 2; 5 is in the history, and 4 stands there twice."""
    scores = torch.tensor([[3.0, 1.0, 5.0, 2.0, 4.0]])
    features = torch.zeros(1, 5, len(SCORE_FEATURES))
    features[..., 0], features[0, 2, -1] = scores, 1
    rows = torch.zeros(1, 5, dtype=torch.bool)
    found = Candidates(features, rows, rows.clone(), torch.tensor([1]), torch.tensor([[1.0, 0.0, 0.0]]))
    found.repeated[0, 4] = True
    assert _ndcg(sequence_alone(), found) == pytest.approx([1 / np.log2(4)])


def test_shrinkage_is_what_ranks_the_targets_of_the_other_half_best(monkeypatch):
    """The blend of a shrinkage ranks as the value that is given here: the largest sum over both halves wins, of equal ones the first."""
    given = {SHRINKAGES[1]: (0.1, 0.4), SHRINKAGES[2]: (0.4, 0.2), SHRINKAGES[4]: (0.2, 0.4)}
    halves = [only(sample(np.random.default_rng(3), by("text")), 20) for _ in range(2)]
    monkeypatch.setattr(blend_module, "fit_blend", lambda half, shrinkage: (shrinkage, half is halves[0]))
    asked = []

    def ndcg(blend, half):
        shrinkage, of_first = blend
        asked.append(of_first != (half is halves[0]))
        return np.full(2, given.get(shrinkage, (0.0, 0.0))[half is halves[0]])

    monkeypatch.setattr(blend_module, "_ndcg", ndcg)
    assert choose_shrinkage(halves) == SHRINKAGES[2]
    assert all(asked) and len(asked) == 2 * len(SHRINKAGES)


def test_without_targets_in_both_halves_the_first_shrinkage_is_taken():
    half = only(sample(np.random.default_rng(3), by("text")), 20)
    assert choose_shrinkage([half, no_candidates()]) == choose_shrinkage([]) == SHRINKAGES[0]


def test_a_stronger_shrinkage_keeps_the_blend_nearer_to_the_start():
    found = sample(np.random.default_rng(3), by("text"))
    start = fit_blend(no_candidates()).weights
    unit = found.features[~found.repeated].std(0, unbiased=False)
    unit = torch.cat([unit, unit, torch.ones(1)])
    blends = [fit_blend(found, Shrinkage(constant, dependence)) for constant, dependence in ((1, 1), (1, 1000), (100, 1000), (1e7, 1e7))]
    constant = [float(((blend.weights - start) * unit)[0].norm()) for blend in blends]
    dependence = [float((blend.weights * unit)[1:].norm()) for blend in blends]
    assert dependence[0] > 5 * dependence[1] and constant[1] > 2 * constant[2] > constant[3]
    assert constant[3] < 1e-3


def plainly_blended(blend, sequence, features, lengths, trained):
    """[B, N] scores by the definition: every feature as a dense array, its weights for each item and history."""
    all_weights = blend.weights_for(describe(features[0].amax(1), lengths))
    cold, count = torch.arange(features.shape[2]) >= trained, len(SCORE_FEATURES)
    each = torch.cat([sequence[None], features])  # [F, B, N]
    weights = torch.where(cold, all_weights[:, count : 2 * count, None], all_weights[:, :count, None]).transpose(0, 1)
    return (each * weights).sum(0) + cold * all_weights[:, -1:]


@pytest.mark.parametrize("kept", [True, False], ids=["kept products", "products"])
@pytest.mark.parametrize("blocks", [[40], [30, 40], [7, 30, 40], [30, 33, 40]], ids=str)
def test_the_blend_block_by_block_is_the_plain_one(blocks, kept, monkeypatch):
    """Sparse and blocked against dense and whole: within 1e-5 of scores of size 10."""
    monkeypatch.setattr(item_item, "MOST_PAIRS", 40**2 if kept else 0)
    rng = np.random.default_rng(4)
    blend = fit_blend(sample(rng, by("text"), cold=4))
    trained = 30 if len(blocks) > 1 else 40
    histories = [rng.choice(40, size) for size in (1, 0, 25, 5, 12)]  # with repetitions
    sequence, lengths = torch.randn(5, 40), torch.tensor([len(history) for history in histories])
    model = make_item_item(np.random.default_rng(4), cold=means_of_two(trained) if trained < 40 else None)
    features = model.features(histories)
    expected = plainly_blended(blend, sequence, features.dense(), lengths, trained)
    slices = [slice(begin, end) for begin, end in pairwise([0, *blocks])]
    for hidden in (False, True):
        blended = BlendedScores(features, blend.weights_for(describe(features.strongest, lengths)), slices, trained, hidden)
        found = torch.cat([blended.of(sequence[:, block].clone(), block) for block in slices], dim=1)
        torch.testing.assert_close(found, hide(expected, histories) if hidden else expected, atol=1e-5, rtol=0)


def test_without_data_the_blend_is_the_start():
    found = sample(np.random.default_rng(5), lambda scores, features: scores.argmax(1))
    assert torch.isfinite(fit_blend(only(found, 1)).weights).all()
    for none in (only(found, 0), no_candidates()):
        weights = fit_blend(none).weights_for(found.description)
        assert weights.unique(dim=0).tolist() == [pytest.approx([*START, *START, 0])]


def test_an_item_that_is_a_candidate_twice_counts_once():
    scores, features = torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(len(SCORE_FEATURES) - 1, 1, 3)
    found = candidates(scores, features, torch.tensor([1]), torch.tensor([1]), torch.tensor([False, False, True]), [0, 1, 2], 3)
    assert found.features.shape == (1, 12, len(SCORE_FEATURES)) and len(found.target) == 1
    assert (~found.repeated).sum() == 3 and found.cold[~found.repeated].sum() == 1
    assert not found.repeated[0, found.target[0]]
    nowhere = candidates(scores, features, torch.tensor([1]), torch.tensor([2]), torch.zeros(3, dtype=torch.bool), [0], 2)
    assert len(nowhere.target) == 0  # its target is not among the two best


def test_weights_are_linear_in_the_description_up_to_three_deviations():
    weights = torch.zeros(3, 2 * len(SCORE_FEATURES) + 1)
    weights[:, 0] = torch.tensor([1.0, 10.0, 100.0])
    blend = Blend(weights, torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 0.5, 2.0]))
    found = blend.weights_for(torch.tensor([[1.0, 2.5, 4.0], [1.0, 9.0, 50.0], [1.0, -9.0, -50.0]]))
    assert found[:, 0].tolist() == [1 + 10 - 50, 1 + 30 + 300, 1 - 30 - 300]
    assert not found[:, 1:].any()


def test_a_history_is_described_by_one_its_length_and_its_largest_ridge_feature():
    found = describe(torch.tensor([0.5, 0.0]), torch.tensor([8, 0]))
    assert found.tolist() == [pytest.approx([1, np.log(8), 0.5]), [1, 0, 0]]  # an empty history is as one of a single item


def test_descriptions_are_standardised_by_what_the_blend_was_fitted_on():
    found = sample(np.random.default_rng(3), by("text"))
    users = len(found.target)
    described = np.stack([np.ones(users), np.arange(users), np.linspace(0, 1e-3, users)], axis=1)
    blend = fit_blend(found._replace(description=torch.from_numpy(described).float()))
    assert blend.centre.tolist() == pytest.approx([0, *described.mean(0)[1:]], rel=1e-4)
    assert blend.spread.tolist() == pytest.approx([1, *described.std(0)[1:]], rel=1e-4)


def test_items_are_scored_by_the_weights_of_their_kind():
    """A trained item of features 1 and 2, a cold one of 3 and 4; the bias and the bonus are of cold items alone."""
    features, weights = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[10.0, 1.0, 100.0, 0.5, 7.0]])
    cold = torch.tensor([[False, True]])
    assert blended_at(features, weights, cold).tolist() == [[10 + 2, 300 + 2 + 7]]
    assert blended_at(features, weights, cold, bonus=0.25).tolist() == [[12, 309.25]]


def test_the_sequence_model_alone_ranks_trained_and_cold_items_by_its_scores():
    features = torch.randn(2, 5, 3)
    weights = sequence_alone(3).weights_for(describe(torch.tensor([0.4, 9.0]), torch.tensor([1, 50])))
    assert torch.equal(blended_at(features, weights, torch.tensor([[False, True, False, True, False]] * 2)), features[..., 0])
    assert sequence_alone(3, -2.0).weights[0].tolist() == [1, 0, -2, 1, 0, -2, 0]  # "seen" is the last score feature
    assert sequence_alone().weights.shape == (3, 2 * len(SCORE_FEATURES) + 1) and sequence_alone().num_features == len(SCORE_FEATURES)


@pytest.mark.parametrize("blocks", [[40], [7, 30, 40]], ids=str)
def test_a_penalty_is_added_to_the_scores_of_every_history(blocks):
    rng = np.random.default_rng(4)
    blend, histories = fit_blend(sample(rng, by("text"), users=40, cold=4)), [rng.choice(40, 5), rng.choice(40, 2)]
    features = make_item_item(np.random.default_rng(4), cold=means_of_two(30)).features(histories)
    weights, sequence = blend.weights_for(describe(features.strongest, torch.tensor([5, 2]))), torch.randn(2, 40)
    penalty = torch.where(torch.arange(40) % 3 == 0, -torch.inf, 0.0)
    penalty[4] = -0.5
    slices = [slice(begin, end) for begin, end in pairwise([0, *blocks])]
    plain, lowered = (
        torch.cat([BlendedScores(features, weights, slices, 30, penalty=each).of(sequence[:, block].clone(), block) for block in slices], 1)
        for each in (None, penalty)
    )
    torch.testing.assert_close(lowered, plain + penalty)


def test_candidates_are_the_best_by_each_score_and_half_as_many_cold_ones():
    """By the sequence model 0 and 1 and, of the cold items, 3; by ridge 5 and 4 and, of the cold ones, 5 again."""
    sequence = torch.tensor([[5.0, 4, 3, 2, 1, 0]])
    features = torch.zeros(len(SCORE_FEATURES) - 1, 1, 6)
    features[0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.9])
    cold = torch.tensor([False] * 3 + [True] * 3)
    found = candidates(sequence, features, torch.tensor([8]), torch.tensor([5]), cold, [0, 1], 2)
    assert found.features[0, :, 1].tolist() == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.9, 0.9])
    assert torch.equal(found.features[0, :, 0], sequence[0, [0, 1, 3, 4, 5, 5]])
    assert found.cold.tolist() == [[False, False, True, True, True, True]]
    assert found.repeated.tolist() == [[False] * 5 + [True]]
    assert found.target.tolist() == [4] and found.description.tolist() == [pytest.approx([1, np.log(8), 0.9])]
    few = candidates(sequence, features, torch.tensor([8]), torch.tensor([0]), torch.arange(6) == 5, [0], 20)  # of a catalog of six
    assert few.features.shape[1] == 6 + 1 and few.repeated.sum() == 1


def test_cold_items_are_ranked_as_high_as_the_blend_was_fitted_to_rank_them():
    """The bias of cold items is best where they get as much of the softmax as they have targets, by the scores that are ranked."""
    generator, users, count = torch.Generator().manual_seed(0), 400, 40
    sequence = 2 * torch.randn(users, count, generator=generator) + 8  # far from the logarithm of a probability
    features = torch.zeros(len(SCORE_FEATURES) - 1, users, count)
    features[0] = torch.rand(users, count, generator=generator)
    cold = torch.arange(count) % 5 == 0
    noise = -(-torch.rand(users, count, generator=generator).log()).log()  # so that targets are drawn by a softmax
    target = ((sequence - 8) * torch.where(cold, 0.5, 1.0) + noise).argmax(1)  # of cold items the sequence model knows less
    lengths = torch.full((users,), 5)
    weights = fit_blend(candidates(sequence, features, lengths, target, cold, [0, 1], count)).weights_for(
        describe(features[0].amax(1), lengths)
    )
    ranked = torch.cat([sequence[None], features]).permute(1, 2, 0)
    share = blended_at(ranked, weights, cold.expand(users, count)).softmax(1)[:, cold].sum(1).mean().item()
    assert share == pytest.approx(cold[target].float().mean().item(), abs=0.02)


def test_candidates_of_groups_of_histories_are_joined():
    rng = np.random.default_rng(3)
    found = sample(rng, by("text"), users=30)
    joined = join_candidates([only(found, 10), no_candidates(), Candidates(*(each[10:] for each in found))])
    assert all(torch.equal(own, whole) for own, whole in zip(joined, found, strict=True))
    nothing = join_candidates([no_candidates(9), no_candidates(9)])
    assert nothing.features.shape == (0, 0, 9) and nothing.description.shape == (0, 3) and len(nothing.target) == 0


def test_score_features_that_are_further_than_the_known_ones_start_at_zero():
    blend = fit_blend(no_candidates(9))
    assert blend.weights[0].tolist() == pytest.approx([*START, 0, 0, *START, 0, 0, 0]) and not blend.weights[1:].any()
    assert blend.num_features == 9 and blend.centre.tolist() == [0] * 3 and blend.spread.tolist() == [1] * 3
