"""Which items may be recommended to whom. Filters hold before the top k: an item that is left out never takes a place.

Shapes: B histories, N catalog, n items of a block of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qbert_ray.ranking.blocks import Entries, add, by_block
from qbert_ray.top_k import pairs


class Filter(NamedTuple):
    """The items that each history of a batch may get; by default all."""

    items: np.ndarray | None = None  # [N] booleans, for every history
    excluded: Sequence[np.ndarray] | None = None  # item_index that each history must not get
    allowed: Sequence[np.ndarray | None] | None = None  # item_index of which each history may get some; None: of all

    def within(self, items: np.ndarray | None) -> Filter:
        """The same filter, and only items of `items` [N]; None: of all."""
        if items is None:
            return self
        return self._replace(items=items if self.items is None else self.items & items)

    def also(self, other: Filter) -> Filter:
        """Both filters of the same histories."""
        excluded = [each for each in (self.excluded, other.excluded) if each is not None]
        allowed = [each for each in (self.allowed, other.allowed) if each is not None]
        return Filter(
            self.within(other.items).items,
            [np.concatenate(each) for each in zip(*excluded, strict=True)] if excluded else None,
            [_common(each) for each in zip(*allowed, strict=True)] if allowed else None,
        )

    def part(self, rows: slice) -> Filter:
        """The filter of some of the histories."""
        excluded, allowed = self.excluded, self.allowed
        return Filter(self.items, None if excluded is None else excluded[rows], None if allowed is None else allowed[rows])


EVERYTHING = Filter()


def _common(lists: Iterable[np.ndarray | None]) -> np.ndarray | None:
    """The items of all lists; None where there is no list."""
    given = [each for each in lists if each is not None]
    return reduce(np.intersect1d, given) if given else None


def own_lists(only: Filter, seen: list[np.ndarray], most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The items that are left of each history's list, where every history has one.

    Args:
        only: the filter.
        seen: item_index that each history must not get either.
        most: largest C; a single long list would be laid out once for every history.

    Returns:
        [B, C] item_index in order, and [B, C] booleans, which of them are padding; None where a history may get any item, or more than `most`.
    """
    lists = only.allowed or []
    if not lists or any(own is None for own in lists):
        return None
    excluded = only.excluded if only.excluded is not None else [np.zeros(0, np.int64)] * len(seen)
    left = [np.setdiff1d(own, np.concatenate(hidden)) for own, *hidden in zip(lists, seen, excluded, strict=True) if own is not None]
    left = left if only.items is None else [items[only.items[items]] for items in left]
    if max(map(len, left)) > most:
        return None
    padding = np.arange(max(map(len, left))) >= np.array([len(items) for items in left])[:, None]
    items = np.zeros(padding.shape, np.int64)
    items[~padding] = np.concatenate(left)
    return items, padding


class HiddenItems:
    """A filter laid out over the blocks of a catalog, whose hidden items get minus infinity.

    Args:
        only: the filter of a batch of histories.
        blocks: the catalog in order.
        size: B.
        device: of the scores.
    """

    def __init__(self, only: Filter, blocks: list[slice], size: int, device: torch.device) -> None:
        num_items = blocks[-1].stop
        self.penalty: Tensor | None = None  # [N] 0, or minus infinity for items that no history may get
        if only.items is not None:
            self.penalty = torch.zeros(num_items, device=device).masked_fill_(~torch.from_numpy(only.items).to(device), -torch.inf)
        self._excluded: dict[int, Entries] = {}
        if only.excluded is not None:
            rows, items = pairs(list(only.excluded), num_items)
            self._excluded = by_block(blocks, rows, items, np.full(len(rows), -np.inf, np.float32), device)
        self._allowed: dict[int, Entries] = {}
        if only.allowed is not None and any(each is not None for each in only.allowed):
            given = [np.zeros(0, np.int64) if each is None else each for each in only.allowed]
            rows, items = pairs(given, num_items)
            self._allowed = by_block(blocks, rows, items, np.zeros(len(rows), np.float32), device)
            self._anything = torch.tensor([each is None for each in only.allowed], device=device)
        assert all(each is None or len(each) == size for each in (only.excluded, only.allowed)), "a filter of other histories"

    def of(self, scores: Tensor, block: slice) -> Tensor:
        """Scores [B, n] of a block, in place, without the items that hold for single histories; `penalty` is still to be added."""
        if self._excluded:
            scores = add(scores, self._excluded[block.start])
        if self._allowed:
            rows, columns, _ = self._allowed[block.start]
            hidden = torch.ones_like(scores, dtype=torch.bool)
            hidden[self._anything] = False
            hidden.view(-1)[rows * scores.shape[1] + columns] = False
            scores.masked_fill_(hidden, -torch.inf)
        return scores
