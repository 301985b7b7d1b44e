"""A generative sequence model: an encoder-decoder that writes the semantic ID of the next item, code by code.

The generative counterpart of the masked encoder in `model.py` (TIGER, arXiv 2305.05065), on the same semantic IDs. It reads
the codes of the latest items as one token each and predicts K codes one after another, each given those before it.

Notable choices: T5's layers (RMS norms, no biases, ReLU, one table for inputs and outputs), so that a T5 with the same weights
gives the same scores. In place of T5's relative positions, an embedding of the item's place counted from the end. Each level
has a softmax over its own M codewords. Histories are packed without padding, those of equal length together. Every history ends
with an end token, so that an empty one can be read too.

Shapes: B histories, S tokens of all packed histories, T items of a history, N catalog, K levels, M codewords per level,
D width, H heads, n code sequences of a history, W beams of a history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import Linear
from qbert_ray.sequence.dropout import Dropout

MOST_ROWS = 4096  # code sequences whose scores are computed at once, over all histories of a batch
POSITION_START = 0.3  # size of position embeddings at the start; tokens start at 1
EPSILON = 1e-6  # of the RMS norms, T5's

Groups = list[tuple[int, int]]  # (histories, tokens of each) of every run of equally long histories, in packed order


class Reading(NamedTuple):
    """Packed tokens of a batch of histories, shortest first."""

    tokens: Tensor  # [S] rows of the token table
    positions: Tensor  # [S] 0 for the last item of a history, `max_items` for the end token
    groups: Groups
    order: np.ndarray  # [B] place in the batch of each packed history


class Memory(NamedTuple):
    """An encoded batch of histories, as the decoder's layers read it; all code sequences of a history share it."""

    keys_values: list[Tensor]  # [S, 2 * H * head width] of each decoder layer
    groups: Groups
    order: np.ndarray  # [B]

    @property
    def size(self) -> int:
        """B."""
        return len(self.order)


class Cache:
    """Keys and values of the codes decoded so far, [B, slots, 2, H, head width] of each layer.

    It is never reordered: a mask says which slots hold a beam's own ancestors.
    """

    def __init__(self, num_layers: int, batch: int, slots: int, num_heads: int, head_width: int, like: Tensor) -> None:
        self.layers = [like.new_empty(batch, slots, 2, num_heads, head_width) for _ in range(num_layers)]
        self.used = 0


class Generator(nn.Module):
    """Encoder-decoder over the tokens of semantic IDs.

    Args:
        num_levels: K.
        codebook_size: M.
        width: D.
        num_layers: layers of the encoder, and of the decoder.
        head_width: width of an attention head; H heads of it need not add up to D.
        max_items: most items of a history that are read, the latest ones.
    """

    def __init__(
        self,
        num_levels: int,
        codebook_size: int,
        width: int = 128,
        num_layers: int = 4,
        num_heads: int = 6,
        head_width: int = 64,
        ffn_width: int = 1024,
        dropout: float = 0.1,
        max_items: int = 20,
    ) -> None:
        super().__init__()
        self.num_levels, self.codebook_size, self.max_items = num_levels, codebook_size, max_items
        self.num_heads, self.head_width = num_heads, head_width
        sizes = (width, num_heads, head_width, ffn_width, dropout)
        self.table = nn.Embedding(num_levels * codebook_size + 2, width)  # codes level by level, the start token, the end token
        self.position_embedding = nn.Embedding(max_items + 1, width)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(num_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(num_layers))
        self.encoder_norm, self.decoder_norm = nn.RMSNorm(width, EPSILON), nn.RMSNorm(width, EPSILON)
        self.dropout = Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=POSITION_START)

    @property
    def start(self) -> int:
        """Row of the token that every decoded ID starts with."""
        return self.num_levels * self.codebook_size

    def read(self, items: np.ndarray, lengths: np.ndarray, codes: np.ndarray) -> Reading:
        """The tokens of histories laid end to end, packed by length.

        Args:
            items: [sum of lengths] item_index.
            lengths: [B] items of each history; of longer ones than `max_items` the latest are read.
            codes: [N, K] of the catalog.
        """
        levels, most = self.num_levels, self.max_items
        ends = np.cumsum(lengths)
        order = np.argsort(np.minimum(lengths, most), kind="stable")
        sizes = np.minimum(lengths, most)[order]
        begin = np.cumsum(sizes) - sizes
        within = np.arange(int(sizes.sum())) - np.repeat(begin, sizes)
        chosen = items[np.repeat(ends[order] - sizes, sizes) + within]
        place = np.repeat(begin * levels + np.arange(len(sizes)), sizes) + within * levels  # of each item's first token
        tokens = np.full(int(sizes.sum()) * levels + len(sizes), self.start + 1)
        positions = np.full(len(tokens), most)
        for level in range(levels):
            tokens[place + level] = codes[chosen, level] + level * self.codebook_size
            positions[place + level] = np.repeat(sizes, sizes) - 1 - within
        values, counts = np.unique(sizes, return_counts=True)
        groups = [(int(count), int(value) * levels + 1) for value, count in zip(values, counts, strict=True)]
        device = self.table.weight.device
        return Reading(torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device), groups, order)

    def encode(self, reading: Reading) -> Memory:
        """Keys and values of the encoded histories for each layer of the decoder."""
        states = self.dropout(self.table(reading.tokens) + self.position_embedding(reading.positions))
        for layer in self.encoder:
            states = layer(states, reading.groups)
        states = self.dropout(self.encoder_norm(states))
        layers: Iterable[Any] = self.decoder
        return Memory([layer.cross_key_value(states) for layer in layers], reading.groups, reading.order)

    def forward(self, memory: Memory, codes: Tensor) -> Tensor:
        """[B, n, K, M] logits of every code given those before it, in packed order.

        Args:
            codes: [B, n, K] n code sequences of each history; the last codes are not read.
        """
        count, heads = codes.shape[1], self.num_heads
        states = self.dropout(self.table(self._shifted(codes)).flatten(0, 2))  # [B * n * K, D]

        def causal(projected: Tensor) -> Tensor:
            query, key, value = projected.view(-1, self.num_levels, 3, heads, self.head_width).permute(2, 0, 3, 1, 4)
            return _joined(F.scaled_dot_product_attention(query, key, value, is_causal=True))

        for layer, key_value in zip(self.decoder, memory.keys_values, strict=True):
            states = layer(states, causal, key_value, memory.groups, count * self.num_levels)
        return self._head(states.view(-1, self.num_levels, states.shape[1])).view(*codes.shape, -1)

    def loss(self, reading: Reading, codes: Tensor, weight: Tensor | None = None) -> Tensor:
        """Cross-entropy summed over the K codes of each next item.

        Args:
            reading: the histories.
            codes: [B, K] of the next items, in packed order.
            weight: [B] of the next items, in packed order; None: all are 1.
        """
        logits = self(self.encode(reading), codes[:, None])
        if weight is None:
            return F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="sum")
        return F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none").view(codes.shape).sum(1) @ weight

    def new_cache(self, memory: Memory, slots: int) -> Cache:
        """An empty cache for `slots` codes of each history."""
        return Cache(len(self.decoder), memory.size, slots, self.num_heads, self.head_width, self.table.weight)

    def step(self, codes: Tensor | None, level: int, memory: Memory, cache: Cache, ancestors: Tensor) -> Tensor:
        """[B, W, M] log-probabilities of the codes of a level, given the codes decoded before.

        Args:
            codes: [B, W] the beams' codes of the level before; None at level 0.
            ancestors: [B, W, used slots + W] True where a slot of the cache is an ancestor of the beam, or the beam itself.
        """
        start = torch.full((memory.size, 1), self.start, device=self.table.weight.device)
        tokens = start if codes is None else codes + (level - 1) * self.codebook_size
        batch, beams = tokens.shape
        states = self.table(tokens).flatten(0, 1)
        slots = slice(cache.used, cache.used + beams)
        cache.used += beams
        for layer, key_value, store in zip(self.decoder, memory.keys_values, cache.layers, strict=True):

            def over_ancestors(projected: Tensor, store: Tensor = store) -> Tensor:
                projected = projected.view(batch, beams, 3, self.num_heads, self.head_width)
                store[:, slots] = projected[:, :, 1:]
                key, value = store[:, : cache.used].permute(2, 0, 3, 1, 4)
                return _joined(F.scaled_dot_product_attention(projected[:, :, 0].transpose(1, 2), key, value, ancestors[:, None]))

            states = layer(states, over_ancestors, key_value, memory.groups, beams)
        return self._head(states[:, None], level).log_softmax(-1).view(batch, beams, -1)

    def score_all(self, memory: Memory, codes: Tensor) -> Tensor:
        """[B, N] log-probability of every item's ID [N, K], without any search; in the order of the batch."""
        if self.num_levels > 1:
            prefixes, which = torch.unique(codes[:, :-1], dim=0, return_inverse=True)
        else:
            prefixes, which = codes.new_zeros(1, 0), codes.new_zeros(len(codes))  # all items begin alike
        prefixes = F.pad(prefixes, (0, 1))  # [n, K]; the last code is not read
        size = max(1, MOST_ROWS // max(memory.size, 1))
        found = []
        for piece, number in zip(prefixes.split(size), torch.arange(len(prefixes), device=codes.device).split(size), strict=True):
            logp = self(memory, piece.expand(memory.size, -1, -1)).log_softmax(-1)
            before = logp[:, :, :-1].gather(3, piece[:, :-1, None].expand(memory.size, -1, -1, -1)).sum((2, 3))  # [B, n]
            items = ((which >= number[0]) & (which <= number[-1])).nonzero()[:, 0]
            row = which[items] - number[0]
            found.append((items, before[:, row] + logp[:, row, -1, codes[items, -1]]))
        result = torch.cat([scores for _, scores in found], dim=1)[:, torch.cat([items for items, _ in found]).argsort()]
        return unpacked(result, memory.order)

    def _shifted(self, codes: Tensor) -> Tensor:
        """[B, n, K] tokens that the decoder reads: the start token, then all codes but the last."""
        offset = torch.arange(self.num_levels - 1, device=codes.device) * self.codebook_size
        return F.pad(codes[..., :-1] + offset, (1, 0), value=self.start)

    def _head(self, states: Tensor, level: int | None = None) -> Tensor:
        """[R, K, M] logits of states [R, K, D], one place per level; of one level alone [R, 1, M] of states [R, 1, D]."""
        width = states.shape[-1]
        books = self.table.weight[: self.start].view(self.num_levels, self.codebook_size, width)
        states = self.dropout(self.decoder_norm(states)) * width**-0.5
        if level is not None:
            return F.linear(states, books[level])
        return torch.bmm(states.transpose(0, 1), books.transpose(1, 2)).transpose(0, 1)


class EncoderLayer(nn.Module):
    """Pre-norm bidirectional layer over packed histories."""

    def __init__(self, width: int, num_heads: int, head_width: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_width
        self.norm_attention, self.norm_ffn = nn.RMSNorm(width, EPSILON), nn.RMSNorm(width, EPSILON)
        self.query_key_value, self.out = Linear(width, 3 * inner, bias=False), Linear(inner, width, bias=False)
        self.ffn = FeedForward(width, ffn_width, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, groups: Groups) -> Tensor:
        """New states [S, D]."""
        projected = self.query_key_value(self.norm_attention(states))
        parts = []
        for block, (count, length) in zip(projected.split([count * length for count, length in groups]), groups, strict=True):
            query, key, value = block.view(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            parts.append(_joined(F.scaled_dot_product_attention(query, key, value)))
        states = states + self.dropout(self.out(torch.cat(parts)))
        return states + self.dropout(self.ffn(self.norm_ffn(states)))


class DecoderLayer(nn.Module):
    """Pre-norm layer that attends to the codes before and to the encoded history."""

    def __init__(self, width: int, num_heads: int, head_width: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_width
        self.norm_attention, self.norm_cross, self.norm_ffn = (nn.RMSNorm(width, EPSILON) for _ in range(3))
        self.query_key_value, self.out = Linear(width, 3 * inner, bias=False), Linear(inner, width, bias=False)
        self.cross_query, self.cross_out = Linear(width, inner, bias=False), Linear(inner, width, bias=False)
        self.cross_key_value = Linear(width, 2 * inner, bias=False)
        self.ffn = FeedForward(width, ffn_width, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, attend: Callable[[Tensor], Tensor], key_value: Tensor, groups: Groups, asking: int) -> Tensor:
        """New states [R, D].

        Args:
            attend: attention among the codes: [R, 3 * H * head width] to [R, H * head width].
            key_value: [S, 2 * H * head width] of the encoded histories.
            asking: states of each history, R / B.
        """
        states = states + self.dropout(self.out(attend(self.query_key_value(self.norm_attention(states)))))
        query = self.cross_query(self.norm_cross(states))
        parts = []
        queries = query.split([count * asking for count, _ in groups])
        blocks = key_value.split([count * length for count, length in groups])
        for piece, block, (count, length) in zip(queries, blocks, groups, strict=True):
            key, value = block.view(count, length, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            piece = piece.view(count, asking, self.num_heads, -1).transpose(1, 2)
            parts.append(_joined(F.scaled_dot_product_attention(piece, key, value)))
        states = states + self.dropout(self.cross_out(torch.cat(parts)))
        return states + self.dropout(self.ffn(self.norm_ffn(states)))


class FeedForward(nn.Module):
    """T5's MLP: ReLU, no biases."""

    def __init__(self, width: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = Linear(width, ffn_width, bias=False), Linear(ffn_width, width, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """[R, D] of [R, D]."""
        hidden = self.up(states)
        return self.down(self.dropout(hidden.relu_() if not torch.is_grad_enabled() else hidden.relu()))


def unpacked(values: Tensor, order: np.ndarray) -> Tensor:
    """Rows [B, ...] in packed order, put back into the order of the batch."""
    return values[torch.from_numpy(np.argsort(order)).to(values.device)]


def _joined(attended: Tensor) -> Tensor:
    """[B * T, H * head width] of [B, H, T, head width]."""
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)
