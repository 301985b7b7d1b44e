"""BSARec on a run's sequences: SASRec whose layers mix attention with a low-pass filter along the history.

    python -m tests.benchmarks.rivals.bsarec runs/scientific scientific results/rivals/ranks.parquet --epochs 60 --patience 4 \\
        --minutes 0.75 --set '{"mixing": 0.7}' --set '{"mixing": 0.3}'

BSARec (Shin et al., arXiv 2312.10325). The filter sees the whole history, so every prefix of a training history is a sample of its own.
Positions count from the last item, as with the published left padding.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from qbert_ray.sequence.dropout import Dropout
from tests.benchmarks.peers_table import Split
from tests.benchmarks.rivals.encoders import Attention, FeedForward, Frequencies, read, start, visible
from tests.benchmarks.rivals.training import Encoder, Settings, Trained, compare, fit_encoder, parser

DEFAULTS: Settings = {"width": 64, "num_layers": 2, "num_heads": 1, "ffn_width": 256, "dropout": 0.5, "longest": 50}
DEFAULTS |= {"mixing": 0.7, "cutoff": 5, "learning_rate": 0.001, "weight_decay": 0.0, "batch_size": 256}


class BSARec(Encoder):
    """Layers of `mixing` x filter + (1 - `mixing`) x attention, then an MLP."""

    def __init__(self, num_items: int, settings: Settings) -> None:
        super().__init__()
        s, layers = settings, range(settings["num_layers"])
        self.longest, self.mixing = s["longest"], s["mixing"]
        self.embedding = nn.Embedding(num_items, s["width"])
        self.position = nn.Embedding(s["longest"], s["width"])
        self.norm, self.dropout = nn.LayerNorm(s["width"], 1e-12), Dropout(s["dropout"])
        self.frequencies = nn.ModuleList(Frequencies(s["width"], s["cutoff"], s["longest"], s["dropout"]) for _ in layers)
        self.attention = nn.ModuleList(Attention(s["width"], s["num_heads"], s["dropout"]) for _ in layers)
        self.ffn = nn.ModuleList(FeedForward(s["width"], s["ffn_width"], s["dropout"]) for _ in layers)
        start(self)

    def catalog(self) -> Tensor:
        return self.embedding.weight

    def forward(self, items: Tensor, catalog: Tensor) -> Tensor:
        known = items < len(catalog)
        place = torch.arange(items.shape[1]).flip(0)
        x = self.dropout(self.norm(read(items, catalog) + self.position(place)))
        mask = visible(known)
        for frequencies, attention, ffn in zip(self.frequencies, self.attention, self.ffn, strict=True):
            x = x * known[:, :, None]
            x = ffn(torch.lerp(attention(x, mask), frequencies(x), self.mixing))
        return x


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    return fit_encoder(BSARec(split.num_items, settings), split, settings, given, seed, prefixes=True)


if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), "BSARec", DEFAULTS, train)
