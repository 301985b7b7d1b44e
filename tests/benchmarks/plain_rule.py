"""The rule of `qbert_ray/semantic_ids.py` in plain loops, item by item: what its tests and its benchmark compare with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Ids = list[list[int]]


def plain_rule(codes: np.ndarray, latents: np.ndarray, codebooks: np.ndarray, taken: np.ndarray) -> Ids:
    """The IDs [N, K] of `resolve_collisions`."""
    vectors, books = latents.astype(np.float64).tolist(), codebooks.astype(np.float64).tolist()
    own = [np.flatnonzero(book.any(0)).tolist() for book in codebooks]  # a level with dimensions of its own looks at no others

    def residual(item: int, prefix: list[int]) -> list[float]:
        left = vectors[item]
        for book, code in zip(books, prefix, strict=False):
            left = [a - b for a, b in zip(left, book[code], strict=True)]
        return left

    def preference(item: int, prefix: list[int]) -> list[int]:
        """Nearest codeword first; equally near ones by their number."""
        left, level = residual(item, prefix), len(prefix)
        distance = []
        for word in books[level]:
            total = 0.0
            for number in own[level]:
                gap = left[number] - word[number]
                total += gap * gap
            distance.append(total)
        return sorted(range(len(distance)), key=distance.__getitem__)

    distance = [np.square(residual(item, ids)).sum() for item, ids in enumerate(codes.tolist())]
    return move(codes, distance, preference, codebooks.shape[1], taken)


def plain_rule_given(codes: np.ndarray, size: int, taken: np.ndarray) -> Ids:
    """The IDs [N, K] of `resolve_given`."""

    def preference(item: int, prefix: list[int]) -> list[int]:
        own = int(codes[item, len(prefix)])
        return [*range(own, size), *range(own)]

    return move(codes, [0.0] * len(codes), preference, size, taken)


def move(codes: np.ndarray, distance: list[float], preference: Callable[[int, list[int]], list[int]], size: int, taken: np.ndarray) -> Ids:
    num_levels = codes.shape[1]
    result = codes.tolist()
    used = {tuple(ids) for ids in taken.tolist()}
    under: dict[tuple[int, ...], int] = {}  # IDs in use by prefix

    def take(ids: list[int]) -> None:
        used.add(tuple(ids))
        for length in range(num_levels + 1):
            under[tuple(ids[:length])] = under.get(tuple(ids[:length]), 0) + 1

    def full(prefix: list[int]) -> bool:
        return under.get(tuple(prefix), 0) == size ** (num_levels - len(prefix))

    for ids in taken.tolist():
        take(ids)
    movers = []
    for item in sorted(range(len(codes)), key=lambda item: (distance[item], item)):
        if tuple(result[item]) in used:
            movers.append(item)
        else:
            take(result[item])
    for level in range(num_levels - 1, -1, -1):
        waiting = []
        for item in movers:
            if full(result[item][:level]):
                waiting.append(item)
                continue
            prefix = result[item][:level]
            while len(prefix) < num_levels:
                prefix.append(next(code for code in preference(item, prefix) if not full([*prefix, code])))
            take(prefix)
            result[item] = prefix
        movers = waiting
    return result
