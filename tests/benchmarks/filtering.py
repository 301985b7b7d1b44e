"""What filters cost: milliseconds per user of `Ranker.best` with exclude and allow, next to the same without a filter.

    python -m tests.benchmarks.filtering          # 6,250 and 250,000 items
    python -m tests.benchmarks.filtering --full   # more users and rounds, and a million items

Rankers are those of `scoring`: random weights, the recipe with its item-item model and reranker. CPU time of one process of one thread,
so that other work on the machine does not count; medians of alternating rounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from qbert_ray.ranking.filters import EVERYTHING, Filter
from qbert_ray.ranking.ranker import Ranker, batches
from tests.benchmarks.scoring import ITEMS, RECIPE, K, bare_ranker, generated_item_item, histories_of_instruments, item_item_of, zipf
from tests.benchmarks.table import Figure, main


def filters(rng: np.random.Generator, num_items: int, users: int) -> dict[str, Filter]:
    few = min(200, num_items)
    return {
        "no filter": EVERYTHING,
        "exclude a tenth of the items": Filter(items=rng.random(num_items) > 0.1),
        "allow a tenth of the items": Filter(items=rng.random(num_items) < 0.1),
        "exclude 20 items of each user": Filter(excluded=list(rng.integers(0, num_items, (users, 20)))),
        "allow 200 items of each user": Filter(allowed=list(rng.integers(0, num_items, (users, few)))),
    }


@torch.inference_mode()
def took(ranker: Ranker, histories: list[np.ndarray], only: Filter) -> float:
    """Milliseconds of CPU per user."""
    started = time.process_time()
    for rows in batches(len(histories)):
        ranker.best(histories[rows], K, True, only.part(rows))
    return (time.process_time() - started) / len(histories) * 1e3


def figures(full: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    histories, source = histories_of_instruments(rng)
    num_items = max(ITEMS, 1 + max(int(history.max()) for history in histories))
    content = F.normalize(torch.from_numpy(rng.standard_normal((num_items, 128), dtype=np.float32)), dim=-1)
    ranker = bare_ranker(num_items, RECIPE, item_item_of(histories, num_items, content), content)
    yield from compared(rng, ranker, histories[: 4096 if full else 2048], 11 if full else 7, source)
    for size in (250_000, 1_000_000) if full else (250_000,):
        ranker = bare_ranker(size, RECIPE | {"content_width": 0}, generated_item_item(rng, size))
        generated = [zipf(rng, size, length) for length in 5 + rng.geometric(1 / 5, 512 if full else 256)]
        yield from compared(rng, ranker, generated, 7 if full else 5, "generated histories")


def compared(rng: np.random.Generator, ranker: Ranker, histories: list[np.ndarray], rounds: int, source: str) -> Iterator[Figure]:
    """A line for each filter, all measured in turns."""
    given = filters(rng, ranker.num_items, len(histories))
    times: dict[str, list[float]] = {name: [] for name in given}
    for number in range(rounds + 1):
        for name, only in given.items():
            once = took(ranker, histories, only)
            if number:  # the first round warms up
                times[name].append(once)
    plain = float(np.median(times["no filter"]))
    for name, each in times.items():
        if name == "no filter":
            continue
        more = float(np.median(np.array(each) - np.array(times["no filter"])))
        what = f"filtering, {ranker.num_items:,} items, {source}: {name}"
        yield Figure(
            what, f"{plain + more:.3f} ms per user", f"no filter: {plain:.3f} ms; {more:+.4f} ms", plain / (plain + more), "", None
        )


if __name__ == "__main__":
    main(figures)
