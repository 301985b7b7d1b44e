"""Layers of the rivals that read one vector per item: post-norm self-attention as in RecBole, and BSARec's frequency filter.

Shapes: B histories, T items of the longest, D width, C longest history that is read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import Linear
from qbert_ray.sequence.dropout import Dropout

DEVIATION = 0.02  # of weights at the start, BERT's


class Attention(nn.Module):
    """Self-attention with a residual and a norm after it."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.rate = num_heads, dropout
        self.query_key_value, self.out = Linear(width, 3 * width), Linear(width, width)
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] of x [B, T, D]; mask [B, 1, T, T] is True where a place may be looked at."""
        query, key, value = self.query_key_value(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, mask, rate).transpose(1, 2).flatten(2)
        return self.norm(x + self.dropout(self.out(found)))


class CrossAttention(nn.Module):
    """Attention on other vectors with a residual and a norm after it."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.rate = num_heads, dropout
        self.query, self.key_value, self.out = Linear(width, width), Linear(width, 2 * width), Linear(width, width)
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), Dropout(dropout)

    def forward(self, x: Tensor, others: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] of x [B, T, D] that looks at others [B, C, D]; mask [B, 1, 1, C] is True where there is one."""
        query = self.query(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
        key, value = self.key_value(others).view(*others.shape[:2], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, mask, rate).transpose(1, 2).flatten(2)
        return self.norm(x + self.dropout(self.out(found)))


class FeedForward(nn.Module):
    """MLP with a residual and a norm after it."""

    def __init__(self, width: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = Linear(width, ffn_width), Linear(ffn_width, width)
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] of x [B, T, D]."""
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Frequencies(nn.Module):
    """BSARec's filter (arXiv 2312.10325, eq. 5): low frequencies along a history stay, high ones are scaled by squares of weights.

    The low pass of a history of C items is one matrix [C, C]; a shorter one is its right lower corner, so padding counts as zeros
    (in the published code as vectors of its positions).
    """

    def __init__(self, width: int, cutoff: int, longest: int, dropout: float) -> None:
        super().__init__()
        spectrum = torch.fft.rfft(torch.eye(longest), dim=0, norm="ortho")
        spectrum[cutoff // 2 + 1 :] = 0
        self.register_buffer("low", torch.fft.irfft(spectrum, n=longest, dim=0, norm="ortho"))
        self.scale = nn.Parameter(torch.randn(width))
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] of left-padded x [B, T, D], zeros where padded."""
        length = x.shape[1]
        low = self.low[-length:, -length:] @ x
        return self.norm(x + self.dropout(low + self.scale.square() * (x - low)))


def visible(known: Tensor) -> Tensor:
    """[B, 1, T, T] causal attention among the places that are `known` [B, T]; padding looks at itself, so that nothing is undefined."""
    length = known.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((causal & known[:, None]) | torch.eye(length, dtype=torch.bool))[:, None]


def among(known: Tensor) -> Tensor:
    """[B, 1, T, T] attention in both directions among the places that are `known` [B, T]; the others look at themselves."""
    return (known[:, None] | torch.eye(known.shape[1], dtype=torch.bool))[:, None]


def start(model: nn.Module) -> None:
    """Normal weights and no biases, as BERT starts."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag):
            nn.init.normal_(module.weight, std=DEVIATION)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def from_start(known: Tensor) -> Tensor:
    """[B, T] place of each item counted from the first one that is read; 0 where padded."""
    return (known.cumsum(1) - 1).clamp_min(0)


def read(items: Tensor, catalog: Tensor) -> Tensor:
    """[B, T, D] rows of catalog [N, D] for items [B, T]; zeros where an item is N."""
    return F.embedding(items, F.pad(catalog, (0, 0, 0, 1)))
