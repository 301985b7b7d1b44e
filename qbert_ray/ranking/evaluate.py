"""The stage `evaluate`: the test item of every user that has one, with the whole catalog of the domain ranked for each.

Two protocols: all items (the paper's), and unseen items only. The baselines read the same training interactions: popularity and item
co-occurrence as counts, ridge regression and transitions as item-item weights, and the blend of these weights with cosines of texts,
which is fitted on validation items as the model's own blend is. With `refit.include=validation` all of them read validation interactions too.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from scipy import sparse

from qbert_ray import metrics
from qbert_ray.config.schema import Config, Ranking
from qbert_ray.execution.device import own_device
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.features.structure import co_occurrence
from qbert_ray.random_streams import TEST_STREAM, uniform
from qbert_ray.ranking.cold_items import evaluate_cold
from qbert_ray.ranking.generative import load_catalog_ranker
from qbert_ray.ranking.item_item import co_occurrence_scores, popularity
from qbert_ray.ranking.ranker import batches
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import item_ids
from qbert_ray.storage.directory import RunDir
from qbert_ray.top_k import rank_pairs

MODEL = "model"
MODELS = 7  # whose scores of a batch are held at once
PROTOCOLS = {"all": "rank_all", "unseen": "rank_unseen"}


def evaluate(config: Config, run: RunDir, executor: Executor, progress: Progress) -> dict[str, dict[str, int]]:
    """Write evaluate/ranks and evaluate/metrics.json; counts of ranked users."""
    counts: dict[str, dict[str, int]] = {}
    report: dict[str, metrics.Evaluation] = {}
    included = "validation" if config.refit.include == "validation" else "none"  # models that saw test items say nothing about them
    for domain in config.data.targets:
        progress.note(domain)
        baselines = executor.submit(_baselines, run, domain, included)
        arguments = {"run": run, "domain": domain, "settings": config.ranking, "baselines": baselines}
        arguments |= {"latest": config.evaluate.co_occurrence_history, "refit": included != "none"}
        parts = run.parts("ingest/sequences", domain)
        with_target, arguments["sampled"] = _sample(run, parts, config.evaluate.users)
        counts[domain] = dict(executor.map_parts(run, RankPart, arguments, parts, "evaluate/ranks", config.compute.evaluate, progress))
        report[domain] = summarise(run.read("evaluate/ranks", domain), list(config.evaluate.cutoffs))
        if report[domain]["users"] < with_target:
            report[domain]["sampled_from"] = with_target
        if cold := evaluate_cold(config, run, domain, executor, progress):
            report[domain]["cold"] = cold
        if included != "none":
            for each in [report[domain], *([cold] if cold else [])]:
                each["trained_on"] = included
    run.write_json("evaluate/metrics.json", report)
    return counts


def summarise(table: pa.Table, cutoffs: list[int]) -> metrics.Evaluation:
    """Hit rates and NDCG of a ranks table.

    Returns:
        {users, protocols: {all | unseen: {model | sequencer | ridge | transitions | item_item_text | popularity | co_occurrence:
        {"hr@10": {value, low, high}, ...}}}}.
    """
    model = np.array(table["model"].to_pylist())
    protocols = {}
    for protocol, column in PROTOCOLS.items():
        rank = table[column].to_numpy()
        protocols[protocol] = {str(name): metrics.summarise(rank[model == name], cutoffs) for name in dict.fromkeys(model)}
    return {"users": int((model == MODEL).sum()), "protocols": protocols}


def _baselines(run: RunDir, domain: str, include: str) -> tuple[sparse.csr_matrix, np.ndarray]:
    sequences = columns.to_sequences(run.read("ingest/sequences", domain)).training_on(include)
    size = run.read("ingest/items", domain, [columns.ITEM_INDEX]).num_rows
    together = co_occurrence(sequences.indptr, sequences.items, size, weights=sequences.weights)
    return together, popularity(sequences.indptr, sequences.items, size, sequences.weights)


def _sample(run: RunDir, parts: list[str], users: int | None) -> tuple[int, dict[str, np.ndarray] | None]:
    """Number of users that have a test item; and the rows of `users` of them in each part, chosen by hash, or None for all."""
    has = [run.read_part("ingest/sequences", part, ["test"])["test"].is_valid().to_numpy() for part in parts]
    size = np.cumsum([0, *map(len, has)])
    found = np.flatnonzero(np.concatenate([*has, np.zeros(0, bool)]))
    if users is None or users >= len(found):
        return len(found), None
    chosen = np.sort(found[np.argsort(uniform(TEST_STREAM, 0, found, 1)[:, 0])[:users]])
    bounds = np.searchsorted(chosen, size)
    return len(found), {part: chosen[bounds[number] : bounds[number + 1]] - size[number] for number, part in enumerate(parts)}


class RankPart:
    """Ranks of the test items of a part of the users, or of a sample of them."""

    def __init__(
        self,
        run: RunDir,
        domain: str,
        settings: Ranking,
        baselines: tuple[sparse.csr_matrix, np.ndarray],
        latest: int,
        sampled: dict[str, np.ndarray] | None = None,
        refit: bool = False,
    ) -> None:
        self.run, self.domain, self.latest, self.sampled = run, domain, latest, sampled
        self.counts, self.popularity = baselines
        self.ranker = load_catalog_ranker(run, domain, settings, own_device(), baselines=True, refit=refit)
        self.item_ids = item_ids(run, domain).to_pylist()

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        sequences = columns.to_sequences(self.run.read_part("ingest/sequences", name))
        everybody = np.flatnonzero(sequences.test >= 0)
        users = everybody if self.sampled is None else self.sampled[name]
        found: dict[str, list[np.ndarray]] = {}
        for rows in batches(len(users), MODELS * len(self.item_ids)):
            batch = users[rows]
            histories = [sequences.history(user, "test") for user in batch]
            target = torch.from_numpy(sequences.test[batch])
            for model, scores in self._scores(histories).items():
                found.setdefault(model, []).append(rank_pairs(scores, target, histories, self.ranker.repeats(model)).numpy())
        self._write(
            name,
            [sequences.user_ids[user] for user in users],
            sequences.test[users],
            {model: np.concatenate(pieces) for model, pieces in found.items()},
        )
        counts = {"users": len(sequences.user_ids), "ranked": len(users), "without_target": len(sequences.user_ids) - len(everybody)}
        return counts if self.sampled is None else counts | {"not_sampled": len(everybody) - len(users)}

    def _scores(self, histories: list[np.ndarray]) -> dict[str, torch.Tensor]:
        together = co_occurrence_scores(self.counts, histories, self.latest)
        return self.ranker.scores(histories) | {
            "popularity": torch.tensor(self.popularity).expand(len(histories), -1),
            "co_occurrence": torch.from_numpy(together),
        }

    def _write(self, name: str, users: list[str], test: np.ndarray, rank: dict[str, np.ndarray]) -> None:
        targets = [self.item_ids[item] for item in test]
        tables = [
            pa.table(
                [
                    pa.array([self.domain] * len(users)),
                    pa.array(users),
                    pa.array([model] * len(users)),
                    pa.array(targets),
                    pa.array(values[:, 0].astype(np.int32)),
                    pa.array(values[:, 1].astype(np.int32)),
                ],
                schema=columns.RANKS,
            )
            for model, values in rank.items()
        ]
        self.run.write_part("evaluate/ranks", name, pa.concat_tables(tables) if tables else columns.RANKS.empty_table())
