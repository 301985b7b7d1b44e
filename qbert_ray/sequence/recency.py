"""The recency-weighted mean of a history's item vectors, which `recall` adds to the queries.

Shapes: S items of all packed sequences, T items of a sequence, D width, P positions whose query is asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qbert_ray.sequence.packing import Packed


def recency_weighted_mean(items: Tensor, batch: Packed, recall: Tensor, causal: bool = False) -> Tensor:
    """The recency-weighted mean of the history's item vectors, for every position whose query is asked for.

    Args:
        items: [S, D] vectors of the packed items.
        batch: the sequences; masked items do not count.
        recall: [2] the weight of the mean, and the logit of its decay per step.
        causal: the mean is of the items up to the position itself; else of all that are not masked.

    Returns:
        [P, D] of length weight * sqrt(D), the size of a query; zeros where every item is masked.
    """
    if batch.ends:
        weights = recency_weights(batch.position + int(causal), recall)
        weights = weights if causal else weights.masked_fill(batch.masked, 0)
        sums = items.new_zeros(sum(count for _, count, _ in batch.groups), items.shape[1])
        sums.index_add_(0, batch.masked.cumsum(0) - batch.masked.long(), items * weights[:, None])
        return at_query_size(sums, recall)
    means, decay = [], F.logsigmoid(recall[1])
    sizes = [count * length for _, count, length in batch.groups]
    for vectors, masked, (_, count, length) in zip(items.split(sizes), batch.masked.split(sizes), batch.groups, strict=True):
        place = torch.arange(length, device=items.device)
        logits = decay * (place - place[:, None]).abs()  # [T, T]
        hidden = place > place[:, None] if causal else masked.view(count, 1, length)
        logits = logits.masked_fill(hidden, -torch.inf)  # [count, T, T], or [T, T]
        mean = logits.softmax(-1).nan_to_num() @ vectors.view(count, length, -1)  # nothing but masked items: zeros
        means.append(mean.flatten(0, 1)[masked])
    return at_query_size(torch.cat(means), recall)


def recency_weights(steps: Tensor, recall: Tensor) -> Tensor:
    """Weight of each item by its steps before the masked item: 1 for the last; only the direction of a mean counts, so no sum to 1."""
    return torch.exp(F.logsigmoid(recall[1]) * (steps - 1))


def at_query_size(means: Tensor, recall: Tensor) -> Tensor:
    """Mean item vectors [P, D] scaled to length weight * sqrt(D), which is that of a normalized query."""
    return recall[0] * means.shape[1] ** 0.5 * F.normalize(means, dim=-1)
