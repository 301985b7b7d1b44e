"""The blend: the sequence model's scores plus weighted score features, fitted on validation items. Beyond the paper.

The weights are linear in a description of the history (its length, the largest ridge feature of any item), and cold items have
weights of their own, since no training has seen them.

Shapes: N catalog, n items of a block of it, B histories, V validation histories, C candidates, P numbers that describe a history,
F score features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from qbert_ray import metrics
from qbert_ray.ranking.blocks import Entries, add, by_block
from qbert_ray.ranking.score_features import SCORE_FEATURES, ScoreFeatures

# blend weights where there is nothing to fit them on: what the real data sets gave, rounded; further score features have 0
START = (0.35, 1.0, 0.6, 0.0, 0.0, 0.0, 0.0)
WITHOUT_NETWORK = ("ridge", "following", "text", "lexical", "seen")  # score features for which no network is trained on the data


class Blend(NamedTuple):
    """Weights of the score features, linear in what describes a history."""

    weights: Tensor  # [P, 2 F + 1]: of trained items' features, of cold items' features, and the bias of cold items
    centre: Tensor  # [P] mean of the descriptions it was fitted on
    spread: Tensor  # [P] their standard deviation

    @property
    def num_features(self) -> int:
        """F."""
        return (self.weights.shape[1] - 1) // 2

    def used(self, names: tuple[str, ...] = SCORE_FEATURES) -> list[str]:
        """Names of the score features that have a weight for some history, of the names of all."""
        used = self.weights[:, :-1].view(len(self.weights), 2, -1).any(1).any(0)
        return [name for name, has_weight in zip(names, used.tolist(), strict=True) if has_weight]

    def weights_for(self, description: Tensor) -> Tensor:
        """[B, 2 F + 1] weights for histories of these descriptions [B, P], clamped to about the range that was fitted on."""
        return ((description - self.centre) / self.spread).clamp(-3, 3) @ self.weights


def describe(strongest: Tensor, lengths: Tensor) -> Tensor:
    """[B, P] descriptions of histories: one, the logarithm of the length, the largest ridge feature of any item."""
    return torch.stack([torch.ones_like(strongest), lengths.float().clamp_min(1).log(), strongest], dim=1)


class BlendedScores:
    """Blended scores of a batch of histories, block by block of the catalog.

    Args:
        features: of the histories.
        weights: [B, 2 F + 1] of `Blend.weights_for`.
        blocks: the catalog in order; none has both trained and cold items.
        trained: number of trained items, the first of the catalog; the others are cold.
        hide_seen: items of a history get minus infinity.
        penalty: [N] added to the scores of every history: 0, or minus infinity for hidden items.
    """

    def __init__(
        self,
        features: ScoreFeatures,
        weights: Tensor,
        blocks: list[slice],
        trained: int,
        hide_seen: bool = False,
        penalty: Tensor | None = None,
    ) -> None:
        self.features, self.weights, self.trained, self.penalty = features, weights, trained, penalty
        self._whole = list(self._weighted(weights.cpu().numpy(), hide_seen))
        self._added: dict[int, Entries] = {}
        if len(blocks) > 1:
            counts = [np.diff(matrix.indptr) for matrix in self._whole]
            rows = np.concatenate([np.repeat(np.arange(len(each)), each) for each in counts])
            items = np.concatenate([matrix.indices for matrix in self._whole]).astype(np.int64)
            values = np.concatenate([matrix.data for matrix in self._whole])
            self._added = by_block(blocks, rows, items, values, weights.device)

    def _weighted(self, weights: np.ndarray, hide_seen: bool) -> Iterator[sparse.csr_matrix]:
        """[B, N] what every sparse feature adds."""
        for number, matrix in self.features.sparse.items():
            counts = np.diff(matrix.indptr)
            each = np.repeat(weights[:, number], counts)
            if self.trained < matrix.shape[1]:
                cold = np.repeat(weights[:, number + len(self.features.names)], counts)
                each = np.where(matrix.indices < self.trained, each, cold)
            added = np.full_like(each, -np.inf) if hide_seen and self.features.names[number] == "seen" else matrix.data * each
            yield sparse.csr_matrix((added, matrix.indices, matrix.indptr), shape=matrix.shape)

    def of(self, scores: Tensor, block: slice) -> Tensor:
        """[B, n] blended scores of a block.

        Args:
            scores: [B, n] of the sequence model; they are overwritten.
            block: of the catalog.
        """
        cold = block.start >= self.trained
        weights = self.weights[:, len(self.features.names) :] if cold else self.weights
        if self.penalty is None:
            scores.mul_(weights[:, :1])
        else:  # in the same pass over the scores
            torch.addcmul(self.penalty[block], scores, weights[:, :1], out=scores)
        for number in self.features.contents:
            if weights[:, number].any():
                scores.addcmul_(self.features.nearest(number, block), weights[:, number, None])
        if cold:
            scores.add_(weights[:, -1:])
        if self._added:
            return add(scores, self._added[block.start])
        for matrix in self._whole:  # a block that is the whole catalog: no entry has to be looked for
            scores.add_(torch.from_numpy(matrix.toarray()).to(scores.device))
        return scores


def blended_at(features: Tensor, weights: Tensor, cold: Tensor, bonus: float = 0.0) -> Tensor:
    """[B, C] blended scores of some items of each history, as `BlendedScores` gives them for a block.

    Args:
        features: [B, C, F] of the items, the score of the sequence model first.
        weights: [B, 2 F + 1] of `Blend.weights_for`.
        cold: [B, C] which of the items are cold.
        bonus: added to the scores of cold items.
    """
    count = features.shape[2]
    of_trained, of_cold = (torch.einsum("bcf,bf->bc", features, each) for each in (weights[:, :count], weights[:, count:-1]))
    return torch.where(cold, of_cold + weights[:, -1:] + bonus, of_trained)


class Shrinkage(NamedTuple):
    """Strength of the penalties of `fit_blend`."""

    constant: float  # on what the weights of an average history differ from `START` by
    dependence: float  # on how the weights depend on the history


# Tried by `choose_shrinkage`: thousands of users do not always suffice for three numbers per weight, and a large likelihood is not a large ndcg.
SHRINKAGES = tuple(Shrinkage(*each) for each in ((1, 1), (1, 1000), (10, 1000), (30, 1000), (100, 1000), (300, 1000)))


class Candidates(NamedTuple):
    """What a blend is fitted on: the best C items of each validation history by each score."""

    features: Tensor  # [V, C, F]
    cold: Tensor  # [V, C] whether an item is a simulated cold one
    repeated: Tensor  # [V, C] whether the item is among the columns before
    target: Tensor  # [V] column of the target
    description: Tensor  # [V, P]


def no_candidates(num_features: int = len(SCORE_FEATURES)) -> Candidates:
    """The candidates of no history, to which `fit_blend` gives the start."""
    rows = torch.zeros(0, 0, dtype=torch.bool)
    return Candidates(torch.zeros(0, 0, num_features), rows, rows, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))


def join_candidates(found: list[Candidates]) -> Candidates:
    """The candidates of several groups of histories."""
    given = [each for each in found if each.features.shape[1]]
    return Candidates(*(torch.cat(pieces) for pieces in zip(*given, strict=True))) if given else found[0]


def sequence_alone(num_features: int = len(SCORE_FEATURES), repeats: float = 0.0) -> Blend:
    """The blend that ranks as the sequence model by itself does, which adds `repeats` to items of the history."""
    weights = torch.zeros(3, 2 * num_features + 1)
    weights[0, [0, num_features]] = 1.0
    weights[0, [num_features - 1, 2 * num_features - 1]] += repeats  # "seen" is the last score feature
    return Blend(weights, torch.zeros(3), torch.ones(3))


def candidates(
    sequence: Tensor, features: Tensor, lengths: Tensor, target: Tensor, cold: Tensor, available: list[int], count: int
) -> Candidates:
    """The `count` best items by each score, and half as many of the simulated cold ones.

    Args:
        sequence: [B, N] scores of the sequence model.
        features: [F - 1, B, N] of `ScoreFeatures.dense`.
        lengths: [B] of the histories.
        target: [B] item_index.
        cold: [N] which items are simulated cold ones.
        available: indices of the score features.
        count: items by each score.

    Returns:
        Candidates of the histories whose target is one of them.
    """
    description = describe(features[0].amax(1), lengths)
    features = torch.cat([sequence[None], features])  # as they are ranked by: trained and cold items weigh them differently
    best = [features[number].topk(min(count, len(cold)), dim=1).indices for number in available]
    rows = cold.nonzero()[:, 0]
    if len(rows):
        best += [rows[features[number][:, rows].topk(min(count // 2, len(rows)), dim=1).indices] for number in available]
    chosen = torch.cat(best, dim=1).sort(dim=1).values
    found = features.gather(2, chosen.expand(len(features), -1, -1)).permute(1, 2, 0)
    repeated = torch.zeros_like(chosen, dtype=torch.bool)
    repeated[:, 1:] = chosen[:, 1:] == chosen[:, :-1]
    is_target = (chosen == target[:, None]) & ~repeated
    has_target = is_target.any(1)
    return Candidates(*(each[has_target] for each in (found, cold[chosen], repeated, is_target.int().argmax(1), description)))


def without_network(candidates: Candidates, names: tuple[str, ...] = SCORE_FEATURES) -> Candidates:
    """The candidates with zeros for the score features of trained networks, so that a blend fitted on them does not read those."""
    kept = torch.tensor([name in WITHOUT_NETWORK for name in names])
    return candidates._replace(features=candidates.features * kept)


def choose_shrinkage(halves: list[Candidates]) -> Shrinkage:
    """That of `SHRINKAGES` with which the blend of each half of the users ranks the targets of the other half best, by ndcg@10."""

    def gain(shrinkage: Shrinkage) -> float:
        blends = [fit_blend(half, shrinkage) for half in halves]
        return float(sum(_ndcg(blend, half).sum() for blend, half in zip(blends[::-1], halves, strict=True)))

    return max(SHRINKAGES, key=gain) if halves and all(len(half.target) for half in halves) else SHRINKAGES[0]


def _ndcg(blend: Blend, found: Candidates) -> np.ndarray:
    """[V] ndcg@10 of each target among those of its candidates that are not in the history."""
    scores = blended_at(found.features, blend.weights_for(found.description), found.cold)
    better = (scores > scores.gather(1, found.target[:, None])) & (found.features[..., -1] == 0) & ~found.repeated
    return metrics.ndcg(better.sum(1).numpy() + 1, 10)


def fit_blend(found: Candidates, shrinkage: Shrinkage = SHRINKAGES[0]) -> Blend:
    """The blend under which targets rank first among their candidates: softmax regression, shrunk to `START`.

    Ranking the best candidates, rather than the likelihood over the whole catalog, is what hit rates at small k measure: fitted
    over the catalog, the blend serves the far tail (instruments, validation ndcg@10 .118 against .135).
    """
    users, count = len(found.target), found.features.shape[2]
    start = torch.zeros(3, 2 * count + 1)
    start[0, :-1] = torch.tensor([*START, *[0.0] * (count - len(START))]).repeat(2)
    if not users:
        return Blend(start, torch.zeros(3), torch.ones(3))
    centre, spread = found.description.mean(0), found.description.std(0, unbiased=False)
    centre[0], spread = 0, torch.where(spread > 1e-6, spread, 1)
    unit = found.features[~found.repeated].std(0, unbiased=False)  # features of equal size make one penalty fit all
    unit = torch.where(unit > 1e-6, unit, 1)
    cold = found.cold[:, :, None].float()
    features = found.features / unit
    features = torch.cat([features * (1 - cold), features * cold, cold], dim=2)
    unit = torch.cat([unit, unit, torch.ones(1)])
    weights = (start * unit).clone().requires_grad_()
    blend = Blend(weights, centre, spread)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = blend.weights_for(found.description)
        scores = torch.einsum("vcf,vf->vc", features, each).masked_fill(found.repeated, -torch.inf)
        moved = (weights - start * unit).square().sum(1)
        penalty = (1e-3 + 1 / users) * (shrinkage.constant * moved[0] + shrinkage.dependence * moved[1:].sum())
        value = F.cross_entropy(scores, found.target) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    weights = weights.detach() / unit
    unused = ~features.any(0).any(0)  # a feature that is zero everywhere keeps its start, so that it need not be computed
    weights[:, unused] = torch.where(start[:, unused] != 0, start[:, unused], 0.0)
    return Blend(weights, centre, spread)
