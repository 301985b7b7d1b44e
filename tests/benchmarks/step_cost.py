"""Seconds of a training step of the sequence model by the size of the catalog, with a sampled softmax.

    python -m tests.benchmarks.step_cost            # 6,250, 100,000 and 1,000,000 items; 2 GiB

Steps of the catalogs are taken in turns in one run, by the ordinary `SequencerTask` and `Loop`: forward, backward, update, average of
weights. `finetune.sampled_items` is the same for all, small enough that the smallest catalog is sampled too. Next to it the same steps
where every row of the item embeddings is updated, as below the size at which the softmax is sampled.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch

from qbert_ray.config.schema import Config
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.training import Loop
from tests.benchmarks.table import Figure, main
from tests.benchmarks.training import make_run

SIZES = (6_250, 100_000, 1_000_000)
USERS, LENGTH, SAMPLED, BATCH, ROUNDS, STEPS = 2_048, 10, 3_000, 128, 5, 3
LARGEST = 1.3  # times the step of the smallest catalog


class EveryRow(SequencerTask):
    """The same training with dense gradients of the item embeddings."""

    def build(self) -> torch.nn.Module:
        model = super().build()
        for embedding in model.item_embedding.values():
            embedding.sparse = False
        return model


def make_loop(folder: str, num_items: int, task: type[SequencerTask]) -> Loop:
    rng = np.random.default_rng(0)
    histories = [np.minimum(num_items * rng.random(LENGTH) ** 3, num_items - 1).astype(np.int64) for _ in range(USERS)]
    run, config = make_run(folder, histories, num_items)
    content = config.model_dump(mode="json")
    content["finetune"] |= {"objective": "causal", "sampled_items": SAMPLED, "averaging": 0.995, "batch_size": BATCH}
    content["sequencer"] |= {"item_start": "random", "recall": True}
    config = Config.model_validate(content)
    return Loop(task(config, run, ["shop"], config.finetune), torch.device("cpu"))


def seconds(loops: dict[int, Loop]) -> dict[int, float]:
    """Items -> seconds of a step, the least of some rounds."""
    found: dict[int, list[float]] = {size: [] for size in loops}
    for turn in range(ROUNDS):
        for size, loop in loops.items():
            loop.model.train()
            batches = loop.task.batches(turn)[: STEPS + 1]
            loop._step(batches[0], 1e-3)
            begun = time.perf_counter()
            for samples in batches[1:]:
                loop._step(samples, 1e-3)
            found[size].append((time.perf_counter() - begun) / STEPS)
    return {size: min(each) for size, each in found.items()}


def figures(full: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for task, name, bar in ((SequencerTask, "rows that are read", True), (EveryRow, "every row", False)):
        with tempfile.TemporaryDirectory() as folder:
            found = seconds({size: make_loop(f"{folder}/{size}", size, task) for size in SIZES})
        for size in SIZES[1:]:
            times = found[size] / found[SIZES[0]]
            yield Figure(
                f"training step, {name} updated; {size:,} items, {SAMPLED:,} sampled",
                f"{1e3 * found[size]:.0f} ms",
                f"{SIZES[0]:,} items: {1e3 * found[SIZES[0]]:.0f} ms",
                1 / times,
                f"<= {LARGEST} x" if bar else "",
                times <= LARGEST if bar else None,
            )


if __name__ == "__main__":
    main(figures)
