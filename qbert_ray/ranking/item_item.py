"""Collaborative memory: what training interactions alone say of the next item, and how far a ranking trusts it.

Beyond the paper. A sequence model of low rank cannot hold the tail of item pairs, so item-item weights stand beside it:
the ridge regression of each item on the items it occurs with (EASE, Steck 2019, restricted to the strongest neighbours, so
that it also serves where a dense inverse of the catalog does not fit), and which item tends to follow which. What content
says is how near the nearest item of the history is, by the fused embedding, the text, the picture. A `Mix` of a few numbers,
fitted on validation items, adds them to the sequencer's scores; its weights follow from the history, and are others for new
items, that no training has seen: a share of the trained ones plays them when the mix is fitted.

Shapes: N catalog, U users, B histories, C candidates, D width of content vectors, P numbers that describe a history, F signals:
the sequencer's score, the two memories, three kinds of content, and whether the history holds the item.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from qbert_ray.features.structure import gram
from qbert_ray.ranking.score_features import CONTENTS, SIGNALS, Alike, Said

# weights of the signals where there is nothing to fit them on: what the real data sets gave, rounded
MOST_PAIRS = 2**26  # of a catalog whose products of contents are kept: 256 MiB for each kind
START = (0.35, 1.0, 0.6, 0.0, 0.0, 0.0, 0.0)


def popularity(indptr: np.ndarray, items: np.ndarray, num_items: int) -> np.ndarray:
    """[N] training interactions of each item; `items[indptr[u]:indptr[u + 1]]` are the training items of user u."""
    return np.bincount(items, minlength=num_items).astype(np.float32)


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
        self.gram = gram(indptr, items, num_items)
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
        contents: of some of `CONTENTS`, [N, D] vectors of length 1 whose products say how alike items are.
        popularity: [N] training interactions of each item.
    """

    def __init__(
        self,
        ridge: sparse.csr_matrix,
        following: sparse.csr_matrix,
        decays: tuple[float, float],
        scale: float,
        latest: int,
        contents: dict[str, Tensor] | None = None,
        popularity: Tensor | None = None,
    ) -> None:
        self.contents = contents or {}
        self.popularity = torch.zeros(ridge.shape[0]) if popularity is None else popularity
        self.weights = (ridge.T.tocsr(), following.T.tocsr())
        self.decays, self.scale, self.latest = decays, scale, latest
        self._products: dict[str, np.ndarray] = {}

    @property
    def num_items(self) -> int:
        return self.weights[0].shape[0]

    @property
    def known(self) -> list[int]:
        """Places in `SIGNALS` of the scores that say something here, the sequencer's first."""
        return [0, 1, 2, *(SIGNALS.index(name) for name in CONTENTS if name in self.contents)]

    def asked(self, histories: list[np.ndarray], wanted: Collection[str] = SIGNALS, borrow: sparse.csr_matrix | None = None) -> Said:
        """What this memory says of histories.

        Args:
            wanted: some of `SIGNALS`.
            borrow: [N, N] with which items' weights are replaced by those of others, as a sum over the first axis.
        """
        said = [
            _aged(histories, decay, self.latest, self.num_items) @ matrix for matrix, decay in zip(self.weights, self.decays, strict=True)
        ]
        weights = [self._logarithm(matrix) for matrix in said]
        weights = weights if borrow is None else [matrix @ borrow for matrix in weights]
        alike = {SIGNALS.index(name): Alike(vectors, self._pairs(name)) for name, vectors in self.contents.items() if name in wanted}
        return Said(said[0], weights, alike, histories)

    def _logarithm(self, said: sparse.csr_matrix) -> sparse.csr_matrix:
        result = said.copy()
        result.data = np.log1p(np.maximum(said.data, 0) / self.scale)
        return result

    def signals(self, histories: list[np.ndarray], wanted: Collection[str] = SIGNALS) -> Tensor:
        """[F - 1, B, N]: all `SIGNALS` but the sequencer's score; zeros for those that are not wanted."""
        return self.asked(histories, wanted).dense()

    def _pairs(self, name: str) -> np.ndarray | None:
        """[N, N] products of contents, kept by CPUs where the catalog is small: the same few items are in many histories."""
        vectors = self.contents[name]
        if self.num_items**2 > MOST_PAIRS or vectors.is_cuda:
            return None
        if name not in self._products:
            self._products[name] = (vectors @ vectors.T).numpy()
        return self._products[name]


class Mix(NamedTuple):
    """How far a history's ranking trusts each signal: weights that are linear in what describes the history."""

    weights: Tensor  # [P, 2 F + 1]: of the signals of trained items, of those of new items, and what new items have in advance
    centre: Tensor  # [P] of the descriptions it was fitted on
    spread: Tensor  # [P]

    def wanted(self) -> list[str]:
        """Names of the signals that some history trusts."""
        used = self.weights[:, :-1].view(len(self.weights), 2, -1).any(1).any(0)
        return [name for name, there in zip(SIGNALS, used.tolist(), strict=True) if there]

    def trust(self, description: Tensor) -> Tensor:
        """[B, 2 F + 1] weights for histories that `describe` gave [B, P] for."""
        return ((description - self.centre) / self.spread).clamp(-3, 3) @ self.weights  # not further than what was fitted on


def describe(strongest: Tensor, lengths: Tensor) -> Tensor:
    """[B, P] of histories: one, the logarithm of the length, the strongest thing the regression says."""
    return torch.stack([torch.ones_like(strongest), lengths.float().clamp_min(1).log(), strongest], dim=1)


class Candidates(NamedTuple):
    """What a mix is fitted on: of each of V validation histories the best C items by each score."""

    signals: Tensor  # [V, C, F]
    new: Tensor  # [V, C] whether an item plays a new one
    repeated: Tensor  # [V, C] whether it stands there before
    place: Tensor  # [V] of the target
    description: Tensor  # [V, P]


def nobody() -> Candidates:
    """Of no history at all, for which `fit_mix` gives the start."""
    rows = torch.zeros(0, 0, dtype=torch.bool)
    return Candidates(torch.zeros(0, 0, len(SIGNALS)), rows, rows, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))


def candidates(
    sequencer: Tensor, signals: Tensor, lengths: Tensor, target: Tensor, new: Tensor, known: list[int], count: int
) -> Candidates:
    """The `count` best items by each score, and half as many of the new ones; histories whose target is not there are left out.

    Args:
        sequencer: [B, N] scores, signals: [F - 1, B, N] of `Memory.signals`, lengths: [B], target: [B] item_index.
        new: [N] whether an item plays one that training has not seen.
        known: places in `SIGNALS` of the scores.
    """
    description = describe(signals[0].amax(1), lengths)
    signals = torch.cat([sequencer.log_softmax(1)[None], signals])
    best = [signals[number].topk(min(count, len(new)), dim=1).indices for number in known]
    rows = new.nonzero()[:, 0]
    if len(rows):
        best += [rows[signals[number][:, rows].topk(min(count // 2, len(rows)), dim=1).indices] for number in known]
    chosen = torch.cat(best, dim=1).sort(dim=1).values
    found = signals.gather(2, chosen.expand(len(signals), -1, -1)).permute(1, 2, 0)
    repeated = torch.zeros_like(chosen, dtype=torch.bool)
    repeated[:, 1:] = chosen[:, 1:] == chosen[:, :-1]
    is_target = (chosen == target[:, None]) & ~repeated
    there = is_target.any(1)
    return Candidates(*(each[there] for each in (found, new[chosen], repeated, is_target.int().argmax(1), description)))


def fit_mix(found: Candidates) -> Mix:
    """The mix under which targets stand out among their candidates: softmax regression, drawn towards `START` where data are few.

    Ranking the best candidates, rather than the likelihood over the whole catalog, is what hit rates at small k measure: fitted
    over the catalog, the mix serves the far tail (instruments, validation ndcg@10 .118 against .135).
    """
    users, count = len(found.place), len(SIGNALS)
    start = torch.zeros(3, 2 * count + 1)
    start[0, :-1] = torch.tensor(START + START)
    if not users:
        return Mix(start, torch.zeros(3), torch.ones(3))
    centre, spread = found.description.mean(0), found.description.std(0, unbiased=False)
    centre[0], spread = 0, torch.where(spread > 1e-6, spread, 1)
    unit = found.signals[~found.repeated].std(0, unbiased=False)  # signals of equal size make one penalty fit all
    unit = torch.where(unit > 1e-6, unit, 1)
    new = found.new[:, :, None].float()
    signals = found.signals / unit
    signals = torch.cat([signals * (1 - new), signals * new, new], dim=2)
    unit = torch.cat([unit, unit, torch.ones(1)])
    weights = (start * unit).clone().requires_grad_()
    mix = Mix(weights, centre, spread)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = torch.einsum("vcf,vf->vc", signals, mix.trust(found.description)).masked_fill(found.repeated, -torch.inf)
        value = F.cross_entropy(scores, found.place) + (1e-3 + 1 / users) * (weights - start * unit).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weights = weights.detach() / unit
    silent = ~signals.any(0).any(0)  # a signal that says nothing here keeps its start, which is not to be computed for nothing
    weights[:, silent] = torch.where(start[:, silent] != 0, start[:, silent], 0.0)
    return Mix(weights, centre, spread)


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
