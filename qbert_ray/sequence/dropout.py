"""Dropout that draws random bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
