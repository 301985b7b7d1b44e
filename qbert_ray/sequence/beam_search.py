"""Beam search over semantic IDs, constrained to the IDs of items.

The catalog is a trie kept as arrays: items sorted by their codes, and for every level the range of children of each node. A
step looks at the children of all beams of all histories at once, as one ragged list, so its cost grows with the beams and
levels and not with the catalog.

Shapes: B histories, W beams of a history, N catalog, K levels, M codewords per level, E width of a codeword, R codes looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qbert_ray.sequence.decoder import Generator, Memory, unpacked
from qbert_ray.top_k import pairs, top_k

MOST_DISTANCES = 2**22  # from generated codes to items, computed at once
SEARCHED_AT_ONCE = 128  # histories with beams of BEAM; more do not fit the processor's caches
BEAM = 20


class Beams(NamedTuple):
    """The best code sequences of each history, best first; where there are fewer than W, the rest scores minus infinity."""

    scores: Tensor  # [B, W] log-probability
    items: Tensor  # [B, W] item_index; -1: none
    codes: Tensor  # [B, W, K]


class Codes(Protocol):
    """The code sequences that a search may write: a tree with one node per prefix, numbered within each level."""

    def children(self, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        """Number of the first child of nodes of a level, and how many children there are."""
        ...

    def code(self, level: int, child: Tensor) -> Tensor:
        """Code that leads to children of nodes of a level."""
        ...

    def item(self, leaf: Tensor) -> Tensor:
        """item_index of leaves; -1 where there is no item."""
        ...


@dataclass(frozen=True)
class Trie:
    """The IDs of a catalog's items. Items that share an ID are leaves of their own with one parent and one score.

    Args:
        items: [leaves] item_index in lexicographic order of the codes.
        first: of every level but the last, [nodes + 1] first leaf below each node; the root is the node of level 0.
        begin: of every level but the last, [nodes + 1] first child of each node.
        codes: of every level but the root's, [nodes] code that leads to it.
        leaf: [N] leaf of each item; -1: the item may not be generated.
    """

    items: Tensor
    first: tuple[Tensor, ...]
    begin: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]
    leaf: Tensor

    @classmethod
    def build(cls, codes: Tensor, allowed: Tensor | None = None) -> Trie:
        """The trie of codes [N, K]; of items that are `allowed` [N] alone, where that is given."""
        rows = torch.arange(len(codes), device=codes.device) if allowed is None else allowed.nonzero()[:, 0]
        chosen = codes[rows].cpu().numpy()
        order = torch.from_numpy(np.lexsort(chosen.T[::-1])).to(codes.device)
        items = rows[order]
        ordered, count = codes[items], len(items)
        fresh = torch.zeros(count, dtype=torch.bool, device=codes.device)  # whether a row starts a node of the level
        fresh[:1] = True
        end = torch.tensor([count], device=codes.device)
        first, begin, levels = [torch.cat([fresh.nonzero()[:, 0], end])], [], []
        for level in range(codes.shape[1]):
            last = level == codes.shape[1] - 1
            fresh = torch.ones_like(fresh) if last else fresh.clone()
            fresh[1:] |= ordered[1:, level] != ordered[:-1, level]
            starts = fresh.nonzero()[:, 0]
            levels.append(ordered[starts, level])
            begin.append(torch.searchsorted(starts, first[-1]))
            if not last:
                first.append(torch.cat([starts, end]))
        leaf = torch.full((len(codes),), -1, device=codes.device)
        leaf[items] = torch.arange(count, device=codes.device)
        return cls(items, tuple(first), tuple(begin), tuple(levels), leaf)

    def children(self, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        first = self.begin[level][node]
        return first, self.begin[level][node + 1] - first

    def code(self, level: int, child: Tensor) -> Tensor:
        return self.codes[level][child]

    def item(self, leaf: Tensor) -> Tensor:
        return self.items[leaf]

    def node(self, level: int, leaf: Tensor) -> Tensor:
        """Node of a level that leaves lie below."""
        return leaf if level == len(self.codes) else torch.searchsorted(self.first[level], leaf, right=True) - 1

    def emptied(self, seen: list[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of history and node of which all items were seen, of every level below the root."""
        if not sum(map(len, seen)):
            return []
        user, item = (torch.from_numpy(each).to(self.leaf.device) for each in pairs(seen, len(self.leaf)))
        leaf = self.leaf[item]
        user, leaf = user[leaf >= 0], leaf[leaf >= 0]
        found = []
        for level in range(1, len(self.codes)):
            size = len(self.first[level])
            keys, count = torch.unique(user * size + self.node(level, leaf), return_counts=True)
            node = keys % size
            empty = count == self.first[level][node + 1] - self.first[level][node]
            found.append((keys[empty] // size, node[empty]))
        return [*found, (user, leaf)]

    def prefix(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Deepest node on the path of each of the codes [R, K], and its level."""
        node = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        depth = torch.zeros_like(node)
        for level, known in enumerate(self.codes):
            first, count = self.children(level, node)
            # the children of a node are in order of their codes, so (node, code) is in order as well
            parent = torch.repeat_interleave(self.begin[level].diff())
            size = int(max(known.max(), codes[:, level].max())) + 1
            place = torch.searchsorted(parent * size + known, node * size + codes[:, level])
            there = (depth == level) & (place < first + count)
            there &= known[place.clamp_max(len(known) - 1)] == codes[:, level]
            node, depth = torch.where(there, place, node), torch.where(there, level + 1, depth)
        return node, depth

    def lookup(self, codes: Tensor) -> Tensor:
        """[R] item_index of codes [R, K], the first one where several share them; -1: no item has these codes."""
        node, depth = self.prefix(codes)
        return torch.where(depth == len(self.codes), self.items[node.clamp_max(len(self.items) - 1)], -1)

    def nearest(self, codes: Tensor, codewords: Tensor) -> Tensor:
        """[R] item_index for codes [R, K] that need not be an item's: of the items that share the longest prefix, the nearest.

        Args:
            codewords: [K, M, E] vectors of the codes; the distance is between their sums over the levels.
        """
        node, depth = self.prefix(codes)
        begin, end = node.clone(), node + 1
        for level, first in enumerate(self.first):
            here = depth == level
            begin[here], end[here] = first[node[here]], first[node[here] + 1]
        levels = torch.arange(codes.shape[1], device=codes.device)
        result = torch.empty_like(node)
        wanted = codewords[levels, codes].sum(1)  # [R, E]
        known = torch.stack([self._codes_of_leaves(level) for level in range(len(self.codes))], dim=1)
        for row in range(len(codes)):
            best, found = torch.inf, -1
            for leaves in torch.arange(int(begin[row]), int(end[row]), device=codes.device).split(MOST_DISTANCES // wanted.shape[1]):
                distance = (codewords[levels, known[leaves]].sum(1) - wanted[row]).square().sum(1)
                least = int(distance.argmin())
                if float(distance[least]) < best:
                    best, found = float(distance[least]), int(leaves[least])
            result[row] = self.items[found]
        return result

    def _codes_of_leaves(self, level: int) -> Tensor:
        """[leaves] code of each leaf's path at a level."""
        leaves = torch.arange(len(self.items), device=self.items.device)
        return self.codes[level][self.node(level + 1, leaves)]


@dataclass(frozen=True)
class AnyCodes:
    """Every sequence of codes, whether an item has it or not: unconstrained decoding."""

    codebook_size: int

    def children(self, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        return node * self.codebook_size, torch.full_like(node, self.codebook_size)

    def code(self, level: int, child: Tensor) -> Tensor:
        return child % self.codebook_size

    def item(self, leaf: Tensor) -> Tensor:
        return torch.full_like(leaf, -1)


@torch.inference_mode()
def beam_search(model: Generator, memory: Memory, tree: Codes, beam: int, seen: list[np.ndarray] | None = None) -> Beams:
    """The best code sequences of each history, in the order of the batch.

    Args:
        beam: W, most sequences that are kept at every level.
        seen: item indices that each history must not get, one array per history of the batch; needs a `Trie`.
    """
    empty: list[tuple[Tensor, Tensor]] = []
    if seen is not None:
        assert isinstance(tree, Trie), "items can be removed from a trie alone"
        empty = tree.emptied([seen[place] for place in memory.order])
    device = model.table.weight.device
    cache = model.new_cache(memory, 1 + (model.num_levels - 1) * beam)
    node = torch.zeros(memory.size, 1, dtype=torch.long, device=device)
    scores = torch.zeros(memory.size, 1, device=device)
    ancestors = torch.ones(memory.size, 1, 1, dtype=torch.bool, device=device)
    codes = torch.zeros(memory.size, 1, 0, dtype=torch.long, device=device)
    for level in range(model.num_levels):
        logp = model.step(codes[..., -1] if level else None, level, memory, cache, ancestors)
        scores, parent, node, code = _expand(logp, scores, node, tree, level, beam, empty[level] if empty else None)
        codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, level)), code[..., None]], dim=2)
        own = torch.eye(parent.shape[1], dtype=torch.bool, device=device).expand(len(parent), -1, -1)
        ancestors = torch.cat([ancestors.gather(1, parent[..., None].expand(-1, -1, ancestors.shape[2])), own], dim=2)
    items = torch.where(scores > -torch.inf, tree.item(node), -1)
    order = _by_score(scores, items)
    found = Beams(scores.gather(1, order), items.gather(1, order), codes.gather(1, order[..., None].expand_as(codes)))
    return Beams(*(unpacked(each, memory.order) for each in found))


def search(
    model: Generator, catalog: np.ndarray, trie: Trie, histories: list[np.ndarray], beam: int, seen: list[np.ndarray] | None = None
) -> Beams:
    """The best items after each history, in its order.

    Args:
        catalog: [N, K] codes.
        trie: of that catalog, or of a part of it.
        seen: items that each history must not get.
    """
    found, beam = [], min(beam, len(catalog))
    size = max(1, SEARCHED_AT_ONCE * BEAM // max(beam, BEAM))  # keys and values of all beams are kept
    for begin in range(0, len(histories), size):
        rows = slice(begin, begin + size)
        memory = encode(model, histories[rows], catalog)
        found.append(beam_search(model, memory, trie, beam, None if seen is None else seen[rows]))
    width = max(each.items.shape[1] for each in found)
    return Beams(*(torch.cat(pieces) for pieces in zip(*(_widened(each, width) for each in found), strict=True)))


def encode(model: Generator, histories: list[np.ndarray], catalog: np.ndarray) -> Memory:
    """The encoded histories, as `beam_search` and `Generator.score_all` read them."""
    cut = [history[-model.max_items :] for history in histories]
    items = np.concatenate([np.zeros(0, np.int64), *cut]).astype(np.int64)
    return model.encode(model.read(items, np.array([len(history) for history in cut]), catalog))


def _expand(
    logp: Tensor, scores: Tensor, node: Tensor, tree: Codes, level: int, beam: int, empty: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best children of each history's beams: scores, parent beam, node and code, [B, W] each.

    Args:
        logp: [B, W, M] of the codes of this level.
        scores, node: [B, W] of the beams; minus infinity where there is none.
        empty: pairs of history and child that must not be taken.
    """
    batch, beams = node.shape
    first, count = tree.children(level, node)
    count = torch.where(scores > -torch.inf, count, 0)
    ends = count.cumsum(1)  # where a beam's children end in the list of its history
    row = torch.repeat_interleave(count.flatten())  # [children of all] beam of each
    column = torch.arange(len(row), device=row.device) - torch.repeat_interleave(_exclusive(ends[:, -1]), ends[:, -1])
    before = (ends - count).flatten()  # children of earlier beams of the history
    child = first.flatten()[row] + column - before[row]
    code = tree.code(level, child)
    most = max(1, int(ends[:, -1].max()) if batch else 0)  # no layer takes zero beams: where no history has any, one stays, empty
    values = logp.new_full((batch, most), -torch.inf)
    values[row // beams, column] = scores.flatten()[row] + logp.flatten(0, 1)[row, code]
    if empty is not None:
        user, gone = empty
        offset = gone[:, None] - first[user]  # [pairs, W]
        which, place = ((offset >= 0) & (offset < count[user])).nonzero(as_tuple=True)
        values[user[which], before.view(batch, beams)[user[which], place] + offset[which, place]] = -torch.inf
    values, place = top_k(values, beam)
    place = place.clamp_min(0)
    parent = torch.searchsorted(ends, place, right=True).clamp_max(beams - 1)
    node = first.gather(1, parent) + place - (ends - count).gather(1, parent)
    there = values > -torch.inf
    node = torch.where(there, node, 0)
    return values, parent, node, torch.where(there, tree.code(level, node), 0)


def _exclusive(counts: Tensor) -> Tensor:
    """Sums of all counts before each."""
    return counts.cumsum(0) - counts


def _by_score(scores: Tensor, items: Tensor) -> Tensor:
    """[B, W] order of the beams, the best first, equal ones by item_index."""
    by_item = items.argsort(dim=1, stable=True)
    return by_item.gather(1, scores.gather(1, by_item).argsort(dim=1, descending=True, stable=True))


def _widened(beams: Beams, width: int) -> Beams:
    """Beams with `width` columns, the added ones empty."""
    more = width - beams.items.shape[1]
    pad = F.pad
    return Beams(pad(beams.scores, (0, more), value=-torch.inf), pad(beams.items, (0, more), value=-1), pad(beams.codes, (0, 0, 0, more)))
