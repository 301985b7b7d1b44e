"""The reranker's gain is that of histories it was not fitted on, recomputed in plain loops."""

import math

import pytest
import torch

from qbert_ray.ranking import reranker
from qbert_ray.ranking.reranker import FEWEST, CandidateLists, Reranker, fit_reranker

USERS, CANDIDATES = 160, 12


def noisy():
    """Targets that follow a product of two inputs most of the time, some of them no candidates; a few candidates are seen or fixed."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(USERS, CANDIDATES, len(reranker.INPUTS), generator=generator)
    blended = inputs[..., 0] = inputs[..., 0].sort(descending=True).values
    description = torch.cat([torch.ones(USERS, 1), torch.randn(USERS, 2, generator=generator)], dim=1)
    target = (inputs[..., 3] * inputs[..., 4]).argmax(1)
    target[::3] = torch.randint(CANDIDATES, (len(target[::3]),), generator=generator)
    is_target = torch.zeros(USERS, CANDIDATES, dtype=torch.bool).scatter_(1, target[:, None], True)
    is_target[5::20] = False
    seen, fixed = (torch.rand(is_target.shape, generator=generator) < 0.1 for _ in range(2))
    return CandidateLists(blended, inputs, description, is_target, seen & ~is_target, ~fixed | is_target)


def plain_ndcg(scores, found, row):
    """1 / log2(rank + 1) within ten among unseen items that move; 0 for a target that is no candidate."""
    targets = [place for place, is_target in enumerate(found.is_target[row].tolist()) if is_target]
    if not targets:
        return 0.0
    own = scores[targets[0]]
    open_places = zip(scores, found.seen[row].tolist(), found.moved[row].tolist(), strict=True)
    rank = 1 + sum(score > own and not seen and moved for score, seen, moved in open_places)
    return 1 / math.log2(rank + 1) if rank <= 10 else 0.0


def rows_of(fold):
    """Histories to fit on, and those of the fold."""
    return [row for row in range(USERS) if row % 5 != fold], list(range(fold, USERS, 5))


def test_each_fifth_is_ranked_by_what_was_fitted_on_the_others():
    found = noisy()
    _, gains = fit_reranker(found, seed=3)
    torch.manual_seed(3)
    blended, reranked = [], []
    for fold in range(5):
        own, other = (CandidateLists(*(each[rows] for each in found)) for rows in rows_of(fold))
        model = reranker._fit(own)
        with torch.no_grad():
            corrected = (other.blended + model(other.inputs, other.description)).tolist()
        for row, scores in enumerate(corrected):
            blended.append(plain_ndcg(other.blended[row].tolist(), other, row))
            reranked.append(plain_ndcg(scores, other, row))
    differences = [after - before for before, after in zip(blended, reranked, strict=True)]
    mean = sum(differences) / USERS
    deviation = math.sqrt(sum((each - mean) ** 2 for each in differences) / (USERS - 1))
    assert gains["blended"] == pytest.approx(sum(blended) / USERS, abs=1e-6)
    assert gains["reranked"] == pytest.approx(sum(reranked) / USERS, abs=1e-6)
    assert gains["error"] == pytest.approx(deviation / math.sqrt(USERS), abs=1e-6)
    assert any(differences)


@pytest.mark.parametrize(("gain", "kept"), [(0.03, True), (0.0, False), (-0.03, False)])
def test_it_is_kept_where_its_gain_is_larger_than_the_error_of_it(gain, kept, monkeypatch):
    blended = torch.linspace(0.1, 0.5, USERS // 5)
    noise = 0.1 * torch.sin(torch.arange(USERS // 5).float())
    monkeypatch.setattr(reranker, "_gains", lambda model, found: (blended, blended + gain + noise - noise.mean()))
    model, found = fit_reranker(noisy(), seed=0)
    assert found["error"] == pytest.approx(float(noise.repeat(5).std() / USERS**0.5), rel=1e-4) and 0 < found["error"] < 0.03
    assert (model is not None) == kept


def test_a_hundred_histories_are_enough():
    assert FEWEST == 100
    whole = noisy()
    assert fit_reranker(CandidateLists(*(each[:100] for each in whole)), seed=0)[1]
    assert fit_reranker(CandidateLists(*(each[:99] for each in whole)), seed=0) == (None, {})


def test_inputs_are_standardised_by_what_was_fitted_on():
    found = noisy()
    inputs = found.inputs.clone()
    inputs[..., 2] = 7.0  # says nothing
    inputs[..., 3] = 5 + 40 * inputs[..., 3]
    model = reranker._fit(found._replace(inputs=inputs))
    fitted = found.is_target.any(1)
    joined = torch.cat([inputs, found.description[:, None, 1:].expand(-1, CANDIDATES, -1)], dim=2)[fitted]
    assert torch.allclose(model.centre, joined.mean((0, 1)), atol=1e-4)
    spread = joined.std((0, 1))
    spread[2] = 1
    assert torch.allclose(model.spread, spread, rtol=1e-4)
    assert not model.training


def test_corrections_are_those_of_the_standardised_inputs():
    torch.manual_seed(0)
    model, inputs, description = Reranker().eval(), torch.randn(2, 5, len(reranker.INPUTS)), torch.randn(2, 3)
    torch.nn.init.normal_(model.layers[-1].weight)
    model.centre.normal_()
    model.spread.uniform_(1, 2)
    with torch.no_grad():
        found = model(inputs, description)
        for row in range(2):
            for place in range(5):
                joined = torch.cat([inputs[row, place], description[row, 1:]])
                assert torch.allclose(found[row, place], model.layers((joined - model.centre) / model.spread)[0], atol=1e-5)
