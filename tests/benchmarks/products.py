"""Matrix products in float32 on one core: `qbert_ray.products` against PyTorch's own, in turns.

python -m tests.benchmarks.products
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from qbert_ray.products import product
from tests.benchmarks.table import Figure, main

SIZES = {
    "a layer of the recipe": (2000, 128, 384),
    "a layer of the paper's model": (2000, 256, 768),
    "scores of 6,250 items": (256, 128, 6250),
    "a layer of MiniLM": (2048, 384, 1536),
}


def gigaflops(multiply: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> float:
    started = time.process_time()
    for _ in range(10):
        multiply(*tensors)
    rows, inputs = tensors[0].shape
    return 20 * rows * inputs * len(tensors[1]) / (time.process_time() - started) / 1e9


@torch.inference_mode()
def figures(full: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for name, (rows, inputs, outputs) in SIZES.items():
        tensors = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
        torch.testing.assert_close(product(*tensors), F.linear(*tensors), atol=1e-3, rtol=1e-4)
        turns = [(gigaflops(product, tensors), gigaflops(F.linear, tensors)) for _ in range(40 if full else 15)]
        ours, theirs = np.median(turns, axis=0)
        yield Figure(f"products, {name}, one core", f"{ours:.0f} GFLOPS", f"PyTorch (MKL): {theirs:.0f}", ours / theirs, "", None)


if __name__ == "__main__":
    main(figures)
