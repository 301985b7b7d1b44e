"""GRU4Rec with a softmax over the whole catalog, on a run's sequences.

    python -m tests.benchmarks.rivals.gru4rec runs/scientific scientific results/rivals/ranks.parquet --epochs 100 --patience 5 \\
        --set '{"dropout": 0.3}' --set '{"dropout": 0.5}' --seeds 0 1 2

GRU4Rec (Hidasi et al., arXiv 1511.06939) as RecBole trains it: item embeddings, one GRU layer, a projection back to the width of the
embeddings, which are also the head, and cross-entropy over all items in place of a pairwise loss on sampled ones.
"""

from __future__ import annotations

import argparse

from torch import Tensor, nn

from qbert_ray.products import Linear
from qbert_ray.sequence.dropout import Dropout
from tests.benchmarks.peers_table import Split
from tests.benchmarks.rivals.encoders import read
from tests.benchmarks.rivals.training import Encoder, Settings, Trained, compare, fit_encoder, parser

DEFAULTS: Settings = {"width": 64, "hidden": 128, "num_layers": 1, "dropout": 0.3, "longest": 50}
DEFAULTS |= {"learning_rate": 0.001, "weight_decay": 0.0, "batch_size": 64}


class GRU4Rec(Encoder):
    """Gated recurrent units over item embeddings."""

    def __init__(self, num_items: int, settings: Settings) -> None:
        super().__init__()
        s = settings
        self.longest = s["longest"]
        self.embedding = nn.Embedding(num_items, s["width"])
        self.dropout = Dropout(s["dropout"])
        self.gru = nn.GRU(s["width"], s["hidden"], s["num_layers"], bias=False, batch_first=True)
        self.out = Linear(s["hidden"], s["width"])
        nn.init.xavier_normal_(self.embedding.weight)

    def catalog(self) -> Tensor:
        return self.embedding.weight

    def forward(self, items: Tensor, catalog: Tensor) -> Tensor:
        # without biases and started with zeros, a GRU that reads the zeros of left padding stays at zero
        states, _ = self.gru(self.dropout(read(items, catalog)))
        result: Tensor = self.out(states)
        return result


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    return fit_encoder(GRU4Rec(split.num_items, settings), split, settings, given, seed)


if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), "GRU4Rec, full softmax", DEFAULTS, train)
