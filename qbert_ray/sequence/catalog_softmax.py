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
    log_probability: Tensor  # [R]


def sample_items(batch_items: Tensor, frequency: Tensor, uniform: int) -> SampledItems:
    """The items of a batch and `uniform` random ones, with their inclusion probabilities.

    An item is included if the batch holds it, whose items are drawn about by frequency, or if it is among the uniform draws.

    Args:
        batch_items: [S] item_index of all inputs and targets of a batch.
        frequency: [N] share of each item in the training interactions.
        uniform: draws from the whole catalog, with repetition.
    """
    size = len(frequency)
    drawn = torch.randint(size, (uniform,), device=batch_items.device)
    rows = torch.cat([batch_items, drawn]).unique()
    missed_by_batch = torch.exp(len(batch_items) * torch.log1p(-frequency[rows]))
    missed_by_draws = (1 - 1 / size) ** uniform
    return SampledItems(rows, torch.log1p(-missed_by_batch * missed_by_draws))


def catalog_cross_entropy(
    query: Tensor, vectors: Tensor, bias: Tensor, target: Tensor, correction: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the targets under a softmax over the items, summed over the queries.

    Args:
        query: [P, D].
        vectors: [N, D], bias: [N] of the items; logits are `query @ vectors.T + bias`.
        target: [P] row of each target.
        correction: [P] added to the target's own logit: with sampled items, whose bias is reduced by their log-probability
            (Jean et al. 2015), the target is not a sample.
        weight: [P] of the targets; None: all are 1.
    """
    return _CatalogCrossEntropy.apply(query, vectors, bias, target, correction, weight)


class _CatalogCrossEntropy(torch.autograd.Function):
    """Keeps one [P, N] buffer where PyTorch's product, log-softmax and their gradients hold three."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, vectors: Tensor, bias: Tensor, target: Tensor, correction: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        logits = product(query, vectors, bias)
        own = target[:, None]
        if correction is not None:
            logits.scatter_add_(1, own, correction[:, None].to(logits.dtype))
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
