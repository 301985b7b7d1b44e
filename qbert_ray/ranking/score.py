"""The stages `score` and `score-histories`: the k best items for every user, part by part.

Histories are those of the run; with `score.interactions`, newer interactions come on top of them; `score.histories` names other users.
Which items may be recommended, `score.exclude` and `score.allow` say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from qbert_ray.config.schema import Config, Ranking
from qbert_ray.execution.device import own_device
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.inputs.histories import open_histories, write_histories
from qbert_ray.ranking.filters import EVERYTHING, Filter
from qbert_ray.ranking.generative import load_catalog_ranker
from qbert_ray.ranking.loader import ranks_by_refit
from qbert_ray.ranking.ranker import Ranker, batches
from qbert_ray.ranking.rules import EVERYBODY, Rules, load_rules
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import catalog_codes, item_ids
from qbert_ray.storage.directory import Counts, RunDir

SCORE, SCORE_HISTORIES = "score", "score_histories"  # folders, also of the tables
SEQUENCES = "ingest/sequences"


def score(config: Config, run: RunDir, executor: Executor, progress: Progress) -> Counts:
    """Write recommendations for every user of the target domains; counts of users and rows."""
    newer = {"interactions": (config.score.interactions, True)} if config.score.interactions else {}
    return _score(config, run, executor, progress, SCORE, newer)


def score_histories(config: Config, run: RunDir, executor: Executor, progress: Progress) -> Counts:
    """Write recommendations for every user of the file of `score.histories`; counts of users and rows."""
    assert config.score.histories, "the stage is skipped without a file"
    return _score(config, run, executor, progress, SCORE_HISTORIES, {"histories": (config.score.histories, False)})


def _score(config: Config, run: RunDir, executor: Executor, progress: Progress, output: str, files: dict[str, tuple[str, bool]]) -> Counts:
    """Write a table of recommendations.

    Args:
        output: folder of the table.
        files: field of the section `score` that names a file of histories -> its path, and whether it adds to the histories of the run.
    """
    counts: Counts = {}
    warnings: list[str] = []
    for domain in config.data.targets:
        progress.note(domain)
        rules, report = executor.submit(load_rules, config, run, domain, num_returns=2)
        found = executor.get(report)
        warnings += [text for each in found.values() if (text := each.pop("warning", None))]
        table = SEQUENCES
        for field, (path, newer) in files.items():
            source = open_histories(config, domain, path.replace("{domain}", domain), f"score.{field}")
            found[f"score.{field}"] = write_histories(config, run, domain, source, output, executor, newer)
            if newer and _later_in_training(run, domain):
                warnings.append(
                    f"{domain}: with score.interactions histories are in the order of time alone, and some users have training interactions "
                    "later than their targets, which the run puts first (data.split=given)"
                )
            table = f"{output}/histories"
        arguments = {"run": run, "domain": domain, "settings": config.ranking, "k": config.score.top_k, "rules": rules}
        arguments |= {"remove_seen": config.score.remove_seen, "histories": table, "output": output, "prefixes": config.score.prefixes}
        arguments["refit"] = ranks_by_refit(run, config)
        done = executor.map_parts(run, ScorePart, arguments, run.parts(table, domain), output, config.compute.score, progress)
        counts[domain] = dict(done) | found
        warnings += _fruitless(run, domain, table, done, found)
    return counts | ({"warnings": warnings} if warnings else {})


def _fruitless(run: RunDir, domain: str, histories: str, done: Counts, found: dict[str, Any]) -> list[str]:
    """Warnings about tables that name none of the users who were scored, about users who all get nothing, and rows that are all rejected.

    Args:
        run: that was scored.
        domain: of the run.
        histories: table of the users.
        done: counts of `ScorePart`.
        found: field of the section `score` -> what was read of its file or expression.
    """
    said, users = [], done.get("users", 0)
    if users and done.get("users_with_rules") == 0:
        tables = " and ".join(f"{key}={each['table']}" for key, each in found.items() if "users" in each and "table" in each)
        own = run.read(histories, domain, [columns.USER_ID])[columns.USER_ID][0].as_py()
        said.append(f"{domain}: none of the {users:,} users who were scored has a row in {tables}; one of the users is called {own!r}")
    if users and done.get("users_without_items") == users:
        said.append(f"{domain}: score.exclude and score.allow leave nothing to recommend to any of the {users:,} users")
    for key, each in found.items():
        lost = sum(each.get("rejected", {}).values())
        if lost and not each["new"] + each["known"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in each["rejected"].items())
            own = item_ids(run, domain)[0].as_py()
            said.append(f"{domain}: no row of {key}={each['file']} could be used: {reasons}; an item of the run is called {own!r}")
    return said


def _later_in_training(run: RunDir, domain: str) -> bool:
    """Whether a split of one's own trains on interactions later than its targets."""
    return bool(run.read_json("ingest/manifest.json")["counts"].get(domain, {}).get("split", {}).get("users_trained_on_later"))


class ScorePart:
    """The k best items for a part of the users, from their whole history."""

    def __init__(
        self,
        run: RunDir,
        domain: str,
        settings: Ranking,
        k: int,
        remove_seen: bool,
        rules: Rules = EVERYBODY,
        histories: str = SEQUENCES,
        output: str = SCORE,
        prefixes: int | None = None,
        refit: bool = False,
    ) -> None:
        self.run, self.domain, self.k, self.remove_seen, self.rules = run, domain, k, remove_seen, rules
        self.histories, self.output = histories, output
        self.ranker = load_catalog_ranker(run, domain, settings, own_device(), refit=refit)
        if prefixes is not None:
            assert isinstance(self.ranker, Ranker), "the config refuses prefixes for the generative model"
            self.ranker.search_prefixes(torch.from_numpy(catalog_codes(run, domain)), prefixes)
        self.item_ids = item_ids(run, domain)
        self.cold: pl.DataFrame | None = None  # item_id and item_index of the cold items, where users of the run may have had them
        self.interactions: set[str] = set()
        if remove_seen and histories == SEQUENCES and self.ranker.trained < len(self.item_ids):
            ids = pl.Series(columns.ITEM_ID, self.item_ids[self.ranker.trained :].to_pylist(), pl.String)
            self.cold = ids.to_frame().with_row_index(columns.ITEM_INDEX, offset=self.ranker.trained)
            self.interactions = set(run.parts("ingest/interactions", domain))

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        users, histories = columns.to_histories(self.run.read_part(self.histories, name))
        only, scores, items = self.rules.of(users).also(self._had(name, users)), [], []
        for rows in batches(len(users)):
            values, indices = self.ranker.best(histories[rows], self.k, self.remove_seen, only.part(rows))
            scores.append(values.numpy())
            items.append(indices.numpy())
        table = self._table(users, np.concatenate(scores), np.concatenate(items)) if users else columns.RECOMMENDATIONS.empty_table()
        self.run.write_part(self.output, name, table)
        counts = {"users": len(users), "rows": table.num_rows}
        if without := sum(int((each[:, :1] < 0).sum()) for each in items):
            counts["users_without_items"] = without
        return counts | ({"users_with_rules": self.rules.named(users)} if self.rules.by_user else {})

    def _had(self, name: str, users: list[str]) -> Filter:
        """What leaves out the cold items that users had, which are in no sequence of the run."""
        if self.cold is None or name not in self.interactions:
            return EVERYTHING
        rows = pl.DataFrame(self.run.read_part("ingest/interactions", name, [columns.USER_ID, columns.ITEM_ID]))
        had = rows.join(self.cold, on=columns.ITEM_ID).group_by(columns.USER_ID).agg(columns.ITEM_INDEX)
        lists = dict(had.iter_rows())
        return Filter(excluded=[np.array(lists.get(user, ()), np.int64) for user in users])

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
