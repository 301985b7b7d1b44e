"""Uniform random numbers that depend only on their arguments, and so not on batches, workers or restarts."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Bits = TypeVar("Bits", np.ndarray, np.uint64)

# Added to a seed, or in its place: keep draws for different purposes apart.
ID_DROPOUT_STREAM, WINDOW_STREAM, VALIDATION_STREAM = 1, 2, 3
SAMPLE_STREAM, COLD_STREAM, PREFIX_STREAM, TEXT_STREAM, TEST_STREAM = 7_000_003, 7_000_009, 7_000_013, 7_000_021, 7_000_027


def uniform(seed: int, epoch: int, samples: np.ndarray, slots: int) -> np.ndarray:
    """[B, slots] numbers in [0, 1) that depend only on the arguments (splitmix64 as a counter-based generator)."""
    with np.errstate(over="ignore"):
        key = splitmix64(np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch) + np.uint64(1))
        row = splitmix64(samples.astype(np.uint64) ^ key)[:, None]
        bits = splitmix64(row + np.arange(1, slots + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)).astype(np.float64) / 2**53


def splitmix64(x: Bits) -> Bits:
    """The final mix of splitmix64, a bijection of 64 bits, of an array or a number."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
