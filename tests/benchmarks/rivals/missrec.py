"""MISSRec from scratch on a run's sequences and content vectors.

    python -m tests.benchmarks.rivals.missrec runs/scientific scientific results/rivals/ranks.parquet --modalities text --epochs 30 \\
        --patience 4 --minutes 9 --set '{"epoch_samples": 0, "item_ids": true}'

MISSRec (Wang et al., arXiv 2308.11175) without its pre-training. Vectors of each modality are projected to one width, and clustered
before each epoch; the clusters that a history touches are its interests. An encoder reads the interests without order, a decoder the
items in order and the interests; the state after the last item is compared with every modality of an item by cosine, and the
similarities are averaged with the weights of their softmax. Left out: the penalties on how interests are spread, and their start from
density peaks (here k-means, `sklearn.cluster.MiniBatchKMeans`).

The decoder is not causal, so every prefix of a training history is a sample; where that is too many, `epoch_samples` of them are drawn
for each epoch.

Shapes: B histories, T items of the longest, N items, M modalities, C interests of a history, E input dimensions, D width.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from qbert_ray.products import Linear, product
from qbert_ray.sequence.dropout import Dropout
from tests.benchmarks.peers_table import Split
from tests.benchmarks.rivals.content import content_vectors
from tests.benchmarks.rivals.encoders import Attention, CrossAttention, FeedForward, among, from_start, start
from tests.benchmarks.rivals.training import Encoder, Settings, Trained, compare, fit_encoder, parser

DEFAULTS: Settings = {"width": 300, "num_heads": 4, "ffn_width": 256, "dropout": 0.5, "longest": 50, "temperature": 0.07}
DEFAULTS |= {"interests": 0.1, "item_ids": False, "learning_rate": 0.001, "weight_decay": 0.0, "batch_size": 256, "epoch_samples": 20_000}


class MISSRec(Encoder):
    """One layer over interests, one over items.

    Args:
        content: [N, E] vectors of each modality.
        present: [N] whether an item has them, of each modality.
    """

    def __init__(self, content: list[np.ndarray], present: list[np.ndarray], settings: Settings) -> None:
        super().__init__()
        s, (num_items, width) = settings, (len(content[0]), settings["width"])
        self.longest, self.temperature = s["longest"], s["temperature"]
        for number, vectors in enumerate(content):
            self.register_buffer(f"content_{number}", torch.from_numpy(vectors))
        self.adapters = nn.ModuleList(Linear(vectors.shape[1], width) for vectors in content)
        self.embedding = nn.Embedding(num_items, width) if s["item_ids"] else None
        own = [np.ones(num_items, bool)] * s["item_ids"]
        self.register_buffer("present", torch.from_numpy(np.stack([*present, *own], axis=1)))  # [N, M]
        self.num_interests = max(2, round(s["interests"] * num_items))
        self.register_buffer("interest", torch.zeros(num_items, len(content), dtype=torch.long))  # of each vector
        self.position = nn.Embedding(s["longest"], width)
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), Dropout(s["dropout"])
        shape = (width, s["num_heads"], s["dropout"])
        self.over_interests, self.interests_ffn = Attention(*shape), FeedForward(width, s["ffn_width"], s["dropout"])
        self.over_items, self.across, self.items_ffn = (
            Attention(*shape),
            CrossAttention(*shape),
            FeedForward(width, s["ffn_width"], s["dropout"]),
        )
        start(self)
        self.start_epoch(0)

    def catalog(self) -> Tensor:
        """[N, M, D] vectors of each modality, zeros where an item has none."""
        made = [adapter(getattr(self, f"content_{number}")) for number, adapter in enumerate(self.adapters)]
        if self.embedding is not None:
            made.append(self.embedding.weight)
        return torch.stack(made, dim=1) * self.present[:, :, None]

    @torch.no_grad()
    def start_epoch(self, epoch: int) -> None:
        """Cluster the projected content as the weights are now."""
        vectors = F.normalize(self.catalog()[:, : len(self.adapters)], dim=-1).numpy()  # [N, M, D]
        there = self.present[:, : len(self.adapters)].numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fewer different vectors than clusters
            found = MiniBatchKMeans(min(self.num_interests, int(there.sum())), random_state=epoch, n_init=1).fit_predict(vectors[there])
        self.interest[self.present[:, : len(self.adapters)]] = torch.from_numpy(found.astype(np.int64))

    def interests(self, items: Tensor, catalog: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, D] mean vectors of the clusters that a history touches, each once, and [B, C] which are such; one of zeros if there are none."""
        there = self.present[:, : len(self.adapters)]
        total = catalog.new_zeros(self.num_interests, catalog.shape[2])
        total = total.index_add(0, self.interest[there], catalog[:, : len(self.adapters)][there])
        mean = total / torch.bincount(self.interest[there], minlength=self.num_interests).clamp_min(1)[:, None]
        touched = torch.zeros(len(items), self.num_interests + 1, dtype=torch.bool)
        nothing = torch.full((1, there.shape[1]), self.num_interests)
        rows = torch.cat([torch.where(there, self.interest, self.num_interests), nothing])  # of padding too
        touched.scatter_(1, rows[items].flatten(1), True)
        touched = touched[:, :-1]
        most = max(1, int(touched.sum(1).max()))
        known, which = (sorted_[:, :most] for sorted_ in touched.sort(dim=1, descending=True, stable=True))
        return mean[which] * known[:, :, None], known | (torch.arange(most) == 0)

    def forward(self, items: Tensor, catalog: Tensor) -> Tensor:
        known = items < len(catalog)
        interests, there = self.interests(items, catalog)
        interests = self.interests_ffn(self.over_interests(self.dropout(self.norm(interests)), among(there)))
        x = F.embedding(items, F.pad(catalog.sum(1), (0, 0, 0, 1))) + self.position(from_start(known))
        x = self.over_items(self.dropout(self.norm(x)), among(known))
        return self.items_ffn(self.across(x, interests, there[:, None, None]))

    def logits(self, states: Tensor, catalog: Tensor) -> Tensor:
        queries = F.normalize(states, dim=-1) / self.temperature
        similar = torch.stack([product(queries, F.normalize(each, dim=-1)) for each in catalog.unbind(1)], dim=-1)  # [S, N, M]
        lowest = -1 / float(self.temperature or 1)
        weights = similar.masked_fill(~self.present, -torch.inf).softmax(-1)
        return torch.where(self.present.any(1), (weights.nan_to_num() * similar).sum(-1), lowest)


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    vectors, present = zip(*(content_vectors(given.run, given.domain, modality) for modality in given.modalities), strict=True)
    return fit_encoder(MISSRec(list(vectors), list(present), settings), split, settings, given, seed, prefixes=True)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--modalities", nargs="+", default=["text", "image"], help="content to read; one has no dynamic weights")
    compare(arguments.parse_args(), "MISSRec", DEFAULTS, train)
