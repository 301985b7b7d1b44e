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


class OwnItems(NamedTuple):
    """Each query with all items of its own sequence, its target and those after it too; pairs may repeat."""

    query: Tensor  # [Q]
    item: Tensor  # [Q] item_index
    left_out: bool  # of the softmax, but for the target

    def correction(self, target: Tensor, sampled: SampledItems | None) -> Correction:
        """What is added to the logits of own items, for targets [P]: with sampled items, they are there for certain."""
        row = self.item if sampled is None else torch.searchsorted(sampled.rows, self.item)
        added = torch.zeros(len(row), device=row.device) if sampled is None else sampled.log_probability[row]
        return Correction(self.query, row, added.masked_fill(self.left_out & (self.item != target[self.query]), -torch.inf))


class Correction(NamedTuple):
    """What is added to some logits; repeated pairs count once."""

    query: Tensor  # [Q]
    row: Tensor  # [Q] of the items
    added: Tensor  # [Q]


def own_items(items: Tensor, target: Tensor, groups: list[tuple[int, int, int]], left_out: bool) -> OwnItems:
    """The own items of each query.

    Args:
        items: [P] item_index of packed sequences, each of which is followed by
        target: [P].
        groups: of the sequences, as `pack` gives them.
        left_out: of the softmax.
    """
    queries, own = [], []
    for start, count, length in groups:
        block = torch.arange(start, start + count * length, device=items.device).view(count, length)
        whole = torch.cat([items[block], target[block[:, -1:]]], dim=1)  # [count, length + 1]
        queries.append(block[:, :, None].expand(count, length, length + 1).flatten())
        own.append(whole[:, None].expand(count, length, length + 1).flatten())
    return OwnItems(torch.cat(queries), torch.cat(own), left_out)


def sample_items(items: Tensor, target: Tensor, groups: list[tuple[int, int, int]], frequency: Tensor, uniform: int) -> SampledItems:
    """The items of a batch and `uniform` random ones, with their inclusion probabilities.

    An item is included if another sequence of the batch holds it, whose items are drawn about by frequency, or if it is among the uniform
    draws. A query's own sequence is no draw: its items are always there.

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
    return SampledItems(rows, torch.log1p(-missed_by_batch * missed_by_draws))


def item_cross_entropy(
    query: Tensor,
    vectors: Tensor,
    bias: Tensor,
    target: Tensor,
    own: OwnItems | None = None,
    sampled: SampledItems | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the targets [P], item_index, under a softmax over the catalog or a sample of it, summed over the queries.

    Args:
        query: [P, D].
        vectors: [N, D], bias: [N] of the catalog, or [R, D] and [R] of the sampled items; logits are `query @ vectors.T + bias`.
        target: [P] item_index.
        own: the own items of each query, which have to be given with sampled items.
        sampled: items of the softmax; None: the catalog.
        weight: [P] of the targets; None: all are 1.
    """
    correction = None if own is None else own.correction(target, sampled)
    if sampled is not None:
        bias, target = bias - sampled.log_probability, torch.searchsorted(sampled.rows, target)
    return catalog_cross_entropy(query, vectors, bias, target, correction, weight)


def catalog_cross_entropy(
    query: Tensor,
    vectors: Tensor,
    bias: Tensor,
    target: Tensor,
    correction: Correction | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the targets under a softmax over the items, summed over the queries.

    Args:
        query: [P, D].
        vectors: [N, D], bias: [N] of the items; logits are `query @ vectors.T + bias`.
        target: [P] row of each target.
        correction: with sampled items, whose bias is reduced by their log-probability (Jean et al. 2015), the target and other items that
            are there for certain get it back. Minus infinity leaves an item out.
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
        correction: Correction | None,
        weight: Tensor | None,
    ) -> Tensor:
        logits = product(query, vectors, bias)
        own = target[:, None]
        if correction is not None:
            place = correction.query, correction.row
            logits[place] = logits[place] + correction.added.to(logits.dtype)
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
