"""The item-item model: weights from co-occurrence and order, and similarity of content. Beyond the paper.

Shapes: N catalog, U users, B histories, D width of content vectors.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from qbert_ray.features.structure import gram
from qbert_ray.ranking.score_features import SCORE_FEATURES, Content, ScoreFeatures
from qbert_ray.sequence.item_table import ColdItems

MOST_PAIRS = 2**26  # of a catalog whose products of content vectors are kept: 256 MiB for each kind


def popularity(indptr: np.ndarray, items: np.ndarray, num_items: int, weights: np.ndarray | None = None) -> np.ndarray:
    """[N] training interactions of each item, or the sum of their weights.

    Args:
        indptr: [U + 1]; `items[indptr[u]:indptr[u + 1]]` are the training items of user u.
        items: item_index of all users' training items, end to end.
        num_items: N.
        weights: of the training items; None: all are 1.
    """
    return np.bincount(items, weights, minlength=num_items).astype(np.float32)


def co_occurrence_scores(counts: sparse.csr_matrix, histories: list[np.ndarray], latest: int) -> np.ndarray:
    """[B, N] summed co-occurrence of each item with the `latest` items of each history."""
    return (recency(histories, 1.0, latest, counts.shape[0]) @ counts).toarray()


class RidgeRegression:
    """Item-item weights by ridge regression of each item on the items it occurs with (EASE, Steck 2019, on the strongest neighbours).

    Args:
        indptr: [U + 1]; `items[indptr[u]:indptr[u + 1]]` are the training items of user u.
        items: item_index of all users' training items, end to end.
        num_items: N.
        regularisation: ridge penalty, in users.
        neighbours: most neighbours of an item: those with the largest cosine of co-occurrence. With N, and where any two items occur
            together, the weights are EASE's; items that never do have weight 0.
        weights: of the training items, by which users have them; None: all are 1.
    """

    def __init__(
        self,
        indptr: np.ndarray,
        items: np.ndarray,
        num_items: int,
        regularisation: float,
        neighbours: int,
        weights: np.ndarray | None = None,
    ) -> None:
        self.gram = gram(indptr, items, num_items, weights)
        self.norms = np.sqrt(self.gram.diagonal())
        self.regularisation, self.neighbours = regularisation, neighbours

    def rows(self, targets: np.ndarray) -> sparse.csr_matrix:
        """[len(targets), N] weight of each item of a history for each target; 0 for the target itself."""
        columns, values = [], []
        place = np.full(self.gram.shape[0], -1)  # among the neighbours of a target
        for target in targets:
            begin, end = self.gram.indptr[target : target + 2]
            others, counts = self.gram.indices[begin:end], self.gram.data[begin:end]
            others, counts = others[others != target], counts[others != target]
            if len(others) > self.neighbours:
                # lexsort, not argpartition: which of equally strong neighbours stay must not depend on the order of the data
                strongest = np.lexsort((others, -counts / self.norms[others]))[: self.neighbours]
                others, counts = others[strongest], counts[strongest]
            among = self._among(others, place)
            among[np.diag_indices_from(among)] += self.regularisation
            columns.append(others)
            values.append(np.linalg.solve(among, counts).astype(np.float32))
        return _from_rows(columns, values, self.gram.shape[0])

    def _among(self, items: np.ndarray, place: np.ndarray) -> np.ndarray:
        """[n, n] co-occurrences of n items with each other; SciPy would look at every column of the catalog for each target.

        Args:
            items: [n] distinct.
            place: [N] of -1, and so again afterwards.
        """
        found = np.zeros((len(items), len(items)))  # 64 bits: next to weighted interactions in 32, the penalty is rounded away
        begin = self.gram.indptr[items].astype(np.int64)
        lengths = self.gram.indptr[items + 1] - begin
        entries = np.repeat(begin - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
        place[items] = np.arange(len(items))
        column = place[self.gram.indices[entries]]
        place[items] = -1
        wanted = column >= 0
        found[np.repeat(np.arange(len(items)), lengths)[wanted], column[wanted]] = self.gram.data[entries[wanted]]
        return found


class Transitions:
    """Item-item weights of order: how often an item comes after another, as a share of all that comes after the latter.

    Args:
        indptr: [U + 1]; `items[indptr[u]:indptr[u + 1]]` are the training items of user u.
        items: item_index of all users' training items, end to end.
        num_items: N.
        window: largest number of steps between the two.
        decay: weight of each further step.
        shrinkage: added to the denominator, so that rare items have small weights.
        neighbours: weights kept per item.
        weights: of the training items; a transition counts as the product of both. None: all are 1.
    """

    def __init__(
        self,
        indptr: np.ndarray,
        items: np.ndarray,
        num_items: int,
        window: int,
        decay: float,
        shrinkage: float,
        neighbours: int,
        weights: np.ndarray | None = None,
    ) -> None:
        user = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        counts = sparse.csr_matrix((num_items, num_items), dtype=np.float32)
        for gap in range(1, window + 1):
            same = user[:-gap] == user[gap:]
            pairs = (items[gap:][same], items[:-gap][same])
            weight = np.full(len(pairs[0]), decay ** (gap - 1), dtype=np.float32)
            if weights is not None:
                weight *= weights[gap:][same] * weights[:-gap][same]
            counts = counts + sparse.csr_matrix((weight, pairs), shape=counts.shape)
        counts.setdiag(0)
        counts.eliminate_zeros()
        totals = np.asarray(counts.sum(0)).ravel()
        counts = (counts @ sparse.diags(1 / np.maximum(totals + shrinkage, 1e-12))).tocsr().astype(np.float32)
        counts.sort_indices()
        kept = [slice(*counts.indptr[row : row + 2]) for row in range(num_items)]
        best = [np.argsort(-counts.data[row], kind="stable")[:neighbours] + row.start for row in kept]
        self.weights = _from_rows(
            [counts.indices[entries] for entries in best], [counts.data[entries] for entries in best], num_items
        )  # [N, N]

    def rows(self, targets: np.ndarray) -> sparse.csr_matrix:
        """[len(targets), N] weight of each item of a history for each target."""
        return self.weights[targets]


class ItemItem:
    """The item-item model of a catalog: score features from what training users had together, and from content.

    A 128-dimensional sequence model cannot represent the long tail of item co-occurrence; item-item weights can. They are summed over
    the history, recent items more, and a cold item has the weighted mean of those of its nearest trained items.

    Args:
        ridge: [N, N] weights of `RidgeRegression`, a row per target.
        transitions: [N, N] weights of `Transitions`, a row per target.
        decays: weight of each further step back in a history, for either.
        scale: weights far below it do not count, since features are log(1 + weight / scale).
        latest: most items of a history that are read.
        contents: score feature -> [N, D] vectors of length 1, by whose cosines it is.
        popularity: [N] training interactions of each item.
        cold: items without weights, and their nearest trained items.
        names: of the score features of the run.
    """

    def __init__(
        self,
        ridge: sparse.csr_matrix,
        transitions: sparse.csr_matrix,
        decays: tuple[float, float],
        scale: float,
        latest: int,
        contents: dict[str, Tensor] | None = None,
        popularity: Tensor | None = None,
        cold: ColdItems | None = None,
        names: tuple[str, ...] = SCORE_FEATURES,
    ) -> None:
        self.contents, self.names = contents or {}, names
        self.popularity = torch.zeros(ridge.shape[0]) if popularity is None else popularity
        self.weights = (ridge.T.tocsr(), transitions.T.tocsr())
        self.decays, self.scale, self.latest = decays, scale, latest
        self._averaging = averaging_matrix(cold, self.num_items) if cold is not None else None
        self._products: dict[str, np.ndarray] = {}

    @property
    def num_items(self) -> int:
        return self.weights[0].shape[0]

    @property
    def available(self) -> list[int]:
        """Indices of the score features that rank items here, the sequence model's first."""
        return [0, 1, 2, *(number for number, name in enumerate(self.names) if name in self.contents)]

    def with_cold_items(self, cold: ColdItems) -> ItemItem:
        """A copy in which these items, and no others, are cold."""
        other = copy(self)
        other._averaging = averaging_matrix(cold, self.num_items)
        return other

    def features(self, histories: list[np.ndarray], used: Collection[str] | None = None) -> ScoreFeatures:
        """Score features of the whole catalog for each history.

        Args:
            histories: item_index in time order, the latest last.
            used: names of score features; cosines of other contents are not computed. None: all.
        """
        return ScoreFeatures(*self._summed(histories), self._contents(used), histories, self.names)

    def features_and_last(self, histories: list[np.ndarray], used: Collection[str] | None = None) -> tuple[ScoreFeatures, ScoreFeatures]:
        """`features` of the whole histories and of their last items alone, by one product with the item-item weights."""
        both, size = [*histories, *(history[-1:] for history in histories)], len(histories)
        sums, weights = self._summed(both)
        contents = self._contents(used)
        whole, last = (
            ScoreFeatures(
                [_rows(each, *rows) for each in sums], [_rows(each, *rows) for each in weights], contents, both[slice(*rows)], self.names
            )
            for rows in ((0, size), (size, 2 * size))
        )
        return whole, last

    def _summed(self, histories: list[np.ndarray]) -> tuple[list[sparse.csr_matrix], list[sparse.csr_matrix]]:
        """[B, N] scores of both kinds of weights, and their features."""
        sums = [
            recency(histories, decay, self.latest, self.num_items) @ matrix for matrix, decay in zip(self.weights, self.decays, strict=True)
        ]
        weights = [self._logarithm(matrix) for matrix in sums]
        return sums, weights if self._averaging is None else [matrix @ self._averaging for matrix in weights]

    def _logarithm(self, sums: sparse.csr_matrix) -> sparse.csr_matrix:
        result = sums.copy()
        result.data = np.log1p(np.maximum(sums.data, 0) / self.scale)
        return result

    def _contents(self, used: Collection[str] | None) -> dict[int, Content]:
        wanted = {name: vectors for name, vectors in self.contents.items() if used is None or name in used}
        return {self.names.index(name): Content(vectors, self._kept(name)) for name, vectors in wanted.items()}

    def _kept(self, name: str) -> np.ndarray | None:
        """[N, N] products of content vectors, kept by CPUs where the catalog is small: the same few items are in many histories."""
        vectors = self.contents[name]
        if self.num_items**2 > MOST_PAIRS or vectors.is_cuda:
            return None
        if name not in self._products:
            self._products[name] = (vectors @ vectors.T).numpy()
        return self._products[name]


def averaging_matrix(cold: ColdItems, num_items: int) -> sparse.csr_matrix:
    """[N, N] matrix that averages the weights of cold items' neighbours; columns of the identity for all other items."""
    rows, items, weights = (each.numpy() for each in cold)
    own = np.setdiff1d(np.arange(num_items), rows)
    values = np.concatenate([np.ones(len(own), np.float32), weights.ravel()])
    places = np.concatenate([own, items.ravel()]), np.concatenate([own, np.repeat(rows, items.shape[1])])
    return sparse.csr_matrix((values, places), shape=(num_items, num_items))


def recency(histories: list[np.ndarray], decay: float, latest: int, num_items: int) -> sparse.csr_matrix:
    """[B, N] weight of each item of a history: 1 for the last, `decay` times as much for each step back."""
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


def _rows(matrix: sparse.csr_matrix, begin: int, end: int) -> sparse.csr_matrix:
    """Some neighbouring rows of a matrix, without copying their entries."""
    first, last = matrix.indptr[begin], matrix.indptr[end]
    parts = (matrix.data[first:last], matrix.indices[first:last], matrix.indptr[begin : end + 1] - first)
    return sparse.csr_matrix(parts, shape=(end - begin, matrix.shape[1]))
