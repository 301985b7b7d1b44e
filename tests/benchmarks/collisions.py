"""How long collisions take, for catalogs of up to ten million items with popular clusters and exact copies.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.collisions            # 1 and 2 million, and the plain loops
    OMP_NUM_THREADS=1 python -m tests.benchmarks.collisions 5e6 1e7

Every size runs in a process of its own, so that its peak memory is its own; that includes the latents.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import numpy as np

from qbert_ray.semantic_ids.collisions import resolve_collisions, to_keys
from tests.benchmarks.plain_rule import plain_rule

LEVELS, SIZE, WIDTH = 4, 256, 32
ITEMS_PER_CLUSTER = 5  # on average; the most popular one of a million items has 1,600
VARIANTS = 0.15  # clusters whose items hardly differ, like one product in many sizes
COPIES = 0.01  # items that are exactly like another
PIECE = 2**16
PLAIN = 50_000  # items that the plain loops are given


def catalog(num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents around clusters of very unequal size and width, codebooks from their residuals, nearest codes."""
    rng = np.random.default_rng(0)
    clusters = num_items // ITEMS_PER_CLUSTER
    coarse = rng.standard_normal(size=(500, WIDTH), dtype=np.float32)
    centres = rng.standard_normal(size=(clusters, WIDTH), dtype=np.float32)
    centres *= 0.5
    centres += coarse[rng.integers(500, size=clusters)]
    widths = rng.uniform(0.6, 1.2, size=clusters).astype(np.float32)
    widths[rng.random(clusters) < VARIANTS] = 0.1
    popularity = 1 / np.arange(10, clusters + 10) ** 0.5
    codebooks = np.zeros((LEVELS, SIZE, WIDTH), dtype=np.float32)
    latents = np.empty((num_items, WIDTH), dtype=np.float32)
    for begin in range(0, num_items, PIECE):
        part = latents[begin : begin + PIECE]
        cluster = rng.choice(clusters, size=len(part), p=popularity / popularity.sum())
        part[:] = centres[cluster] + widths[cluster, None] * rng.standard_normal(size=part.shape, dtype=np.float32)
    copies = rng.choice(num_items, int(COPIES * num_items), replace=False)
    latents[copies] = latents[rng.integers(num_items, size=len(copies))]
    codes = np.empty((num_items, LEVELS), dtype=np.int16)
    for begin in range(0, num_items, PIECE):
        residual = latents[begin : begin + PIECE].copy()
        for level in range(LEVELS):
            if begin == 0:  # codewords are means of a few residuals
                codebooks[level] = residual[: SIZE * 16].reshape(SIZE, 16, WIDTH)[:, : 1 + level].mean(1)
            book = codebooks[level]
            code = (np.square(book).sum(1) - 2 * residual @ book.T).argmin(1)
            codes[begin : begin + PIECE, level] = code
            residual -= book[code]
    return codes, latents, codebooks


def distances(codes: np.ndarray, latents: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """[N] how far items are from what their codes decode to."""
    decoded = sum(book[code] for book, code in zip(codebooks, codes.T, strict=True))
    return np.sqrt(np.square(latents - decoded).sum(1))


def measure(num_items: int) -> None:
    codes, latents, codebooks = catalog(num_items)
    raw = 1 - len(np.unique(to_keys(codes, SIZE))) / num_items
    started = time.perf_counter(), time.process_time()
    resolved = resolve_collisions(codes, latents, codebooks)
    wall, seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    left = num_items - len(np.unique(to_keys(resolved.codes, SIZE)))
    moved = np.flatnonzero(resolved.moved)
    near, far = (distances(ids[moved], latents[moved], codebooks).mean() for ids in (codes, resolved.codes))
    higher = (resolved.codes[moved, :-1] != codes[moved, :-1]).any(1).mean()
    print(
        f"{num_items:>11,} {raw:7.1%} {len(moved) / num_items:7.1%} {higher:7.2%} {near:6.3f} {far:6.3f} {left:5} "
        f"{wall:8.1f} {seconds:8.1f} {num_items / seconds:>9,.0f} {peak:8.2f}",
        flush=True,
    )


def compare(num_items: int = 1_000_000) -> None:
    """The same part of a catalog, all items under some first codes, with and without plain loops."""
    codes, latents, codebooks = catalog(num_items)
    held = np.cumsum(np.bincount(codes[:, 0], minlength=SIZE)) <= PLAIN
    rows = np.flatnonzero(held[codes[:, 0]])
    codes, latents = codes[rows], latents[rows]
    started = time.process_time()
    fast = resolve_collisions(codes, latents, codebooks)
    between = time.process_time()
    plain = plain_rule(codes, latents, codebooks, codes[:0])
    seconds = time.process_time() - between
    print(
        f"{len(rows):,} items of {num_items:,}, {fast.moved.mean():.1%} moved: plain loops {seconds:.1f} s of CPU, "
        f"here {between - started:.3f} s, {seconds / (between - started):.0f} x faster; equal: {plain == fast.codes.tolist()}"
    )


def main(sizes: list[str]) -> None:
    if sizes[:1] == ["--one"]:
        measure(int(sizes[1]))
        return
    print("      items  raw col   moved  higher   near    far  left   wall s    CPU s   items/s peak GiB", flush=True)
    for size in sizes or ["1e6", "2e6"]:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.collisions", "--one", str(int(float(size)))], check=True)
    if not sizes:
        compare()


if __name__ == "__main__":
    main(sys.argv[1:])
