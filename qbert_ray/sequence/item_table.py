"""The items of a catalog as tensors: what a `Sequencer` reads of them in addition to its own weights.

Shapes: N catalog, K levels, F width of content vectors, C cold items, n neighbours of a cold item.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 10, 0.1  # of a cold item among the trained ones
CHUNK, MOST = 4096, 2**28  # cold items whose neighbours are looked up at once, and cosines: 1 GiB


class ColdItems(NamedTuple):
    """Items without training interactions, each with its nearest trained items and their weights."""

    rows: Tensor  # [C] item_index
    nearest: Tensor  # [C, n] item_index of trained items
    weights: Tensor  # [C, n] summing to 1

    def to(self, device: torch.device | str) -> ColdItems:
        return ColdItems(*(tensor.to(device) for tensor in self))


class ItemTable(NamedTuple):
    """Codes and content of the items of one catalog, in the order of item_index.

    Args:
        codes: [N, K] codes of the semantic IDs.
        content: [N, F] content vectors, where the model reads them.
        known: [N] booleans, which items have training interactions; the model's item embeddings of the others are ignored. None: all
            that have an embedding.
        cold: items that are scored as the weighted mean of their nearest trained items.
        domain: which of the model's item embeddings are those of this catalog, where it has any.
    """

    codes: Tensor
    content: Tensor | None = None
    known: Tensor | None = None
    cold: ColdItems | None = None
    domain: str = ""

    def to(self, device: torch.device | str) -> ItemTable:
        content, known = (None if each is None else each.to(device) for each in (self.content, self.known))
        cold = None if self.cold is None else self.cold.to(device)
        return ItemTable(self.codes.to(device), content, known, cold, self.domain)


def nearest_trained_items(content: Tensor, rows: Tensor, trained: Tensor) -> ColdItems:
    """Cold items with the trained items whose content is nearest by cosine, weighted by a softmax of the cosines.

    Args:
        content: [N, F] content vectors of the catalog.
        rows: [C] item_index of the cold items.
        trained: item_index of the items among which neighbours are looked for.
    """
    unit = F.normalize(content, dim=-1)
    others, count = unit[trained].T, min(NEIGHBOURS, len(trained))
    size = max(1, min(CHUNK, MOST // max(len(trained), 1)))
    cosine, found = zip(*(torch.topk(unit[piece] @ others, count, dim=1) for piece in rows.split(size)), strict=True)
    return ColdItems(rows, trained[torch.cat(found)], torch.softmax(torch.cat(cosine) / NEIGHBOUR_TEMPERATURE, dim=1))
