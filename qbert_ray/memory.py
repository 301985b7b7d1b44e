"""Collaborative memory: what training interactions alone say of the next item, and how far a ranking trusts it.

Beyond the paper. A sequence model of low rank cannot hold the tail of item pairs, so item-item weights stand beside it:
the ridge regression of each item on the items it occurs with (EASE, Steck 2019, restricted to the strongest neighbours, so
that it also serves where a dense inverse of the catalog does not fit), and which item tends to follow which. What content
alone says, for items that no weights know, is how near the nearest item of the history is. A `Mix` of a few numbers, fitted on
validation items, adds them to the sequencer's scores; its weights follow from the history.

Shapes: N catalog, U users, B histories, C candidates, D width of content vectors, P numbers that describe a history, F signals:
the sequencer's score, the two memories, content, and whether the history holds the item.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

SIGNALS = ("sequencer", "ridge", "following", "content", "seen")
START = (0.35, 1.0, 0.6, 0.0, 0.0)  # weights of the signals where there is nothing to fit them on: what the real data sets gave, rounded


def popularity(indptr: np.ndarray, items: np.ndarray, num_items: int) -> np.ndarray:
    """[N] training interactions of each item; `items[indptr[u]:indptr[u + 1]]` are the training items of user u."""
    return np.bincount(items, minlength=num_items).astype(np.float32)


def co_occurrence(indptr: np.ndarray, items: np.ndarray, num_items: int, window: int | None = None) -> sparse.csr_matrix:
    """[N, N] number of users who have both items among their training interactions; the diagonal is empty.

    Args:
        window: only the latest so many of each user's items count.
    """
    if window is not None:
        ends = np.repeat(indptr[1:], np.diff(indptr))
        late = ends - np.arange(len(items)) <= window
        indptr, items = np.concatenate([[0], np.cumsum(late)])[indptr], items[late]
    counts = _gram(indptr, items, num_items)
    counts.setdiag(0)
    counts.eliminate_zeros()
    return counts


def co_occurrence_scores(counts: sparse.csr_matrix, histories: list[np.ndarray], latest: int) -> np.ndarray:
    """[B, N] summed co-occurrence of each item with the `latest` items of each history."""
    return (_aged(histories, 1.0, latest, counts.shape[0]) @ counts).toarray()


class RidgeRegression:
    """Regresses each item of the catalog on its strongest neighbours in training histories.

    Args:
        indptr: [U + 1], items: training items of all users, as everywhere.
        regularisation: ridge penalty, in users.
        neighbours: most neighbours of an item; they are those with the largest cosine of co-occurrence.
    """

    def __init__(self, indptr: np.ndarray, items: np.ndarray, num_items: int, regularisation: float, neighbours: int) -> None:
        self.gram = _gram(indptr, items, num_items)
        self.norms = np.sqrt(self.gram.diagonal())
        self.regularisation, self.neighbours = regularisation, neighbours

    def rows(self, targets: np.ndarray) -> sparse.csr_matrix:
        """[len(targets), N]: weights with which the items of a history speak for each target; no item for itself."""
        columns, values = [], []
        for target in targets:
            begin, end = self.gram.indptr[target : target + 2]
            others, counts = self.gram.indices[begin:end], self.gram.data[begin:end]
            others, counts = others[others != target], counts[others != target]
            if len(others) > self.neighbours:
                # lexsort, not argpartition: which of equally strong neighbours stay must not depend on chance
                strongest = np.lexsort((others, -counts / self.norms[others]))[: self.neighbours]
                others, counts = others[strongest], counts[strongest]
            among = self.gram[others][:, others].toarray()
            among[np.diag_indices_from(among)] += self.regularisation
            columns.append(others)
            values.append(np.linalg.solve(among, counts).astype(np.float32))
        return _from_rows(columns, values, self.gram.shape[0])


def following(
    indptr: np.ndarray, items: np.ndarray, num_items: int, window: int, decay: float, shrinkage: float, neighbours: int
) -> sparse.csr_matrix:
    """[N, N]: how often the item of a row comes after that of a column, as a share of what comes after the latter.

    Args:
        window: largest number of steps between the two.
        decay: weight of each further step.
        shrinkage: added to the denominator, so that an item seen once says little.
        neighbours: entries kept per row.
    """
    user = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    counts = sparse.csr_matrix((num_items, num_items), dtype=np.float32)
    for gap in range(1, window + 1):
        same = user[:-gap] == user[gap:]
        pairs = (items[gap:][same], items[:-gap][same])
        weight = np.full(len(pairs[0]), decay ** (gap - 1), dtype=np.float32)
        counts = counts + sparse.csr_matrix((weight, pairs), shape=counts.shape)
    counts.setdiag(0)
    counts.eliminate_zeros()
    totals = np.asarray(counts.sum(0)).ravel()
    counts = (counts @ sparse.diags(1 / np.maximum(totals + shrinkage, 1e-12))).tocsr().astype(np.float32)
    counts.sort_indices()
    kept = [slice(*counts.indptr[row : row + 2]) for row in range(num_items)]
    best = [np.argsort(-counts.data[row], kind="stable")[:neighbours] + row.start for row in kept]
    return _from_rows([counts.indices[entries] for entries in best], [counts.data[entries] for entries in best], num_items)


class Memory:
    """The item-item weights of a domain, ready to be asked.

    Args:
        ridge: [N, N], rows are targets.
        following: [N, N], rows are targets.
        decays: weight of each further step back in a history, for either.
        scale: weights far below it count for nothing, since signals are log(1 + weight / scale).
        latest: items of a history that are asked.
        content: [N, D] vectors of length 1 whose products say how alike items are; None: nothing is known of it.
    """

    def __init__(
        self,
        ridge: sparse.csr_matrix,
        following: sparse.csr_matrix,
        decays: tuple[float, float],
        scale: float,
        latest: int,
        content: Tensor | None = None,
    ) -> None:
        self.content = content
        self.weights = (ridge.T.tocsr(), following.T.tocsr())
        self.decays, self.scale, self.latest = decays, scale, latest

    def ridge_scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """[B, N] scores of the regression by itself, the linear floor."""
        return (self._aged(histories, 0) @ self.weights[0]).toarray()

    def signals(self, histories: list[np.ndarray]) -> Tensor:
        """[B, N, 4]: log(1 + weight / scale) of both memories, cosine to the nearest item of the history, 1 where it holds the item."""
        result = np.zeros((len(histories), self.weights[0].shape[0], 4), dtype=np.float32)
        for number in (0, 1):
            spoken = self._aged(histories, number) @ self.weights[number]
            spoken.data = np.log1p(np.maximum(spoken.data, 0) / self.scale)
            result[:, :, number] = spoken.toarray()
        for row, history in enumerate(histories if self.content is not None else []):
            if len(history):
                result[row, :, 2] = (self.content[history[-self.latest :]] @ self.content.T).amax(0)
        rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        if len(rows):
            result[rows, np.concatenate(histories), 3] = 1
        return torch.from_numpy(result)

    def _aged(self, histories: list[np.ndarray], number: int) -> sparse.csr_matrix:
        return _aged(histories, self.decays[number], self.latest, self.weights[0].shape[0])


class Mix(NamedTuple):
    """How far a history's ranking trusts each signal: weights that are linear in what describes the history."""

    weights: Tensor  # [P, F]
    centre: Tensor  # [P] of the descriptions it was fitted on
    spread: Tensor  # [P]

    def scores(self, sequencer: Tensor, signals: Tensor, lengths: Tensor) -> Tensor:
        """[B, N] mixed scores.

        Args:
            sequencer: [B, N] scores of the sequencer; a constant per history changes no ranking.
            signals: [B, N, 4] of `Memory.signals`.
            lengths: [B] items of each history.
        """
        weights = self.trust(describe(signals, lengths))
        mixed = sequencer * weights[:, :1]
        for number in range(signals.shape[2]):
            mixed = mixed.addcmul(signals[:, :, number], weights[:, number + 1, None])
        return mixed

    def trust(self, description: Tensor) -> Tensor:
        """[B, F] weights for histories that `describe` gave [B, P] for; all but that of items already had are not negative."""
        description = ((description - self.centre) / self.spread).clamp(-3, 3)  # not further than what was fitted on
        weights = description @ self.weights
        return torch.cat([weights[:, :-1].clamp_min(0), weights[:, -1:]], dim=1)


def describe(signals: Tensor, lengths: Tensor) -> Tensor:
    """[B, P] of histories: one, the logarithm of the length, the strongest thing the regression says."""
    return torch.stack(
        [torch.ones(len(lengths), device=signals.device), lengths.float().clamp_min(1).log(), signals[:, :, 0].amax(1)], dim=1
    )


def candidates(sequencer: Tensor, signals: Tensor, target: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a mix is fitted on: the `count` best items by each of the four scores; C is four times as many.

    Args:
        sequencer: [B, N] scores, signals: [B, N, 4] of `Memory.signals`, target: [B] item_index.

    Returns:
        [B, C, F] signals of the candidates, those of an item that is there twice at minus infinity for the sequencer;
        [B] place of the target among them; [B] whether it is there.
    """
    signals = torch.cat([sequencer.log_softmax(1)[:, :, None], signals], dim=2)
    count = min(count, signals.shape[1])
    chosen = torch.cat([signals[:, :, number].topk(count, dim=1).indices for number in range(4)], dim=1).sort(dim=1).values
    found = signals.gather(1, chosen[:, :, None].expand(-1, -1, signals.shape[2]))
    found[:, 1:, 0].masked_fill_(chosen[:, 1:] == chosen[:, :-1], -torch.inf)
    is_target = chosen == target[:, None]
    return found, is_target.int().argmax(1), is_target.any(1)


def fit_mix(signals: Tensor, description: Tensor, place: Tensor) -> Mix:
    """The mix under which targets stand out among their candidates: softmax regression, drawn towards `START` where data are few.

    Ranking the best candidates, rather than the likelihood over the whole catalog, is what hit rates at small k measure: fitted
    over the catalog, the mix serves the far tail (instruments, validation ndcg@10 .118 against .135).

    Args:
        signals: [V, C, F], description: [V, P], place: [V], of validation histories whose target is a candidate.
    """
    start = torch.zeros(3, len(SIGNALS))
    start[0] = torch.tensor(START)
    users = len(place)
    if not users:
        return Mix(start, torch.zeros(3), torch.ones(3))
    centre, spread = description.mean(0), description.std(0, unbiased=False)
    centre[0], spread = 0, torch.where(spread > 1e-6, spread, 1)
    repeated = signals[:, :, 0].isneginf()
    signals = signals.masked_fill(repeated[:, :, None], 0)
    unit = signals[~repeated].std(0, unbiased=False)  # signals of equal size make one penalty fit all
    unit = torch.where(unit > 1e-6, unit, 1)
    signals = signals / unit
    weights = (start * unit).clone().requires_grad_()
    mix = Mix(weights, centre, spread)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = torch.einsum("vcf,vf->vc", signals, mix.trust(description)).masked_fill(repeated, -torch.inf)
        value = F.cross_entropy(scores, place) + (1e-3 + 1 / users) * (weights - start * unit).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Mix(weights.detach() / unit, centre, spread)


def _gram(indptr: np.ndarray, items: np.ndarray, num_items: int) -> sparse.csr_matrix:
    """[N, N] number of users who have both items; on the diagonal, users who have the item."""
    has = sparse.csr_matrix((np.ones(len(items), dtype=np.float32), items, indptr), shape=(len(indptr) - 1, num_items))
    has.sum_duplicates()
    has.data[:] = 1.0  # a user who has an item twice is still one user
    gram = (has.T @ has).tocsr()
    gram.sort_indices()
    return gram


def _aged(histories: list[np.ndarray], decay: float, latest: int, num_items: int) -> sparse.csr_matrix:
    """[B, N] weight of each item in its history: 1 for the last, `decay` as much for each step back."""
    cut = [history[-latest:] for history in histories]
    lengths = np.array([len(history) for history in cut], dtype=np.int64)
    chosen = np.concatenate(cut) if cut else np.zeros(0, dtype=np.int64)
    ends = np.cumsum(lengths)
    age = np.repeat(ends, lengths) - 1 - np.arange(len(chosen))
    return sparse.csr_matrix(((decay**age).astype(np.float32), chosen, np.concatenate([[0], ends])), shape=(len(cut), num_items))


def _from_rows(columns: list[np.ndarray], values: list[np.ndarray], num_items: int) -> sparse.csr_matrix:
    indptr = np.cumsum([0, *map(len, columns)])
    flat = [np.concatenate([*arrays, np.zeros(0, kind)]).astype(kind) for arrays, kind in ((values, np.float32), (columns, np.int32))]
    return sparse.csr_matrix((flat[0], flat[1], indptr), shape=(len(columns), num_items))
