"""Stage 3, §3.5-3.6: an encoder over sequences of semantic IDs, masked as in the paper or causal.

An item enters as the sum of its K code embeddings (`tokens: item`) or as K positions (`tokens: flat`). The head is tied to
the same embeddings and linear in them, so the score of an item is one dot product with its composed vector, and one matrix
product ranks the whole catalog: no beam search.

A masked model reads a sequence in both directions and predicts its masked items (§3.5). A causal model reads only what comes
before: every position predicts the next item, so that a sequence of T items gives T - 1 targets where a mask gives a few.

Notable choices: sequences of a batch are packed without padding and grouped by length, so attention is a plain batched product
over each group; positions of a masked model count from the end, so that "the last item" is one embedding, and a causal one has a
bias per distance in each head; what belongs to a catalog (codes, content vectors, cold items) is passed as an `ItemTable`, so that
one model serves several catalogs.

Shapes: S items of all packed sequences, T items of a sequence, N catalog, K levels, M codewords per level, D width,
P positions whose query is asked for: the masked ones, or all of a causal model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import Linear, product
from qbert_ray.sequence.catalog_softmax import OwnItems, SampledItems, item_cross_entropy
from qbert_ray.sequence.dropout import Dropout
from qbert_ray.sequence.item_table import ColdItems, ItemTable
from qbert_ray.sequence.packing import Packed, pack, to_device
from qbert_ray.sequence.recency import recency_weighted_mean

RECALL_START = 1.0  # initial weight of the history's mean item vector in the query, relative to the encoder's output
ITEM_START = 0.05  # standard deviation of item embeddings that start from given vectors
CONTENT_START = 0.1  # size of an item's projected content in each dimension; four codes start at about half of that


class Sequencer(nn.Module):
    """Encoder over semantic IDs with a tied, catalog-wide head.

    Args:
        num_levels: K; 0, as with `tokens: word`: an item's vector is its own embedding and its content, without codes.
        codebook_size: M.
        max_items: longest sequence that can be read.
        tokens: "item", "flat" or "word".
        loss: "catalog" or "tokens" (Eq. 11).
        token_weight: of the loss "tokens" that is added to the loss "catalog"; not with K = 0.
        logits: "dot" or "cosine".
        temperature: of cosine logits.
        item_embeddings: domain -> number of items that have an embedding of their own in addition to their codes; none by default.
        content_width: F of the content vectors whose projection is part of an item's vector; 0: codes alone.
        code_dropout: fraction of items whose codes are hidden in training, so that they have to be placed by content alone.
        repeats: hold a number for `Ranker` to add to the scores of items of the history.
        causal: each position reads only those before it and predicts the next item; needs tokens="item".
        recall: add the recency-weighted mean of the history's item vectors to the query (`recency_weighted_mean`).
    """

    repeats: Tensor | None  # a number, added to the scores of items of the history
    empty_query: Tensor | None  # [D] of a history without items, which a causal model never reads

    def __init__(
        self,
        num_levels: int,
        codebook_size: int,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        ffn_width: int = 512,
        dropout: float = 0.2,
        max_items: int = 50,
        tokens: str = "item",
        loss: str = "catalog",
        token_weight: float = 0.0,
        logits: str = "dot",
        temperature: float = 0.07,
        item_embeddings: dict[str, int] | None = None,
        content_width: int = 0,
        code_dropout: float = 0.0,
        recall: bool = False,
        repeats: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.num_levels, self.codebook_size, self.max_items = num_levels, codebook_size, max_items
        self.tokens, self.loss_kind, self.logits_kind, self.temperature = tokens, loss, logits, temperature
        self.token_weight = token_weight if num_levels else 0.0
        self.code_embedding = nn.Embedding(num_levels * codebook_size, width)
        self.code_bias = nn.Parameter(torch.zeros(num_levels * codebook_size))
        # prefixed, since a module's name must not be that of a method of ModuleDict, and a lone domain is called "items"
        self.item_embedding = nn.ModuleDict({f"in_{name}": nn.Embedding(size, width) for name, size in (item_embeddings or {}).items()})
        self.content = Linear(content_width, width, bias=False) if content_width else None
        self.code_dropout, self.causal = code_dropout, causal
        self.recall = nn.Parameter(torch.tensor([RECALL_START, 0.0])) if recall else None  # weight, and logit of the decay per step
        self.register_buffer("repeats", torch.zeros(()) if repeats else None)  # no gradient trains it: `calibrated_repeats` sets it
        self.register_buffer("empty_query", torch.zeros(width) if causal else None)  # nor this: `query_of_popularity` does
        if not causal:
            self.mask_embedding = nn.Parameter(torch.randn(width) * 0.02)
            self.position_embedding = nn.Embedding(max_items * (num_levels if tokens == "flat" else 1), width)
            nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.dropout = Dropout(dropout)
        distances = max_items if causal else 0
        self.layers = nn.ModuleList(EncoderLayer(width, num_heads, ffn_width, dropout, distances) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        for parameter in [self.code_embedding.weight, *self.item_embedding.parameters()]:
            if parameter.numel():
                nn.init.normal_(parameter, std=0.02)
        if self.content is not None:
            nn.init.normal_(self.content.weight, std=CONTENT_START / content_width**0.5)

    def forward(self, batch: Packed, table: ItemTable) -> Tensor:
        """Query vectors of the positions that `batch.masked` marks, in packed order.

        Args:
            batch: sequences of items of the table.
            table: the catalog.

        Returns:
            [P, D], or [P, K * D] with flat tokens.
        """
        if self.tokens == "flat":
            states, groups = self._embed_flat(batch, table)
        else:
            items = self.compose(table, batch.items)
            states, groups = items if self.causal else self._masked(items, batch), batch.groups
        states = self.dropout(states)
        for layer in self.layers[:-1]:
            states = layer(states, groups)
        places = self.num_levels if self.tokens == "flat" else 1  # of an item
        last: Any = self.layers[-1]
        wanted = None if self.causal and batch.masked.all() else batch.masked.repeat_interleave(places)
        states = last.at_the_ends(states, groups, places) if batch.ends else last(states, groups, wanted)
        queries = self.norm(states).view(-1, places * states.shape[1])  # the K states of an item, concatenated
        return queries if self.recall is None else queries + recency_weighted_mean(items, batch, self.recall, self.causal)

    def _masked(self, items: Tensor, batch: Packed) -> Tensor:
        return torch.where(batch.masked[:, None], self.mask_embedding, items) + self.position_embedding(batch.position)

    def compose(self, table: ItemTable, items: Tensor | None = None) -> Tensor:
        """Item vectors: the sum of the code embeddings, the projected content, and the item's own embedding where it has one.

        Args:
            table: the catalog.
            items: [B] item_index; None: the whole catalog.

        Returns:
            [B, D], or [N, D].
        """
        codes = table.codes if items is None else table.codes[items]
        slots = self._slots(codes)
        if self.num_levels:
            vectors = F.embedding_bag(slots, self.code_embedding.weight, mode="sum")
        else:
            vectors = self.code_bias.new_zeros(len(slots), self.code_embedding.embedding_dim)
        if self.content is not None:
            if self.training and self.code_dropout:
                vectors = vectors * (torch.rand(len(vectors), 1, device=vectors.device) >= self.code_dropout)
            assert table.content is not None, "a model that reads content needs a table with content"
            vectors = vectors + self.content(table.content if items is None else table.content[items])
        if f"in_{table.domain}" not in self.item_embedding:
            return vectors
        own = self._own(table.domain)
        if items is not None and self.item_embedding[f"in_{table.domain}"].sparse:  # nothing here grows with the catalog
            has = items < len(own)
            has = has if table.known is None else has & table.known[items.where(has, 0)]
            return vectors + F.embedding(items.where(has, 0), own, sparse=True) * has[:, None]
        own = own if table.known is None else own * table.known[:, None]
        if items is None:  # items beyond the embedding came after the training
            return vectors + F.pad(own, (0, 0, 0, len(codes) - len(own)))
        has = items < len(own)
        return vectors + own[items.where(has, 0)] * has[:, None]

    def _own(self, domain: str) -> Tensor:
        """[N, D] item embeddings of a domain."""
        return next(self.item_embedding[f"in_{domain}"].parameters())

    def catalog_vectors(self, table: ItemTable, items: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors [N, D or K * D] and biases [N] of the catalog, or of `items` of it, whose product with a query is the items' scores.

        The loss "tokens" trains each level's scores, so their sum ranks: codes alone, even where items read content too;
        they place cold items as well.
        """
        slots = self._slots(table.codes if items is None else table.codes[items])
        bias = self.code_bias[slots].sum(1)
        if self.loss_kind == "tokens":
            books = self._codewords()
            return books[slots].flatten(1) if self.tokens == "flat" else F.embedding_bag(slots, books, mode="sum"), bias
        vectors = self.code_embedding(slots).flatten(1) if self.tokens == "flat" else self.compose(table, items)
        vectors = F.normalize(vectors, dim=-1) if self.logits_kind == "cosine" else vectors
        return (vectors, bias) if table.cold is None or items is not None else self.average_neighbours(vectors, bias, table.cold)

    def average_neighbours(self, vectors: Tensor, bias: Tensor, cold: ColdItems) -> tuple[Tensor, Tensor]:
        """The catalog's vectors and biases with those of cold items replaced by the weighted mean of their nearest trained items."""
        mean = F.embedding_bag(cold.nearest, vectors, per_sample_weights=cold.weights, mode="sum")
        if self.logits_kind == "cosine":
            mean = F.normalize(mean, dim=-1)
        return vectors.index_copy(0, cold.rows, mean), bias.index_copy(0, cold.rows, (bias[cold.nearest] * cold.weights).sum(1))

    def scores(self, query: Tensor, vectors: Tensor, bias: Tensor) -> Tensor:
        """Scores of items for each query.

        Args:
            query: [P, D or K * D].
            vectors: [N, D or K * D] of the whole catalog, or [P, C, D or K * D] of candidates of each query.
            bias: [N] or [P, C].

        Returns:
            [P, N] or [P, C].
        """
        query = self.scaled(query)
        if vectors.dim() == 3:
            return torch.baddbmm(bias[:, None], query[:, None], vectors.transpose(1, 2))[:, 0]
        return product(query, vectors, bias)

    def scaled(self, query: Tensor) -> Tensor:
        """Queries [P, D or K * D] whose dot products with the catalog's vectors, plus the biases, are scores."""
        if self.logits_kind != "cosine":
            return query
        levels = query.unflatten(-1, (-1, self.code_embedding.embedding_dim)) if self.loss_kind == "tokens" else query  # each by itself
        return (F.normalize(levels, dim=-1) / self.temperature).view_as(query)

    def loss(
        self,
        query: Tensor,
        target: Tensor,
        table: ItemTable,
        own: OwnItems | None = None,
        sampled: SampledItems | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of the targets, over the catalog, by level of the semantic ID (Eq. 11) or both, summed over the P positions.

        Args:
            query: [P, D or K * D].
            target: [P] item_index.
            own: items of each query's own sequence, which a softmax over items may leave out.
            sampled: items that this softmax runs over instead of the catalog, own items among them.
            weight: [P] of the targets; None: all are 1.
        """
        if self.loss_kind == "tokens":
            return self._token_loss(query, table.codes[target], weight)
        vectors, bias = self.catalog_vectors(table, None if sampled is None else sampled.rows)
        loss = item_cross_entropy(self.scaled(query), vectors, bias, target, own, sampled, weight)
        return loss + self.token_weight * self._token_loss(query, table.codes[target], weight) if self.token_weight else loss

    def _token_loss(self, query: Tensor, codes: Tensor, weight: Tensor | None) -> Tensor:
        """Eq. 11, of codes [P, K]: cross-entropy at each level, their mean. A flat query has a state of its own for each level.

        Next to a softmax over items it goes without the codes' biases, whose sum is an item's bias: fitted level by level, they would
        count popularity K times.
        """
        size, flat = self.codebook_size, self.tokens == "flat"
        queries = self.scaled(query.view(len(query), self.num_levels, -1) if flat else query)
        books = self._codewords()
        by_level = books.view(self.num_levels, size, -1)
        logits = torch.einsum("pkd,kmd->pkm", queries, by_level) if flat else product(queries, books).view(-1, self.num_levels, size)
        if self.loss_kind == "tokens":
            logits = logits + self.code_bias.view(self.num_levels, size)
        if weight is None:
            return F.cross_entropy(logits.reshape(-1, size), codes.reshape(-1), reduction="sum") / self.num_levels
        each = F.cross_entropy(logits.reshape(-1, size), codes.reshape(-1), reduction="none").view(-1, self.num_levels)
        return each.mean(1) @ weight

    def _codewords(self) -> Tensor:
        """[K * M, D] code embeddings as the loss "tokens" compares queries with them."""
        return F.normalize(self.code_embedding.weight, dim=-1) if self.logits_kind == "cosine" else self.code_embedding.weight

    @torch.no_grad()
    def start_items_from(self, domain: str, vectors: Tensor) -> None:
        """Start a domain's item embeddings as a random rotation of vectors [N, E] of its items, such as collaborative ones."""
        weight = self._own(domain)
        rotation = torch.linalg.qr(torch.randn(max(weight.shape[1], vectors.shape[1]), weight.shape[1]))[0][: vectors.shape[1]]  # [E, D]
        rotated = vectors @ rotation
        weight.add_(ITEM_START * rotated / rotated.std().clamp_min(1e-12))

    @torch.no_grad()
    def start_from(self, codebooks: Tensor) -> None:
        """Start the code embeddings as a random rotation of the codewords [K, M, E], at the size of a random start.

        An item's vector is the sum of its codes' embeddings, so it starts as a rotation of its quantized latent: items
        with near content are near from the first step on.
        """
        width = self.code_embedding.embedding_dim
        rotation = torch.linalg.qr(torch.randn(max(width, codebooks.shape[-1]), width))[0][: codebooks.shape[-1]]  # [E, D]
        centred = codebooks - codebooks.mean(1, keepdim=True)
        embedding = (centred @ rotation).flatten(0, 1)
        # A little noise keeps codes apart that the rotation, or a small codebook, puts on one spot.
        self.code_embedding.weight.mul_(0.3).add_(0.02 * embedding / embedding.std().clamp_min(1e-12))

    def _slots(self, codes: Tensor) -> Tensor:
        return codes + torch.arange(self.num_levels, device=codes.device) * self.codebook_size

    def _embed_flat(self, batch: Packed, table: ItemTable) -> tuple[Tensor, list[tuple[int, int, int]]]:
        levels = self.num_levels
        states = self.code_embedding(self._slots(table.codes[batch.items]))  # [S, K, D]
        states = torch.where(batch.masked[:, None, None], self.mask_embedding, states)
        position = batch.position[:, None] * levels + torch.arange(levels, device=states.device)
        states = states + self.position_embedding(position)
        groups = [(start * levels, count, length * levels) for start, count, length in batch.groups]
        return states.flatten(0, 1), groups


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer over packed sequences.

    Args:
        distances: a causal layer's largest number of items, with a bias for each distance in each head; 0: bidirectional.
    """

    def __init__(self, width: int, num_heads: int, ffn_width: int, dropout: float, distances: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = Linear(width, 3 * width), Linear(width, width)
        self.ffn = nn.Sequential(Linear(width, ffn_width), nn.GELU(), Dropout(dropout), Linear(ffn_width, width))
        self.dropout = Dropout(dropout)
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, distances)) if distances else None

    def forward(self, states: Tensor, groups: list[tuple[int, int, int]], chosen: Tensor | None = None) -> Tensor:
        """New states [S, D], or [P, D] of the `chosen` places [S] alone where the others are not needed."""
        attended = self._attend(self.query_key_value(self.norm_attention(states)), groups)
        if chosen is not None:
            states, attended = states[chosen], attended[chosen]
        states = states + self.dropout(self.out(attended), chosen)
        hidden = self.ffn[2](self.ffn[1](self.ffn[0](self.norm_ffn(states))), chosen)
        return states + self.dropout(self.ffn[3](hidden), chosen)

    def at_the_ends(self, states: Tensor, groups: list[tuple[int, int, int]], places: int) -> Tensor:
        """New states of the last `places` of each sequence: queries are computed for those alone, keys and values for all."""
        width = states.shape[1]
        sizes = np.concatenate([np.full(count, length) for _, count, length in groups])
        ends = torch.from_numpy((sizes.cumsum()[:, None] + np.arange(-places, 0)).ravel()).to(states.device)
        normed = self.norm_attention(states)
        query, key_value = (
            product(x, weight, bias)
            for x, weight, bias in zip(
                (normed[ends], normed),
                self.query_key_value.weight.split([width, 2 * width]),
                self.query_key_value.bias.split([width, 2 * width]),
                strict=True,
            )
        )
        parts = []
        queries = query.split([count * places for _, count, _ in groups])
        blocks = key_value.split([count * length for _, count, length in groups])
        for last, block, (_, count, length) in zip(queries, blocks, groups, strict=True):
            key, value = block.view(count, length, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            last = last.view(count, places, self.num_heads, -1).transpose(1, 2)
            attended = F.scaled_dot_product_attention(last, key, value, attn_mask=self._bias(length, places))
            parts.append(attended.transpose(1, 2).reshape(-1, width))
        states = states[ends] + self.out(torch.cat(parts))
        return states + self.ffn(self.norm_ffn(states))

    def _attend(self, projected: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
        """[S, D] from [S, 3 * D]: each sequence attends to itself; equally long ones in one call.

        The attention weights are not dropped out: the fused kernels then serve on CPUs too.
        """
        width = projected.shape[1] // 3
        parts = []
        # split, not slices: the backward pass then joins the pieces once instead of adding each to a full-size zero
        for block, (_, count, length) in zip(projected.split([count * length for _, count, length in groups]), groups, strict=True):
            query, key, value = block.view(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [count, H, length, D/H]
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self._bias(length, length))
            parts.append(attended.transpose(1, 2).reshape(-1, width))
        return torch.cat(parts)

    def _bias(self, length: int, places: int) -> Tensor | None:
        """[H, places, length] added to the attention logits of the last `places`: minus infinity for later items."""
        if self.distance_bias is None:
            return None
        place = torch.arange(length, device=self.distance_bias.device)
        distance = place[length - places :, None] - place
        return self.distance_bias[:, distance.clamp_min(0)].masked_fill(distance < 0, -torch.inf)


@torch.inference_mode()
def next_item_queries(model: Sequencer, histories: list[np.ndarray], table: ItemTable) -> Tensor:
    """Query vectors for the item after each history, [B, D or K * D].

    A masked model reads one masked item appended to the latest items (§3.6), a causal one the latest items alone; an empty
    history then has the query whose scores are nearest to what is popular.
    """
    device, appended = table.codes.device, 0 if model.causal else 1
    cut = [history[-(model.max_items - 1) :] for history in histories]
    if model.empty_query is not None:
        empty = torch.tensor([not len(history) for history in cut], device=device)
        cut = [history if len(history) else np.zeros(1, np.int64) for history in cut]
    lengths = np.array([len(history) + appended for history in cut])
    ends = np.cumsum(lengths)
    items = np.zeros(int(ends[-1]), dtype=np.int64)
    items[np.delete(np.arange(len(items)), ends - 1) if appended else slice(None)] = np.concatenate(cut)
    masks = np.arange(lengths.max()) == lengths[:, None] - 1
    packed, order = pack(items, lengths, masks)
    queries = model(to_device(packed._replace(ends=True), device), table)
    queries = queries[torch.from_numpy(np.argsort(order)).to(device)]
    return queries if model.empty_query is None else torch.where(empty[:, None], model.empty_query, queries)
