"""Ranks the catalog for a batch of histories: sequence model, item-item features, blend, reranker. No files, no config.

The path of a history: the sequence model gives a query, the item-item model gives score features; the blend adds both up, block by
block of the catalog; the reranker reorders the best.

Shapes: B histories, N catalog, n items of a block of it, C candidates, D width of a query, P numbers that describe a history,
F score features.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qbert_ray.ranking.blend import Blend, BlendedScores, blended_at, describe
from qbert_ray.ranking.blocks import add, by_block, catalog_blocks
from qbert_ray.ranking.filters import EVERYTHING, Filter, HiddenItems, own_lists
from qbert_ray.ranking.item_item import ItemItem
from qbert_ray.ranking.prefix_search import PER_HISTORY, PrefixIndex, laid_out, linked
from qbert_ray.ranking.reranker import CandidateLists, Reranker, candidate_inputs, inputs_of, reorder
from qbert_ray.ranking.score_features import ScoreFeatures
from qbert_ray.sequence.item_table import ItemTable, nearest_trained_items
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.top_k import better, pairs, top_k

MOST_HISTORIES, MOST_SCORES = 256, 2**26  # of a batch
LISTED, MOST_GATHERED = 16, 2**25  # lists of at most a 16th of the catalog are scored alone, while so many numbers hold their vectors


class HistoryBatch(NamedTuple):
    """What is known of a batch of histories before an item is scored."""

    histories: list[np.ndarray]
    queries: Tensor  # [B, D]
    features: ScoreFeatures | None = None
    last_item: ScoreFeatures | None = None  # of the last items alone
    description: Tensor | None = None  # [B, P]


class Ranker:
    """Scores and best items of one catalog for any histories.

    Args:
        model: the fine-tuned sequence model; it computes where the item table lies.
        items: the catalog as the model reads it.
        trained: number of items with training interactions, the first of the catalog; the others are cold.
        item_item: the item-item model; None: the sequence model ranks alone.
        candidates: C, how many of the best items the reranker reorders.
        cold_item_bonus: added to the blended scores of cold items.
    """

    def __init__(
        self,
        model: Sequencer,
        items: ItemTable,
        trained: int,
        item_item: ItemItem | None = None,
        candidates: int = 64,
        cold_item_bonus: float = 0.0,
    ) -> None:
        self.model, self.items, self.trained, self.item_item = model, items, trained, item_item
        self.num_features = len(item_item.names) if item_item is not None else 1  # F
        self.candidates, self.cold_item_bonus = candidates, cold_item_bonus
        self.device, self.num_items = items.codes.device, len(items.codes)
        with torch.inference_mode():
            self.vectors, self.bias = model.catalog_vectors(items)
        self.blend: Blend | None = None
        self.reranker: Reranker | None = None
        self.item_item_text: Blend | None = None
        self.index: PrefixIndex | None = None  # of prefixes that `best` searches; None: it ranks the whole catalog
        self.available: np.ndarray | None = None  # [N] booleans, items that `best` may give; None: all

    def use(self, blend: Blend, reranker: Reranker | None = None, item_item_text: Blend | None = None) -> None:
        """Rank by a blend from now on, and by a reranker where there is one.

        Args:
            blend: of all score features.
            reranker: of the best items by the blend.
            item_item_text: the blend of a baseline, which reads no network's scores.
        """
        self.blend = Blend(*(tensor.to(self.device) for tensor in blend))
        self.reranker = reranker.to(self.device) if reranker is not None else None
        self.item_item_text = Blend(*(tensor.to(self.device) for tensor in item_item_text)) if item_item_text is not None else None

    def repeats(self, name: str = "model") -> float:
        """What a ranking of `scores` adds to items of the history where it lists them too: a blend has a weight for them."""
        alone = "model" if self.blend is None else "sequencer"
        return float(self.model.repeats) if name == alone and self.model.repeats is not None else 0.0

    def best(self, histories: list[np.ndarray], k: int, remove_seen: bool = True, only: Filter = EVERYTHING) -> tuple[Tensor, Tensor]:
        """The k best items of each history, best first.

        The catalog is scored block by block, so that memory does not grow with it.

        Args:
            histories: item_index in time order, the latest last.
            k: how many.
            remove_seen: leave out the items of the history.
            only: the items that each history may get; the reranker reorders none but these.

        Returns:
            Scores and item_index [B, min(k, N)], as `top_k.top_k` gives them; on the CPU.
        """
        only = only.within(self.available)
        most = min(self.num_items // LISTED, MOST_GATHERED // (max(len(histories), 1) * self.vectors.shape[1]))
        lists = own_lists(only, [history if remove_seen else history[:0] for history in histories], most)
        if lists is not None:
            return self._best_of(histories, k, *(torch.from_numpy(each) for each in lists))
        if self.index is not None and only.excluded is None and only.allowed is None:
            return self._best_of_prefixes(histories, k, remove_seen, only)
        return self._exact(histories, k, remove_seen, only)

    def _exact(self, histories: list[np.ndarray], k: int, remove_seen: bool, only: Filter) -> tuple[Tensor, Tensor]:
        batch = self._read(histories, last_item=self.reranker is not None)
        values, items = self._top(batch, k if self.reranker is None else max(k, self.candidates), remove_seen, only)
        if self.reranker is not None:
            first = self.candidates
            values = torch.cat([self._reordered(batch, values[:, :first], items[:, :first]), values[:, first:]], dim=1)
            by_item = items.argsort(dim=1)
            order = by_item.gather(1, values.gather(1, by_item).argsort(dim=1, descending=True, stable=True))[:, :k]
            values, items = values.gather(1, order), items.gather(1, order)
        return values.cpu(), items.cpu()

    def _best_of(self, histories: list[np.ndarray], k: int, items: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """As `best`, of a short list of items [B, C] of each history, which alone are scored."""
        return self._ranked(self.candidate_scores(histories, items, padding), items.numpy(), k)

    def candidate_scores(self, histories: list[np.ndarray], items: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Scores of some items of each history, as `best` gives them where these are the only items; on the CPU.

        Args:
            histories: item_index in time order, the latest last.
            items: [B, C] item_index, distinct in a row where they are not hidden.
            hidden: [B, C] booleans, places that get minus infinity; None: none.

        Returns:
            [B, C]. No other item is scored, so that time does not grow with the catalog.
        """
        return self._candidate_scores(self._read(histories, last_item=self.reranker is not None), items, hidden)

    def _candidate_scores(self, batch: HistoryBatch, items: Tensor, hidden: Tensor | None) -> Tensor:
        items = items.to(self.device)
        values = self.model.scores(batch.queries, self.vectors[items], self.bias[items]).float()
        if repeats := self.repeats():
            seen = np.stack([np.isin(row, history) for row, history in zip(items.cpu().numpy(), batch.histories, strict=True)])
            values += repeats * torch.from_numpy(seen).to(self.device)
        if self.blend is not None and batch.features is not None and batch.description is not None:
            each = torch.cat([values[..., None], batch.features.at(items).to(self.device)], dim=2)  # [B, C, F]
            values = blended_at(each, self.blend.weights_for(batch.description), items >= self.trained, self.cold_item_bonus)
        if hidden is not None:
            values = values.masked_fill(hidden.to(self.device), -torch.inf)
        if self.reranker is not None:
            by_item = items.argsort(dim=1)
            order = by_item.gather(1, values.gather(1, by_item).argsort(dim=1, descending=True, stable=True))[:, : self.candidates]
            values = values.scatter(1, order, self._reordered(batch, values.gather(1, order), items.gather(1, order)))
        return values.cpu()

    def search_prefixes(self, codes: Tensor, prefixes: int) -> None:
        """Let `best` rank only items of so many prefixes of semantic IDs for each history, and items with item-item weights to it.

        A filter by user, of excluded or allowed items, is still answered by the whole catalog, as is a history with fewer than k candidates.

        Args:
            codes: [N, K] of the semantic IDs.
            prefixes: searched for each history.
        """
        self.index = PrefixIndex(codes, self.vectors, self.bias, prefixes)

    def _best_of_prefixes(self, histories: list[np.ndarray], k: int, remove_seen: bool, only: Filter) -> tuple[Tensor, Tensor]:
        """As `best`, of candidates; histories with fewer than k of them are ranked exactly."""
        assert self.index is not None
        batch = self._read(histories, last_item=self.reranker is not None)
        found = [self.index.best(self.model.scaled(batch.queries), max(PER_HISTORY, k))]
        if batch.features is not None:
            found.append(linked(batch.features.weights))
        rows, items = (np.concatenate(each) for each in zip(*found, strict=True))
        table, hidden = laid_out(rows, items, len(histories), self.num_items)
        if remove_seen:
            hidden |= np.stack([np.isin(row, history) for row, history in zip(table, histories, strict=True)])
        if only.items is not None:
            hidden |= ~only.items[table]
        values, best = self._ranked(self._candidate_scores(batch, torch.from_numpy(table), torch.from_numpy(hidden)), table, k)
        few = np.flatnonzero((~hidden).sum(1) < min(k, self.num_items))
        if len(few):
            values[few], best[few] = self._exact([histories[row] for row in few], k, remove_seen, only)
        return values, best

    def _ranked(self, scores: Tensor, items: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
        """The k best of items [B, C], whose scores are given, in the form of `best`."""
        width, length = min(k, self.num_items), min(k, items.shape[1])
        values, best = torch.full((len(items), width), -torch.inf), torch.full((len(items), width), -1)
        if length:
            found, places = top_k(scores, length)
            values[:, :length] = found
            best[:, :length] = torch.where(places >= 0, torch.from_numpy(items).gather(1, places.clamp_min(0)), -1)
        return values, best

    def item_vectors(self) -> tuple[Tensor, Tensor]:
        """[N, D] vectors and [N] biases of the catalog; their product with `user_vectors` is the sequence model's scores. On the CPU."""
        with torch.inference_mode():
            vectors, bias = self.model.catalog_vectors(self.items)
        return vectors.cpu(), bias.cpu()

    def user_vectors(self, histories: list[np.ndarray]) -> Tensor:
        """[B, D] vectors of histories, on the CPU."""
        return self.model.scaled(next_item_queries(self.model, histories, self.items)).cpu()

    def scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        """[B, N] scores of the whole catalog, on the CPU; without what `repeats` gives.

        Returns:
            "model"; with a blend also the "sequencer", the "ridge" regression and the "transitions" by themselves, and
            "item_item_text", their blend with cosines of texts without the sequence model, where there are texts.
        """
        batch = self._read(histories, last_item=self.reranker is not None)
        sequence = self._sequence(batch.queries)
        if batch.features is None or self.blend is None:
            return {"model": sequence.cpu()}
        model = torch.cat([scores for _, scores in self._blocks(batch, sequence=sequence)], dim=1)
        if self.reranker is not None:
            values, items = top_k(model, self.candidates)
            model.scatter_(1, items, self._reordered(batch, values, items))
        ridge, transitions = (torch.from_numpy(each.toarray()) for each in batch.features.sums)
        found = {"model": model.cpu(), "sequencer": sequence.cpu(), "ridge": ridge, "transitions": transitions}
        if self.item_item_text is not None:
            pieces = self._blocks(batch, sequence=torch.zeros_like(sequence), blend=self.item_item_text)
            found["item_item_text"] = torch.cat([scores for _, scores in pieces], dim=1).cpu()
        return found

    def cold_scores(self, histories: list[np.ndarray]) -> Tensor | None:
        """None: `scores` has those of all items."""
        return None

    # what the blend and the reranker are fitted on

    def score_features(self, histories: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N] scores of the sequence model, [F - 1, B, N] all other score features, [B] lengths; on the CPU."""
        batch = self._read(histories)
        assert batch.features is not None, "without an item-item model there are no features"
        return self._sequence(batch.queries).cpu(), batch.features.dense(), batch.features.lengths

    def candidate_lists(self, histories: list[np.ndarray], target: Tensor) -> CandidateLists:
        """The best candidates of each history and what the reranker reads of them, on the CPU; target is [B] item_index."""
        assert self.item_item is not None
        batch = self._read(histories, last_item=True)
        values, items = self._top(batch, self.candidates)
        inputs = self._inputs(batch, values, items)
        seen = inputs[..., inputs_of(self.item_item.names).index("seen")] > 0
        assert batch.description is not None
        found = (values, inputs, batch.description, items == target[:, None].to(items.device), seen, items < self.trained)
        return CandidateLists(*(tensor.cpu() for tensor in found))

    def with_simulated_cold_items(self, rows: Tensor) -> Ranker:
        """A copy without a blend that treats some trained items [C] as cold, and none of those that are."""
        assert self.item_item is not None
        other = copy(self)
        others = torch.ones(self.trained, dtype=torch.bool)
        others[rows] = False
        cold = nearest_trained_items(self.item_item.contents["content"].cpu(), rows, others.nonzero()[:, 0])
        other.blend = other.reranker = None
        other.item_item = self.item_item.with_cold_items(cold)
        with torch.inference_mode():
            other.vectors, other.bias = self.model.average_neighbours(self.vectors, self.bias, cold.to(self.device))
        return other

    # the path of a history

    def _read(self, histories: list[np.ndarray], last_item: bool = False) -> HistoryBatch:
        """Queries of the sequence model and score features of the item-item model, both computed once per batch.

        Args:
            histories: item_index in time order, the latest last.
            last_item: for a reranker: with the features of the last item alone, and all score features.
        """
        queries = next_item_queries(self.model, histories, self.items)
        if self.item_item is None:
            return HistoryBatch(histories, queries)
        blends = [blend for blend in (self.blend, self.item_item_text) if blend is not None]
        every = self.blend is None or last_item  # what a reranker reads must not depend on which blends are loaded next to it
        used = None if every else [name for blend in blends for name in blend.used(self.item_item.names)]
        if last_item:
            features, last = self.item_item.features_and_last(histories, used)
        else:
            features, last = self.item_item.features(histories, used), None
        description = describe(features.strongest.to(self.device), features.lengths.to(self.device))
        return HistoryBatch(histories, queries, features, last, description)

    def _sequence(self, queries: Tensor) -> Tensor:
        """[B, N] scores of the sequence model."""
        blocks = catalog_blocks(self.num_items, self.trained)
        return torch.cat([self._sequence_block(queries, block) for block in blocks], dim=1)

    def _sequence_block(self, queries: Tensor, block: slice, penalty: Tensor | None = None) -> Tensor:
        bias = self.bias[block] if penalty is None else self.bias[block] + penalty[block]
        return self.model.scores(queries, self.vectors[block], bias).float()

    def _blocks(
        self,
        batch: HistoryBatch,
        hide_seen: bool = False,
        sequence: Tensor | None = None,
        blend: Blend | None = None,
        only: Filter = EVERYTHING,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Scores [B, n] of each block of the catalog, blended where there is a blend.

        Args:
            batch: of `_read`.
            hide_seen: seen items get minus infinity.
            sequence: [B, N] scores of the sequence model, where they are there already.
            blend: another than the ranker's own.
            only: other items get minus infinity.
        """
        blend = self.blend if blend is None else blend
        blocks = catalog_blocks(self.num_items, self.trained)
        hidden = HiddenItems(only, blocks, len(batch.histories), self.device)
        if blend is not None and batch.features is not None and batch.description is not None:
            weights = blend.weights_for(batch.description)
            weights[:, -1] += self.cold_item_bonus
            blended = BlendedScores(batch.features, weights, blocks, self.trained, hide_seen, hidden.penalty)
            for block in blocks:
                scores = self._sequence_block(batch.queries, block) if sequence is None else sequence[:, block].clone()
                yield block, hidden.of(blended.of(scores, block), block)
            return
        seen = {}
        repeats = -np.inf if hide_seen else self.repeats()
        if repeats:
            rows, items = pairs(batch.histories, self.num_items)
            added = np.full(len(rows), repeats, np.float32)
            seen = by_block(blocks, rows, items, added, self.device)
        for block in blocks:
            scores = self._sequence_block(batch.queries, block, hidden.penalty)
            yield block, hidden.of(add(scores, seen[block.start]) if seen else scores, block)

    def _top(self, batch: HistoryBatch, k: int, hide_seen: bool = False, only: Filter = EVERYTHING) -> tuple[Tensor, Tensor]:
        """Scores and item_index [B, min(k, N)] of the best items, best first."""
        best = None
        for block, scores in self._blocks(batch, hide_seen, only=only):
            best = better(best, scores, block.start, k)
        assert best is not None, "a catalog without items"
        return best

    def _reordered(self, batch: HistoryBatch, values: Tensor, items: Tensor) -> Tensor:
        """[B, C] scores of the best items in the order of the reranker."""
        assert self.reranker is not None
        corrections = self.reranker(self._inputs(batch, values, items), batch.description)
        return reorder(values, values + corrections, items < self.trained)

    def _inputs(self, batch: HistoryBatch, values: Tensor, items: Tensor) -> Tensor:
        """[B, C, R] what the reranker reads of candidates [B, C]."""
        assert self.item_item is not None and batch.features is not None and batch.last_item is not None
        items = items.clamp_min(0)  # places without an item have no score either
        sequence = self.model.scores(batch.queries, self.vectors[items], self.bias[items]).float()
        return candidate_inputs(values, sequence, batch.features, batch.last_item, self.item_item.popularity.to(self.device), items)


def batches(users: int, scores: int = 0) -> Iterator[slice]:
    """Slices of users; where so many `scores` of each are held at once, they stay of bounded size."""
    size = max(1, min(MOST_HISTORIES, MOST_SCORES // max(scores, 1)))
    for begin in range(0, users, size):
        yield slice(begin, min(begin + size, users))
