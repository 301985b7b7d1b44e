"""From scores of every catalog item to ranks and top-k lists.

Equal scores are ordered by item_index, which is a permutation by hash: ties carry no information and never change.

Shapes: B users, N catalog.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def ranks(scores: Tensor, target: Tensor, seen: list[np.ndarray] | None = None) -> Tensor:
    """[B] 1-based rank of each target among all N items, or among the unseen ones.

    Args:
        scores: [B, N].
        target: [B] item_index.
        seen: item indices to leave out, one array per user; the target itself always stays in.
    """
    if seen is not None:
        scores = hide(scores, seen, keep=target)
    own = scores.gather(1, target[:, None])  # [B, 1]
    index = torch.arange(scores.shape[1], device=scores.device)
    better = (scores > own).sum(1) + ((scores == own) & (index < target[:, None])).sum(1)
    return better + 1


def hide(scores: Tensor, seen: list[np.ndarray], keep: Tensor | None = None) -> Tensor:
    """Scores with the items each user has seen at minus infinity, but for `keep` [B]."""
    rows = torch.from_numpy(np.repeat(np.arange(len(seen)), [len(items) for items in seen]))
    columns = torch.from_numpy(np.concatenate([np.asarray(items, dtype=np.int64) for items in seen])) if seen else rows
    hidden = scores.clone()
    hidden[rows.to(scores.device), columns.to(scores.device)] = -torch.inf
    if keep is not None:
        hidden.scatter_(1, keep[:, None], scores.gather(1, keep[:, None]))
    return hidden


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices [B, min(k, N)] of the best items, best first, equal scores by index.

    Hidden items (minus infinity) come last; their index is -1.
    """
    k = min(k, scores.shape[1])
    values, indices = scores.topk(k, dim=1)
    # topk picks freely among equal scores at the cut: where there are any, sort that row whole.
    tied = (scores >= values[:, -1:]).sum(1) > k
    if tied.any():
        values[tied], indices[tied] = (x[:, :k] for x in scores[tied].sort(dim=1, descending=True, stable=True))
    by_index = indices.argsort(dim=1)
    order = by_index.gather(1, values.gather(1, by_index).argsort(dim=1, descending=True, stable=True))
    values, indices = values.gather(1, order), indices.gather(1, order)
    return values, indices.masked_fill(values == -torch.inf, -1)
