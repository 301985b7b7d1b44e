"""What training interactions alone say: item popularity and item-item co-occurrence, the floors of every comparison.

Shapes: N catalog, U users.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse


def popularity(indptr: np.ndarray, items: np.ndarray, num_items: int) -> np.ndarray:
    """[N] training interactions of each item; `items[indptr[u]:indptr[u + 1]]` are the training items of user u."""
    return np.bincount(items, minlength=num_items).astype(np.float32)


def co_occurrence(indptr: np.ndarray, items: np.ndarray, num_items: int) -> sparse.csr_matrix:
    """[N, N] number of users who have both items among their training interactions; the diagonal is empty."""
    users = len(indptr) - 1
    has = sparse.csr_matrix((np.ones(len(items), dtype=np.float32), items, indptr), shape=(users, num_items))
    has.sum_duplicates()
    has.data[:] = 1.0  # a user who has an item twice is still one user
    counts = (has.T @ has).tocsr()
    counts.setdiag(0)
    counts.eliminate_zeros()
    return counts


def co_occurrence_scores(counts: sparse.csr_matrix, histories: list[np.ndarray], latest: int) -> np.ndarray:
    """[B, N] summed co-occurrence of each item with the `latest` items of each history."""
    cut = [history[-latest:] for history in histories]
    indptr = np.cumsum([0, *map(len, cut)])
    chosen = np.concatenate(cut) if cut else np.zeros(0, dtype=np.int64)
    select = sparse.csr_matrix((np.ones(len(chosen), dtype=np.float32), chosen, indptr), shape=(len(cut), counts.shape[0]))
    return (select @ counts).toarray()
