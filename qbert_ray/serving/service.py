"""What the HTTP endpoints answer: JSON in, recommendations as JSON out. Knows neither HTTP nor Ray.

A request is read by the service that answers it, so one that came before a reload is answered by the models that it was read with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from qbert_ray.config.schema import Config
from qbert_ray.inputs.fingerprints import fingerprint
from qbert_ray.inputs.rules import rule_files
from qbert_ray.ranking.arguments import read_count, read_ids
from qbert_ray.ranking.filters import Filter
from qbert_ray.ranking.generative import load_catalog_ranker
from qbert_ray.ranking.loader import ranks_by_refit
from qbert_ray.ranking.recommender import Recommendation, Recommender
from qbert_ray.ranking.rules import Rules, load_rules
from qbert_ray.storage.catalog import item_ids, run_config
from qbert_ray.storage.checksums import checksum
from qbert_ray.storage.directory import ArtifactError, RunDir
from qbert_ray.storage.seals import APPENDING
from qbert_ray.storage.stages import BY_NAME

MOST_ITEMS = 1000  # that a request may ask for
MOST_BYTES = 1 << 20  # of a request
STAGES = ("ingest", "semantic_ids", "finetune", "ranking", "refit")  # that are served
RECOMMEND = ("history", "k", "remove_seen", "exclude", "allow", "user_id", "domain")
SIMILAR = ("item", "k", "exclude", "allow", "domain")


class RequestError(ValueError):
    """A request that cannot be answered; the message says what is wrong and what to send."""


class Answer(NamedTuple):
    """An HTTP status and the body as JSON."""

    status: int
    body: dict[str, Any]


class Asked(NamedTuple):
    """A request for recommendations, by item_index."""

    service: Service
    domain: str
    history: np.ndarray
    unknown: int  # items of the history that the catalog does not have
    k: int
    remove_seen: bool
    only: Filter  # of this history


def served_version(config: Config) -> str:
    """A hash that differs where models, catalog, filters or settings of a run that is served do.

    Raises:
        ArtifactError: the run is not done, or items are being appended to it.
    """
    run = RunDir(config.run.dir)
    stages = [name for name in STAGES if not BY_NAME[name].skipped(config)]
    missing = next((name for name in stages if not run.exists(f"{name}/manifest.json")), None)
    if missing or run.exists(APPENDING):
        why = f"{BY_NAME[missing].command} is not done" if missing else "items are being appended to it"
        raise ArtifactError(f"{run.uri} cannot be served: {why}; finish it with qbert-ray run, or semantic-ids --append")
    files = [fingerprint(config.data.root, location) for location in rule_files(config).values()]
    content = [
        run.uri,
        config.score.model_dump_json(),
        str(run_config(run).sequencer.beam),  # an evaluate or score with another one changes no manifest of a model
        *map(str, files),
        *(run.read_json(f"{name}/manifest.json")["checksum"] for name in stages),
    ]
    return checksum(json.dumps(content).encode())


class Service:
    """The recommenders of a run's target domains, behind `recommend`, `similar` and `health`.

    Args:
        recommenders: target domain -> recommender.
        rules: target domain -> what `score.exclude` and `score.allow` say.
        config: its section `score` names what holds where a request does not say otherwise.
        version: of `served_version`.
    """

    def __init__(self, recommenders: dict[str, Recommender], rules: dict[str, Rules], config: Config, version: str) -> None:
        self.recommenders, self.rules, self.config, self.version = recommenders, rules, config, version

    @classmethod
    def load(cls, config: Config, device: str = "cpu") -> Service:
        """The service of a finished run, ready to answer.

        Args:
            config: with the run's directory and the sections `ranking` and `score`.
            device: where the sequence model computes.

        Raises:
            ArtifactError: the run is not done.
            SourceError: score.exclude or score.allow cannot be used.
        """
        version, run = served_version(config), RunDir(config.run.dir)
        recommenders, rules = {}, {}
        for domain in config.data.targets:
            ranker = load_catalog_ranker(run, domain, config.ranking, device, refit=ranks_by_refit(run, config))
            recommenders[domain] = Recommender(ranker, item_ids(run, domain).to_pylist())
            rules[domain] = load_rules(config, run, domain)[0]
            with torch.inference_mode():
                ranker.best([np.zeros(1, np.int64)], 1)  # what is computed once is computed now
        return cls(recommenders, rules, config, version)

    def read(self, body: bytes) -> Asked:
        """A request for recommendations.

        Raises:
            RequestError: it is no JSON object of `RECOMMEND`, or names something that is not there.
        """
        given = self._object(body, RECOMMEND)
        domain = self._domain(given)
        recommender, rules, score = self.recommenders[domain], self.rules[domain], self.config.score
        history = _ids(given, "history")
        known = recommender.known(history)
        only = _filter(recommender, given)
        user = given.get("user_id")
        if rules.by_user:
            if not isinstance(user, str):
                raise RequestError("user_id is needed: score.exclude or score.allow is a table of users and items")
            if any("\ud800" <= letter <= "\udfff" for letter in user):
                raise RequestError("user_id is no text: it holds half of a surrogate pair")
            only = rules.of([user]).also(only)
        seen = given.get("remove_seen", score.remove_seen)
        if not isinstance(seen, bool):
            raise RequestError(f"remove_seen is {seen!r}; it must be true or false")
        return Asked(self, domain, known, len(history) - len(known), self._count(given), seen, only._replace(items=None))

    def recommend(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answers to requests that this service has read, together: {"items": [{"item_id", "score"}, ...], "unknown_items", "version"}."""
        answers: list[Answer | None] = [None] * len(asked)
        kinds = [(each.domain, each.remove_seen, each.k) for each in asked]  # k too: beams, and items that are reranked, are at least k
        for kind in dict.fromkeys(kinds):
            domain, remove_seen, k = kind
            rows = [row for row, each in enumerate(kinds) if each == kind]
            chosen = [asked[row] for row in rows]
            recommender, rules = self.recommenders[domain], self.rules[domain]
            excluded = [each.only.excluded[0] if each.only.excluded else np.zeros(0, np.int64) for each in chosen]
            allowed = [each.only.allowed[0] if each.only.allowed else None for each in chosen]
            only = Filter(rules.items, excluded, allowed)
            with torch.inference_mode():
                best = recommender.ranker.best([each.history for each in chosen], k, remove_seen, only)
            for row, each, values, items in zip(rows, chosen, *best, strict=True):
                answers[row] = Answer(
                    200, _listed(recommender.pairs(values, items)) | {"unknown_items": each.unknown, "version": self.version}
                )
        return [answer for answer in answers if answer is not None]

    def similar(self, body: bytes) -> Answer:
        """{"items": [{"item_id", "score"}, ...], "version"} of the most similar items that `score.exclude` and `score.allow` leave.

        Raises:
            RequestError: the body is no JSON object of `SIMILAR`, or names an item or a domain that is not there.
        """
        given = self._object(body, SIMILAR)
        domain = self._domain(given)
        recommender, item = self.recommenders[domain], given.get("item")
        if not isinstance(item, str) or item not in recommender:
            raise RequestError(f"item is {item!r}; it must be an item_id of {domain}, such as {recommender.ids[0]!r}")
        only = _filter(recommender, given)._replace(items=self.rules[domain].items)
        found = recommender.most_similar(recommender.index[item], self._count(given), only)
        return Answer(200, _listed(found) | {"version": self.version})

    def health(self) -> Answer:
        """{"status": "ok", "run", "version", "domains": {name: number of items}}."""
        domains = {name: len(recommender.ids) for name, recommender in self.recommenders.items()}
        return Answer(200, {"status": "ok", "run": self.config.run.dir, "version": self.version, "domains": domains})

    def _object(self, body: bytes, known: tuple[str, ...]) -> dict[str, Any]:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON: {error}") from None
        if not isinstance(given, dict):
            raise RequestError(f"the body is a JSON {type(given).__name__}; it must be an object with {', '.join(known)}")
        strange = next((name for name in given if name not in known), None)
        if strange is not None:
            name = strange.encode(errors="backslashreplace").decode()  # half a surrogate pair could not be sent back
            raise RequestError(f"{name}: no such field; known are {', '.join(known)}")
        return {name: value for name, value in given.items() if value is not None}

    def _domain(self, given: dict[str, Any]) -> str:
        domain = given.get("domain", next(iter(self.recommenders)) if len(self.recommenders) == 1 else None)
        if not isinstance(domain, str) or domain not in self.recommenders:
            raise RequestError(f"domain is {domain!r}; it must be one of {', '.join(self.recommenders)}")
        return domain

    def _count(self, given: dict[str, Any]) -> int:
        try:
            count = read_count(given.get("k", self.config.score.top_k))
        except ValueError as error:
            raise RequestError(str(error)) from None
        if count > MOST_ITEMS:
            raise RequestError(f"k is {count}; it may be {MOST_ITEMS} at most")
        return count


def _ids(given: dict[str, Any], name: str) -> list[str]:
    try:
        return read_ids(given.get(name, []), name)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _filter(recommender: Recommender, given: dict[str, Any]) -> Filter:
    """The filter of one request."""
    excluded = [recommender.known(_ids(given, "exclude"))]
    return Filter(excluded=excluded, allowed=[recommender.known(_ids(given, "allow"))] if "allow" in given else None)


def _listed(found: list[Recommendation]) -> dict[str, Any]:
    return {"items": [{"item_id": item, "score": score} for item, score in found]}
