"""SASRec with a softmax over the whole catalog, on a run's sequences.

    python -m tests.benchmarks.rivals.sasrec runs/scientific scientific results/rivals/ranks.parquet --epochs 60 --patience 5 \\
        --set '{"dropout": 0.5}' --set '{"dropout": 0.5, "width": 128}' --set '{"dropout": 0.2}'

SASRec (Kang and McAuley, arXiv 1808.09781) as sequence toolkits train it today: post-norm layers, tied item embeddings, cross-entropy
over all items in place of one sampled negative (Klenitskiy and Vasilev, arXiv 2309.07602).
"""

from __future__ import annotations

import argparse

from torch import Tensor, nn

from qbert_ray.sequence.dropout import Dropout
from tests.benchmarks.peers_table import Split
from tests.benchmarks.rivals.encoders import Attention, FeedForward, from_start, read, start, visible
from tests.benchmarks.rivals.training import Encoder, Settings, Trained, compare, fit_encoder, parser

DEFAULTS: Settings = {"width": 64, "num_layers": 2, "num_heads": 2, "ffn_width": 256, "dropout": 0.5, "longest": 50}
DEFAULTS |= {"learning_rate": 0.001, "weight_decay": 0.0, "batch_size": 64}


class SASRec(Encoder):
    """Causal self-attention over item embeddings."""

    def __init__(self, num_items: int, settings: Settings) -> None:
        super().__init__()
        s = settings
        self.longest = s["longest"]
        self.embedding = nn.Embedding(num_items, s["width"])
        self.position = nn.Embedding(s["longest"], s["width"])
        self.norm, self.dropout = nn.LayerNorm(s["width"], 1e-12), Dropout(s["dropout"])
        self.attention = nn.ModuleList(Attention(s["width"], s["num_heads"], s["dropout"]) for _ in range(s["num_layers"]))
        self.ffn = nn.ModuleList(FeedForward(s["width"], s["ffn_width"], s["dropout"]) for _ in range(s["num_layers"]))
        start(self)

    def catalog(self) -> Tensor:
        return self.embedding.weight

    def forward(self, items: Tensor, catalog: Tensor) -> Tensor:
        known = items < len(catalog)
        x = self.dropout(self.norm(read(items, catalog) + self.position(from_start(known))))
        mask = visible(known)
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            x = ffn(attention(x, mask))
        return x


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    return fit_encoder(SASRec(split.num_items, settings), split, settings, given, seed)


if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), "SASRec, full softmax", DEFAULTS, train)
