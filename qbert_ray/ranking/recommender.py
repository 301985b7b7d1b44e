"""Recommendations from a finished run, in one process and without Ray.

recommender = Recommender.load("runs/demo")
recommender.recommend([["item-1", "item-7"], []], k=10)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from qbert_ray.config.schema import Config
from qbert_ray.ranking.generative import CatalogRanker, load_catalog_ranker
from qbert_ray.ranking.ranker import batches
from qbert_ray.storage.catalog import item_ids, run_config
from qbert_ray.storage.directory import ArtifactError, RunDir

UNKNOWN = ("ignore", "error")  # what can be done with unknown items


class ArgumentError(ValueError, TypeError):
    """An argument of another type than the one that is asked for; the message names it."""


class Recommendation(NamedTuple):
    item_id: str
    score: float


class Recommender:
    """Recommends items of one domain of a run for any histories, as `qbert-ray score` does for the run's users.

    Args:
        ranker: the domain's models.
        ids: [N] item_id of its items.
    """

    def __init__(self, ranker: CatalogRanker, ids: Sequence[str]) -> None:
        self.ranker, self.ids = ranker, list(ids)
        self.index = {item: number for number, item in enumerate(self.ids)}

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str], domain: str | None = None, device: str = "cpu") -> Recommender:
        """The recommender of a finished run.

        Args:
            run_dir: a local path, s3:// or gs://.
            domain: one that was fine-tuned; may be left out where there is only one.
            device: where the sequence model computes, such as "cuda".

        Raises:
            ArtifactError: there is no such run or domain, or its fine-tuning is not done.
        """
        run = RunDir(os.fspath(run_dir))
        config = run_config(run)
        domain = target_domain(run, config, domain)
        return cls(load_catalog_ranker(run, domain, config.ranking, device), item_ids(run, domain).to_pylist())

    def __contains__(self, item_id: object) -> bool:
        return item_id in self.index

    def recommend(
        self,
        histories: Iterable[Iterable[str]],
        k: int = 10,
        remove_seen: bool = True,
        unknown: Literal["ignore", "error"] = "ignore",
    ) -> list[list[Recommendation]]:
        """The k best items for each history, best first; fewer where a history leaves fewer.

        Args:
            histories: item_id in time order, the latest last; an empty one gets what is popular in general.
            k: how many.
            remove_seen: leave out what the history holds.
            unknown: what to do with an item_id that the run does not know: skip it with one warning that counts them, or refuse.

        Raises:
            ValueError: k is no positive whole number, histories is not a list of lists of text (`ArgumentError`, which is a TypeError
                too), or there are unknown items and `unknown` is "error", or it is another word.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer):
            raise ArgumentError(f"k is {k!r}; it must be a whole number")
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        if unknown not in UNKNOWN:
            raise ValueError(f"unknown is {unknown!r}; it must be {' or '.join(map(repr, UNKNOWN))}")
        known = self._indices(_read_histories(histories), unknown)
        result: list[list[Recommendation]] = []
        with torch.inference_mode():
            for rows in batches(len(known)):
                best = self.ranker.best(known[rows], k, remove_seen)
                for values, items in zip(*(tensor.tolist() for tensor in best), strict=True):
                    result.append([Recommendation(self.ids[item], value) for value, item in zip(values, items, strict=True) if item >= 0])
        return result

    def _indices(self, histories: list[list[str]], unknown: str) -> list[np.ndarray]:
        missing = [item for history in histories for item in history if item not in self.index]
        if missing:
            such = f"{len(missing)} of {sum(map(len, histories))} items of the histories are not in the catalog, such as {missing[0]!r}"
            if unknown == "error":
                raise ValueError(f'{such}; give items of the run, or unknown="ignore"')
            warnings.warn(f"{such}; they are skipped", stacklevel=3)
        return [np.array([self.index[item] for item in history if item in self.index], dtype=np.int64) for history in histories]


def _read_histories(histories: Iterable[Iterable[str]]) -> list[list[str]]:
    """The histories as lists, each read once: an iterator has nothing left for a second reading.

    Raises:
        ArgumentError: it is no list of lists of text.
    """
    if isinstance(histories, str | bytes | dict) or not isinstance(histories, Iterable):
        raise ArgumentError(f"histories is of type {type(histories).__name__}; it must be a list of lists of item_id")
    read = []
    for number, history in enumerate(histories):
        if isinstance(history, str | bytes):
            raise ArgumentError("histories must be a list of lists of item_id; for a single history write [history]")
        if isinstance(history, dict) or not isinstance(history, Iterable):
            raise ArgumentError(f"history {number} is {history!r}; it must be a list of item_id, and [] for a user without any")
        items = list(history)
        wrong = next((item for item in items if not isinstance(item, str)), None)
        if wrong is not None or None in items:
            raise ArgumentError(f"history {number} holds {wrong!r} of type {type(wrong).__name__}; item_ids are text: write {str(wrong)!r}")
        read.append(items)
    return read


def target_domain(run: RunDir, config: Config, domain: str | None) -> str:
    """The target domain of a name, or the only one.

    Raises:
        ArtifactError: none is named where there are several, or the run was not fine-tuned on it.
    """
    targets = config.data.targets
    if domain is None and len(targets) > 1:
        raise ArtifactError(f"{run.uri} has several domains; name one of {', '.join(targets)}")
    if domain is not None and domain not in targets:
        raise ArtifactError(f"{run.uri} has no target domain {domain!r}; it has {', '.join(targets)}")
    return domain or targets[0]
