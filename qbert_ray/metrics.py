"""Metrics: hit rate and NDCG from ranks, and the quality of semantic IDs from codes.

Leave-one-out has one relevant item per user, so a user's hit is 0 or 1 and the ideal DCG is 1.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

import numpy as np
from scipy.special import stdtrit

NORMAL_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


class Interval(TypedDict):
    """A mean over users with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


Figures = dict[str, Interval]  # metric, such as hr@10 -> its mean over users


class Evaluation(TypedDict):
    """Metrics of one domain, as evaluate/metrics.json holds them."""

    users: int
    sampled_from: NotRequired[int]  # users with a test item, where only a sample of them was ranked
    trained_on: NotRequired[str]  # held-out interactions that the models were trained on as well: "validation"
    protocols: dict[str, dict[str, Figures]]  # all, unseen or cold -> the model, a part of it or a baseline -> metrics
    cold: NotRequired[Evaluation]  # of users with a held-out cold item


def hit_rate(rank: np.ndarray, k: int) -> np.ndarray:
    """[U] 1 where the 1-based rank of the target is at most k, else 0."""
    return (rank <= k).astype(np.float64)


def ndcg(rank: np.ndarray, k: int) -> np.ndarray:
    """[U] 1 / log2(rank + 1) where the target is among the first k, else 0."""
    return np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)


def summarise(rank: np.ndarray, cutoffs: list[int]) -> Figures:
    """{"hr@10": {"value", "low", "high"}, ...}: means over users with their 95 % intervals (normal approximation).

    ndcg@1 is hr@1, so it is left out.
    """
    table = {f"hr@{k}": interval(hit_rate(rank, k)) for k in cutoffs}
    return table | {f"ndcg@{k}": interval(ndcg(rank, k)) for k in cutoffs if k > 1}


def expected_at_random(candidates: np.ndarray, cutoffs: list[int]) -> Figures:
    """Expected metrics, in the format of `summarise`, of a random order of each user's candidates."""
    gains = 1.0 / np.log2(np.arange(1, max(cutoffs) + 1) + 1.0)
    table = {f"hr@{k}": interval(np.minimum(k, candidates) / candidates) for k in cutoffs}
    return table | {f"ndcg@{k}": interval(np.cumsum(gains[:k])[np.minimum(k, candidates) - 1] / candidates) for k in cutoffs if k > 1}


def interval(values: np.ndarray) -> Interval:
    """Mean and 95 % interval of per-user values in [0, 1]; zeros if there are no users."""
    if not len(values):
        return {"value": 0.0, "low": 0.0, "high": 0.0}
    mean = float(values.mean())
    half = NORMAL_95 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"value": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def half_over_seeds(deviation: float | None, seeds: int) -> float | None:
    """Half-width of the 95 % interval (Student's t) of a mean over seeds, from their standard deviation; None for a single seed."""
    return None if deviation is None or seeds < 2 else float(stdtrit(seeds - 1, 0.975) * deviation / seeds**0.5)


def collision_rate(codes: np.ndarray) -> float:
    """Collision rate of codes [N, K]: 1 - distinct IDs / items."""
    if not len(codes):
        return 0.0
    ordered = codes[np.lexsort(codes.T)]
    return 1.0 - (1 + int((ordered[1:] != ordered[:-1]).any(1).sum())) / len(codes)


def codebook_usage(codes: np.ndarray, codebook_size: int) -> list[float]:
    """Share of the codewords that at least one item uses, per level."""
    return [np.count_nonzero(np.bincount(level)) / codebook_size for level in codes.T]


def perplexity(codes: np.ndarray) -> list[float]:
    """Perplexity (2 ** entropy) of the codes per level: M if all codewords are used equally, 1 if only one is."""
    return [2**bits for bits in entropy(codes)]


def entropy(codes: np.ndarray) -> list[float]:
    """Entropy in bits of the codes per level: log2 M where all M codewords are used equally, 0 where one is."""
    result = []
    for level in codes.T:
        share = np.bincount(level) / max(len(level), 1)
        used = share[share > 0]
        result.append(float(-(used * np.log2(used)).sum()) + 0.0)
    return result


def gini(codes: np.ndarray, codebook_size: int) -> list[float]:
    """Gini coefficient of the codewords' use per level: 0 if all are used equally, 1 - 1 / codebook_size if only one is used."""
    rank = np.arange(1, codebook_size + 1)
    result = []
    for level in codes.T:
        count = np.sort(np.bincount(level, minlength=codebook_size))
        result.append(float(2 * (rank * count).sum() / (codebook_size * max(count.sum(), 1)) - (codebook_size + 1) / codebook_size))
    return result
