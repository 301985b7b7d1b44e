"""VQ-Rec from scratch on a run's sequences and text vectors.

    python -m tests.benchmarks.rivals.vq_rec runs/scientific scientific results/rivals/ranks.parquet --epochs 40 --patience 4 \\
        --minutes 1.5

VQ-Rec (Hou et al., arXiv 2210.12316) without its pre-training: 32 codes of a product quantizer of the text vectors, an item is the mean
of their learned embeddings, a causal encoder reads it, and the last state is compared with all items by cosine. The published
"from scratch" keeps the encoder as it was drawn and permutes codes at random; here everything is trained, and codes stay as they are.
The quantizer is fitted on the items of training histories (`semantic_ids/kmeans.py`, rotated product quantization).

Shapes: N items, K codes of an item, M codewords of a code, E text dimensions, D width.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray.semantic_ids.kmeans import fit_product
from qbert_ray.semantic_ids.rqvae import RQVAE
from qbert_ray.sequence.dropout import Dropout
from tests.benchmarks.peers_table import Split
from tests.benchmarks.rivals.content import content_vectors
from tests.benchmarks.rivals.encoders import Attention, FeedForward, from_start, read, start, visible
from tests.benchmarks.rivals.training import Encoder, Settings, Trained, compare, fit_encoder, parser

DEFAULTS: Settings = {"width": 300, "num_layers": 2, "num_heads": 2, "ffn_width": 256, "dropout": 0.5, "longest": 50, "temperature": 0.07}
DEFAULTS |= {"num_codes": 32, "codebook_size": 256, "learning_rate": 0.001, "weight_decay": 0.0, "batch_size": 128}


class VQRec(Encoder):
    """The encoder over sums of code embeddings.

    Args:
        codes: [N, K] below M.
    """

    def __init__(self, codes: np.ndarray, settings: Settings) -> None:
        super().__init__()
        s = settings
        self.longest, self.temperature = s["longest"], s["temperature"]
        rows = torch.from_numpy(codes) + torch.arange(codes.shape[1]) * s["codebook_size"]
        self.register_buffer("rows", rows)  # [N, K] of the table of all codewords
        self.embedding = nn.EmbeddingBag(codes.shape[1] * s["codebook_size"], s["width"], mode="mean")
        self.position = nn.Embedding(s["longest"], s["width"])
        self.norm, self.dropout = nn.LayerNorm(s["width"], 1e-12), Dropout(s["dropout"])
        self.attention = nn.ModuleList(Attention(s["width"], s["num_heads"], s["dropout"]) for _ in range(s["num_layers"]))
        self.ffn = nn.ModuleList(FeedForward(s["width"], s["ffn_width"], s["dropout"]) for _ in range(s["num_layers"]))
        start(self)

    def catalog(self) -> Tensor:
        return self.embedding(self.rows)

    def forward(self, items: Tensor, catalog: Tensor) -> Tensor:
        known = items < len(catalog)
        x = self.dropout(self.norm(read(items, catalog) + self.position(from_start(known))))
        mask = visible(known)
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            x = ffn(attention(x, mask))
        return x


def product_codes(vectors: np.ndarray, trained: np.ndarray, num_codes: int, codebook_size: int, seed: int) -> np.ndarray:
    """[N, K] codes of vectors [N, E] by a rotated product quantizer, fitted on the rows that are `trained`."""
    model = RQVAE(vectors.shape[1], [], num_codes, codebook_size, vectors.shape[1])
    fit_product(model, torch.from_numpy(vectors[trained]), seed)
    with torch.no_grad():
        return model.codes(torch.from_numpy(vectors)).numpy()


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    seen = np.unique(np.concatenate(split.every)).astype(np.int64)
    codes = product_codes(content_vectors(given.run, given.domain, "text")[0], seen, settings["num_codes"], settings["codebook_size"], seed)
    return fit_encoder(VQRec(codes, settings), split, settings, given, seed)


if __name__ == "__main__":
    compare(parser(__doc__).parse_args(), "VQ-Rec", DEFAULTS, train)
