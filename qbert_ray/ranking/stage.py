"""The collaborative memory of each target domain: item-item weights part by part on Ray Data, then the mix on validation items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qbert_ray import metrics
from qbert_ray.config.schema import Config, Ranking, Workers
from qbert_ray.execution.device import own_device
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.random_streams import COLD_STREAM, SAMPLE_STREAM, uniform
from qbert_ray.ranking.item_item import SIGNALS, Candidates, RidgeRegression, candidates, fit_mix, following, nobody, popularity
from qbert_ray.ranking.ranker import MIX, RERANKER, WEIGHTS, Ranker, batches
from qbert_ray.ranking.reranker import Lists, Reranker, fit_reranker
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir
from qbert_ray.top_k import ranks

NEW_SHARE = 0.1  # of the trained items that play new ones while the mix is fitted


def fit_ranking(config: Config, run: RunDir, executor: Executor, progress: Progress) -> dict[str, Any]:
    """Write ranking/weights and ranking/mix/<domain>; the mix's weights and what it gains on validation items."""
    counts: dict[str, Any] = {}
    for domain in config.data.targets:
        progress.note(domain)
        arguments = {"run": run, "domain": domain, "settings": config.ranking}
        done = executor.map_parts(run, WeightsPart, arguments, run.parts("ingest/items", domain), WEIGHTS, config.compute.ranking, progress)
        counts[domain] = dict(done) | executor.get(executor.submit(_fit, run, domain, config.ranking, workers=Workers()))
    return counts


class WeightsPart:
    """Item-item weights of a part of the catalog; every actor holds the co-occurrences of the domain."""

    def __init__(self, run: RunDir, domain: str, settings: Ranking) -> None:
        self.run, s = run, settings
        sequences = columns.to_sequences(run.read("ingest/sequences", domain))
        size = run.read("ingest/items", domain, [columns.ITEM_INDEX]).num_rows
        train = (sequences.indptr, sequences.items, size)
        self.ridge = RidgeRegression(*train, s.regularisation, s.neighbours)
        self.following = following(*train, s.following_window, s.following_decay, s.following_shrinkage, s.neighbours)
        self.popularity = popularity(*train)

    def __call__(self, name: str) -> dict[str, int]:
        items = self.run.read_part("ingest/items", name, columns.KEYS)
        targets = items[columns.ITEM_INDEX].to_numpy()
        rows = (self.ridge.rows(targets), self.following[targets])
        lists = [
            pa.ListArray.from_arrays(matrix.indptr.astype(np.int32), pa.array(values))
            for matrix in rows
            for values in (matrix.indices.astype(np.int32), matrix.data.astype(np.float32))
        ]
        table = pa.table([*items.columns, *lists, pa.array(self.popularity[targets])], schema=columns.MEMORY)
        self.run.write_part(WEIGHTS, name, table)
        return {"items": items.num_rows, "weights": sum(matrix.nnz for matrix in rows)}


def _fit(run: RunDir, domain: str, settings: Ranking) -> dict[str, Any]:
    """Fit the mix on validation items, save it, and rank them with it and without; then the reranker."""
    ranker = Ranker(run, domain, settings, own_device(), mixed=False)
    sequences = columns.to_sequences(run.read("ingest/sequences", domain))
    everybody = np.flatnonzero(sequences.valid >= 0)
    everybody = everybody[np.argsort(uniform(SAMPLE_STREAM, 0, everybody, 1)[:, 0])]
    users = everybody[: settings.validation_users]
    target = torch.from_numpy(sequences.valid[users])
    histories = [sequences.history(user, "valid") for user in users]
    new = torch.zeros(ranker.trained, dtype=torch.bool)
    if "content" in ranker.memory.contents:
        drawn = torch.from_numpy(uniform(COLD_STREAM, 0, np.arange(ranker.trained), 1)[:, 0] < NEW_SHARE)
        new = drawn & ~drawn.all()  # a catalog of a few items: somebody must stay to be near to
    pretender = ranker.pretending(new.nonzero()[:, 0]) if new.any() else ranker
    samples = []
    with torch.inference_mode():
        for rows in batches(len(users), len(SIGNALS) * len(ranker.catalog)):
            scores, signals, lengths = pretender.signals(histories[rows])
            trained = (scores[:, : ranker.trained], signals[:, :, : ranker.trained], lengths)
            samples.append(candidates(*trained, target[rows], new, ranker.memory.known, settings.candidates))
    joined = Candidates(*(torch.cat(pieces).clone() for pieces in zip(*samples, strict=True))) if samples else nobody()
    mix = fit_mix(joined)
    run.save_model(f"{MIX}/{domain}", mix._asdict(), {"signals": list(SIGNALS)})
    ranker.use(mix)
    trust = mix.trust(mix.centre[None] + torch.tensor([[1.0, 0, 0]]))[0].tolist()
    result: dict[str, Any] = {"users": len(users), "fitted_on": len(joined.place)}
    result["weights_of_signals"] = dict(zip(SIGNALS, trust, strict=False))
    result["weights_for_new_items"] = dict(zip((*SIGNALS, "new"), trust[len(SIGNALS) :], strict=True))
    found: dict[str, list[np.ndarray]] = {"model": [np.zeros(0, int)], "sequencer": [np.zeros(0, int)]}
    with torch.inference_mode():
        for rows in batches(len(users), len(SIGNALS) * len(ranker.catalog)):
            scores = ranker.scores(histories[rows])
            for name, pieces in found.items():
                pieces.append(ranks(scores[name], target[rows], histories[rows]).numpy())  # as fine-tuning is judged
    ndcg = {name: metrics.interval(metrics.ndcg(np.concatenate(pieces), 10))["value"] for name, pieces in found.items()}
    result |= {f"{name}_ndcg@10": value for name, value in ndcg.items()}
    if settings.rerank:
        reranker, gain = _fit_reranker(ranker, sequences, everybody[: settings.rerank_users])
        if reranker is not None:
            run.save_model(f"{RERANKER}/{domain}", reranker.state_dict(), {})
        result["reranking"] = {"kept": reranker is not None} | gain
    return result


def _fit_reranker(ranker: Ranker, sequences: columns.Sequences, users: np.ndarray) -> tuple[Reranker | None, dict[str, float]]:
    """What `fit_reranker` gives for the validation items of users."""
    lists = []
    with torch.inference_mode():
        for rows in batches(len(users)):
            histories = [sequences.history(user, "valid") for user in users[rows]]
            lists.append(ranker.lists(histories, torch.from_numpy(sequences.valid[users[rows]])))
    joined = [torch.cat(pieces).clone() for pieces in zip(*lists, strict=True)]
    return fit_reranker(Lists(*joined), seed=0) if lists else (None, {})
