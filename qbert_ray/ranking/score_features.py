"""Non-sequential score features of the catalog's items, for a batch of histories: what the blend and the reranker read.

Shapes: N catalog, n items of a block of it, B histories, C candidates, U different items in the histories, D width of content vectors,
F score features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

ALWAYS = ("text", "image")  # have a score feature also where a run lacks them, so that what was fitted keeps its shape


def score_features(modalities: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the score features of a run, in order.

    Score of the sequence model; item-item weights of the ridge regression and of the transitions, log(1 + weight / scale); cosine to the
    nearest item of the history by the fused embedding ("content") and by the mean vector in each modality; 1 for an item of the history.
    """
    return ("sequencer", "ridge", "following", "content", *dict.fromkeys([*ALWAYS, *modalities]), "seen")


SCORE_FEATURES = score_features()  # of a run with texts and images alone
SCRATCH = 2**22  # numbers laid out at once where entries of sparse rows are looked up
CONTENT_HISTORY = 20  # latest items of a history that candidates are compared with by content


class Content(NamedTuple):
    """The catalog's vectors of one kind of content."""

    vectors: Tensor  # [N, D] of length 1
    products: np.ndarray | None  # [N, N] their products, where they are kept


class ScoreFeatures:
    """All score features but the sequence model's score, for a batch of histories.

    Item-item weights and seen items are sparse matrices; the dense cosines are computed block by block or for some items.

    Args:
        sums: [B, N] scores of the ridge regression and of the transitions, each by itself.
        weights: [B, N] features of the ridge regression and of the transitions.
        contents: index of a score feature -> content whose cosines it is.
        histories: item_index in time order, the latest last.
        names: of the F score features.
    """

    def __init__(
        self,
        sums: list[sparse.csr_matrix],
        weights: list[sparse.csr_matrix],
        contents: dict[int, Content],
        histories: list[np.ndarray],
        names: tuple[str, ...] = SCORE_FEATURES,
    ) -> None:
        self.sums, self.weights, self.contents, self.names = sums, weights, contents, names
        self.size, self.num_items = weights[0].shape
        self.lengths = torch.tensor([len(history) for history in histories], dtype=torch.int64)
        seen = sparse.csr_matrix(
            (
                np.ones(sum(map(len, histories)), np.float32),
                np.concatenate([*histories, np.zeros(0, np.int64)]),
                np.cumsum([0, *map(len, histories)]),
            ),
            shape=weights[0].shape,
        )
        seen.sum_duplicates()
        seen.data[:] = 1  # an item that is in the history twice is still seen once
        self.sparse = {1: weights[0], 2: weights[1], len(names) - 1: seen}
        self._latest = latest = [history[-CONTENT_HISTORY:] for history in histories]
        lengths = np.array([len(items) for items in latest], dtype=np.int64)
        self._order = np.argsort(-lengths)
        joined, first = np.concatenate([*latest, np.zeros(0, np.int64)]), np.cumsum(lengths) - lengths
        self._items, place = np.unique(joined, return_inverse=True)
        longer = [self._order[: int((lengths > step).sum())] for step in range(int(lengths.max(initial=0)))]
        self._steps = [torch.from_numpy(place[first[rows] + step]) for step, rows in enumerate(longer)]

    @property
    def strongest(self) -> Tensor:
        """[B] the largest ridge feature of any item; 0 where there is none."""
        indptr, strongest = self.weights[0].indptr, np.zeros(self.size, np.float32)
        some = np.diff(indptr) > 0
        strongest[some] = np.maximum.reduceat(self.weights[0].data, indptr[:-1][some]) if some.any() else 0
        return torch.from_numpy(strongest)

    def nearest(self, number: int, block: slice) -> Tensor:
        """[B, n] cosine of each item of a block to the nearest of the history's latest items; 0 for an empty history.

        Args:
            number: index of the score feature.
            block: of the catalog.
        """
        vectors, products = self.contents[number]
        if products is not None:
            found = np.zeros((self.size, block.stop - block.start), np.float32)
            for row, items in zip(found, self._latest, strict=True):
                if len(items):
                    np.maximum.reduce(products[items, block], axis=0, out=row)
            return torch.from_numpy(found)
        cosines = vectors[torch.from_numpy(self._items).to(vectors.device)] @ vectors[block].T  # [U, n]
        best = cosines.new_zeros(self.size, cosines.shape[1])  # the longest histories first
        for step, places in enumerate(self._steps):
            own, further = best[: len(places)], cosines[places.to(cosines.device)]
            torch.maximum(own, further, out=own) if step else own.copy_(further)
        return best[torch.from_numpy(np.argsort(self._order)).to(best.device)]

    def at(self, items: Tensor) -> Tensor:
        """Features of some items of each history, on the CPU; zeros for features that are not used.

        Args:
            items: [B, C] item_index.

        Returns:
            [B, C, F - 1].
        """
        items = items.cpu()
        result = torch.zeros(*items.shape, len(self.names) - 1)
        for number, matrix in self.sparse.items():
            result[..., number - 1] = torch.from_numpy(_entries(matrix, items.numpy()))
        for number, content in self.contents.items():
            result[..., number - 1] = self._nearest_of(content, items)
        return result

    def _nearest_of(self, content: Content, items: Tensor) -> Tensor:
        """[B, C] as `nearest`, of some items."""
        vectors, products = content
        if products is not None:
            found = np.zeros(items.shape, np.float32)
            for row, latest, some in zip(found, self._latest, items.numpy(), strict=True):
                if len(latest):
                    np.maximum.reduce(products[latest[:, None], some], axis=0, out=row)
            return torch.from_numpy(found)
        lengths = torch.tensor([len(latest) for latest in self._latest])
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(latest) for latest in self._latest], batch_first=True)  # [B, T]
        if not padded.shape[1]:
            return torch.zeros(items.shape)
        items, padded = items.to(vectors.device), padded.to(vectors.device)
        cosines = torch.bmm(vectors[items], vectors[padded].transpose(1, 2)).cpu()  # [B, C, T]
        padding = torch.arange(padded.shape[1]) >= lengths[:, None]
        return torch.where(lengths[:, None] > 0, cosines.masked_fill(padding[:, None], -torch.inf).amax(2), 0)

    def dense(self) -> Tensor:
        """[F - 1, B, N] features of the whole catalog; zeros for features that are not used."""
        result = torch.zeros(len(self.names) - 1, self.size, self.num_items)
        for number, matrix in self.sparse.items():
            result[number - 1] = torch.from_numpy(matrix.toarray())
        for number in self.contents:
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
