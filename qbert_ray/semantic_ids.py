"""Stage 2, §3.4: codes made unique, and written as tokens.

Collisions are resolved greedily and exactly. Of the items that share all codes the one nearest to its last codeword keeps
them. The others, nearest first, take the nearest free last code; where a prefix has none, the level above changes, with
the residuals recomputed, and so on up to the first. Order is (distance, item_index), so rows, blocks and actors do not
matter, and items that already have an ID can be held fixed.

Shapes: N items, K levels, M codewords per level, E codebook width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np


class CapacityError(ValueError):
    """More items than there are semantic IDs."""


class Resolved(NamedTuple):
    codes: np.ndarray  # [N, K], all distinct
    moved: np.ndarray  # [N] whether the item did not keep its nearest codes


def resolve_collisions(codes: np.ndarray, latents: np.ndarray, codebooks: np.ndarray) -> Resolved:
    """Distinct codes for every item; rows are in the order of item_index, which breaks ties.

    Args:
        codes: [N, K] nearest codes.
        latents: [N, E] what was quantized.
        codebooks: [K, M, E].

    Raises:
        CapacityError: more items than M ** K.
    """
    last = latents - sum(book[level] for book, level in zip(codebooks[:-1], codes.T[:-1], strict=True))
    distance = np.square(last - codebooks[-1][codes[:, -1]]).sum(1)

    def preference(item: int, prefix: list[int]) -> np.ndarray:
        level = len(prefix)
        residual = latents[item] - sum((codebooks[k][code] for k, code in enumerate(prefix)), np.zeros_like(latents[item]))
        return np.argsort(np.square(codebooks[level] - residual).sum(1), kind="stable")

    return _resolve(codes, distance, preference, codebooks.shape[1])


def resolve_given(codes: np.ndarray, codebook_size: int) -> Resolved:
    """Distinct codes where only codes are known: the first item by item_index keeps them, others take the next free number."""

    def preference(item: int, prefix: list[int]) -> np.ndarray:
        return np.roll(np.arange(codebook_size), -int(codes[item, len(prefix)]))

    return _resolve(codes, np.zeros(len(codes)), preference, codebook_size)


def to_tokens(codes: np.ndarray) -> list[str]:
    """ "<a_2><b_3><c_1><d_6>" for each row of codes [N, K]."""
    letters = ascii_lowercase[: codes.shape[1]]
    return ["".join(f"<{letter}_{code}>" for letter, code in zip(letters, row, strict=True)) for row in codes.tolist()]


def _resolve(codes: np.ndarray, distance: np.ndarray, preference: Callable[[int, list[int]], np.ndarray], size: int) -> Resolved:
    num_items, num_levels = codes.shape
    if num_levels > len(ascii_lowercase) or size**num_levels >= 2**63:
        raise ValueError(f"{num_levels} levels of {size} codewords do not fit a token; use at most 26 levels and 2**63 IDs")
    if num_items > size**num_levels:
        raise CapacityError(
            f"{num_items:,} items but only {size}**{num_levels} = {size**num_levels:,} semantic IDs; raise rqvae.num_levels or rqvae.codebook_size"
        )
    keys = codes.astype(np.int64) @ (size ** np.arange(num_levels - 1, -1, -1, dtype=np.int64))
    order = np.lexsort((np.arange(num_items), distance, keys))
    first = np.ones(num_items, dtype=bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    losers = order[~first]
    movers = losers[np.lexsort((losers, distance[losers]))]
    result = codes.copy()
    moved = np.zeros(num_items, dtype=bool)
    moved[movers] = True
    if len(movers):
        tree = _Tree(keys[order[first]], num_levels, size)
        for item in movers.tolist():
            result[item] = tree.place(codes[item].tolist(), lambda prefix, item=item: preference(item, prefix))
    return Resolved(result, moved)


class _Tree:
    """The IDs in use, with the number of them under each prefix, so that a full prefix is skipped at once."""

    def __init__(self, keys: np.ndarray, num_levels: int, size: int) -> None:
        self.num_levels, self.size = num_levels, size
        self.used = set(keys.tolist())
        self.under: list[Counter[int]] = []  # by length of the prefix
        for length in range(num_levels):
            prefixes, counts = np.unique(keys // size ** (num_levels - length), return_counts=True)
            self.under.append(Counter(dict(zip(prefixes.tolist(), counts.tolist(), strict=True))))

    def place(self, codes: list[int], preference: Callable[[list[int]], np.ndarray]) -> list[int]:
        """The first free ID: last level first, then one level up, each in the item's order of preference."""
        for length in range(self.num_levels - 1, -1, -1):
            prefix = codes[:length]
            if not self._full(prefix):
                return self._take(prefix, preference)
        raise AssertionError("capacity was checked")

    def _take(self, prefix: list[int], preference: Callable[[list[int]], np.ndarray]) -> list[int]:
        while len(prefix) < self.num_levels:
            code = next(code for code in preference(prefix).tolist() if not self._full([*prefix, code]))
            prefix = [*prefix, code]
        key = self._key(prefix)
        self.used.add(key)
        for length in range(self.num_levels):
            self.under[length][key // self.size ** (self.num_levels - length)] += 1
        return prefix

    def _full(self, prefix: list[int]) -> bool:
        if len(prefix) == self.num_levels:
            return self._key(prefix) in self.used
        return self.under[len(prefix)][self._key(prefix)] >= self.size ** (self.num_levels - len(prefix))

    def _key(self, prefix: list[int]) -> int:
        key = 0
        for code in prefix:
            key = key * self.size + code
        return key
