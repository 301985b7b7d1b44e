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
EXACT = 2**33  # pairs of a cold and a trained item up to which all are compared: 300,000 items of which a tenth is cold
CELLS, PROBED = 1024, 48  # k-means cells of larger catalogs, and those among which a cold item's neighbours are looked for
SAMPLED = 100_000  # items that k-means reads


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

    Every pair is compared where there are at most `EXACT`. Otherwise the trained items are divided into cells, and a cold item is
    compared with those of the cells around its own, so that time grows with the catalog and not with its square.

    Args:
        content: [N, F] content vectors of the catalog.
        rows: [C] item_index of the cold items.
        trained: item_index of the items among which neighbours are looked for.
    """
    cold, others = F.normalize(content[rows], dim=-1), F.normalize(content[trained], dim=-1)
    if len(rows) * len(trained) <= EXACT:
        cosine, found = _nearest(cold, others)
    else:
        cosine, found = _nearest_in_cells(cold, others)
    return ColdItems(rows, trained[found], torch.softmax(cosine / NEIGHBOUR_TEMPERATURE, dim=1))


def _nearest(cold: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """[C, n] cosines and rows of the nearest others, of vectors of length 1."""
    count, size = min(NEIGHBOURS, len(others)), max(1, min(CHUNK, MOST // max(len(others), 1)))
    cosine, found = zip(*(torch.topk(piece @ others.T, count, dim=1) for piece in cold.split(size)), strict=True)
    return torch.cat(cosine), torch.cat(found)


def _nearest_in_cells(cold: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """As `_nearest`, among the others of the cells nearest to a vector's own; all vectors of a cell are looked up at once."""
    from sklearn.cluster import MiniBatchKMeans  # takes a second to import, and small catalogs do not need it

    cells = MiniBatchKMeans(min(CELLS, len(others)), random_state=0, batch_size=CHUNK, n_init=1)
    cells.fit(others[:: max(1, len(others) // SAMPLED)].numpy())
    centres = torch.from_numpy(cells.cluster_centers_)
    of_others, of_cold = (torch.from_numpy(cells.predict(each.numpy())).long() for each in (others, cold))
    sizes = torch.bincount(of_others, minlength=len(centres))
    members = of_others.argsort(stable=True).split(sizes.tolist())
    count = min(NEIGHBOURS, len(others))
    cosine, found = cold.new_empty(len(cold), count), torch.empty(len(cold), count, dtype=torch.long)
    for cell in of_cold.unique().tolist():
        nearest = torch.cdist(centres[cell][None], centres)[0].argsort()
        enough = int((sizes[nearest].cumsum(0) < count).sum()) + 1
        searched = torch.cat([members[each] for each in nearest[: max(PROBED, enough)]])
        asked = (of_cold == cell).nonzero()[:, 0]
        cosine[asked], places = _nearest(cold[asked], others[searched])
        found[asked] = searched[places]
    return cosine, found
