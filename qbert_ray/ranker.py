"""Scores of the whole catalog for a batch of histories, as evaluation and scoring rank by: the sequencer and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

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
from qbert_ray.sequencer import Sequencer, next_item_queries

WEIGHTS, MIX = "memory/weights", "memory/mix"
MOST_HISTORIES, MOST_SCORES = 256, 2**26  # of a batch


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
        self.model = _load_sequencer(run, domain, content, self.borrowed).to(self.device)
        self.catalog = torch.from_numpy(catalog_codes(run, domain)).to(self.device)
        with torch.inference_mode():
            self.vectors, self.bias = self.model.catalog_vectors(self.catalog, domain)
        self.memory: memory.Memory | None = None
        self.mix: memory.Mix | None = None
        if settings.enabled:
            self.memory = _load_memory(run, domain, settings, self.model.max_items, len(self.catalog), content)
        self.bonus = settings.new_item_bonus
        if settings.enabled and mixed:
            self.use(_load_mix(run, domain))

    def use(self, mix: memory.Mix) -> None:
        self.mix = memory.Mix(*(tensor.to(self.device) for tensor in mix))

    def signals(self, histories: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N] scores of the sequencer, [F - 1, B, N] signals of the memory, [B] lengths; on the device."""
        assert self.memory is not None
        lengths = torch.tensor([len(history) for history in histories], device=self.device)
        signals = self.memory.signals(histories, self.mix.wanted() if self.mix else memory.SIGNALS)
        if self.borrowed is not None:  # no weights know a new item: it stands where its nearest trained items do
            rows, items, weights = self.borrowed
            signals[:2, :, rows] = torch.einsum("fbcn,cn->fbc", signals[:2, :, items], weights)
        return self._sequencer(histories), signals.to(self.device), lengths

    def scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        """[B, N] of the "model"; with a memory also of the "sequencer" and the "ridge" regression by themselves; on the CPU."""
        if self.memory is None:
            return {"model": self._sequencer(histories).cpu()}
        assert self.mix is not None
        scores, *rest = self.signals(histories)
        ridge = torch.from_numpy(self.memory.ridge_scores(histories))
        return {"model": self._mixed(scores, *rest).cpu(), "sequencer": scores.cpu(), "ridge": ridge}

    def model_scores(self, histories: list[np.ndarray]) -> Tensor:
        """[B, N] of the model alone, on the device."""
        return self._sequencer(histories) if self.mix is None else self._mixed(*self.signals(histories))

    def pretending(self, rows: Tensor) -> Ranker:
        """This ranker without a mix, as it would be had training not seen some of the items [C] that it has seen."""
        assert self.memory is not None
        other = copy(self)
        others = torch.ones(self.trained, dtype=torch.bool)
        others[rows] = False
        other.borrowed, other.mix = _borrowed(self.memory.contents["content"], rows, others.nonzero()[:, 0]), None
        with torch.inference_mode():
            borrowed = (each.to(self.device) for each in other.borrowed)
            other.vectors, other.bias = self.model.borrow(self.vectors, self.bias, *borrowed)
        return other

    def _mixed(self, sequencer: Tensor, signals: Tensor, lengths: Tensor) -> Tensor:
        assert self.mix is not None
        scores = self.mix.scores(sequencer, signals, lengths, self.trained)
        scores[:, self.trained :] += self.bonus
        return scores

    def _sequencer(self, histories: list[np.ndarray]) -> Tensor:
        queries = next_item_queries(self.model, histories, self.catalog, self.domain)
        return self.model.scores(queries, self.vectors, self.bias).float()


def batches(users: int, num_items: int) -> Iterator[slice]:
    """Slices of users, so that a users x items matrix stays of bounded size."""
    size = max(1, min(MOST_HISTORIES, MOST_SCORES // max(num_items, 1)))
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


def _load_memory(run: RunDir, domain: str, settings: Memory, latest: int, num_items: int, content: Tensor | None) -> memory.Memory:
    """The item-item weights of memory/weights, none for items that came later; and what content there is."""
    table = run.read(WEIGHTS, domain)
    matrices = [_matrix(table[f"{name}_items"], table[f"{name}_weights"], num_items) for name in ("ridge", "following")]
    contents = {name: modality_vectors(run, domain, name) for name in ("text", "image")}
    contents["content"] = None if content is None else F.normalize(content, dim=-1)
    there = {name: vectors for name, vectors in contents.items() if vectors is not None}
    return memory.Memory(*matrices, (settings.decay, settings.following_decay), settings.scale, latest, there)


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
