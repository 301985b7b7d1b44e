"""Stage 2, §3.4: resolves collisions, so that every item has codes of its own, and writes them as tokens.

The rule. Every item comes with its nearest codes and its distance from what they decode to; order below is always
(distance, item_index).

* Of the items that share all codes the first in order keeps them, unless they are published already; the others move.
* Last level: under each prefix of K - 1 codes the movers, in order, take the nearest last code that is free.
* Level above: movers whose prefix was full, in order, take under their K - 2 codes the nearest code that has room below
  it, and below that the nearest free last code, with the residuals recomputed. And so on up to the first level.

So codes change at the lowest possible level, prefixes are independent of each other at every step, and the result does not
depend on the order of rows, on blocks or on actors. Published IDs (`taken`) are never changed or reused.

How it is fast. On the last level thousands of prefixes take turns at once: the first mover of each, then the second, at most
M turns. On the levels above a prefix may have any number of movers. There, turns are a stable matching in which all codes
prefer items in the same order. It is unique, and deferred acceptance finds it: every mover proposes to its nearest code, a code
keeps the first in order that it has room for, and only rejected movers propose to their next one. Distances are a matrix
product; where its rounding could decide, they are recomputed exactly.

Shapes: N items, K levels, M codewords per level, E codebook width, n movers looked at together, in g groups of one prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

CELLS = 2**19  # movers x codewords processed at a time; bounds the memory
ROWS = 2**13
EPSILON = float(np.finfo(np.float64).eps)


class Preference:
    """Distances of n movers from the codewords of a level, from which each mover's nearest available codeword follows.

    Args:
        distance: [n, M] from each codeword, up to a constant of the row; inf: not available.
        slack: [n] largest error of a difference of two distances; below 0: they are exact.
        exact: rows of distance [m] -> [m, M] without rounding that depends on m.
    """

    def __init__(self, distance: np.ndarray, slack: np.ndarray, exact: Callable[[np.ndarray], np.ndarray]) -> None:
        self.distance, self.slack, self._exact = distance, slack, exact

    def first(self, rows: np.ndarray, closed: np.ndarray | None = None) -> np.ndarray:
        """[m] nearest available codeword of each of rows [m] that is not closed [m, M]; the first of equally near ones."""
        distance = self._open(rows, closed)
        choice = distance.argmin(1)
        nearest = distance[np.arange(len(rows)), choice]
        doubtful = np.flatnonzero(np.count_nonzero(distance <= (nearest + self.slack[rows])[:, None], axis=1) > 1)
        if len(doubtful):
            asked = rows[doubtful]
            self.distance[asked] = np.where(np.isinf(self.distance[asked]), np.inf, self._exact(asked))
            self.slack[asked] = -1
            choice[doubtful] = self._open(asked, None if closed is None else closed[doubtful]).argmin(1)
        return choice

    def _open(self, rows: np.ndarray, closed: np.ndarray | None) -> np.ndarray:
        distance = self.distance[rows]
        if closed is not None:
            np.copyto(distance, np.inf, where=closed)
        return distance


# Rows of items [n] and the codes chosen so far [n, level] -> their preference at that level.
Distances = Callable[[np.ndarray, np.ndarray], Preference]


class CapacityError(ValueError):
    """More items than there are semantic IDs."""


class Resolved(NamedTuple):
    codes: np.ndarray  # [N, K], all distinct
    moved: np.ndarray  # [N] whether the item did not keep its nearest codes


def resolve_collisions(codes: np.ndarray, latents: np.ndarray, codebooks: np.ndarray, taken: np.ndarray | None = None) -> Resolved:
    """Unique codes for every item; rows are in the order of item_index, which breaks ties.

    Product quantizers work too: their codebooks are zero outside their own dimensions of the latent, so that the codes of
    other levels do not change the order of the codewords.

    Args:
        codes: [N, K] nearest codes.
        latents: [N, E] what was quantized.
        codebooks: [K, M, E].
        taken: [T, K] published IDs, all distinct.

    Raises:
        CapacityError: more items and taken IDs than M ** K.
    """
    books = codebooks.astype(np.float64)
    used = [np.flatnonzero(book.any(0)) for book in books]  # dimensions

    def residual(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        result = latents[rows].astype(np.float64)
        for book, code in zip(books, chosen.T, strict=False):
            result -= book[code]
        return result

    def distances(rows: np.ndarray, chosen: np.ndarray) -> Preference:
        own = used[chosen.shape[1]]
        book, left = books[chosen.shape[1]][:, own], residual(rows, chosen)[:, own]
        norms = np.square(book).sum(1)
        reach = np.sqrt(np.square(left).sum(1)) + np.sqrt(norms.max())
        slack = 8 * (len(own) + 8) * EPSILON * np.square(reach)  # sums of E products, in any order

        def exact(asked: np.ndarray) -> np.ndarray:
            from scipy.spatial.distance import cdist  # rarely needed, and every actor would import it

            return cdist(left[asked], book, "sqeuclidean")

        # A matrix product is ten times as fast, but its rounding depends on the number of rows, and so would ties.
        distance = left @ (-2 * book.T)
        distance += norms
        return Preference(distance, slack, exact)

    def distance(rows: np.ndarray) -> np.ndarray:
        return np.square(residual(rows, codes[rows])).sum(1)

    return _resolve(codes, distance, distances, codebooks.shape[1], taken)


def resolve_given(codes: np.ndarray, codebook_size: int, taken: np.ndarray | None = None) -> Resolved:
    """Distinct codes where no latents are known: the first item by item_index keeps its codes, others take the next free number."""

    def distances(rows: np.ndarray, chosen: np.ndarray) -> Preference:
        own = codes[rows, chosen.shape[1]].astype(np.int64)
        distance = ((np.arange(codebook_size) - own[:, None]) % codebook_size).astype(np.float64)
        return Preference(distance, np.full(len(rows), -1.0), lambda asked: distance[asked])

    return _resolve(codes, lambda rows: np.zeros(len(rows)), distances, codebook_size, taken)


def to_keys(codes: np.ndarray, size: int) -> np.ndarray:
    """[N] codes [N, K] of each item as one number, of which they are the digits in base M."""
    key = np.zeros(len(codes), dtype=np.int64)
    for level in codes.T:
        key = key * size + level
    return key


def to_tokens(codes: np.ndarray) -> list[str]:
    """ "<a_2><b_3><c_1><d_6>" for each row of codes [N, K]."""
    form = "".join(f"<{letter}_%d>" for letter in ascii_lowercase[: codes.shape[1]])
    return [form % tuple(row) for row in codes.tolist()]


def _resolve(
    codes: np.ndarray, distance: Callable[[np.ndarray], np.ndarray], distances: Distances, size: int, taken: np.ndarray | None
) -> Resolved:
    num_items, num_levels = codes.shape
    published = np.zeros(0, dtype=np.int64) if taken is None else np.sort(to_keys(taken, size))
    _check_capacity(num_items, len(published), num_levels, size)
    keys = to_keys(codes, size)
    movers = _movers(keys, published, distance)
    moved = np.zeros(num_items, dtype=bool)
    moved[movers] = True
    result = codes.copy()
    used = np.sort(np.concatenate([keys[~moved], published]))
    for level in range(num_levels - 1, -1, -1):
        if not len(movers):
            break
        placed, movers = _split(movers, to_keys(codes[movers, :level], size), used, size ** (num_levels - level))
        for below in range(level, num_levels):
            _choose(result, placed, below, used, size, distances)
        used = np.sort(np.concatenate([used, to_keys(result[placed], size)]))
    return Resolved(result, moved)


def _check_capacity(num_items: int, published: int, num_levels: int, size: int) -> None:
    if num_levels > len(ascii_lowercase) or size**num_levels >= 2**63:
        raise ValueError(f"{num_levels} levels of {size} codewords do not fit a token; use at most 26 levels and 2**63 IDs")
    if num_items + published > size**num_levels:
        added = f" in addition to {published:,} published ones" if published else ""
        raise CapacityError(
            f"{num_items:,} items{added} but only {size}**{num_levels} = {size**num_levels:,} semantic IDs; raise quantizer.num_levels or quantizer.codebook_size"
        )


def _movers(keys: np.ndarray, published: np.ndarray, distance: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows that cannot keep their codes, in order."""
    order = np.argsort(keys)
    in_order = keys[order]
    same = in_order[1:] == in_order[:-1]
    shared = np.zeros(len(keys), dtype=bool)
    shared[1:] |= same
    shared[:-1] |= same
    if len(published):
        at = np.searchsorted(published, in_order).clip(max=len(published) - 1)
        shared |= published[at] == in_order
    rows = np.sort(order[shared])
    far = np.concatenate([np.zeros(0), *(distance(rows[piece]) for piece in _pieces(len(rows), ROWS))])
    order = np.lexsort((far, keys[rows]))  # stable, so equal ones stay in the order of item_index
    key = keys[rows[order]]
    loses = np.ones(len(rows), dtype=bool)
    if len(rows):
        loses[0] = False
        loses[1:] = key[1:] == key[:-1]
    if len(published):
        at = np.searchsorted(published, key).clip(max=len(published) - 1)
        loses |= published[at] == key
    losers = np.sort(order[loses])
    return rows[losers[np.argsort(far[losers], kind="stable")]]


def _split(movers: np.ndarray, prefix: np.ndarray, used: np.ndarray, below: int) -> tuple[np.ndarray, np.ndarray]:
    """Movers for which there is room under their prefix, and those for which there is not; both in order. below: IDs under a prefix."""
    order = np.argsort(prefix, kind="stable")
    begin, group = _groups(prefix[order])
    distinct = prefix[order][begin]
    free = below - (np.searchsorted(used, (distinct + 1) * below) - np.searchsorted(used, distinct * below))
    finds = np.empty(len(movers), dtype=bool)
    finds[order] = np.arange(len(movers)) - begin[group] < free[group]
    return movers[finds], movers[~finds]


def _choose(result: np.ndarray, movers: np.ndarray, level: int, used: np.ndarray, size: int, distances: Distances) -> None:
    """Set the codes of one level: under each prefix the movers, in order, get the nearest code with room below it."""
    prefix = to_keys(result[movers, :level], size)
    order = np.argsort(prefix, kind="stable")
    prefix, rows = prefix[order], movers[order]
    below = size ** (result.shape[1] - level - 1)
    last, left = -1, np.zeros(size, dtype=np.int64)  # a prefix may continue in the next piece
    for piece in _pieces(len(rows), max(CELLS // size, 1)):
        begin, group = _groups(prefix[piece])
        distinct = prefix[piece][begin]
        goes_on = int(distinct[0] == last)
        room = np.concatenate([left[None][:goes_on], _free_ids(distinct[goes_on:], used, below, size)])
        match = _one_by_one if below == 1 else _deferred_acceptance  # on the last level a prefix has at most M movers
        result[rows[piece], level] = match(distances(rows[piece], result[rows[piece], :level]), group, room)
        last, left = distinct[-1], room[-1]


def _one_by_one(preference: Preference, group: np.ndarray, room: np.ndarray) -> np.ndarray:
    """[n] code of each mover: in all groups at once, the next mover gets the nearest free code.

    Args:
        group: [n] prefix of each mover, ascending; in a group the movers are in order.
        room: [g, M] 1 where a code is free; the codes that the movers get are subtracted.
    """
    closed = room == 0
    choice = np.empty(len(group), dtype=np.int64)
    begin, _ = _groups(group)
    size = np.diff(begin, append=len(group))
    largest = np.argsort(-size)
    begin, waiting = begin[largest], np.searchsorted(-size[largest], -np.arange(size.max()))  # groups with more movers than turns so far
    for turn, count in enumerate(waiting):
        mine, movers = largest[:count], begin[:count] + turn
        choice[movers] = code = preference.first(movers, closed[mine])
        closed[mine, code] = True
    room[:] = ~closed
    return choice


def _deferred_acceptance(preference: Preference, group: np.ndarray, room: np.ndarray) -> np.ndarray:
    """[n] the same by deferred acceptance, for codes with much room: the number of rounds depends on rejections, not on movers."""
    preference.distance[(room == 0)[group]] = np.inf
    choice = preference.first(np.arange(len(group)))
    live = np.arange(len(choice))  # movers under prefixes where some were rejected
    while len(live):
        asked = group[live] * room.shape[1] + choice[live]
        order = np.argsort(asked, kind="stable")
        begin, run = _groups(asked[order])
        refused = live[order[np.arange(len(order)) - begin[run] >= room.ravel()[asked[order]]]]
        preference.distance[refused, choice[refused]] = np.inf
        choice[refused] = preference.first(refused)
        busy = np.zeros(len(room), dtype=bool)
        busy[group[refused]] = True
        live = live[busy[group[live]]]
    room -= np.bincount(group * room.shape[1] + choice, minlength=room.size).reshape(room.shape)
    return choice


def _free_ids(prefix: np.ndarray, used: np.ndarray, below: int, size: int) -> np.ndarray:
    """[g, M] free IDs below each code under prefixes [g]; below: IDs below a code."""
    begin = np.searchsorted(used, prefix * (below * size))
    count = np.searchsorted(used, (prefix + 1) * (below * size)) - begin
    group = np.repeat(np.arange(len(prefix)), count)
    at = np.arange(len(group)) + (begin - np.cumsum(count) + count)[group]
    code = used[at] // below % size
    return below - np.bincount(group * size + code, minlength=len(prefix) * size).reshape(-1, size)


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start of each run of equal values, and the number of the run of each value."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return np.flatnonzero(new), np.cumsum(new) - 1


def _pieces(total: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, total)) for begin in range(0, total, size))
