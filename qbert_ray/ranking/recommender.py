"""Recommendations from a finished run, in one process and without Ray.

recommender = Recommender.load("runs/demo")
recommender.recommend([["item-1", "item-7"], []], k=10)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from qbert_ray.config.loading import with_values
from qbert_ray.config.schema import Config
from qbert_ray.ranking.arguments import Items, read_count, read_filter, read_histories, read_ids, read_unknown
from qbert_ray.ranking.filters import EVERYTHING, Filter, HiddenItems
from qbert_ray.ranking.generative import CatalogRanker, load_catalog_ranker
from qbert_ray.ranking.loader import ranks_by_refit
from qbert_ray.ranking.ranker import Ranker, batches
from qbert_ray.ranking.rules import Rules, load_rules
from qbert_ray.storage.catalog import item_ids, run_config
from qbert_ray.storage.columns import ITEM_ID, to_fixed_lists
from qbert_ray.storage.directory import ArtifactError, RunDir
from qbert_ray.top_k import top_k

Unknown = Literal["ignore", "error"]


class Recommendation(NamedTuple):
    """A recommended item with its score."""

    item_id: str
    score: float


class Recommender:
    """Recommends items of one domain of a run for any histories, as `qbert-ray score` does for the run's users.

    Where the run's config asks for it, by the models that the stage `refit` trained, as soon as that is done.

    Filters are arguments: `score.exclude` and `score.allow` of the config are not applied, nor is `score.prefixes`. Items that are gone
    from the catalog's files since an append are never recommended.

    Args:
        ranker: the domain's models.
        ids: [N] item_id of its items.
        read_rules: reads the rules of a text, given "exclude" or "allow" and the text; None: texts are refused.
    """

    def __init__(self, ranker: CatalogRanker, ids: Sequence[str], read_rules: Callable[[str, str], Rules] | None = None) -> None:
        self.ranker, self.ids, self.read_rules = ranker, list(ids), read_rules
        self.index = {item: number for number, item in enumerate(self.ids)}
        self._rules: dict[tuple[str, str], np.ndarray | None] = {}

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
        name = target_domain(run, config, domain)

        def read_rules(key: str, text: str) -> Rules:
            alone = with_values(config, {"score.exclude": None, "score.allow": None} | {f"score.{key}": text})
            return load_rules(alone, run, name)[0]

        ranker = load_catalog_ranker(run, name, config.ranking, device, refit=ranks_by_refit(run, config))
        return cls(ranker, item_ids(run, name).to_pylist(), read_rules)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self.index

    def recommend(
        self,
        histories: Iterable[Iterable[str]],
        k: int = 10,
        remove_seen: bool = True,
        unknown: Unknown = "ignore",
        exclude: Items | None = None,
        allow: Items | None = None,
    ) -> list[list[Recommendation]]:
        """The k best items for each history, best first; fewer where a history or a filter leaves fewer.

        Filters hold before the k best are taken, and before the reranker reorders, so a filtered list is as long as there are items for it.

        Args:
            histories: item_id in time order, the latest last; an empty one gets what is popular in general.
            k: how many.
            remove_seen: leave out what the history holds.
            unknown: what to do with an item_id that the run does not know, in `histories` or `allow`: skip it with one warning that
                counts them, or refuse.
            exclude: items that are not recommended: a list of item_id, a list of them (or None) for each history, or a text as in
                `score.exclude`: a table of items, or an expression over columns of the items files, such as "in_stock == false".
            allow: items of which the recommended ones are taken, in the same forms.

        Raises:
            ValueError: k is no positive whole number, histories is not a list of lists of text (`ArgumentError`, which is a TypeError
                too), there are unknown items and `unknown` is "error", or it is another word, or a filter cannot be read.
        """
        k = read_count(k)
        read_unknown(unknown)
        given = read_histories(histories)
        only = self._filter(exclude, allow, len(given), unknown)
        return self._recommend(self._indices(given, unknown, "the histories"), k, remove_seen, only)

    def score_candidates(self, history: Iterable[str], items: Iterable[str], unknown: Unknown = "ignore") -> list[Recommendation]:
        """Some items with their scores, best first: what `recommend` gives where these are the only items, seen ones included.

        No other item is scored, so its time does not grow with the catalog.

        Args:
            history: item_id in time order, the latest last.
            items: item_id of the candidates, such as those that a search found.
            unknown: what to do with an item_id that the run does not know.

        Raises:
            ValueError: an argument is no list of text, or there are unknown items and `unknown` is "error".
        """
        read_unknown(unknown)
        (known,) = self._indices([read_ids(history, "history")], unknown, "the history")
        (candidates,) = self._indices([read_ids(items, "items")], unknown, "the candidates")
        candidates = np.unique(candidates)
        if self.ranker.available is not None:
            candidates = candidates[self.ranker.available[candidates]]
        if not len(candidates):
            return []
        with torch.inference_mode():
            scores = self.ranker.candidate_scores([known], torch.from_numpy(candidates)[None])
            values, places = top_k(scores, len(candidates))
        return [
            Recommendation(self.ids[candidates[place]], value) for value, place in zip(values[0].tolist(), places[0].tolist(), strict=True)
        ]

    def similar_items(self, item: str, k: int = 10, exclude: Items | None = None, allow: Items | None = None) -> list[Recommendation]:
        """The k most similar other items, best first, with the cosine of their vectors.

        The vectors are those by which the sequence model reads and ranks items: codes, content, and what users have together with them.

        Args:
            item: item_id of the run.
            k: how many.
            exclude: as in `recommend`.
            allow: as in `recommend`.

        Raises:
            ValueError: k is no positive whole number, the run does not know the item, or a filter cannot be read.
        """
        k = read_count(k)
        if item not in self.index:
            raise ValueError(f"no item {item!r} in the catalog of {len(self.ids):,} items, such as {self.ids[0]!r}")
        return self.most_similar(self.index[item], k, self._filter(exclude, allow, 1, "ignore"))

    def most_similar(self, number: int, k: int, only: Filter) -> list[Recommendation]:
        """`similar_items` of an item_index, of the items that a filter of one history lets pass."""
        only = only.within(self.ranker.available)
        with torch.inference_mode():
            cosines = (self._unit_vectors @ self._unit_vectors[number])[None]
            hidden = HiddenItems(only, [slice(0, len(self.ids))], 1, cosines.device)
            cosines = hidden.of(cosines if hidden.penalty is None else cosines + hidden.penalty, slice(0, len(self.ids)))
            cosines[0, number] = -torch.inf
            values, places = top_k(cosines, k)
        return self.pairs(values[0], places[0])

    def user_embeddings(
        self, histories: Iterable[Iterable[str]], user_ids: Iterable[str] | None = None, unknown: Unknown = "ignore"
    ) -> pa.Table:
        """A table of the histories' vectors: column embedding, and user_id where these are given.

        The product of a user's and an item's vector (`item_embeddings`), plus the item's bias, is the score of the sequence model, without
        the blend and the reranker: what a nearest-neighbour index needs.

        Args:
            histories: item_id in time order, the latest last.
            user_ids: one for each history.
            unknown: what to do with an item_id that the run does not know.

        Raises:
            ValueError: an argument is not as above, or the model is generative: it writes the codes of items and has no vector of a user.
        """
        read_unknown(unknown)
        known = self._indices(read_histories(histories), unknown, "the histories")
        ranker = self._with_vectors("user_embeddings")
        with torch.inference_mode():
            pieces = [ranker.user_vectors(known[rows]) for rows in batches(len(known))]
        vectors = torch.cat(pieces) if pieces else torch.zeros(0, ranker.item_vectors()[0].shape[1])
        table = pa.table({"embedding": to_fixed_lists(vectors.numpy())})
        if user_ids is None:
            return table
        users = read_ids(user_ids, "user_ids")
        if len(users) != len(known):
            raise ValueError(f"user_ids has {len(users)} entries for {len(known)} histories")
        return table.add_column(0, "user_id", pa.array(users, pa.string()))

    def item_embeddings(self) -> pa.Table:
        """A table of the items' vectors, for `user_embeddings`: columns item_id, embedding and bias.

        Raises:
            ValueError: the model is generative.
        """
        vectors, bias = self._with_vectors("item_embeddings").item_vectors()
        return pa.table({ITEM_ID: pa.array(self.ids), "embedding": to_fixed_lists(vectors.numpy()), "bias": bias.numpy()})

    # arguments as the ranker reads them

    def _recommend(self, histories: list[np.ndarray], k: int, remove_seen: bool, only: Filter) -> list[list[Recommendation]]:
        """`recommend` by item_index."""
        result: list[list[Recommendation]] = []
        with torch.inference_mode():
            for rows in batches(len(histories)):
                best = self.ranker.best(histories[rows], k, remove_seen, only.part(rows))
                result += [self.pairs(values, items) for values, items in zip(*best, strict=True)]
        return result

    def pairs(self, values: Tensor, items: Tensor) -> list[Recommendation]:
        """Scores and item_index of one history as recommendations, without the places that have no item."""
        return [Recommendation(self.ids[item], value) for value, item in zip(values.tolist(), items.tolist(), strict=True) if item >= 0]

    def _filter(self, exclude: Items | None, allow: Items | None, histories: int, unknown: Unknown) -> Filter:
        """The filter of some histories."""
        only = EVERYTHING
        if exclude is not None:
            only = self._texts("exclude", exclude) if isinstance(exclude, str) else self._excluded(exclude, histories)
        if allow is not None:
            only = only.also(self._texts("allow", allow) if isinstance(allow, str) else self._allowed(allow, histories, unknown))
        return only

    def _excluded(self, exclude: Items, histories: int) -> Filter:
        common, own = read_filter(exclude, "exclude", histories)
        if common is not None:
            return Filter(items=~self._mask(common))
        return Filter(excluded=[self.known(each or []) for each in own])

    def _allowed(self, allow: Items, histories: int, unknown: Unknown) -> Filter:
        common, own = read_filter(allow, "allow", histories)
        self._indices([each or [] for each in own] if common is None else [common], unknown, "allow")
        if common is not None:
            return Filter(items=self._mask(common))
        return Filter(allowed=[None if each is None else self.known(each) for each in own])

    def _texts(self, name: str, text: str) -> Filter:
        """The filter of a table of items or of an expression, which is read once."""
        if (name, text) not in self._rules:
            if self.read_rules is None:
                raise ValueError(f"{name} is {text!r}; a recommender without a run takes lists of item_id alone")
            rules = self.read_rules(name, text)
            if rules.by_user:
                raise ValueError(f"{name} is {text!r}, a table of users and items; give a list of item_id for each history instead")
            self._rules[name, text] = rules.items
        return Filter(items=self._rules[name, text])

    def _mask(self, items: Iterable[str]) -> np.ndarray:
        mask = np.zeros(len(self.ids), bool)
        mask[self.known(items)] = True
        return mask

    def known(self, items: Iterable[str]) -> np.ndarray:
        """item_index of those items that are in the catalog, in their order."""
        return np.array([self.index[item] for item in items if item in self.index], dtype=np.int64)

    def _indices(self, lists: Sequence[Sequence[str]], unknown: Unknown, where: str) -> list[np.ndarray]:
        """item_index of the items of each list; those that are not known are skipped with a warning, or refused."""
        missing = [item for items in lists for item in items if item not in self.index]
        if missing:
            such = f"{len(missing)} of {sum(map(len, lists))} items of {where} are not in the catalog, such as {missing[0]!r}"
            if unknown == "error":
                raise ValueError(f'{such}; give items of the run, or unknown="ignore"')
            warnings.warn(f"{such}; they are skipped", stacklevel=3)
        return [self.known(items) for items in lists]

    @cached_property
    def _unit_vectors(self) -> Tensor:
        """[N, D] vectors of the items, of length 1."""
        return F.normalize(self.ranker.item_vectors()[0], dim=-1)

    def _with_vectors(self, wanted: str) -> Ranker:
        if not isinstance(self.ranker, Ranker):
            raise ValueError(
                f"{wanted} needs a run with sequencer.kind=masked: a generative model writes codes and has no vector of a user"
            )
        return self.ranker


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
