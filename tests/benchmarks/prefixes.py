"""Ranking the items of some prefixes of semantic IDs against the exact ranking of the whole catalog: recall@10 and time per user.

    python -m tests.benchmarks.prefixes runs/scale/100000/run       # a finished run, up to the stage ranking

Both rank the same users by `Ranker.best` in turns in one process with one thread, seen items removed. Recall is the share of the exact ten
that is found; a list of fewer candidates than ten is ranked exactly.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from qbert_ray.random_streams import uniform
from qbert_ray.ranking.generative import load_catalog_ranker
from qbert_ray.ranking.ranker import Ranker
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import catalog_codes, run_config
from qbert_ray.storage.directory import RunDir
from tests.benchmarks.table import Figure, markdown

K, BATCH = 10, 128
TRIED = (16, 64, 256, 1024)


def ranked(ranker: Ranker, histories: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """[U, K] item_index, and milliseconds per user; the first batch is ranked once before."""
    ranker.best(histories[:BATCH], K)
    begun, found = time.perf_counter(), []
    for begin in range(0, len(histories), BATCH):
        found.append(ranker.best(histories[begin : begin + BATCH], K)[1].numpy())
    return np.concatenate(found), 1e3 * (time.perf_counter() - begun) / len(histories)


def compare(run: RunDir, domain: str, users: int) -> list[Figure]:
    config = run_config(run)
    ranker = load_catalog_ranker(run, domain, config.ranking)
    assert isinstance(ranker, Ranker), "the generative model has no exact ranking to compare with"
    sequences = columns.to_sequences(run.read("ingest/sequences", domain))
    chosen = np.argsort(uniform(0, 0, np.arange(len(sequences.user_ids)), 1)[:, 0])[:users]
    histories = [sequences.history(int(user), "test") for user in chosen]
    codes = torch.from_numpy(catalog_codes(run, domain))
    with torch.inference_mode():
        exact, slow = ranked(ranker, histories)
        figures = []
        for prefixes in TRIED:
            ranker.search_prefixes(codes, prefixes)
            found, fast = ranked(ranker, histories)
            hits = np.array([len(np.intersect1d(a, b)) / K for a, b in zip(exact, found, strict=True)])
            first = float((exact[:, 0] == found[:, 0]).mean())
            assert ranker.index is not None
            what = f"{ranker.num_items:,} items, {prefixes} of {len(ranker.index.sizes):,} prefixes: recall@{K} {hits.mean():.3f}, same first item {first:.3f}"
            figures.append(Figure(what, f"{fast:.2f} ms per user", f"whole catalog: {slow:.2f} ms", slow / fast, "", None))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument("--users", type=int, default=1024)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = RunDir(given.run)
    print(markdown([figure for domain in run_config(run).data.targets for figure in compare(run, domain, given.users)]))


if __name__ == "__main__":
    main()
