"""The catalog in blocks, so that scores of a batch of histories need not fit in memory whole; sparse additions cut into such blocks.

Shapes: B histories, N catalog, n items of a block of it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

BLOCK = 8192  # most items of a block

Entries = tuple[Tensor, Tensor, Tensor]  # history, column in a block, and what is added there


def catalog_blocks(num_items: int, trained: int) -> list[slice]:
    """The catalog in order, in blocks of which none has both trained items, the first of the catalog, and cold ones."""
    edges = [*range(0, trained, BLOCK), *range(trained, num_items, BLOCK), num_items]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def by_block(blocks: list[slice], rows: np.ndarray, items: np.ndarray, values: np.ndarray, device: torch.device) -> dict[int, Entries]:
    """First item of each block -> the entries of a sparse [B, N] matrix in it; the blocks are the catalog in order."""
    starts = np.array([block.start for block in blocks])
    number = (np.searchsorted(starts, items, side="right") - 1).astype(np.uint16)
    order = np.argsort(number, kind="stable")
    rows, items, values = rows[order], items[order] - starts[number[order]], values[order]
    bounds = [0, *np.cumsum(np.bincount(number, minlength=len(blocks))).tolist()]
    pieces = [[torch.from_numpy(each[begin:end]).to(device) for each in (rows, items, values)] for begin, end in pairwise(bounds)]
    return {block.start: (row, item, value) for block, (row, item, value) in zip(blocks, pieces, strict=True)}


def add(scores: Tensor, entries: Entries) -> Tensor:
    """Scores [B, n] of a block with sparse entries added, in place."""
    rows, columns, values = entries
    scores.view(-1).scatter_add_(0, rows * scores.shape[1] + columns, values)
    return scores
