"""Ridge regression of items on items with its settings chosen for each data set, next to those that all sets share.

    python -m tests.benchmarks.tuned_ridge /data scientific movielens       # /data/scientific/items.parquet, ...

The decay of the history and the penalty are chosen by ndcg@10 of validation items among unseen ones, the decay first, as
`ranking.decay=auto ranking.regularisation=auto` do. Figures are hr@10 / ndcg@10 of test items; weights are of training items alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from qbert_ray import metrics
from qbert_ray.config.schema import Ranking
from qbert_ray.ranking.item_item import RidgeRegression, recency
from qbert_ray.ranking.ranker import batches
from qbert_ray.ranking.weights import DECAYS, PENALTIES
from qbert_ray.top_k import ranks
from tests.benchmarks.artefacts import LATEST, Histories, print_table, read

HEAD = ("data set", "decay", "penalty", "validation, shared settings", "chosen", "test, shared: unseen", "chosen: unseen", "chosen: all")


class Regression:
    """The ranks that ridge regression gives held-out items of one data set."""

    def __init__(self, found: Histories, settings: Ranking) -> None:
        length = np.diff(found.indptr)
        kept = np.where(length >= 3, length - 2, length)
        place = np.arange(len(found.items)) - np.repeat(found.indptr[:-1], length)
        self.items, self.indptr = found.items[place < np.repeat(kept, length)], np.concatenate([[0], np.cumsum(kept)])
        self.whole = [found.items[found.indptr[user] : found.indptr[user + 1]] for user in np.flatnonzero(length >= 3)]
        self.size, self.neighbours = len(found.order), settings.neighbours
        self._columns: dict[float, sparse.csr_matrix] = {}

    def columns(self, penalty: float) -> sparse.csr_matrix:
        """[N, N] weights, a row per item of a history."""
        if penalty not in self._columns:
            rows = RidgeRegression(self.indptr, self.items, self.size, penalty, self.neighbours).rows(np.arange(self.size))
            self._columns[penalty] = rows.T.tocsr()
        return self._columns[penalty]

    def ranks(self, decay: float, penalty: float, held_out: int, unseen: bool = True) -> np.ndarray:
        """[U] rank of each user's last item but `held_out`, by the items before it."""
        columns, found = self.columns(penalty), []
        histories = [items[: len(items) - 1 - held_out] for items in self.whole]
        target = torch.tensor([int(items[-1 - held_out]) for items in self.whole])
        for rows in batches(len(histories), self.size):
            scores = torch.from_numpy((recency(histories[rows], decay, LATEST, self.size) @ columns).toarray())
            found.append(ranks(scores, target[rows], histories[rows] if unseen else None).numpy())
        return np.concatenate(found)


def row(root: Path, name: str, settings: Ranking) -> tuple[str, ...]:
    """The line of one data set."""
    model, shared = Regression(read(root, name), settings), (float(settings.decay), float(settings.regularisation))

    def value(decay: float, penalty: float) -> float:
        return float(metrics.ndcg(model.ranks(decay, penalty, 1), 10).mean())

    middle = sorted(PENALTIES)[len(PENALTIES) // 2]
    decay = max(DECAYS, key=lambda each: value(each, middle))
    chosen = (decay, max(sorted(PENALTIES), key=lambda each: value(decay, each)))
    tested = (model.ranks(*shared, 0), model.ranks(*chosen, 0), model.ranks(*chosen, 0, unseen=False))
    validated = (f"{value(*each):.4f}" for each in (shared, chosen))
    shown = (f"{(each <= 10).mean():.4f} / {metrics.ndcg(each, 10).mean():.4f}" for each in tested)
    return (name, f"{chosen[0]:g}", f"{chosen[1]:g}", *validated, *shown)


if __name__ == "__main__":
    print_table(__doc__, HEAD, row)
