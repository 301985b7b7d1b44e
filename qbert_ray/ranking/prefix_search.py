"""Candidates of a history without a product with the whole catalog: items of the prefixes of semantic IDs that its query scores best.

Semantic IDs are a tree in which near items share a prefix. Each prefix of one length has the mean vector of its items; a query is
compared with those means, then with the items of the best prefixes. Items that have item-item weights to the history come on top.
What is found is ranked exactly, so a list may lack an item of the exact one, but no score differs.

Shapes: B histories, N catalog, G prefixes, K levels, D width, L items of a history's prefixes, C candidates.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

PER_HISTORY, LINKED = 128, 256  # candidates by the sequence model, and by item-item weights
GATHERING = 16  # cost of comparing a query with a vector of its own list, next to one of all queries' common product
MOST_GATHERED = 2**23  # numbers of item vectors laid out at once: 32 MiB; four times as many took 1.4 times as long, out of the cache


class PrefixIndex:
    """The items of a catalog by the prefix of their semantic IDs.

    Args:
        codes: [N, K] codes of the semantic IDs.
        vectors: [N, D] of the items, whose product with a query, plus the bias, is the score.
        bias: [N].
        prefixes: how many are searched for a history; the length of the prefixes is chosen so that comparisons cost least.
    """

    def __init__(self, codes: Tensor, vectors: Tensor, bias: Tensor, prefixes: int) -> None:
        group, count = _groups(codes.cpu().numpy(), prefixes)
        self.order = torch.from_numpy(np.argsort(group, kind="stable")).to(vectors.device)
        # A copy in the order of prefixes: those of one prefix are read in one go, in a quarter of the time (a million items).
        self.vectors, self.bias = vectors[self.order], bias[self.order]
        self.sizes = np.bincount(group, minlength=count)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.prefixes = min(prefixes, count)
        place = torch.from_numpy(group).to(vectors.device)
        size = torch.from_numpy(self.sizes).to(vectors)
        self.means = vectors.new_zeros(count, vectors.shape[1]).index_add_(0, place, vectors) / size[:, None]
        self.mean_bias = bias.new_zeros(count).index_add_(0, place, bias) / size

    def best(self, queries: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The best items of the best prefixes.

        Args:
            queries: [B, D], scaled as scores need it.
            count: items of each history; fewer where its prefixes have fewer.

        Returns:
            Row and item_index of each.
        """
        chosen = torch.addmm(self.mean_bias, queries, self.means.T).topk(self.prefixes, dim=1).indices.cpu().numpy()  # [B, prefixes]
        rows, items = [], []
        width = int(np.sort(self.sizes)[-self.prefixes :].sum()) * self.vectors.shape[1]
        for piece in np.array_split(np.arange(len(chosen)), max(1, min(len(chosen), -(-len(chosen) * width // MOST_GATHERED)))):
            if len(piece):
                row, item = self._of(queries[torch.from_numpy(piece).to(queries.device)], chosen[piece], count)
                rows.append(piece[row])
                items.append(item)
        return np.concatenate([*rows, np.zeros(0, np.int64)]), np.concatenate([*items, np.zeros(0, np.int64)])

    def _of(self, queries: Tensor, chosen: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = self.sizes[chosen]
        lengths = sizes.sum(1)
        flat = np.repeat((self.starts[chosen] - (np.cumsum(sizes, axis=1) - sizes)).ravel(), sizes.ravel())
        there = np.arange(lengths.max()) < lengths[:, None]  # [B, L]
        places = np.zeros(there.shape, np.int64)
        places[there] = flat + np.broadcast_to(np.arange(there.shape[1]), there.shape)[there]
        laid = torch.from_numpy(places).to(self.order.device)
        scores = torch.baddbmm(self.bias[laid][:, None], queries[:, None], self.vectors[laid].transpose(1, 2))[:, 0]
        scores = scores.masked_fill(~torch.from_numpy(there).to(scores.device), -torch.inf)
        values, best = scores.topk(min(count, scores.shape[1]), dim=1)
        found = (values > -torch.inf).cpu().numpy()
        return found.nonzero()[0], self.order[laid.gather(1, best)].cpu().numpy()[found]


def _groups(codes: np.ndarray, prefixes: int) -> tuple[np.ndarray, int]:
    """[N] number of each item's prefix, and how many there are, for the length of prefix with which comparisons cost least."""
    group, best = np.zeros(len(codes), np.int64), None
    for level in codes.T:
        _, group = np.unique(group * (int(codes.max()) + 1) + level, return_inverse=True)
        count = int(group.max()) + 1
        compared = count + GATHERING * prefixes * len(codes) / count
        if best is None or compared < best[0]:
            best = (compared, group, count)
    assert best is not None, "an ID has at least one code"
    return best[1], best[2]


def linked(weights: list[sparse.csr_matrix]) -> tuple[np.ndarray, np.ndarray]:
    """Row and item_index of the items with the largest summed item-item features [B, N] of each history."""
    together = sum(weights[1:], weights[0]).tocsr()
    together.sort_indices()
    counts = np.diff(together.indptr)
    there = np.arange(counts.max(initial=0)) < counts[:, None]
    values = torch.full(there.shape, -torch.inf)
    values[torch.from_numpy(there)] = torch.from_numpy(together.data)
    best, places = values.topk(min(LINKED, there.shape[1]), dim=1)
    rows, columns = (best > -torch.inf).numpy().nonzero()
    return rows, together.indices[together.indptr[rows] + places.numpy()[rows, columns]].astype(np.int64)


def laid_out(rows: np.ndarray, items: np.ndarray, size: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """[size, C] distinct items of each row in order, and [size, C] booleans of what is padding."""
    distinct = np.sort(rows * num_items + items)  # np.unique takes several times as long
    distinct = distinct[np.append(True, distinct[1:] != distinct[:-1])[: len(distinct)]]
    rows, items = distinct // num_items, distinct % num_items
    counts = np.bincount(rows, minlength=size)
    padding = np.arange(max(1, int(counts.max(initial=0)))) >= counts[:, None]
    table = np.zeros(padding.shape, np.int64)
    table[~padding] = items
    return table, padding
