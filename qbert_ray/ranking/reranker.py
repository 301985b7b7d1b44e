"""The reranker: a small network that reorders the best candidates of a history. Beyond the paper.

The blend is a weighted sum; how much a score feature should count also depends on the others, on how popular an item is, and on the
features of the last item alone. So the best C items by the blend get a correction each, fitted like the blend on validation items. All
other items keep their order behind them. The reranker is kept only where it helps: each fifth of the users is ranked by what was
fitted on the others, and compared with the blend.

Shapes: B histories, C candidates, R inputs per candidate, P numbers that describe a history, V validation histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import Linear
from qbert_ray.ranking.score_features import SCORE_FEATURES, ScoreFeatures


def inputs_of(names: Sequence[str]) -> tuple[str, ...]:
    """[R] names of what is read of a candidate, from those of the score features."""
    return ("blended", *names, *(f"last {name}" for name in names[1:-1]), "popularity")


INPUTS = inputs_of(SCORE_FEATURES)
DESCRIBED = 2  # numbers of a description that are read: the logarithm of the length, the largest ridge feature
BATCH, EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 64, 16, 5e-3, 1e-2
FEWEST = 100  # histories below which no gain can be shown
FOLDS = 5  # of cross-fitting: halves say too little of what all histories give (scientific: +.0003 of ndcg@10 by halves, +.0008 by fifths)


class Reranker(nn.Module):
    """Corrections of the blended scores of candidates.

    Of a candidate it reads the blended score, its features for the whole history and those for the last item alone. Nothing of the other
    candidates: the order of two items must not depend on a third.

    Args:
        width: of both hidden layers.
        dropout: rate after each of them.
        num_features: F.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, width: int = 32, dropout: float = 0.2, num_features: int = len(SCORE_FEATURES)) -> None:
        super().__init__()
        self.num_features = num_features
        inputs = 2 * num_features + DESCRIBED
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        hidden = [Linear(inputs, width), nn.GELU(), nn.Dropout(dropout), Linear(width, width), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*hidden, Linear(width, 1))
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)  # without a fit it changes nothing

    def forward(self, inputs: Tensor, description: Tensor) -> Tensor:
        """What is added to the blended scores.

        Args:
            inputs: [B, C, R] of `candidate_inputs`.
            description: [B, P] of `blend.describe`.

        Returns:
            [B, C].
        """
        return self.layers((_joined(inputs, description) - self.centre) / self.spread)[..., 0]


class CandidateLists(NamedTuple):
    """What a reranker is fitted on: the best candidates of validation histories."""

    blended: Tensor  # [V, C] scores, falling
    inputs: Tensor  # [V, C, R]
    description: Tensor  # [V, P]
    is_target: Tensor  # [V, C]
    seen: Tensor  # [V, C] whether the history holds the item
    moved: Tensor  # [V, C] whether it may change its place: cold items do not


def candidate_inputs(
    blended: Tensor, sequence: Tensor, features: ScoreFeatures, last_item: ScoreFeatures, popularity: Tensor, items: Tensor
) -> Tensor:
    """[B, C, R] what a reranker reads of each candidate, in the order of `inputs_of`.

    Args:
        blended: [B, C] scores by the blend.
        sequence: [B, C] scores by the sequence model.
        features: of the whole histories.
        last_item: of their last items alone.
        popularity: [N] training interactions of each item.
        items: [B, C] item_index of the candidates.
    """
    finite = blended.masked_fill(blended.isinf(), 0)  # hidden items, which stay hidden
    both = torch.cat([features.at(items), last_item.at(items)[..., :-1]], dim=2).to(blended.device)
    return torch.cat([torch.stack([finite, sequence], dim=2), both, popularity[items].log1p()[..., None]], dim=2)


def reorder(values: Tensor, corrected: Tensor, moved: Tensor) -> Tensor:
    """Scores of candidates in the order of the corrected ones: the existing scores are reassigned, so the other items keep their ranks.

    Args:
        values: [B, C] scores, falling along a row.
        corrected: [B, C] scores that say the new order.
        moved: [B, C] items that may change their places; the others keep their scores.

    Returns:
        [B, C] of the same candidates.
    """
    moved = moved & values.isfinite()  # hidden items stay hidden
    by_correction = corrected.masked_fill(~moved, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = (~moved).long().argsort(dim=1, stable=True)  # those of moved items first, from the best on; then the others, as above
    return torch.empty_like(values).scatter_(1, by_correction, values.gather(1, places))


def fit_reranker(lists: CandidateLists, seed: int) -> tuple[Reranker | None, dict[str, float]]:
    """The reranker under which targets come first, by softmax among the candidates; None where it does not help.

    Returns:
        The reranker; and, each fold of the histories ranked by what was fitted on the others, ndcg@10 among unseen items: "blended",
        "reranked", and the "error" of their difference, its standard error over histories.
    """
    users = len(lists.blended)
    if users < FEWEST:
        return None, {}
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        fold = torch.arange(users) % FOLDS
        gains = [_gains(_fit(_some(lists, fold != number)), _some(lists, fold == number)) for number in range(FOLDS)]
        blended, reranked = (torch.cat(pieces) for pieces in zip(*gains, strict=True))
        error = float((reranked - blended).std() / users**0.5)
        found = {"blended": float(blended.mean()), "reranked": float(reranked.mean()), "error": error}
        return (_fit(lists) if found["reranked"] - found["blended"] > error else None), found


def _some(lists: CandidateLists, chosen: Tensor) -> CandidateLists:
    """Those of the histories that are chosen [V]."""
    return CandidateLists(*(tensor[chosen] for tensor in lists))


def _fit(lists: CandidateLists) -> Reranker:
    lists = _some(lists, lists.is_target.any(1))
    target = lists.is_target.int().argmax(1)
    model = Reranker(num_features=lists.inputs.shape[2] // 2)
    if not len(target):
        return model.eval()
    joined = _joined(lists.inputs, lists.description)
    model.centre.copy_(joined.mean((0, 1)))
    spread = joined.std((0, 1))
    model.spread.copy_(torch.where(spread > 1e-6, spread, 1))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(target) // BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(target)).split(BATCH):
            scores = lists.blended[rows] + model(lists.inputs[rows], lists.description[rows])
            optimizer.zero_grad()
            F.cross_entropy(scores.masked_fill(~lists.moved[rows], -torch.inf), target[rows]).backward()
            optimizer.step()
            rate.step()
    return model.eval()


def _joined(inputs: Tensor, description: Tensor) -> Tensor:
    """[B, C, R + DESCRIBED] inputs of the network."""
    described = description[:, None, -DESCRIBED:].expand(-1, inputs.shape[1], -1)
    return torch.cat([inputs, described], dim=2)


@torch.no_grad()
def _gains(model: Reranker, lists: CandidateLists) -> tuple[Tensor, Tensor]:
    """[V] ndcg@10 of each history by the blend, and by the reranker."""
    return _ndcg(lists.blended, lists), _ndcg(lists.blended + model(lists.inputs, lists.description), lists)


def _ndcg(scores: Tensor, lists: CandidateLists) -> Tensor:
    """[V] among unseen items; a target that is no candidate counts as missed, as it does for both."""
    own = scores.masked_fill(~lists.is_target, -torch.inf).amax(1, keepdim=True)
    rank = 1 + ((scores > own) & ~lists.seen & lists.moved).sum(1)
    return torch.where(lists.is_target.any(1) & (rank <= 10), 1 / torch.log2(1.0 + rank), 0.0)
