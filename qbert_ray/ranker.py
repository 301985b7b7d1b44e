"""Scores of the whole catalog for a batch of histories, as evaluation and scoring rank by: the sequencer and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from qbert_ray import memory
from qbert_ray.artifacts import ArtifactError, RunDir
from qbert_ray.catalog import catalog_codes, content_vectors, modality_vectors, nearest, warm_items
from qbert_ray.config import Memory
from qbert_ray.ranking import better, pairs
from qbert_ray.sequencer import Sequencer, next_item_queries
from qbert_ray.signals import SIGNALS, Mixture, Said, add, by_block

WEIGHTS, MIX = "memory/weights", "memory/mix"
MOST_HISTORIES, MOST_SCORES = 256, 2**26  # of a batch
BLOCK = 8192  # items scored at once


class Ranker:
    """The fine-tuned sequencer of a domain with its collaborative memory, where that is enabled.

    Args:
        device: where the sequencer computes.
        mixed: false: without the mix, which is still to be fitted.
    """

    def __init__(self, run: RunDir, domain: str, settings: Memory, device: str = "cpu", mixed: bool = True) -> None:
        self.domain, self.device = domain, torch.device(device)
        content = content_vectors(run, domain) if run.parts("fusion/embeddings", domain) else None  # none: semantic IDs were given
        self.trained = warm_items(run, domain)
        self.borrowed: tuple[Tensor, Tensor, Tensor] | None = None  # items [C] that stand where others do: [C, n] of them, their weights
        if content is not None and self.trained < len(content):
            self.borrowed = _borrowed(content, torch.arange(self.trained, len(content)), torch.arange(self.trained))
        self.borrow = _columns(self.borrowed, len(content)) if content is not None and self.borrowed else None
        self.model = _load_sequencer(run, domain, content, self.borrowed).to(self.device)
        self.catalog = torch.from_numpy(catalog_codes(run, domain)[:, : self.model.num_levels]).to(self.device)
        with torch.inference_mode():
            self.vectors, self.bias = self.model.catalog_vectors(self.catalog, domain)
        self.memory: memory.Memory | None = None
        self.mix: memory.Mix | None = None
        self.bonus = settings.new_item_bonus
        if settings.enabled and mixed:
            self.use(_load_mix(run, domain))
        if settings.enabled:
            contents = self._contents(run, content)
            self.memory = _load_memory(run, domain, settings, self.model.max_items, len(self.catalog), contents)

    def use(self, mix: memory.Mix) -> None:
        self.mix = memory.Mix(*(tensor.to(self.device) for tensor in mix))

    def _contents(self, run: RunDir, content: Tensor | None) -> dict[str, Tensor]:
        """The kinds of content that the mix wants, or all there are before there is one."""
        wanted = self.mix.wanted() if self.mix else SIGNALS
        contents = {name: modality_vectors(run, self.domain, name) for name in ("text", "image") if name in wanted}
        if content is not None and "content" in wanted:
            contents["content"] = F.normalize(content, dim=-1)
        return {name: vectors.to(self.device) for name, vectors in contents.items() if vectors is not None}

    def signals(self, histories: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N] scores of the sequencer, [F - 1, B, N] signals of the memory, [B] lengths; on the CPU."""
        sequencer = torch.cat([scores for _, scores in self._sequencer(histories)], dim=1)
        return sequencer.cpu(), self._asked(histories).dense(), torch.tensor([len(history) for history in histories])

    def scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        """[B, N] of the "model"; with a memory also of the "sequencer" and the "ridge" regression by themselves; on the CPU."""
        if self.mix is None:
            return {"model": self.model_scores(histories).cpu()}
        said = self._asked(histories)
        mixture = self._mixture(said, histories)
        sequencer = torch.empty(len(histories), len(self.catalog))
        model = torch.empty_like(sequencer)
        for block, scores in self._sequencer(histories):
            sequencer[:, block] = scores
            model[:, block] = mixture.mixed(scores, block)
        return {"model": model, "sequencer": sequencer, "ridge": torch.from_numpy(said.regression.toarray())}

    def model_scores(self, histories: list[np.ndarray]) -> Tensor:
        """[B, N] of the model alone, on the device."""
        return torch.cat([scores for _, scores in self._model(histories)], dim=1)

    def best(self, histories: list[np.ndarray], k: int, remove_seen: bool = True) -> tuple[Tensor, Tensor]:
        """Scores and indices [B, min(k, N)] of the best items, as `ranking.top_k` gives them; on the CPU.

        The catalog is scored block by block, so that memory does not grow with it.
        """
        best = None
        for block, scores in self._model(histories, remove_seen):
            best = better(best, scores, block.start, k)
        assert best is not None, "a catalog without items"
        return best[0].cpu(), best[1].cpu()

    def pretending(self, rows: Tensor) -> Ranker:
        """This ranker without a mix, as it would be had training not seen some of the items [C] that it has seen."""
        assert self.memory is not None
        other = copy(self)
        others = torch.ones(self.trained, dtype=torch.bool)
        others[rows] = False
        other.borrowed, other.mix = _borrowed(self.memory.contents["content"].cpu(), rows, others.nonzero()[:, 0]), None
        other.borrow = _columns(other.borrowed, len(self.catalog))
        with torch.inference_mode():
            borrowed = (each.to(self.device) for each in other.borrowed)
            other.vectors, other.bias = self.model.borrow(self.vectors, self.bias, *borrowed)
        return other

    def _model(self, histories: list[np.ndarray], hidden: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Scores [B, n] of the model for each block of the catalog; with `hidden` minus infinity for what a history holds."""
        mixture = self._mixture(self._asked(histories), histories, hidden) if self.mix is not None else None
        if hidden and mixture is None:
            rows, items = pairs(histories, len(self.catalog))
            seen = by_block(self._blocks(), rows, items, np.full(len(rows), -np.inf, np.float32), self.device)
        for block, scores in self._sequencer(histories):
            if mixture is not None:
                scores = mixture.mixed(scores, block)
            elif hidden:
                scores = add(scores, seen[block.start])
            yield block, scores

    def _asked(self, histories: list[np.ndarray]) -> Said:
        """What the memory says; no weights know a new item: it stands where its nearest trained items do."""
        assert self.memory is not None
        return self.memory.asked(histories, self.mix.wanted() if self.mix else SIGNALS, self.borrow)

    def _mixture(self, said: Said, histories: list[np.ndarray], hidden: bool = False) -> Mixture:
        assert self.mix is not None
        lengths = torch.tensor([len(history) for history in histories])
        trust = self.mix.trust(memory.describe(said.strongest.to(self.device), lengths.to(self.device)))
        trust[:, -1] += self.bonus
        return Mixture(said, trust, self._blocks(), self.trained, hidden)

    def _blocks(self) -> list[slice]:
        """The catalog in pieces, none with both trained and new items."""
        edges = [*range(0, self.trained, BLOCK), *range(self.trained, len(self.catalog), BLOCK), len(self.catalog)]
        return [slice(begin, end) for begin, end in pairwise(edges)]

    def _sequencer(self, histories: list[np.ndarray]) -> Iterator[tuple[slice, Tensor]]:
        """Scores [B, n] of the sequencer for each block of the catalog."""
        queries = next_item_queries(self.model, histories, self.catalog, self.domain)
        for block in self._blocks():
            yield block, self.model.scores(queries, self.vectors[block], self.bias[block]).float()


def batches(users: int, scores: int = 0) -> Iterator[slice]:
    """Slices of users; where so many `scores` of each are held at once, they stay of bounded size."""
    size = max(1, min(MOST_HISTORIES, MOST_SCORES // max(scores, 1)))
    for begin in range(0, users, size):
        yield slice(begin, min(begin + size, users))


def _load_sequencer(run: RunDir, domain: str, content: Tensor | None, borrowed: tuple[Tensor, ...] | None) -> Sequencer:
    """The fine-tuned sequencer of a domain, ready to rank."""
    tensors, description = run.load_model(f"finetune/{domain}/model")
    model = Sequencer(**description)
    model.load_state_dict(tensors)
    if model.content is not None:
        assert content is not None, "a model that reads content was trained on embeddings"
        model.hold_content(domain, content)
        if borrowed is not None:
            model.hold_neighbours(domain, *borrowed[1:])
    return model.eval()


def _borrowed(content: Tensor, rows: Tensor, among: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows, *nearest(content, rows, among)


def _columns(borrowed: tuple[Tensor, Tensor, Tensor], num_items: int) -> sparse.csr_matrix:
    """[N, N] whose columns say of whose weights an item's are the sum: of its own, or of those it borrows."""
    rows, items, weights = (each.numpy() for each in borrowed)
    own = np.setdiff1d(np.arange(num_items), rows)
    values = np.concatenate([np.ones(len(own), np.float32), weights.ravel()])
    places = np.concatenate([own, items.ravel()]), np.concatenate([own, np.repeat(rows, items.shape[1])])
    return sparse.csr_matrix((values, places), shape=(num_items, num_items))


def _load_memory(run: RunDir, domain: str, settings: Memory, latest: int, num_items: int, contents: dict[str, Tensor]) -> memory.Memory:
    """The item-item weights of memory/weights, none for items that came later; and what content there is."""
    table = run.read(WEIGHTS, domain)
    ridge, following = (_matrix(table[f"{name}_items"], table[f"{name}_weights"], num_items) for name in ("ridge", "following"))
    return memory.Memory(ridge, following, (settings.decay, settings.following_decay), settings.scale, latest, contents)


def _load_mix(run: RunDir, domain: str) -> memory.Mix:
    mix = memory.Mix(**run.load_model(f"{MIX}/{domain}")[0])
    if mix.weights.shape[1] != 2 * len(memory.SIGNALS) + 1:
        raise ArtifactError(f"the mix in {run.uri}/{MIX}/{domain} is of an older format; fit it again: qbert-ray train-memory --redo")
    return mix


def _matrix(items: pa.ChunkedArray, weights: pa.ChunkedArray, num_items: int) -> sparse.csr_matrix:
    items, weights = items.combine_chunks(), weights.combine_chunks()
    indptr = items.offsets.to_numpy().astype(np.int64)
    matrix = sparse.csr_matrix(
        (weights.flatten().to_numpy(), items.flatten().to_numpy(), indptr - indptr[0]), shape=(len(items), num_items)
    )
    matrix.resize(num_items, num_items)
    return matrix
