"""Ranks a catalog by the generative sequence model: the best items by beam search, or the exact score of every item.

Shapes: B histories, N catalog, K levels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qbert_ray.config.schema import Ranking
from qbert_ray.ranking.filters import EVERYTHING, Filter
from qbert_ray.ranking.loader import load_ranker, model_folder
from qbert_ray.sequence.beam_search import Trie, encode, search
from qbert_ray.sequence.decoder import Generator
from qbert_ray.storage.catalog import available_items, catalog_codes, run_config, warm_items
from qbert_ray.storage.directory import RunDir
from qbert_ray.top_k import top_k

EXACT_AT_ONCE = 8  # histories; each is scored against all items


class CatalogRanker(Protocol):
    """Protocol of a ranker of a catalog, which evaluation, scoring and the recommender use."""

    trained: int  # number of items with training interactions
    num_features: int  # numbers that an item's score is made of
    available: np.ndarray | None  # [N] booleans, items that `best` may give; None: all

    def repeats(self, name: str = "model") -> float:
        """What the ranking of that name adds to the scores of items of the history where it lists them too."""
        ...

    def best(self, histories: list[np.ndarray], k: int, remove_seen: bool = True, only: Filter = EVERYTHING) -> tuple[Tensor, Tensor]:
        """Scores and item_index [B, min(k, N)] of the best items that a filter lets pass, best first."""
        ...

    def candidate_scores(self, histories: list[np.ndarray], items: Tensor) -> Tensor:
        """[B, C] scores of items [B, C], as `best` gives them where these are the only items."""
        ...

    def item_vectors(self) -> tuple[Tensor, Tensor]:
        """[N, D] vectors and [N] biases of the catalog."""
        ...

    def scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        """[B, N] scores of the catalog by the "model", and by parts of it; minus infinity for items that it does not reach."""
        ...

    def cold_scores(self, histories: list[np.ndarray]) -> Tensor | None:
        """[B, N - trained] scores of cold items among themselves, where `scores` does not reach all of them; None: it does."""
        ...


class GenerativeRanker:
    """Best items and scores of one catalog for any histories, as a `Ranker` gives them.

    Args:
        model: the fine-tuned generative model.
        codes: [N, K] of the catalog.
        trained: number of items with training interactions, the first of the catalog; the others are cold.
        beam: most IDs that are kept at every level.
    """

    def __init__(self, model: Generator, codes: np.ndarray, trained: int, beam: int) -> None:
        self.model, self.codes, self.trained, self.beam = model, codes, trained, beam
        self.num_items, self.num_features = len(codes), 1
        self.device = model.table.weight.device
        rows = torch.from_numpy(codes).to(self.device)
        self.trie = Trie.build(rows)
        self.available: np.ndarray | None = None  # [N] booleans, items that `best` may give; None: all
        self._filtered: tuple[bytes, Trie] | None = None  # the last filter of items, and the IDs of those that it lets pass
        self.cold = Trie.build(rows, torch.arange(len(codes), device=self.device) >= trained) if trained < len(codes) else None

    def repeats(self, name: str = "model") -> float:
        """Nothing: see `CatalogRanker`."""
        return 0.0

    def best(self, histories: list[np.ndarray], k: int, remove_seen: bool = True, only: Filter = EVERYTHING) -> tuple[Tensor, Tensor]:
        """The k best items of each history, best first, by at least k beams.

        Args:
            histories: item_index in time order, the latest last.
            remove_seen: leave out the items of the history.
            only: the items that each history may get: no others are written, and beams are kept for these alone. A history with a list of
                its own gets the best of that list by exact log-probabilities, without a search.

        Returns:
            Log-probabilities and item_index [B, min(k, N)]; minus infinity and -1 where there are fewer items. On the CPU.
        """
        only = only.within(self.available)
        scores = torch.full((len(histories), min(k, self.num_items)), -torch.inf)
        items = torch.full(scores.shape, -1)
        hidden = [history if remove_seen else history[:0] for history in histories]
        if only.excluded is not None:
            hidden = [np.concatenate(both) for both in zip(hidden, only.excluded, strict=True)]
        lists = [None] * len(histories) if only.allowed is None else only.allowed
        searched = [number for number, own in enumerate(lists) if own is None]
        if searched and (only.items is None or only.items.any()):
            seen = [hidden[row] for row in searched]
            found = search(
                self.model, self.codes, self._trie(only.items), [histories[row] for row in searched], max(self.beam, scores.shape[1]),
                seen if any(map(len, seen)) else None,
            )  # fmt: skip
            width = min(found.scores.shape[1], scores.shape[1])
            scores[searched, :width], items[searched, :width] = found.scores[:, :width].cpu(), found.items[:, :width].cpu()
        for row, own in enumerate(lists):
            if own is not None:
                left = np.setdiff1d(own, hidden[row])
                left = left if only.items is None else left[only.items[left]]
                values, best = self._best_of(histories[row], left, k)
                scores[row, : len(values)], items[row, : len(values)] = values, best
        return scores, items

    def _best_of(self, history: np.ndarray, items: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and item_index [min(k, n)] of the best of some items [n]."""
        if not len(items):
            return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        candidates = torch.from_numpy(items)
        values, places = top_k(self.candidate_scores([history], candidates[None]), k)
        return values[0], candidates[places[0]]

    def candidate_scores(self, histories: list[np.ndarray], items: Tensor) -> Tensor:
        """[B, C] exact log-probabilities of items [B, C], without a search; on the CPU."""
        codes = torch.from_numpy(self.codes).to(self.device)
        pieces = [
            self.model.score_all(encode(self.model, [history], self.codes), codes[own.to(self.device)])
            for history, own in zip(histories, items, strict=True)
        ]
        return torch.cat(pieces).cpu()

    def item_vectors(self) -> tuple[Tensor, Tensor]:
        """[N, K * D] embeddings of each item's codes, end to end, and biases of zero, on the CPU."""
        rows = (
            torch.from_numpy(self.codes).to(self.device) + torch.arange(self.codes.shape[1], device=self.device) * self.model.codebook_size
        )
        return self.model.table(rows).flatten(1).detach().cpu(), torch.zeros(self.num_items)

    def _trie(self, items: np.ndarray | None) -> Trie:
        """IDs of the items [N] that a filter lets pass."""
        if items is None:
            return self.trie
        key = np.packbits(items).tobytes()
        found = self._filtered  # read once: another thread may put its own filter there at any moment
        if found is None or found[0] != key:
            found = key, Trie.build(torch.from_numpy(self.codes).to(self.device), torch.from_numpy(items).to(self.device))
            self._filtered = found
        return found[1]

    def scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        """[B, N] log-probabilities of the "model", on the CPU: of the beams' items; minus infinity for all others."""
        return {"model": self._found(self.trie, histories)}

    def cold_scores(self, histories: list[np.ndarray]) -> Tensor | None:
        """[B, N - trained] the same of a search for cold items alone: in one of the catalog others take their places.

        They cannot be compared with items of the other search, which leaves out items that are better than these.
        """
        return None if self.cold is None else self._found(self.cold, histories)[:, self.trained :]

    def _found(self, trie: Trie, histories: list[np.ndarray]) -> Tensor:
        """[B, N] log-probabilities of the items that a search finds; minus infinity for all others. On the CPU."""
        found = search(self.model, self.codes, trie, histories, self.beam)
        result = torch.full((len(histories), self.num_items), -torch.inf)
        there = (found.items >= 0).cpu()
        row = torch.arange(len(histories))[:, None].expand_as(there)
        result[row[there], found.items.cpu()[there]] = found.scores.cpu()[there]
        return result

    def exact_scores(self, histories: list[np.ndarray]) -> Tensor:
        """[B, N] log-probability of every item, without a search; on the CPU. Costs grow with the catalog."""
        codes, found = torch.from_numpy(self.codes).to(self.device), []
        for begin in range(0, len(histories), EXACT_AT_ONCE):
            memory = encode(self.model, histories[begin : begin + EXACT_AT_ONCE], self.codes)
            found.append(self.model.score_all(memory, codes).cpu())
        return torch.cat(found)


def load_generative_ranker(run: RunDir, domain: str, beam: int, device: str = "cpu", refit: bool = False) -> GenerativeRanker:
    """The fine-tuned generative model of a domain with its catalog; with `refit`, the one that the stage of that name trained.

    Raises:
        ArtifactError: the model or the IDs are not there.
    """
    model = run.load_module(Generator, model_folder(domain, refit)).to(device)
    codes = catalog_codes(run, domain)[:, : model.num_levels]
    return GenerativeRanker(model, codes, warm_items(run, domain), beam)


def load_catalog_ranker(
    run: RunDir, domain: str, settings: Ranking, device: str = "cpu", baselines: bool = False, refit: bool = False
) -> CatalogRanker:
    """The ranker of a domain for the kind of sequence model that the run was made with.

    Args:
        settings: the config's section `ranking`; beams rank without it.
        baselines: as in `load_ranker`.
        refit: as in `load_ranker`.

    Raises:
        ArtifactError: a model or table is not there.
    """
    sequencer = run_config(run).sequencer
    ranker = (
        load_generative_ranker(run, domain, sequencer.beam, device, refit)
        if sequencer.kind == "generative"
        else load_ranker(run, domain, settings, device, baselines=baselines, refit=refit)
    )
    ranker.available = available_items(run, domain)
    return ranker
