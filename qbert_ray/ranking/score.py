"""The stage `score`: the k best items of the whole catalog for every user, part by part."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from qbert_ray.config.schema import Config, Ranking
from qbert_ray.execution.device import own_device
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.ranking.generative import load_catalog_ranker
from qbert_ray.ranking.ranker import batches
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import item_ids
from qbert_ray.storage.directory import RunDir


def score(config: Config, run: RunDir, executor: Executor, progress: Progress) -> dict[str, dict[str, int]]:
    """Write recommendations for every user of the target domains; counts of users and rows."""
    counts: dict[str, dict[str, int]] = {}
    for domain in config.data.targets:
        progress.note(domain)
        arguments = {"run": run, "domain": domain, "settings": config.ranking, "k": config.score.top_k}
        arguments["remove_seen"] = config.score.remove_seen
        parts = run.parts("ingest/sequences", domain)
        counts[domain] = dict(executor.map_parts(run, ScorePart, arguments, parts, "score", config.compute.score, progress))
    return counts


class ScorePart:
    """The k best items for a part of the users, from their whole history."""

    def __init__(self, run: RunDir, domain: str, settings: Ranking, k: int, remove_seen: bool) -> None:
        self.run, self.domain, self.k, self.remove_seen = run, domain, k, remove_seen
        self.ranker = load_catalog_ranker(run, domain, settings, own_device())
        self.item_ids = item_ids(run, domain)

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        sequences = columns.to_sequences(self.run.read_part("ingest/sequences", name))
        scores, items = [], []
        for rows in batches(len(sequences.user_ids)):
            histories = [sequences.history(user, "end") for user in range(rows.start, rows.stop)]
            values, indices = self.ranker.best(histories, self.k, self.remove_seen)
            scores.append(values.numpy())
            items.append(indices.numpy())
        table = self._table(sequences.user_ids, np.concatenate(scores), np.concatenate(items))
        self.run.write_part("score", name, table)
        return {"users": len(sequences.user_ids), "rows": table.num_rows}

    def _table(self, users: list[str], scores: np.ndarray, items: np.ndarray) -> pa.Table:
        """One row per user and rank; a user who has seen nearly everything gets fewer than k."""
        there = items.ravel() >= 0
        row = np.repeat(np.arange(len(users)), items.shape[1])[there]
        rank = np.tile(np.arange(1, items.shape[1] + 1, dtype=np.int32), len(users))[there]
        arrays = [
            pa.array([self.domain] * len(row)),
            pa.array(users).take(pa.array(row)),
            pa.array(rank),
            self.item_ids.take(pa.array(items.ravel()[there])),
            pa.array(scores.ravel()[there].astype(np.float32)),
        ]
        return pa.table(arrays, schema=columns.RECOMMENDATIONS)
