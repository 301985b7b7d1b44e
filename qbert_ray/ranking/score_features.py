"""What is said of every item of a catalog beside the sequencer's score, asked for a batch of histories.

Shapes: N catalog, n items of a block of it, B histories, U different items in them, D width of content vectors, F signals.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

CONTENTS = ("content", "text", "image")
SIGNALS = ("sequencer", "ridge", "following", *CONTENTS, "seen")
SCRATCH = 2**22  # numbers laid out at once where entries of sparse rows are looked up
CONTENT_HISTORY = 20  # latest items of a history that content is compared with


class Alike(NamedTuple):
    """How alike items are in one kind of content."""

    vectors: Tensor  # [N, D] of length 1
    pairs: np.ndarray | None  # [N, N] their products, where they are kept


class Said:
    """What a memory says of a batch of histories: sparse where it is sparse, block by block of the catalog where it is not.

    Of both memories log(1 + weight / scale), of contents the cosine to the nearest of the latest items of the history, and 1
    where the history holds the item.

    Args:
        regression: [B, N] scores of the ridge regression by itself.
        weights: [B, N] of both memories.
        alike: place in `SIGNALS` -> that kind of content.
    """

    def __init__(
        self, regression: sparse.csr_matrix, weights: list[sparse.csr_matrix], alike: dict[int, Alike], histories: list[np.ndarray]
    ) -> None:
        self.regression, self.weights, self.alike = regression, weights, alike
        self.size, self.num_items = weights[0].shape
        seen = sparse.csr_matrix(
            (
                np.ones(sum(map(len, histories)), np.float32),
                np.concatenate([*histories, np.zeros(0, np.int64)]),
                np.cumsum([0, *map(len, histories)]),
            ),
            shape=weights[0].shape,
        )
        seen.sum_duplicates()
        seen.data[:] = 1  # an item that was had twice is still seen once
        self.sparse = {1: weights[0], 2: weights[1], len(SIGNALS) - 1: seen}
        self._latest = latest = [history[-CONTENT_HISTORY:] for history in histories]
        lengths = np.array([len(items) for items in latest], dtype=np.int64)
        self._order = np.argsort(-lengths, kind="stable")
        joined, first = np.concatenate([*latest, np.zeros(0, np.int64)]), np.cumsum(lengths) - lengths
        self._items, place = np.unique(joined, return_inverse=True)
        there = [self._order[: int((lengths > step).sum())] for step in range(int(lengths.max(initial=0)))]
        self._steps = [torch.from_numpy(place[first[rows] + step]) for step, rows in enumerate(there)]

    @property
    def strongest(self) -> Tensor:
        """[B] the largest thing the regression says of any item."""
        indptr, strongest = self.weights[0].indptr, np.zeros(self.size, np.float32)
        some = np.diff(indptr) > 0
        strongest[some] = np.maximum.reduceat(self.weights[0].data, indptr[:-1][some]) if some.any() else 0
        return torch.from_numpy(strongest)

    def nearest(self, number: int, block: slice) -> Tensor:
        """[B, n] cosine of each item of a block to the nearest of the history's latest; 0 for a history without items."""
        vectors, pairs = self.alike[number]
        if pairs is not None:
            found = np.zeros((self.size, block.stop - block.start), np.float32)
            for row, items in zip(found, self._latest, strict=True):
                if len(items):
                    np.maximum.reduce(pairs[items, block], axis=0, out=row)
            return torch.from_numpy(found)
        cosines = vectors[torch.from_numpy(self._items).to(vectors.device)] @ vectors[block].T  # [U, n]
        best = cosines.new_zeros(self.size, cosines.shape[1])  # the longest histories first
        for step, places in enumerate(self._steps):
            own, further = best[: len(places)], cosines[places.to(cosines.device)]
            torch.maximum(own, further, out=own) if step else own.copy_(further)
        return best[torch.from_numpy(np.argsort(self._order)).to(best.device)]

    def at(self, items: Tensor) -> Tensor:
        """[B, C, F - 1] of some items [B, C]: all signals but the sequencer's score; zeros for those that were not asked for. On the CPU."""
        items = items.cpu()
        result = torch.zeros(*items.shape, len(SIGNALS) - 1)
        for number, matrix in self.sparse.items():
            result[..., number - 1] = torch.from_numpy(_entries(matrix, items.numpy()))
        for number, alike in self.alike.items():
            result[..., number - 1] = self._nearest_of(alike, items)
        return result

    def _nearest_of(self, alike: Alike, items: Tensor) -> Tensor:
        """[B, C] as `nearest`, of some items."""
        vectors, pairs = alike
        if pairs is not None:
            found = np.zeros(items.shape, np.float32)
            for row, latest, some in zip(found, self._latest, items.numpy(), strict=True):
                if len(latest):
                    np.maximum.reduce(pairs[latest[:, None], some], axis=0, out=row)
            return torch.from_numpy(found)
        lengths = torch.tensor([len(latest) for latest in self._latest])
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(latest) for latest in self._latest], batch_first=True)  # [B, T]
        if not padded.shape[1]:
            return torch.zeros(items.shape)
        items, padded = items.to(vectors.device), padded.to(vectors.device)
        cosines = torch.bmm(vectors[items], vectors[padded].transpose(1, 2)).cpu()  # [B, C, T]
        beyond = torch.arange(padded.shape[1]) >= lengths[:, None]
        return torch.where(lengths[:, None] > 0, cosines.masked_fill(beyond[:, None], -torch.inf).amax(2), 0)

    def dense(self) -> Tensor:
        """[F - 1, B, N] of all signals but the sequencer's score; zeros for those that were not asked for."""
        result = torch.zeros(len(SIGNALS) - 1, self.size, self.num_items)
        for number, matrix in self.sparse.items():
            result[number - 1] = torch.from_numpy(matrix.toarray())
        for number in self.alike:
            result[number - 1] = self.nearest(number, slice(0, self.num_items))
        return result


def _entries(matrix: sparse.csr_matrix, items: np.ndarray) -> np.ndarray:
    """[B, C] entries of a matrix [B, N] in some columns [B, C] of each row, by laying out as many rows at a time as stay small."""
    size, width = matrix.shape
    result = np.empty(items.shape, np.float32)
    step = max(1, min(size, SCRATCH // width))
    scratch = np.zeros(step * width, np.float32)
    for first in range(0, size, step):
        bounds = matrix.indptr[first : first + step + 1]
        rows = np.arange(len(bounds) - 1) * width
        flat = np.repeat(rows, np.diff(bounds)) + matrix.indices[bounds[0] : bounds[-1]]
        scratch[flat] = matrix.data[bounds[0] : bounds[-1]]
        result[first : first + step] = scratch[rows[:, None] + items[first : first + step]]
        scratch[flat] = 0
    return result


Entries = tuple[Tensor, Tensor, Tensor]  # history, place in a block, and what is added there


def by_block(blocks: list[slice], rows: np.ndarray, items: np.ndarray, values: np.ndarray, device: torch.device) -> dict[int, Entries]:
    """First item of each block -> what is added to its scores; the blocks are the catalog in order."""
    starts = np.array([block.start for block in blocks])
    number = (np.searchsorted(starts, items, side="right") - 1).astype(np.uint16)
    order = np.argsort(number, kind="stable")
    rows, items, values = rows[order], items[order] - starts[number[order]], values[order]
    bounds = [0, *np.cumsum(np.bincount(number, minlength=len(blocks))).tolist()]
    pieces = [[torch.from_numpy(each[begin:end]).to(device) for each in (rows, items, values)] for begin, end in pairwise(bounds)]
    return {block.start: (row, item, value) for block, (row, item, value) in zip(blocks, pieces, strict=True)}


def add(scores: Tensor, entries: Entries) -> Tensor:
    """Scores [B, n] of a block, changed in place."""
    rows, places, values = entries
    scores.view(-1).scatter_add_(0, rows * scores.shape[1] + places, values)
    return scores


class Mixture:
    """What a mix adds to the sequencer's scores of a batch of histories, block by block of the catalog.

    Args:
        trust: [B, 2 F + 1] of `Mix.trust`.
        blocks: of the catalog, in order; none has both trained and new items.
        trained: items that training has seen, the first of the catalog; the others are new.
        hidden: items of a history get minus infinity.
    """

    def __init__(self, said: Said, trust: Tensor, blocks: list[slice], trained: int, hidden: bool = False) -> None:
        self.said, self.trust, self.trained = said, trust, trained
        self._whole = list(self._weighted(trust.cpu().numpy(), hidden))
        self._added: dict[int, Entries] = {}
        if len(blocks) > 1:
            counts = [np.diff(matrix.indptr) for matrix in self._whole]
            rows = np.concatenate([np.repeat(np.arange(len(each)), each) for each in counts])
            items = np.concatenate([matrix.indices for matrix in self._whole]).astype(np.int64)
            values = np.concatenate([matrix.data for matrix in self._whole])
            self._added = by_block(blocks, rows, items, values, trust.device)

    def _weighted(self, trust: np.ndarray, hidden: bool) -> Iterator[sparse.csr_matrix]:
        """[B, N] what every sparse signal adds."""
        for number, matrix in self.said.sparse.items():
            counts = np.diff(matrix.indptr)
            weights = np.repeat(trust[:, number], counts)
            if self.trained < matrix.shape[1]:
                new = np.repeat(trust[:, number + len(SIGNALS)], counts)
                weights = np.where(matrix.indices < self.trained, weights, new)
            added = np.full_like(weights, -np.inf) if hidden and SIGNALS[number] == "seen" else matrix.data * weights
            yield sparse.csr_matrix((added, matrix.indices, matrix.indptr), shape=matrix.shape)

    def mixed(self, scores: Tensor, block: slice) -> Tensor:
        """[B, n] the sequencer's scores of a block, which are overwritten, with all signals."""
        new = block.start >= self.trained
        trust = self.trust[:, len(SIGNALS) :] if new else self.trust
        scores.mul_(trust[:, :1])
        for number in self.said.alike:
            if trust[:, number].any():
                scores.addcmul_(self.said.nearest(number, block), trust[:, number, None])
        if new:
            scores.add_(trust[:, -1:])
        if self._added:
            return add(scores, self._added[block.start])
        for matrix in self._whole:  # a block that is the whole catalog: no entry has to be looked for
            scores.add_(torch.from_numpy(matrix.toarray()).to(scores.device))
        return scores
