"""Structural features: item vectors from co-occurrence in training histories (§3.1).

`together` is the number of users who have both items, [N, N], as `co_occurrence` counts it from training interactions.

N catalog.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import eigsh

SMALL = 256  # items up to which all eigenvectors are computed at once
LARGE = 50_000  # items from which single precision does: .57 of the time at 100,000, and the sum of the eigenvalues is .9998 of the exact


def co_occurrence(
    indptr: np.ndarray, items: np.ndarray, num_items: int, window: int | None = None, weights: np.ndarray | None = None
) -> sparse.csr_matrix:
    """[N, N] number of users who have both items among their training interactions; the diagonal is empty.

    Args:
        indptr: [U + 1]; `items[indptr[u]:indptr[u + 1]]` are the training items of user u.
        items: item_index of all users' training items, end to end.
        num_items: N.
        window: number of each user's latest items that count; None: all.
        weights: of the training items; a user counts as the product of the weights of both items. None: all are 1.
    """
    if window is not None:
        ends = np.repeat(indptr[1:], np.diff(indptr))
        late = ends - np.arange(len(items)) <= window
        indptr, items = np.concatenate([[0], np.cumsum(late)])[indptr], items[late]
        weights = None if weights is None else weights[late]
    counts = gram(indptr, items, num_items, weights)
    counts.setdiag(0)
    counts.eliminate_zeros()
    return counts


def gram(indptr: np.ndarray, items: np.ndarray, num_items: int, weights: np.ndarray | None = None) -> sparse.csr_matrix:
    """[N, N] number of users who have both items; the diagonal holds the users of each item.

    Args:
        weights: of the items; a user counts as the product of the weights of both. None: all are 1.
    """
    shape = (len(indptr) - 1, num_items)
    if weights is None:
        has = sparse.csr_matrix((np.ones(len(items), dtype=np.float32), items, indptr), shape=shape)
        has.sum_duplicates()
        has.data[:] = 1.0  # a user who has an item twice is still one user
    else:
        user = np.repeat(np.arange(shape[0]), np.diff(indptr))
        order = np.lexsort((-weights, items, user))  # of several interactions with an item, the one of the largest weight counts
        first = np.append(True, (np.diff(user[order]) != 0) | (np.diff(items[order]) != 0))[: len(order)]
        chosen = order[first]
        has = sparse.csr_matrix((weights[chosen].astype(np.float32), (user[chosen], items[chosen])), shape=shape)
    gram = (has.T @ has).tocsr()
    gram.sort_indices()
    return gram


def collaborative_vectors(together: sparse.csr_matrix, dim: int, seed: int) -> np.ndarray:
    """Vectors whose products approach the positive pointwise mutual information of items that occur together.

    The factors are the eigenvectors of the largest positive eigenvalues. Singular vectors would not do: they lose signs, so that
    two items that occur with nothing but each other come out orthogonal.

    Args:
        dim: width; if there are fewer positive eigenvalues, the rest is zeros.
        seed: seed of the iteration's start.

    Returns:
        [N, dim] float32 rows of length 1; zeros for items that never occur with another.
    """
    mutual = _positive_mutual_information(together.astype(float))
    vectors = np.zeros((together.shape[0], dim), np.float32)
    if mutual.nnz:
        strength, factors = _top_eigenvectors(mutual, dim, seed)
        vectors[:, : len(strength)] = _unit_rows(factors * np.sqrt(strength))
        vectors[np.diff(mutual.indptr) == 0] = 0  # rounding errors there would be scaled up to unit length
    return vectors


def _positive_mutual_information(together: sparse.csr_matrix) -> sparse.csr_matrix:
    """[N, N] positive pointwise mutual information of counts: max(0, log(p(i, j) / (p(i) p(j))))."""
    pairs = together.tocoo()
    totals = np.asarray(together.sum(axis=1)).ravel()
    information = np.log(pairs.data * totals.sum() / (totals[pairs.row] * totals[pairs.col]))
    positive = information > 0
    return sparse.csr_matrix((information[positive], (pairs.row[positive], pairs.col[positive])), shape=together.shape)


def _top_eigenvectors(matrix: sparse.csr_matrix, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `count` positive eigenvalues of a symmetric matrix, the largest first, and their vectors [N, count]."""
    size = matrix.shape[0]
    if size <= max(SMALL, 2 * count):
        values, vectors = np.linalg.eigh(matrix.toarray())
    else:
        kind, tolerance = (np.float32, 1e-2) if size >= LARGE else (np.float64, 1e-4)
        start = np.random.default_rng(seed).standard_normal(size).astype(kind)
        values, vectors = eigsh(matrix.astype(kind, copy=False), k=count, which="LA", v0=start, tol=tolerance)
    chosen = np.argsort(-values, kind="stable")[:count]
    chosen = chosen[values[chosen] > 1e-9 * values.max()]
    vectors = vectors[:, chosen]
    largest = np.abs(vectors).argmax(axis=0)
    return values[chosen], vectors * np.sign(vectors[largest, np.arange(len(chosen))])  # eigenvectors are unique up to sign: fix the sign


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
