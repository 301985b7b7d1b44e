"""BERT4Rec with a softmax over the whole catalog, on a run's sequences.

    python -m tests.benchmarks.rivals.bert4rec runs/scientific scientific results/rivals/ranks.parquet --epochs 200 --patience 15 \\
        --set '{"masked": 0.2}' --set '{"masked": 0.4}' --set '{"masked": 0.6}' --seeds 0 1 2

BERT4Rec (Sun et al., arXiv 1904.06690): the layers of SASRec, with attention in both directions. A share of the items of a training
history is masked and predicted; in every tenth history the last item alone is, as at the end of a history that is ranked. One mask for
each history and epoch, so it needs many epochs (Petrov and Macdonald, arXiv 2207.07483). Places count from the last item, as with the published left padding.

Shapes: B histories, T items of the longest, N items, D width.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import Linear, product
from qbert_ray.sequence.dropout import Dropout
from tests.benchmarks.peers_table import Split
from tests.benchmarks.rivals.encoders import Attention, FeedForward, among, start
from tests.benchmarks.rivals.training import Encoder, Scores, Settings, Trained, by_length, compare, fit, padded, parser, validation

DEFAULTS: Settings = {"width": 64, "num_layers": 2, "num_heads": 2, "ffn_width": 256, "dropout": 0.2, "longest": 50}
DEFAULTS |= {"masked": 0.2, "last_alone": 0.1, "learning_rate": 0.001, "weight_decay": 0.0, "batch_size": 64}


class BERT4Rec(Encoder):
    """Attention in both directions over item embeddings; item N + 1 is the mask."""

    def __init__(self, num_items: int, settings: Settings) -> None:
        super().__init__()
        s = settings
        self.longest, self.num_items, self.mask = s["longest"], num_items, num_items + 1
        self.embedding = nn.Embedding(num_items + 2, s["width"])  # and padding and mask
        self.position = nn.Embedding(s["longest"], s["width"])
        self.norm, self.dropout = nn.LayerNorm(s["width"], 1e-12), Dropout(s["dropout"])
        self.attention = nn.ModuleList(Attention(s["width"], s["num_heads"], s["dropout"]) for _ in range(s["num_layers"]))
        self.ffn = nn.ModuleList(FeedForward(s["width"], s["ffn_width"], s["dropout"]) for _ in range(s["num_layers"]))
        self.out, self.out_norm = Linear(s["width"], s["width"]), nn.LayerNorm(s["width"], 1e-12)
        self.bias = nn.Parameter(torch.zeros(num_items))
        start(self)

    def catalog(self) -> Tensor:
        return self.embedding.weight

    def forward(self, items: Tensor, catalog: Tensor) -> Tensor:
        place = torch.arange(items.shape[1]).flip(0)
        x = self.dropout(self.norm(F.embedding(items, catalog) + self.position(place)))
        mask = among(items != self.num_items)
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            x = ffn(attention(x, mask))
        return self.out_norm(F.gelu(self.out(x)))

    def logits(self, states: Tensor, catalog: Tensor) -> Tensor:
        return product(states, catalog[: self.num_items]) + self.bias

    def masked(self, items: Tensor, share: float, last_alone: float) -> Tensor:
        """[B, T] which items of left-padded histories are masked: at least one of each, and in a share `last_alone` only the last."""
        known = items < self.num_items
        chosen = (torch.rand(items.shape) < share) & known
        last = torch.zeros_like(known)
        last[:, -1] = True
        alone = (torch.rand(len(items)) < last_alone) | ~chosen.any(1)
        return torch.where(alone[:, None], last, chosen)

    @torch.no_grad()
    def scorer(self) -> Scores:
        self.eval()
        catalog = self.catalog()

        def scores(histories: list[list[int]]) -> Tensor:
            x = padded([[*history, self.mask] for history in histories], self.longest, self.num_items)
            return self.logits(self(x, catalog)[:, -1], catalog)

        return scores


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    model = BERT4Rec(split.num_items, settings)
    longest = model.longest
    samples = [items[max(0, end - longest) : end] for items in split.every for end in range(len(items), 1, -longest)]
    lengths = np.array([len(sample) for sample in samples])
    targets = settings["batch_size"] * max(1.0, settings["masked"] * float(lengths.mean()))  # of a batch, about

    def loss(rows: np.ndarray) -> Tensor:
        items = padded([samples[row] for row in rows], longest, split.num_items)
        chosen = model.masked(items, settings["masked"], settings["last_alone"])
        catalog = model.catalog()
        states = model(items.masked_fill(chosen, model.mask), catalog)
        # every target counts the same, not every batch: batches are of histories of about one length
        return F.cross_entropy(model.logits(states[chosen], catalog), items[chosen], reduction="sum") / targets

    def batches(epoch: int) -> list[np.ndarray]:
        return by_length(lengths, settings["batch_size"], seed, epoch)

    return fit(model, batches, loss, lambda: validation(model, split), model.scorer, settings, given)


if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), "BERT4Rec, full softmax", DEFAULTS, train)
