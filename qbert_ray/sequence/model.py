"""Stage 3, §3.5-3.6: a masked encoder over sequences of semantic IDs.

An item enters as the sum of its K code embeddings (`tokens: item`) or as K positions (`tokens: flat`). The head is tied to
the same embeddings and linear in them, so the score of an item is one dot product with its composed vector, and one matrix
product ranks the whole catalog: no beam search.

Notable choices: sequences of a batch are packed without padding and grouped by length, so attention is a plain batched product
over each group; positions count from the end, so that "the last item" is one embedding; what belongs to a catalog (codes, content
vectors, cold items) is passed as an `ItemTable`, so that one model serves several catalogs.

Shapes: S items of all packed sequences, T items of a sequence, N catalog, K levels, M codewords per level, D width,
P masked positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import Linear, product
from qbert_ray.sequence.item_table import ColdItems, ItemTable
from qbert_ray.sequence.packing import Packed, pack, to_device

RECALL_START = 1.0  # initial weight of the history's mean item vector in the query, relative to the encoder's output
CONTENT_START = 0.1  # size of an item's projected content in each dimension; four codes start at about half of that


class Sequencer(nn.Module):
    """Masked encoder over semantic IDs with a tied, catalog-wide head.

    Args:
        num_levels: K.
        codebook_size: M.
        max_items: longest sequence that can be read.
        tokens: "item" or "flat".
        loss: "catalog" or "tokens" (Eq. 11).
        logits: "dot" or "cosine".
        temperature: of cosine logits.
        item_embeddings: domain -> number of items that have an embedding of their own in addition to their codes; none by default.
        content_width: F of the content vectors whose projection is part of an item's vector; 0: codes alone.
        code_dropout: fraction of items whose codes are hidden in training, so that they have to be placed by content alone.
        recall: add the recency-weighted mean of the history's item vectors to the query (`recency_weighted_mean`).
    """

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
        logits: str = "dot",
        temperature: float = 0.07,
        item_embeddings: dict[str, int] | None = None,
        content_width: int = 0,
        code_dropout: float = 0.0,
        recall: bool = False,
    ) -> None:
        super().__init__()
        self.num_levels, self.codebook_size, self.max_items = num_levels, codebook_size, max_items
        self.tokens, self.loss_kind, self.logits_kind, self.temperature = tokens, loss, logits, temperature
        self.code_embedding = nn.Embedding(num_levels * codebook_size, width)
        self.code_bias = nn.Parameter(torch.zeros(num_levels * codebook_size))
        # prefixed, since a module's name must not be that of a method of ModuleDict, and a lone domain is called "items"
        self.item_embedding = nn.ModuleDict({f"in_{name}": nn.Embedding(size, width) for name, size in (item_embeddings or {}).items()})
        self.content = Linear(content_width, width, bias=False) if content_width else None
        self.code_dropout = code_dropout
        self.recall = nn.Parameter(torch.tensor([RECALL_START, 0.0])) if recall else None  # weight, and logit of the decay per step
        self.mask_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.position_embedding = nn.Embedding(max_items * (num_levels if tokens == "flat" else 1), width)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(width, num_heads, ffn_width, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        for embedding in [self.code_embedding, self.position_embedding, *self.item_embedding.values()]:
            nn.init.normal_(embedding.weight, std=0.02)
        if self.content is not None:
            nn.init.normal_(self.content.weight, std=CONTENT_START / content_width**0.5)

    def forward(self, batch: Packed, table: ItemTable) -> Tensor:
        """Query vectors of the masked positions, in packed order.

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
            states = torch.where(batch.masked[:, None], self.mask_embedding, items) + self.position_embedding(batch.position)
            groups = batch.groups
        states = self.dropout(states)
        for layer in self.layers[:-1]:
            states = layer(states, groups)
        places = self.num_levels if self.tokens == "flat" else 1  # of an item
        last: Any = self.layers[-1]
        wanted = batch.masked.repeat_interleave(places)
        states = last.at_the_ends(states, groups, places) if batch.ends else last(states, groups, wanted)
        queries = self.norm(states).view(-1, places * states.shape[1])  # the K states of an item, concatenated
        return queries if self.recall is None else queries + recency_weighted_mean(items, batch, self.recall)

    def compose(self, table: ItemTable, items: Tensor | None = None) -> Tensor:
        """Item vectors: the sum of the code embeddings, the projected content, and the item's own embedding where it has one.

        Args:
            table: the catalog.
            items: [B] item_index; None: the whole catalog.

        Returns:
            [B, D], or [N, D].
        """
        codes = table.codes if items is None else table.codes[items]
        vectors = F.embedding_bag(self._slots(codes), self.code_embedding.weight, mode="sum")
        if self.content is not None:
            if self.training and self.code_dropout:
                vectors = vectors * (torch.rand(len(vectors), 1, device=vectors.device) >= self.code_dropout)
            assert table.content is not None, "a model that reads content needs a table with content"
            vectors = vectors + self.content(table.content if items is None else table.content[items])
        if f"in_{table.domain}" not in self.item_embedding:
            return vectors
        own = self.item_embedding[f"in_{table.domain}"].weight
        own = own if table.known is None else own * table.known[:, None]
        if items is None:  # items beyond the embedding came after the training
            return vectors + F.pad(own, (0, 0, 0, len(codes) - len(own)))
        has = items < len(own)
        return vectors + own[items.where(has, 0)] * has[:, None]

    def catalog_vectors(self, table: ItemTable) -> tuple[Tensor, Tensor]:
        """Vectors [N, D or K * D] and biases [N] of the catalog whose product with a query is the items' scores."""
        slots = self._slots(table.codes)
        bias = self.code_bias[slots].sum(1)
        vectors = self.code_embedding(slots).flatten(1) if self.tokens == "flat" else self.compose(table)
        vectors = F.normalize(vectors, dim=-1) if self.logits_kind == "cosine" else vectors
        return (vectors, bias) if table.cold is None else self.average_neighbours(vectors, bias, table.cold)

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
        if self.logits_kind == "cosine":
            query = F.normalize(query, dim=-1) / self.temperature
        if vectors.dim() == 3:
            return torch.baddbmm(bias[:, None], query[:, None], vectors.transpose(1, 2))[:, 0]
        return product(query, vectors, bias)

    def loss(self, query: Tensor, target: Tensor, table: ItemTable) -> Tensor:
        """Cross-entropy of the masked items, summed over the P positions; target is [P] item_index."""
        if self.loss_kind == "catalog":
            return F.cross_entropy(self.scores(query, *self.catalog_vectors(table)), target, reduction="sum")
        # Eq. 11 level by level. A flat query has a state of its own for each level.
        size, codes = self.codebook_size, table.codes[target]  # [P, K]
        queries = query.view(len(query), self.num_levels, -1) if self.tokens == "flat" else query[:, None].expand(-1, self.num_levels, -1)
        books = self.code_embedding.weight.view(self.num_levels, size, -1)
        if self.logits_kind == "cosine":
            queries, books = F.normalize(queries, dim=-1) / self.temperature, F.normalize(books, dim=-1)
        logits = torch.einsum("pkd,kmd->pkm", queries, books) + self.code_bias.view(self.num_levels, size)
        return F.cross_entropy(logits.reshape(-1, size), codes.reshape(-1), reduction="sum") / self.num_levels

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
    """Pre-norm bidirectional transformer layer over packed sequences."""

    def __init__(self, width: int, num_heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = Linear(width, 3 * width), Linear(width, width)
        self.ffn = nn.Sequential(Linear(width, ffn_width), nn.GELU(), Dropout(dropout), Linear(ffn_width, width))
        self.dropout = Dropout(dropout)

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
            parts.append(F.scaled_dot_product_attention(last, key, value).transpose(1, 2).reshape(-1, width))
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
            parts.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, width))
        return torch.cat(parts)


class Dropout(nn.Module):
    """Dropout from random bytes: on a CPU several times as fast as one Bernoulli draw per number; rates are multiples of 1/256."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = round(rate * 256)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Some of x [P, D] dropped; where x is the `chosen` places [S] of something, the same numbers are dropped as in the whole."""
        if not self.training or not self.threshold:
            return x
        size = x.numel() if chosen is None else len(chosen) * x.shape[1]
        words = torch.empty(-(-size // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[:size].view(-1, x.shape[-1]) >= self.threshold
        keep = kept.view(x.shape) if chosen is None else kept[chosen]
        return x * keep * (256 / (256 - self.threshold)) if self.threshold < 256 else x * 0


@torch.inference_mode()
def next_item_queries(model: Sequencer, histories: list[np.ndarray], table: ItemTable) -> Tensor:
    """[B, D or K * D] query for the item after each history: one masked item appended to its latest items (§3.6)."""
    device = table.codes.device
    cut = [history[-(model.max_items - 1) :] for history in histories]
    lengths = np.array([len(history) + 1 for history in cut])
    ends = np.cumsum(lengths)
    items = np.zeros(int(ends[-1]), dtype=np.int64)
    items[np.delete(np.arange(len(items)), ends - 1)] = np.concatenate(cut)
    masks = np.arange(lengths.max()) == lengths[:, None] - 1
    packed, order = pack(items, lengths, masks)
    queries = model(to_device(packed._replace(ends=True), device), table)
    return queries[torch.from_numpy(np.argsort(order)).to(device)]


def recency_weighted_mean(items: Tensor, batch: Packed, recall: Tensor) -> Tensor:
    """The recency-weighted mean of the history's item vectors, for every masked position: what `recall` adds to the queries.

    Args:
        items: [S, D] vectors of the packed items.
        batch: the sequences; masked items do not count.
        recall: [2] the weight of the mean, and the logit of its decay per step.

    Returns:
        [P, D] of length weight * sqrt(D), the size of a query; zeros where every item is masked.
    """
    if batch.ends:
        weights = recency_weights(batch.position, recall).masked_fill(batch.masked, 0)
        sums = items.new_zeros(sum(count for _, count, _ in batch.groups), items.shape[1])
        sums.index_add_(0, batch.masked.cumsum(0) - batch.masked.long(), items * weights[:, None])
        return at_query_size(sums, recall)
    means, decay = [], F.logsigmoid(recall[1])
    sizes = [count * length for _, count, length in batch.groups]
    for vectors, masked, (_, count, length) in zip(items.split(sizes), batch.masked.split(sizes), batch.groups, strict=True):
        place = torch.arange(length, device=items.device)
        logits = decay * (place - place[:, None]).abs()  # [T, T]
        logits = logits.masked_fill(masked.view(count, 1, length), -torch.inf)  # [count, T, T]
        mean = logits.softmax(-1).nan_to_num() @ vectors.view(count, length, -1)  # nothing but masked items: zeros
        means.append(mean.flatten(0, 1)[masked])
    return at_query_size(torch.cat(means), recall)


def recency_weights(steps: Tensor, recall: Tensor) -> Tensor:
    """Weight of each item by its steps before the masked item: 1 for the last; only the direction of a mean counts, so no sum to 1."""
    return torch.exp(F.logsigmoid(recall[1]) * (steps - 1))


def at_query_size(means: Tensor, recall: Tensor) -> Tensor:
    """Mean item vectors [P, D] scaled to length weight * sqrt(D), which is that of a normalized query."""
    return recall[0] * means.shape[1] ** 0.5 * F.normalize(means, dim=-1)


def complexity(num_items: int, width: int, num_layers: int, ffn_width: int, max_items: int, num_levels: int, codebook_size: int) -> dict:
    """Parameters and multiply-adds by module, twice: as Table 6 of the paper evidently counts, and as they are.

    The paper's count: an item-sized tied head, and each weight once per position. The real one: K codebooks in place of the
    item embeddings, attention included, the head on one masked position.
    """
    attention, ffn = 4 * (width * width + width), 2 * width * ffn_width + ffn_width + width
    norms, positions = 4 * width, max_items * width
    encoder = num_layers * (attention + ffn + norms)
    paper = {"encoder": encoder, "position embedding": positions, "item embedding, tied": num_items * width}
    paper_macs = {name: max_items * count for name, count in paper.items() if name != "position embedding"}
    real = {
        "encoder": encoder + 2 * width,
        "position embedding": positions,
        "code embedding, tied": num_levels * codebook_size * (width + 1),
        "mask embedding": width,
    }
    real_macs = {
        "encoder": num_layers * max_items * (4 * width * width + 2 * width * ffn_width),
        "attention scores": num_layers * 2 * max_items * max_items * width,
        "head, one position": num_items * width,
    }
    return {
        "paper": {"parameters": paper, "multiply_adds": paper_macs},
        "real": {"parameters": real, "multiply_adds": real_macs},
    }
