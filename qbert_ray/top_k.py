"""Ranks and top-k lists from the scores of all catalog items.

Equal scores are ordered by item_index, which is a permutation by hash: ties carry no information and never change.

Shapes: B users, N catalog, n items of a block of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUP = 32  # neighbouring items whose largest score is computed first


def ranks(scores: Tensor, target: Tensor, seen: list[np.ndarray] | None = None) -> Tensor:
    """[B] 1-based rank of each target among all N items, or among the unseen ones.

    Args:
        scores: [B, N]; minus infinity for items that were not reached. A target that was not is the last of all, N, whatever is tied with it.
        target: [B] item_index.
        seen: item indices to leave out, one array per user; the target itself always stays in.
    """
    own = scores.gather(1, target[:, None])  # [B, 1]
    better, equal = _count(scores > own), _count(scores >= own)
    rows = (equal - better > 1).nonzero()[:, 0]  # rows in which other items have the target's score
    if len(rows):
        before = torch.arange(scores.shape[1], device=scores.device) < target[rows, None]
        better[rows] += _count((scores[rows] == own[rows]) & before)
    rank = better + 1 if seen is None else better + 1 - _better_among(scores, own, target, seen)
    return rank.masked_fill(own[:, 0] == -torch.inf, scores.shape[1])


def rank_pairs(scores: Tensor, target: Tensor, seen: list[np.ndarray], repeats: float = 0.0) -> Tensor:
    """[B, 2] 1-based rank of each target among all items, and among the unseen ones.

    Args:
        scores: [B, N].
        target: [B] item_index.
        seen: item indices that each user had.
        repeats: added to the scores of seen items where all are ranked.
    """
    rank, own = ranks(scores, target), scores.gather(1, target[:, None])
    unseen = torch.where(own[:, 0] == -torch.inf, rank, rank - _better_among(scores, own, target, seen))
    return torch.stack([ranks(add_to_seen(scores, seen, repeats), target) if repeats else rank, unseen], dim=1)


def add_to_seen(scores: Tensor, seen: list[np.ndarray], value: float) -> Tensor:
    """Scores [B, N] with a value added to those of each user's seen items, once each."""
    rows, items = (torch.from_numpy(each).to(scores.device) for each in pairs(seen, scores.shape[1]))
    return scores.index_put((rows, items), scores.new_tensor(value), accumulate=True)


def _better_among(scores: Tensor, own: Tensor, target: Tensor, seen: list[np.ndarray]) -> Tensor:
    """[B] number of distinct items of `seen` that rank before the target."""
    rows, items = (torch.from_numpy(each).to(scores.device) for each in pairs(seen, scores.shape[1]))
    theirs, own = scores[rows, items], own[rows, 0]
    before = (theirs > own) | ((theirs == own) & (items < target[rows]))
    return torch.zeros_like(target).index_add_(0, rows, before.to(target.dtype))


def hide(scores: Tensor, seen: list[np.ndarray]) -> Tensor:
    """Scores [B, N] with each user's seen items set to minus infinity."""
    rows, items = (torch.from_numpy(each).to(scores.device) for each in pairs(seen, scores.shape[1]))
    return scores.index_put((rows, items), scores.new_tensor(-torch.inf))


def pairs(seen: list[np.ndarray], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """User and item of each distinct pair in `seen`."""
    user = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
    pairs = np.unique(user * num_items + np.concatenate([*seen, np.zeros(0, np.int64)]).astype(np.int64))
    return pairs // num_items, pairs % num_items


def _count(true: Tensor) -> Tensor:
    """[B] number of true values per row [B, N]; on a CPU, NumPy sums booleans several times as fast as PyTorch."""
    return true.sum(1) if true.is_cuda else torch.from_numpy(true.numpy().sum(1, dtype=np.int32)).long()


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices [B, min(k, N)] of the best items, best first, equal scores by index.

    Hidden items (minus infinity) come last; their index is -1.
    """
    values, indices = _best_of_groups(scores, min(k, scores.shape[1]))
    return values, indices.masked_fill(values == -torch.inf, -1)


def better(best: tuple[Tensor, Tensor] | None, scores: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:
    """The top k of a catalog processed in blocks: merges `best`, of the blocks before, with the scores of a further block.

    Args:
        best: scores and indices [B, at most k] of the blocks before; None for the first block.
        scores: [B, n] of the block whose first item is `first`.
    """
    if best is None:
        values, indices = top_k(scores, k)
        return values, torch.where(indices >= 0, indices + first, -1)
    values, indices = best
    if values.shape[1] < k:
        rows = torch.arange(len(scores), device=scores.device)
        more, places = top_k(scores, k)
        places = torch.where(places >= 0, places + first, -1)
    else:  # few items of a block beat those that are kept, and an equal score loses to the earlier item
        rows, more, places = _above(scores, values[:, -1:], k)
        places = places + first
    joined = torch.cat([indices[rows], places], dim=1)
    more, order = _best(torch.cat([values[rows], more], dim=1), min(k, joined.shape[1]))
    found = more, joined.gather(1, order)
    return (values.index_copy(0, rows, found[0]), indices.index_copy(0, rows, found[1])) if values.shape[1] == k else found


def _above(scores: Tensor, least: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, n] above `least` [B, 1], in order of the index: rows [R] that have any, their scores and places [R, most of a row].

    Rows with fewer are padded with minus infinity; rows may be cut to their k best.
    """
    row, place = (scores > least).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(scores))
    rows = counts.nonzero()[:, 0]
    most = int(counts.max()) if len(rows) else 0
    if most > 4 * k:
        return rows, *top_k(scores[rows], k)
    number = torch.cumsum(counts > 0, 0)[row] - 1
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    more = scores.new_full((len(rows), most), -torch.inf)
    places = row.new_zeros(len(rows), most)
    more[number, column], places[number, column] = scores[row, place], place
    return rows, more, places


def _best_of_groups(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`_best` for long rows: the k best items lie in the k groups of neighbours with the largest scores, earlier groups first."""
    groups = scores.shape[1] // GROUP
    if groups <= 4 * k:
        return _best(scores, k)
    _, chosen = _best(scores[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(2), k)
    places = (chosen.sort(dim=1).values[:, :, None] * GROUP + torch.arange(GROUP, device=scores.device)).flatten(1)
    rest = torch.arange(groups * GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
    places = torch.cat([places, rest], dim=1)  # in order of the index
    values, order = _best(scores.gather(1, places), k)
    return values, places.gather(1, order)


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their places, the largest first, equal ones in order of place."""
    values, indices = scores.topk(k, dim=1)
    # topk chooses arbitrarily among equal scores at the cut: sort rows that have any completely.
    tied = (scores >= values[:, -1:]).sum(1) > k
    if tied.any():
        values[tied], indices[tied] = (x[:, :k] for x in scores[tied].sort(dim=1, descending=True, stable=True))
    by_index = indices.argsort(dim=1)
    order = by_index.gather(1, values.gather(1, by_index).argsort(dim=1, descending=True, stable=True))
    return values.gather(1, order), indices.gather(1, order)
