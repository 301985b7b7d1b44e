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

from qbert_ray.config.schema import Ranking
from qbert_ray.ranking import item_item as memory
from qbert_ray.ranking.reranker import READ, Lists, Reranker, deal, read
from qbert_ray.ranking.score_features import SIGNALS, Mixture, Said, add, by_block
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.storage.catalog import catalog_codes, content_vectors, modality_vectors, nearest, warm_items
from qbert_ray.storage.directory import ArtifactError, RunDir
from qbert_ray.top_k import better, pairs, top_k

WEIGHTS, MIX, RERANKER = "ranking/weights", "ranking/mix", "ranking/reranker"
MOST_HISTORIES, MOST_SCORES = 256, 2**26  # of a batch
BLOCK = 8192  # items scored at once


class Ranker:
    """The fine-tuned sequencer of a domain with its collaborative memory, where that is enabled.

    Args:
        device: where the sequencer computes.
        mixed: false: without the mix, which is still to be fitted.
    """

    def __init__(self, run: RunDir, domain: str, settings: Ranking, device: str = "cpu", mixed: bool = True) -> None:
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
        self.reranker: Reranker | None = None
        self.bonus, self.candidates = settings.new_item_bonus, settings.rerank
        if settings.enabled and mixed:
            self.use(_load_mix(run, domain), _load_reranker(run, domain) if settings.rerank else None)
        if settings.enabled:
            contents = self._contents(run, content)
            self.memory = _load_memory(run, domain, settings, self.model.max_items, len(self.catalog), contents)

    def use(self, mix: memory.Mix, reranker: Reranker | None = None) -> None:
        self.mix = memory.Mix(*(tensor.to(self.device) for tensor in mix))
        self.reranker = reranker.to(self.device) if reranker is not None else None

    def _contents(self, run: RunDir, content: Tensor | None) -> dict[str, Tensor]:
        """The kinds of content that the mix wants, or all there are before there is one."""
        wanted = self.mix.wanted() if self.mix else SIGNALS
        contents = {name: modality_vectors(run, self.domain, name) for name in ("text", "image") if name in wanted}
        if content is not None and "content" in wanted:
            contents["content"] = F.normalize(content, dim=-1)
        return {name: vectors.to(self.device) for name, vectors in contents.items() if vectors is not None}

    def signals(self, histories: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N] scores of the sequencer, [F - 1, B, N] signals of the memory, [B] lengths; on the CPU."""
        sequencer = torch.cat([scores for _, scores in self._sequencer(self._queries(histories))], dim=1)
        return sequencer.cpu(), self._asked(histories).dense(), torch.tensor([len(history) for history in histories])

    def scores(self, histories: list[np.ndarray]) -> dict[str, Tensor]:
        """[B, N] of the "model"; with a memory also of the "sequencer" and the "ridge" regression by themselves; on the CPU."""
        queries = self._queries(histories)
        sequencer = torch.cat([scores for _, scores in self._sequencer(queries)], dim=1)
        if self.mix is None:
            return {"model": sequencer.cpu()}
        said = self._asked(histories)
        mixture = self._mixture(said, histories)
        model = torch.cat([mixture.mixed(sequencer[:, block].clone(), block) for block in self._blocks()], dim=1)
        if self.reranker is not None:
            values, items = top_k(model, self.candidates)
            model.scatter_(1, items, self._dealt(values, items, queries, said, histories))
        return {"model": model.cpu(), "sequencer": sequencer.cpu(), "ridge": torch.from_numpy(said.regression.toarray())}

    def model_scores(self, histories: list[np.ndarray]) -> Tensor:
        """[B, N] of the model alone; on the CPU."""
        return self.scores(histories)["model"]

    def best(self, histories: list[np.ndarray], k: int, remove_seen: bool = True) -> tuple[Tensor, Tensor]:
        """Scores and indices [B, min(k, N)] of the best items, as `ranking.top_k` gives them; on the CPU.

        The catalog is scored block by block, so that memory does not grow with it.
        """
        queries, best = self._queries(histories), None
        said = self._asked(histories) if self.mix is not None else None
        many = k if self.reranker is None else max(k, self.candidates)
        for block, scores in self._model(histories, queries, said, remove_seen):
            best = better(best, scores, block.start, many)
        assert best is not None, "a catalog without items"
        values, items = best
        if self.reranker is not None and said is not None:
            first = self.candidates
            dealt = self._dealt(values[:, :first], items[:, :first], queries, said, histories)
            values = torch.cat([dealt, values[:, first:]], dim=1)
            by_item = items.argsort(dim=1)
            order = by_item.gather(1, values.gather(1, by_item).argsort(dim=1, descending=True, stable=True))[:, :k]
            values, items = values.gather(1, order), items.gather(1, order)
        return values.cpu(), items.cpu()

    def lists(self, histories: list[np.ndarray], target: Tensor) -> Lists:
        """What a reranker is fitted on; target is [B] item_index."""
        queries, said, best = self._queries(histories), self._asked(histories), None
        for block, scores in self._model(histories, queries, said):
            best = better(best, scores, block.start, self.candidates)
        assert best is not None, "a catalog without items"
        values, items = best
        known, description = self._read(values, items, queries, said, histories)
        seen = known[..., READ.index("seen")] > 0
        found = (values, known, description, items == target[:, None].to(items.device), seen, items < self.trained)
        return Lists(*(tensor.cpu() for tensor in found))

    def pretending(self, rows: Tensor) -> Ranker:
        """This ranker without a mix, as it would be had training not seen some of the items [C] that it has seen."""
        assert self.memory is not None
        other = copy(self)
        others = torch.ones(self.trained, dtype=torch.bool)
        others[rows] = False
        other.borrowed = _borrowed(self.memory.contents["content"].cpu(), rows, others.nonzero()[:, 0])
        other.mix = other.reranker = None
        other.borrow = _columns(other.borrowed, len(self.catalog))
        with torch.inference_mode():
            borrowed = (each.to(self.device) for each in other.borrowed)
            other.vectors, other.bias = self.model.borrow(self.vectors, self.bias, *borrowed)
        return other

    def _model(
        self, histories: list[np.ndarray], queries: Tensor, said: Said | None, hidden: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Scores [B, n] for each block of the catalog, mixed where a memory said something; with `hidden` minus infinity for what a history holds."""
        mixture = self._mixture(said, histories, hidden) if said is not None else None
        if hidden and mixture is None:
            rows, items = pairs(histories, len(self.catalog))
            seen = by_block(self._blocks(), rows, items, np.full(len(rows), -np.inf, np.float32), self.device)
        for block, scores in self._sequencer(queries):
            if mixture is not None:
                scores = mixture.mixed(scores, block)
            elif hidden:
                scores = add(scores, seen[block.start])
            yield block, scores

    def _dealt(self, values: Tensor, items: Tensor, queries: Tensor, said: Said, histories: list[np.ndarray]) -> Tensor:
        """[B, C] the scores of the best items, dealt out anew in the order of the corrected ones; see `reranking.deal`."""
        assert self.reranker is not None
        corrections = self.reranker(*self._read(values, items, queries, said, histories))
        return deal(values, values + corrections, items < self.trained)

    def _read(self, values: Tensor, items: Tensor, queries: Tensor, said: Said, histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """[B, C, R] and [B, P] what a reranker reads of candidates [B, C] and of histories."""
        assert self.memory is not None
        items = items.clamp_min(0)  # places that nobody takes have no score either
        sequencer = self.model.scores(queries, self.vectors[items], self.bias[items]).float()
        last = self._asked([history[-1:] for history in histories])
        return read(values, sequencer, said, last, self.memory.popularity.to(self.device), items), self._described(said, histories)

    def _asked(self, histories: list[np.ndarray]) -> Said:
        """What the memory says; no weights know a new item: it stands where its nearest trained items do."""
        assert self.memory is not None
        return self.memory.asked(histories, self.mix.wanted() if self.mix else SIGNALS, self.borrow)

    def _mixture(self, said: Said, histories: list[np.ndarray], hidden: bool = False) -> Mixture:
        assert self.mix is not None
        trust = self.mix.trust(self._described(said, histories))
        trust[:, -1] += self.bonus
        return Mixture(said, trust, self._blocks(), self.trained, hidden)

    def _described(self, said: Said, histories: list[np.ndarray]) -> Tensor:
        lengths = torch.tensor([len(history) for history in histories])
        return memory.describe(said.strongest.to(self.device), lengths.to(self.device))

    def _queries(self, histories: list[np.ndarray]) -> Tensor:
        return next_item_queries(self.model, histories, self.catalog, self.domain)

    def _blocks(self) -> list[slice]:
        """The catalog in pieces, none with both trained and new items."""
        edges = [*range(0, self.trained, BLOCK), *range(self.trained, len(self.catalog), BLOCK), len(self.catalog)]
        return [slice(begin, end) for begin, end in pairwise(edges)]

    def _sequencer(self, queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Scores [B, n] of the sequencer for each block of the catalog."""
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


def _load_memory(run: RunDir, domain: str, settings: Ranking, latest: int, num_items: int, contents: dict[str, Tensor]) -> memory.Memory:
    """The item-item weights of ranking/weights, none for items that came later; and what content there is."""
    table = run.read(WEIGHTS, domain)
    ridge, following = (_matrix(table[f"{name}_items"], table[f"{name}_weights"], num_items) for name in ("ridge", "following"))
    popularity = torch.zeros(num_items)
    if "popularity" in table.column_names:  # runs from before have none, and no reranker that reads it
        popularity[: table.num_rows] = torch.from_numpy(table["popularity"].to_numpy())
    return memory.Memory(ridge, following, (settings.decay, settings.following_decay), settings.scale, latest, contents, popularity)


def _load_mix(run: RunDir, domain: str) -> memory.Mix:
    mix = memory.Mix(**run.load_model(f"{MIX}/{domain}")[0])
    if mix.weights.shape[1] != 2 * len(memory.SIGNALS) + 1:
        raise ArtifactError(f"the mix in {run.uri}/{MIX}/{domain} is of an older format; fit it again: qbert-ray ranking --redo")
    return mix


def _load_reranker(run: RunDir, domain: str) -> Reranker | None:
    """None where corrections did not help."""
    folder = f"{RERANKER}/{domain}"
    if not run.exists(f"{folder}/model.json"):
        return None
    tensors, description = run.load_model(folder)
    model = Reranker(**description)
    model.load_state_dict(tensors)
    return model.eval()


def _matrix(items: pa.ChunkedArray, weights: pa.ChunkedArray, num_items: int) -> sparse.csr_matrix:
    items, weights = items.combine_chunks(), weights.combine_chunks()
    indptr = items.offsets.to_numpy().astype(np.int64)
    matrix = sparse.csr_matrix(
        (weights.flatten().to_numpy(), items.flatten().to_numpy(), indptr - indptr[0]), shape=(len(items), num_items)
    )
    matrix.resize(num_items, num_items)
    return matrix
