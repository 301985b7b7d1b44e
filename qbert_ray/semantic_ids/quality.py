"""Quality measures of semantic IDs, on arrays: recall of neighbours, and agreement of prefixes with attributes.

Shapes: N items, K levels, M codewords per level, E codebook width, D embedding width, Q sampled items.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NEIGHBOURS = 10
SHUFFLES = 5  # their mean is the agreement by chance


class NeighbourRecall:
    """Share of an item's nearest items by embedding that is also among its nearest by semantic ID.

    Two distances of IDs: between the sums of their codewords ("codewords"); and "prefix", by the length of the shared prefix, then
    by the first distance. The catalog is added piece by piece, so that its embeddings need not fit into memory.
    """

    def __init__(self, queries: np.ndarray, embedding: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> None:
        """Set the sampled items whose neighbours are compared.

        Args:
            queries: [Q] row of each sampled item in the catalog.
            embedding: [Q, D] of these items.
            codes: [Q, K] of these items.
            codebooks: [K, M, E].
        """
        self.queries, self.embedding, self.codes, self.codebooks = queries, embedding, codes, codebooks
        self.sums = decode(codes, codebooks)
        self.farthest = 4 * np.square(np.sqrt(np.square(codebooks).sum(2)).max(1).sum())  # no two sums are farther apart, squared
        self.best: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # distance and row of the nearest so far, [Q, <= NEIGHBOURS]
        self.seen = 0

    def add(self, embedding: np.ndarray, codes: np.ndarray) -> None:
        """Add the next piece of the catalog: [n, D] and [n, K]."""
        rows = self.seen + np.arange(len(codes))
        self.seen += len(codes)
        sums = _squared(self.sums, decode(codes, self.codebooks))
        differ = np.zeros(sums.shape)  # levels from the first that differs
        same = np.ones(sums.shape, dtype=bool)
        for mine, theirs in zip(self.codes.T, codes.T, strict=True):
            same &= mine[:, None] == theirs
            differ += ~same
        self._keep("embedding", _squared(self.embedding, embedding), rows)
        self._keep("codewords", sums, rows)
        self._keep("prefix", sums + differ * self.farthest, rows)

    def _keep(self, name: str, distance: np.ndarray, rows: np.ndarray) -> None:
        distance = np.where(self.queries[:, None] == rows, np.inf, distance)
        rows = np.broadcast_to(rows, distance.shape)
        if name in self.best:
            distance = np.concatenate([self.best[name][0], distance], axis=1)
            rows = np.concatenate([self.best[name][1], rows], axis=1)
        nearest = np.argpartition(distance, min(NEIGHBOURS, distance.shape[1] - 1), axis=1)[:, :NEIGHBOURS]
        self.best[name] = np.take_along_axis(distance, nearest, 1), np.take_along_axis(rows, nearest, 1)

    def result(self) -> dict[str, float]:
        """Recall by "codewords" and by "prefix", and that of a "random" order; needs more than NEIGHBOURS items."""
        true = self.best["embedding"][1]
        found = {name: (true[:, :, None] == self.best[name][1][:, None]).any(2).mean() for name in ("codewords", "prefix")}
        return {name: float(share) for name, share in found.items()} | {"random": NEIGHBOURS / (self.seen - 1)}


def decode(codes: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """[N, E] sums of the codewords of codes [N, K]."""
    return np.sum([book[code] for book, code in zip(codebooks, codes.T, strict=True)], axis=0)


def prefix_figures(codes: np.ndarray, values: np.ndarray, seed: int = 0) -> list[dict[str, float]]:
    """How well prefixes of each length predict an attribute: purity and normalised mutual information.

    Args:
        codes: [N, K].
        values: [N] whole numbers: the value of each item. Leave out items with a unique value, since no other item can share it.

    Returns:
        For lengths 1 to K: number of prefixes, number of items that share theirs with another; of these items "purity", the
        share that has the most common value of its prefix; "nmi", the normalised mutual information of prefix and
        value over all items; both also for shuffled values, which gives their level by chance.
    """
    from sklearn.metrics import normalized_mutual_info_score  # takes a second to import

    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(values) for _ in range(SHUFFLES)]
    result = []
    for prefix in prefixes(codes):
        shared = np.bincount(prefix)[prefix] > 1
        purity, by_chance = _purity(prefix[shared], values[shared]), [_purity(prefix[shared], other[shared]) for other in shuffled]
        result.append(
            {
                "prefixes": int(prefix.max(initial=-1)) + 1,
                "items": int(shared.sum()),
                "purity": purity,
                "purity_shuffled": float(np.mean(by_chance)),
                "nmi": float(normalized_mutual_info_score(values, prefix)),
                "nmi_shuffled": float(np.mean([normalized_mutual_info_score(other, prefix) for other in shuffled])),
            }
        )
    return result


def prefix_agreement(codes: np.ndarray, first: np.ndarray, second: np.ndarray) -> list[dict[str, float]]:
    """How often two items that belong together share a prefix.

    Args:
        codes: [N, K].
        first: [P] rows of items, P at least 1.
        second: [P] rows of the items that belong to them, different ones.

    Returns:
        For lengths 1 to K: "same", the share of the pairs with the same prefix; and "chance", the same if every first item were paired
        with every second one but itself.
    """
    result = []
    of_items = [np.bincount(rows, minlength=len(codes)) / len(rows) for rows in (first, second)]
    itself = of_items[0] @ of_items[1]
    for prefix in prefixes(codes):
        size = int(prefix.max()) + 1
        left, right = (np.bincount(prefix[rows], minlength=size) / len(rows) for rows in (first, second))
        result.append({"same": float((prefix[first] == prefix[second]).mean()), "chance": float((left @ right - itself) / (1 - itself))})
    return result


def prefixes(codes: np.ndarray) -> Iterable[np.ndarray]:
    """For lengths 1 to K: [N] number of the prefix of each item, dense from 0."""
    prefix = np.zeros(len(codes), dtype=np.int64)
    for level in codes.T:
        prefix = np.unique(prefix * (int(level.max(initial=0)) + 1) + level, return_inverse=True)[1]
        yield prefix


def typical(values: np.ndarray, within: np.ndarray) -> dict[str, float] | None:
    """The most over-represented value `within` some of the items, with its share there and overall; None if none is.

    A value that only one of them has does not count.
    """
    overall = np.bincount(values) / max(len(values), 1)
    count = np.bincount(within, minlength=len(overall))
    share = count / max(len(within), 1)
    above = np.where(count > 1, share - overall, 0)
    if not (above > 0).any():
        return None
    value = int(above.argmax())
    return {"value": value, "share": float(share[value]), "overall": float(overall[value])}


def _purity(prefix: np.ndarray, values: np.ndarray) -> float:
    if not len(values):
        return 0.0
    pairs, count = np.unique(prefix * (int(values.max()) + 1) + values, return_counts=True)
    most = np.zeros(int(prefix.max()) + 1, dtype=np.int64)
    np.maximum.at(most, pairs // (int(values.max()) + 1), count)
    return float(most.sum() / len(values))


def _squared(queries: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[Q, n] squared distances."""
    queries, others = queries.astype(np.float64), others.astype(np.float64)
    return np.square(queries).sum(1)[:, None] + np.square(others).sum(1) - 2 * queries @ others.T
