"""Stage 3, §3.5: which items of a sequence are masked.

Span (one run of neighbours), tail (the last few), multi-region (several runs that do not touch), random (BERT4Rec's), and
the last item alone, as in evaluation. Whole items are masked: the codes of one item would give each other away.

Every draw is a hash of (seed, epoch, sample), so a sample's mask does not depend on its batch mates, on workers, or on
where a training was resumed.

Shapes: B samples, T longest sequence.
"""

from __future__ import annotations

import numpy as np

from qbert_ray.random_streams import PREFIX_STREAM, uniform

STRATEGIES = ("span", "tail", "multi_region", "random", "last")
MAX_REGIONS = 3


def draw_lengths(
    lengths: np.ndarray, samples: np.ndarray, seed: int, epoch: int, last_item_share: float, prefix_share: float
) -> np.ndarray:
    """[B] lengths of the prefixes that are read; only sequences whose last item alone is masked are truncated, to two items at least.

    Without it the last item would be the same in every epoch, and soon be memorized.

    Args:
        prefix_share: fraction of last-item samples truncated at a random position, redrawn each epoch.
    """
    draws = uniform(seed + PREFIX_STREAM, epoch, samples, 2)
    early = _masks_last(samples, seed, epoch, last_item_share) & (draws[:, 0] < prefix_share)
    ends = 2 + np.floor(draws[:, 1] * (lengths - 1)).astype(np.int64)
    return np.where(early, np.minimum(ends, lengths), lengths)


def draw_masks(
    lengths: np.ndarray,
    samples: np.ndarray,
    seed: int,
    epoch: int,
    weights: dict[str, float],
    ratios: dict[str, float],
    last_item_share: float = 0.0,
) -> np.ndarray:
    """True where an item is masked: [B, T], left-aligned. At least one item of each sequence is, and never all of two or more.

    Args:
        lengths: [B] items per sequence, each at least 1.
        samples: [B] number of each sequence; its masks follow from it, the seed and the epoch.
        seed: of all draws.
        epoch: each has other masks.
        weights: strategy -> weight with which a sequence draws it.
        ratios: strategy -> share of the sequence that it masks.
        last_item_share: share of sequences that mask only their last item.
    """
    longest = int(lengths.max())
    draws = uniform(seed, epoch, samples, longest + 2 + MAX_REGIONS)  # [B, T + 2 + R]
    names = list(weights)
    bounds = np.cumsum([weights[name] for name in names]) / sum(weights.values())
    chosen = np.minimum(np.searchsorted(bounds, draws[:, 0], side="right"), len(names) - 1)
    last = _masks_last(samples, seed, epoch, last_item_share)
    places, noise = draws[:, 2 : 2 + MAX_REGIONS], draws[:, 2 + MAX_REGIONS :]
    mask = np.zeros((len(lengths), longest), dtype=bool)
    for number, name in enumerate(names):
        rows = np.flatnonzero((chosen == number) & ~last)
        if len(rows):
            mask[rows] = mask_by(name, lengths[rows], ratios.get(name, 0.0), places[rows], noise[rows], longest)
    mask[last, lengths[last] - 1] = True
    return mask


def mask_by(strategy: str, lengths: np.ndarray, ratio: float, places: np.ndarray, noise: np.ndarray, longest: int) -> np.ndarray:
    """Masks [B, T] of one strategy.

    Args:
        ratio: share of the items to mask.
        places: [B, MAX_REGIONS] draws in [0, 1) of where a run starts.
        noise: [B, T] draws in [0, 1), one per item.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown mask strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    position = np.arange(longest)
    most = np.maximum(lengths - 1, 1)
    count = np.clip(np.rint(ratio * lengths).astype(np.int64), 1, most)
    if strategy == "span":
        start = np.floor(places[:, 0] * (lengths - count + 1)).astype(np.int64)
        return _run(start, count, position)
    if strategy in ("tail", "last"):
        count = count if strategy == "tail" else np.ones_like(count)
        return _run(lengths - count, count, position)
    if strategy == "multi_region":
        return _regions(lengths, count, places, position)
    return _bernoulli(lengths, ratio, noise, position)


def _masks_last(samples: np.ndarray, seed: int, epoch: int, share: float) -> np.ndarray:
    """[B] whether a sample masks only its last item."""
    return uniform(seed, epoch, samples, 2)[:, 1] < share


def _run(start: np.ndarray, count: np.ndarray, position: np.ndarray) -> np.ndarray:
    return (position >= start[:, None]) & (position < (start + count)[:, None])


def _regions(lengths: np.ndarray, count: np.ndarray, places: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Runs in separate zones of the sequence, each zone ending with an item that stays: runs never touch."""
    regions = np.clip(lengths // 2, 1, MAX_REGIONS)
    regions = np.minimum(regions, np.maximum(count, 2))  # at least two regions where the sequence holds them
    mask = np.zeros((len(lengths), len(position)), dtype=bool)
    for number in range(MAX_REGIONS):
        there = number < regions
        begin, end = number * lengths // regions, (number + 1) * lengths // regions
        share = count // regions + (number < count % regions)
        size = np.clip(share, 1, np.maximum(end - begin - 1, 1))
        room = np.maximum(end - begin - 1 - size, 0)
        start = begin + np.floor(places[:, number] * (room + 1)).astype(np.int64)
        mask |= _run(start, np.where(there, size, 0), position)
    return mask


def _bernoulli(lengths: np.ndarray, ratio: float, noise: np.ndarray, position: np.ndarray) -> np.ndarray:
    valid = position < lengths[:, None]
    mask = (noise < ratio) & valid
    rows = np.arange(len(lengths))
    none = ~mask.any(1)
    mask[rows[none], np.where(valid, noise, 2.0).argmin(1)[none]] = True
    whole = (mask.sum(1) == lengths) & (lengths > 1)
    mask[rows[whole], np.where(valid, noise, -1.0).argmax(1)[whole]] = False
    return mask
