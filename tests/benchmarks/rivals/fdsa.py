"""FDSA on a run's sequences and content vectors, with a softmax over the whole catalog.

    python -m tests.benchmarks.rivals.fdsa runs/scientific scientific results/rivals/ranks.parquet --modalities text --epochs 60 \\
        --patience 5 --set '{"dropout": 0.5}' --set '{"dropout": 0.2}' --seeds 0 1 2

FDSA (Zhang et al., IJCAI 2019): one stream of causal self-attention over item embeddings and one over features; the two last states
together are projected to the width of the item embeddings and compared with these. The published features are a category, a brand and
words of an item, embedded and weighed by attention; here they are its content vectors, projected and weighed in the same way.

Shapes: B histories, T items of the longest, N items, M modalities, E input dimensions, D width.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray.products import Linear
from qbert_ray.sequence.dropout import Dropout
from tests.benchmarks.peers_table import Split
from tests.benchmarks.rivals.content import content_vectors
from tests.benchmarks.rivals.encoders import Attention, FeedForward, from_start, read, start, visible
from tests.benchmarks.rivals.training import Encoder, Settings, Trained, compare, fit_encoder, parser

DEFAULTS: Settings = {"width": 64, "num_layers": 2, "num_heads": 2, "ffn_width": 256, "dropout": 0.5, "longest": 50}
DEFAULTS |= {"learning_rate": 0.001, "weight_decay": 0.0, "batch_size": 64}


class Stream(nn.Module):
    """Causal self-attention over one vector per item."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        s = settings
        self.position = nn.Embedding(s["longest"], s["width"])
        self.norm, self.dropout = nn.LayerNorm(s["width"], 1e-12), Dropout(s["dropout"])
        self.attention = nn.ModuleList(Attention(s["width"], s["num_heads"], s["dropout"]) for _ in range(s["num_layers"]))
        self.ffn = nn.ModuleList(FeedForward(s["width"], s["ffn_width"], s["dropout"]) for _ in range(s["num_layers"]))

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """[B, T, D] states of vectors x [B, T, D] of left-padded histories; known [B, T] is False where padded."""
        x, mask = self.dropout(self.norm(x + self.position(from_start(known)))), visible(known)
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            x = ffn(attention(x, mask))
        return x


class FDSA(Encoder):
    """A stream over items and one over what they are like.

    Args:
        content: [N, E] vectors of each modality.
        present: [N] whether an item has them, of each modality.
    """

    def __init__(self, content: list[np.ndarray], present: list[np.ndarray], settings: Settings) -> None:
        super().__init__()
        self.longest, width = settings["longest"], settings["width"]
        self.embedding = nn.Embedding(len(content[0]), width)
        for number, vectors in enumerate(content):
            self.register_buffer(f"content_{number}", torch.from_numpy(vectors))
        self.adapters = nn.ModuleList(Linear(vectors.shape[1], width) for vectors in content)
        self.register_buffer("present", torch.from_numpy(np.stack(present, axis=1)))  # [N, M]
        self.weight = Linear(width, 1)
        self.items, self.features = Stream(settings), Stream(settings)
        self.out = Linear(2 * width, width)
        start(self)

    def catalog(self) -> Tensor:
        return self.embedding.weight

    def described(self) -> Tensor:
        """[N, D] projected content, averaged over modalities with weights of their own; zeros where an item has none."""
        made = torch.stack([adapter(getattr(self, f"content_{number}")) for number, adapter in enumerate(self.adapters)], dim=1)
        weights = self.weight(made)[..., 0].masked_fill(~self.present, -torch.inf).softmax(1).nan_to_num()
        return (weights[..., None] * made).sum(1)

    def forward(self, items: Tensor, catalog: Tensor) -> Tensor:
        known = items < len(catalog)
        states = self.items(read(items, catalog), known), self.features(read(items, self.described()), known)
        result: Tensor = self.out(torch.cat(states, dim=-1))
        return result


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    content, present = zip(*(content_vectors(given.run, given.domain, modality) for modality in given.modalities), strict=True)
    return fit_encoder(FDSA(list(content), list(present), settings), split, settings, given, seed)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--modalities", nargs="+", default=["text", "image"], help="content to read")
    compare(arguments.parse_args(), "FDSA", DEFAULTS, train)
