"""Cross-entropy over the items of a catalog, or over a sample of them.

Shapes: P queries, N items, R sampled items, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbert_ray.products import product


class SampledItems(NamedTuple):
    """A sample of a catalog for the softmax of one batch, with the inclusion probability of each item."""

    rows: Tensor  # [R] item_index, ascending, without repetitions
    log_probability: Tensor  # [R] for queries of other sequences
    certain: tuple[Tensor, Tensor]  # query and place in `rows` of the items of each query's own sequence, which are never left out


def sample_items(items: Tensor, target: Tensor, groups: list[tuple[int, int, int]], frequency: Tensor, uniform: int) -> SampledItems:
    """The items of a batch and `uniform` random ones, with their inclusion probabilities.

    An item is included if a sequence of the batch holds it, whose items are drawn about by frequency, or if it is among the uniform draws.
    A query's own sequence is no draw: its items, those after the target too, would weigh as much more than others as they are rare.

    Args:
        items: [P] item_index of packed sequences, each of which is followed by
        target: [P].
        groups: of the sequences, as `pack` gives them.
        frequency: [N] share of each item in the training interactions.
        uniform: draws from the whole catalog, with repetition.
    """
    size, sequences = len(frequency), sum(count for _, count, _ in groups)
    rows = torch.cat([items, target, torch.randint(size, (uniform,), device=items.device)]).unique()
    others = (len(items) + sequences) * (1 - 1 / sequences)  # items of a batch without one of its sequences
    missed_by_batch = torch.exp(others * torch.log1p(-frequency[rows]))
    missed_by_draws = (1 - 1 / size) ** uniform
    queries, own = [], []
    for start, count, length in groups:
        block = torch.arange(start, start + count * length, device=items.device).view(count, length)
        whole = torch.cat([items[block], target[block[:, -1:]]], dim=1)  # [count, length + 1]
        queries.append(block[:, :, None].expand(count, length, length + 1).flatten())
        own.append(whole[:, None].expand(count, length, length + 1).flatten())
    certain = torch.cat(queries), torch.searchsorted(rows, torch.cat(own))
    return SampledItems(rows, torch.log1p(-missed_by_batch * missed_by_draws), certain)


def catalog_cross_entropy(
    query: Tensor,
    vectors: Tensor,
    bias: Tensor,
    target: Tensor,
    correction: tuple[Tensor, Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the targets under a softmax over the items, summed over the queries.

    Args:
        query: [P, D].
        vectors: [N, D], bias: [N] of the items; logits are `query @ vectors.T + bias`.
        target: [P] row of each target.
        correction: queries, rows and what is added to their logits; repeated pairs count once. With sampled items, whose bias is
            reduced by their log-probability (Jean et al. 2015), the target and other items that are not there by chance get it back.
        weight: [P] of the targets; None: all are 1.
    """
    return _CatalogCrossEntropy.apply(query, vectors, bias, target, correction, weight)


class _CatalogCrossEntropy(torch.autograd.Function):
    """Keeps one [P, N] buffer where PyTorch's product, log-softmax and their gradients hold three."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        vectors: Tensor,
        bias: Tensor,
        target: Tensor,
        correction: tuple[Tensor, Tensor, Tensor] | None,
        weight: Tensor | None,
    ) -> Tensor:
        logits = product(query, vectors, bias)
        own = target[:, None]
        if correction is not None:
            queries, rows, added = correction
            logits[queries, rows] = logits[queries, rows] + added.to(logits.dtype)
        logits -= logits.amax(1, keepdim=True)
        of_target = logits.gather(1, own)[:, 0].clone()
        total = logits.exp_().sum(1)
        ctx.save_for_backward(query, vectors, logits, total, target, weight)
        each = total.log() - of_target
        return each.sum() if weight is None else each @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, vectors, exponentials, total, target, weight = ctx.saved_tensors
        wrong = exponentials.scatter_add(1, target[:, None], -total[:, None])  # softmax minus one-hot, times the sum of each row
        scale = (gradient / total if weight is None else gradient * weight / total)[:, None]
        by_query = (query * scale).T.contiguous()
        return product(wrong, vectors.T) * scale, product(by_query, wrong.T).T, scale[:, 0] @ wrong, None, None, None
