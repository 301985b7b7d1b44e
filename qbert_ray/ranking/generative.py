"""Ranks a catalog by the generative sequence model: the best items by beam search, or the exact score of every item.

Shapes: B histories, N catalog, K levels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qbert_ray.config.schema import Ranking
from qbert_ray.ranking.loader import load_ranker
from qbert_ray.sequence.beam_search import Trie, encode, search
from qbert_ray.sequence.decoder import Generator
from qbert_ray.storage.catalog import catalog_codes, run_config, warm_items
from qbert_ray.storage.directory import RunDir

EXACT_AT_ONCE = 8  # histories; each is scored against all items


class CatalogRanker(Protocol):
    """Protocol of a ranker of a catalog, which evaluation, scoring and the recommender use."""

    trained: int  # number of items with training interactions

    def best(self, histories: list[np.ndarray], k: int, remove_seen: bool = True) -> tuple[Tensor, Tensor]:
        """Scores and item_index [B, min(k, N)] of the best items, best first."""
        ...

    def scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        """[B, N] scores of the catalog by the "model", and by parts of it; minus infinity for items that it does not reach."""
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
        self.num_items = len(codes)
        self.device = model.table.weight.device
        rows = torch.from_numpy(codes).to(self.device)
        self.trie = Trie.build(rows)
        self.cold = Trie.build(rows, torch.arange(len(codes), device=self.device) >= trained) if trained < len(codes) else None

    def best(self, histories: list[np.ndarray], k: int, remove_seen: bool = True) -> tuple[Tensor, Tensor]:
        """The k best items of each history, best first, by at least k beams.

        Args:
            histories: item_index in time order, the latest last.
            remove_seen: leave out the items of the history.

        Returns:
            Log-probabilities and item_index [B, min(k, N)]; minus infinity and -1 where there are fewer items. On the CPU.
        """
        seen = histories if remove_seen else None
        found = search(self.model, self.codes, self.trie, histories, max(self.beam, k), seen)
        return found.scores[:, :k].cpu(), found.items[:, :k].cpu()

    def scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        """[B, N] log-probabilities of the "model", on the CPU: of the beams' items; minus infinity for all others.

        Cold items are searched for among themselves too, so that they can be compared with each other.
        """
        result = torch.full((len(histories), self.num_items), -torch.inf)
        for trie in [self.trie] if self.cold is None else [self.trie, self.cold]:
            found = search(self.model, self.codes, trie, histories, self.beam)
            there = (found.items >= 0).cpu()
            row = torch.arange(len(histories))[:, None].expand_as(there)
            result[row[there], found.items.cpu()[there]] = found.scores.cpu()[there]
        return {"model": result}

    def model_scores(self, histories: list[np.ndarray]) -> Tensor:
        """[B, N] of the "model" of `scores`."""
        return self.scores(histories)["model"]

    def exact_scores(self, histories: list[np.ndarray]) -> Tensor:
        """[B, N] log-probability of every item, without a search; on the CPU. Costs grow with the catalog."""
        codes, found = torch.from_numpy(self.codes).to(self.device), []
        for begin in range(0, len(histories), EXACT_AT_ONCE):
            memory = encode(self.model, histories[begin : begin + EXACT_AT_ONCE], self.codes)
            found.append(self.model.score_all(memory, codes).cpu())
        return torch.cat(found)


def load_generative_ranker(run: RunDir, domain: str, beam: int, device: str = "cpu") -> GenerativeRanker:
    """The fine-tuned generative model of a domain with its catalog.

    Raises:
        ArtifactError: the model or the IDs are not there.
    """
    model = run.load_module(Generator, f"finetune/{domain}/model").to(device)
    codes = catalog_codes(run, domain)[:, : model.num_levels]
    return GenerativeRanker(model, codes, warm_items(run, domain), beam)


def load_catalog_ranker(run: RunDir, domain: str, settings: Ranking, device: str = "cpu") -> CatalogRanker:
    """The ranker of a domain for the kind of sequence model that the run was made with.

    Args:
        settings: the config's section `ranking`; beams rank without it.

    Raises:
        ArtifactError: a model or table is not there.
    """
    sequencer = run_config(run).sequencer
    if sequencer.kind == "generative":
        return load_generative_ranker(run, domain, sequencer.beam, device)
    return load_ranker(run, domain, settings, device)
