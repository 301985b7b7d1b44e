"""Sequences of a batch laid end to end without padding, grouped by length.

Shapes: B sequences, S items of all of them, T items of the longest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Packed(NamedTuple):
    """Sequences laid end to end, shortest first."""

    items: Tensor  # [S] item_index
    masked: Tensor  # [S]
    position: Tensor  # [S] 0 for the last item of a sequence
    groups: list[tuple[int, int, int]]  # (first item, sequences, length) of each run of equally long sequences
    ends: bool = False  # masked is the last item of every sequence, and no other


def pack(items: np.ndarray, lengths: np.ndarray, masks: np.ndarray) -> tuple[Packed, np.ndarray]:
    """Sequences as the model reads them, and the order [B] in which they lie.

    Args:
        items: [S] sequences end to end.
        lengths: [B] items of each.
        masks: [B, T] left-aligned, as `masking.draw_masks` gives them.
    """
    order = np.argsort(lengths, kind="stable")
    begin = np.cumsum(lengths) - lengths
    sizes = lengths[order]
    first = np.cumsum(sizes) - sizes
    offset = np.arange(int(sizes.sum())) - np.repeat(first, sizes)  # place of each item in its sequence
    row = np.repeat(order, sizes)
    values, counts = np.unique(sizes, return_counts=True)
    starts = np.cumsum(values * counts) - values * counts
    groups = [(int(start), int(count), int(length)) for start, count, length in zip(starts, counts, values, strict=True)]
    packed = Packed(
        torch.from_numpy(items[begin[row] + offset].astype(np.int64)),
        torch.from_numpy(masks[row, offset]),
        torch.from_numpy(lengths[row] - 1 - offset),
        groups,
    )
    return packed, order


def to_device(packed: Packed, device: torch.device | str) -> Packed:
    """The same sequences with their tensors on a device."""
    items, masked, position = (tensor.to(device, non_blocking=True) for tensor in packed[:3])
    return packed._replace(items=items, masked=masked, position=position)
