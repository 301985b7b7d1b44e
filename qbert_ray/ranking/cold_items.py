"""Ranks of cold items, those without training interactions, among the whole catalog and among each other.

For each user who had a cold item, the last is the target, after all that the user had of the other items before it. The model is
compared with the expected value of a random order and with neighbours by each modality: the cosine of the vectors of a candidate and
of the latest items of the history, of their mean or of the nearest of them.

Shapes: B users, N catalog, D width of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from qbert_ray import metrics
from qbert_ray.config.schema import Config, Ranking
from qbert_ray.execution.device import own_device
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.ranking.generative import load_catalog_ranker
from qbert_ray.ranking.ranker import batches
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import content_modalities, item_ids, modality_vectors
from qbert_ray.storage.directory import RunDir
from qbert_ray.top_k import ranks

PROTOCOLS = {"unseen": "rank_unseen", "cold": "rank_cold"}
WITHOUT_COLD = ("ridge", "transitions", "item_item_text")  # item-item weights of their own; cold items have none


def evaluate_cold(config: Config, run: RunDir, domain: str, executor: Executor, progress: Progress) -> metrics.Evaluation | None:
    """Write evaluate/cold of a domain; its figures, or None where no item is held out."""
    parts = run.parts("ingest/cold", domain)
    if not parts:
        return None
    arguments = {"run": run, "domain": domain, "settings": config.ranking, "latest": config.evaluate.co_occurrence_history}
    arguments |= {"modalities": content_modalities(run, domain, config), "refit": config.refit.include == "validation"}
    executor.map_parts(run, ColdPart, arguments, parts, "evaluate/cold", config.compute.evaluate, progress)
    return summarise_cold(run.read("evaluate/cold", domain), list(config.evaluate.cutoffs))


def summarise_cold(table: pa.Table, cutoffs: list[int]) -> metrics.Evaluation:
    """{users, protocols: {unseen | cold: {model | <modality>_mean | <modality>_nearest | random: ...}}} of an evaluate/cold table."""
    model = np.array(table["model"].to_pylist(), dtype=object)
    protocols = {}
    for protocol, column in PROTOCOLS.items():
        rank, among = table[column].to_numpy(), table[column.replace("rank", "among")].to_numpy()
        protocols[protocol] = {str(name): metrics.summarise(rank[model == name], cutoffs) for name in dict.fromkeys(model)}
        protocols[protocol]["random"] = metrics.expected_at_random(among[model == "model"], cutoffs)
    return {"users": int((model == "model").sum()), "protocols": protocols}


class ColdPart:
    """Ranks of the cold targets of a part of the users."""

    def __init__(self, run: RunDir, domain: str, settings: Ranking, latest: int, modalities: Sequence[str], refit: bool = False) -> None:
        self.run, self.domain, self.latest = run, domain, latest
        self.ranker = load_catalog_ranker(run, domain, settings, own_device(), refit=refit)
        self.item_ids = item_ids(run, domain).to_pylist()
        self.warm = self.ranker.trained
        vectors = {name: modality_vectors(run, domain, name) for name in modalities}
        self.contents = {name: each for name, each in vectors.items() if each is not None}

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        table = self.run.read_part("ingest/cold", name)
        users, targets = table[columns.USER_ID].to_pylist(), table["target"].to_numpy()
        histories = [np.array(history, dtype=np.int64) for history in table["history"].to_pylist()]
        rows = []
        for batch in batches(len(users), self.ranker.num_features * len(self.item_ids)):
            target = torch.from_numpy(targets[batch].astype(np.int64))
            among_themselves = self.ranker.cold_scores(histories[batch])
            for model, scores in self._scores(histories[batch]).items():
                cold = among_themselves if model == "model" and among_themselves is not None else scores[:, self.warm :]
                pair = (ranks(scores, target, seen=histories[batch]), ranks(cold, target - self.warm))
                rows.append(self._table(users[batch], model, targets[batch], *pair, histories[batch]))
        self.run.write_part("evaluate/cold", name, pa.concat_tables(rows) if rows else columns.COLD_RANKS.empty_table())
        return {"users": len(users)}

    def _scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        scores = self.ranker.scores(histories)
        scores = {name: each for name, each in scores.items() if name not in WITHOUT_COLD}
        for name, vectors in self.contents.items():
            latest = [vectors[history[-self.latest :]] for history in histories]
            scores[f"{name}_mean"] = F.normalize(torch.stack([each.mean(0) for each in latest]), dim=-1) @ vectors.T
            scores[f"{name}_nearest"] = torch.stack([(each @ vectors.T).amax(0) for each in latest])
        return scores

    def _table(
        self, users: list[str], model: str, targets: np.ndarray, unseen: Tensor, cold: Tensor, histories: list[np.ndarray]
    ) -> pa.Table:
        num_items = len(self.item_ids)
        arrays = [
            pa.array([self.domain] * len(users)),
            pa.array(users),
            pa.array([model] * len(users)),
            pa.array([self.item_ids[target] for target in targets]),
            pa.array(unseen.numpy().astype(np.int32)),
            pa.array(cold.numpy().astype(np.int32)),
            pa.array([num_items - len(np.unique(history)) for history in histories], pa.int32()),
            pa.array([num_items - self.warm] * len(users), pa.int32()),
        ]
        return pa.table(arrays, schema=columns.COLD_RANKS)
