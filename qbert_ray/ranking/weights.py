"""Item-item weights part by part, and the choice of the ridge regression's settings on validation items."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch

from qbert_ray import metrics
from qbert_ray.config.schema import Config, Ranking, Workers
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.random_streams import SAMPLE_STREAM, uniform
from qbert_ray.ranking.item_item import RidgeRegression, Transitions, popularity, recency
from qbert_ray.ranking.loader import RIDGE, WEIGHTS, read_matrix
from qbert_ray.ranking.ranker import batches
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import run_config
from qbert_ray.storage.directory import RunDir
from qbert_ray.top_k import ranks

SEARCHED = "ranking/searched"  # weights of one penalty each, deleted when one is chosen
DECAYS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
PENALTIES = (10.0, 30.0, 100.0, 300.0, 1000.0)


class Chosen(NamedTuple):
    """Settings of the ridge regression, with the ndcg@10 of validation items by which they were chosen."""

    decay: float
    regularisation: float
    by_decay: dict[str, float]
    by_regularisation: dict[str, float]


class WeightCounts(TypedDict):
    """Of a domain's item-item weights."""

    items: int
    weights: int  # that are not zero
    ridge: NotRequired[dict[str, object]]  # `Chosen`, where a setting is "auto"


class WeightsPart:
    """Item-item weights of a part of the catalog; every actor holds the co-occurrences of the domain.

    Args:
        run: the run directory.
        domain: whose catalog it is.
        settings: the config's section `ranking`, with a number for the penalty of the ridge regression.
        output: table that the parts are written to.
        include: of `Sequences.training_on`.
    """

    def __init__(self, run: RunDir, domain: str, settings: Ranking, output: str = WEIGHTS, include: str = "none") -> None:
        self.run, self.output, s = run, output, settings
        sequences = columns.to_sequences(run.read("ingest/sequences", domain)).training_on(include)
        size = run.read("ingest/items", domain, [columns.ITEM_INDEX]).num_rows
        train = (sequences.indptr, sequences.items, size)
        weights = sequences.weights
        self.ridge = RidgeRegression(*train, float(s.regularisation), s.neighbours, weights)
        self.transitions = Transitions(*train, s.following_window, s.following_decay, s.following_shrinkage, s.neighbours, weights)
        self.popularity = popularity(*train, weights)

    def __call__(self, name: str) -> dict[str, int]:
        items = self.run.read_part("ingest/items", name, columns.KEYS)
        targets = items[columns.ITEM_INDEX].to_numpy()
        rows = (self.ridge.rows(targets), self.transitions.rows(targets))
        lists = [
            pa.ListArray.from_arrays(matrix.indptr.astype(np.int32), pa.array(values))
            for matrix in rows
            for values in (matrix.indices.astype(np.int32), matrix.data.astype(np.float32))
        ]
        table = pa.table([*items.columns, *lists, pa.array(self.popularity[targets])], schema=columns.ITEM_ITEM)
        self.run.write_part(self.output, name, table)
        return {"items": items.num_rows, "weights": sum(matrix.nnz for matrix in rows)}


def write_weights(config: Config, run: RunDir, domain: str, executor: Executor, progress: Progress) -> WeightCounts:
    """Write ranking/weights of a domain and, where a setting of the ridge regression is "auto", what was chosen.

    The decay is chosen with the penalty that is set, or the middle one of those that are tried; then the penalty with that decay.
    """
    settings, decays = config.ranking, _tried(config.ranking.decay, DECAYS)
    penalties = _tried(settings.regularisation, PENALTIES)

    def write(penalty: float, output: str) -> WeightCounts:
        return _write(config, run, domain, penalty, output, executor, progress)

    if len(penalties) == 1:
        counts, tables = write(penalties[0], WEIGHTS), {penalties[0]: WEIGHTS}
    else:
        tables = {penalty: f"{SEARCHED}/{number}" for number, penalty in enumerate(penalties)}
        for penalty, output in tables.items():
            counts = write(penalty, output)
    if len(decays) == len(penalties) == 1:
        return counts
    chosen = executor.get(executor.submit(_choose, run, domain, settings, decays, tables, workers=Workers()))
    run.write_json(f"{RIDGE}/{domain}.json", chosen._asdict())
    if len(penalties) > 1:
        counts = write(chosen.regularisation, WEIGHTS)
        run.delete(SEARCHED)
    return {"items": counts["items"], "weights": counts["weights"], "ridge": chosen._asdict()}


def write_weights_again(config: Config, run: RunDir, domain: str, output: str, executor: Executor, progress: Progress) -> WeightCounts:
    """Write the weights of a domain with the held-out interactions of `refit.include`, with the penalty that was chosen without them."""
    penalty = config.ranking.regularisation
    if penalty == "auto":
        penalty = run.read_json(f"{RIDGE}/{domain}.json")["regularisation"]
    return _write(config, run, domain, penalty, output, executor, progress, config.refit.include)


def _write(
    config: Config, run: RunDir, domain: str, penalty: float, output: str, executor: Executor, progress: Progress, include: str = "none"
) -> WeightCounts:
    settings = config.ranking.model_copy(update={"regularisation": penalty})
    arguments = {"run": run, "domain": domain, "settings": settings, "output": output, "include": include}
    done = executor.map_parts(run, WeightsPart, arguments, run.parts("ingest/items", domain), output, config.compute.ranking, progress)
    return {"items": done["items"], "weights": done["weights"]}


def _tried(value: float | str, every: tuple[float, ...]) -> tuple[float, ...]:
    return every if value == "auto" else (float(value),)


def _choose(run: RunDir, domain: str, settings: Ranking, decays: tuple[float, ...], tables: dict[float, str]) -> Chosen:
    """The decay, then the penalty, of the largest ndcg@10 of validation items among unseen ones, by the regression alone.

    Args:
        run: the run directory.
        domain: whose users they are.
        settings: the config's section `ranking`.
        decays: that are tried.
        tables: penalty -> table of the weights made with it.
    """
    sequences, latest = columns.to_sequences(run.read("ingest/sequences", domain)), run_config(run).sequencer.max_items
    size = run.read("ingest/items", domain, [columns.ITEM_INDEX]).num_rows
    users = np.flatnonzero(sequences.valid >= 0)
    users = users[np.argsort(uniform(SAMPLE_STREAM, 0, users, 1)[:, 0])][: settings.validation_users]
    histories, target = [sequences.history(int(user), "valid") for user in users], torch.from_numpy(sequences.valid[users])
    columns_of = {penalty: read_matrix(run.read(table, domain), "ridge", size).T.tocsr() for penalty, table in tables.items()}

    @cache
    def value(decay: float, penalty: float) -> float:
        found = [np.zeros(0)]
        for rows in batches(len(users), size):
            scores = (recency(histories[rows], decay, latest, size) @ columns_of[penalty]).toarray()
            found.append(metrics.ndcg(ranks(torch.from_numpy(scores), target[rows], histories[rows]).numpy(), 10))
        return metrics.interval(np.concatenate(found))["value"]

    penalties = sorted(tables)
    if not len(users):  # nothing to choose by
        given = Ranking()
        decay, penalty = (float(given.decay) if len(decays) > 1 else decays[0]), float(given.regularisation)
        return Chosen(decay, penalty if len(penalties) > 1 else penalties[0], {}, {})
    middle = penalties[len(penalties) // 2]
    by_decay = {decay: value(decay, middle) for decay in decays}
    decay = max(decays, key=by_decay.__getitem__)
    by_penalty = {penalty: value(decay, penalty) for penalty in penalties}
    penalty = max(penalties, key=by_penalty.__getitem__)
    return Chosen(decay, penalty, _named(by_decay), _named(by_penalty))


def _named(values: dict[float, float]) -> dict[str, float]:
    return {f"{setting:g}": value for setting, value in values.items()}
