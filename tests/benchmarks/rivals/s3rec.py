"""S3-Rec on a run's sequences: SASRec that is pre-trained on the same sequences, with a softmax over the whole catalog.

    python -m tests.benchmarks.rivals.s3rec runs/scientific scientific results/rivals/ranks.parquet --epochs 60 --patience 5 \\
        --seeds 0 1 2 --set '{"pretrain_epochs": 50}' --set '{"pretrain_epochs": 0}'

S3-Rec (Zhou et al., arXiv 2008.07873). Pre-training looks in both directions and has four losses, weighed as published: attributes of items that are
read (AAP, .2), masked items against others (MIP, 1), attributes of masked items (MAP, 1), and a masked segment against one of another
history (SP, .5). Fine-tuning is that of SASRec here. The published attributes are categories and brands; here they are the most frequent words
of the texts, or published codes (`--codes`), where a catalog has no texts.

Shapes: B histories, T items of the longest, N items, A attributes, D width, S places that are predicted.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor, nn

from qbert_ray.products import Linear, product
from tests.benchmarks.peers_table import Split
from tests.benchmarks.rivals.encoders import among, from_start, read, start
from tests.benchmarks.rivals.mql4grec import read_codes
from tests.benchmarks.rivals.sasrec import DEFAULTS as OF_SASREC
from tests.benchmarks.rivals.sasrec import SASRec
from tests.benchmarks.rivals.training import Settings, Trained, by_length, compare, fit_encoder, padded, parser

DEFAULTS: Settings = OF_SASREC | {"pretrain_epochs": 50, "pretrain_batch_size": 256, "masked": 0.2, "attributes": 1000}
WEIGHTS = {"aap": 0.2, "mip": 1.0, "map": 1.0, "sp": 0.5}


class S3Rec(SASRec):
    """SASRec with a mask, attributes, and a bilinear form for each loss of pre-training.

    Args:
        attributes: [N, A] which item has which.
    """

    def __init__(self, attributes: np.ndarray, settings: Settings) -> None:
        super().__init__(len(attributes), settings)
        width = settings["width"]
        self.register_buffer("attributes", torch.from_numpy(attributes).float())
        self.mask = nn.Parameter(torch.zeros(width))
        self.attribute = nn.Embedding(attributes.shape[1], width)
        self.forms = nn.ModuleDict({name: Linear(width, width) for name in WEIGHTS})
        start(self)

    def both_ways(self, items: Tensor, hidden: Tensor) -> Tensor:
        """[B, T, D] states of left-padded histories [B, T] whose `hidden` [B, T] places show the mask."""
        known = items < len(self.attributes)
        x = torch.where((hidden & known)[:, :, None], self.mask, read(items, self.catalog()))
        x, mask = self.dropout(self.norm(x + self.position(from_start(known)))), among(known)
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            x = ffn(attention(x, mask))
        return x

    def losses(self, items: Tensor, hidden: Tensor, segment: Tensor, foreign: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """Sums over the batch.

        Args:
            items: [B, T] left-padded histories.
            hidden: [B, T] masked places.
            segment: [B, T] places of the segment that is masked for SP.
            foreign: [B, T] items of another history for these places.
            negative: [B, T] an item drawn for each place.
        """
        known = items < len(self.attributes)
        states = self.both_ways(items, hidden)
        masked, shown = hidden & known, known & ~hidden
        found = {}
        for name, places in (("aap", shown), ("map", masked)):
            scores = product(self.forms[name](states[places]), self.attribute.weight)
            found[name] = F.binary_cross_entropy_with_logits(scores, self.attributes[items[places]], reduction="sum")
        predicted, catalog = self.forms["mip"](states[masked]), self.catalog()
        found["mip"] = preferred(predicted, catalog[items[masked]], catalog[negative[masked]])
        around, own, other = (
            self.both_ways(each, places)[:, -1]
            for each, places in ((items, segment), (items, ~segment), (torch.where(segment, foreign, items), ~segment))
        )
        found["sp"] = preferred(self.forms["sp"](around), own, other)
        return found


def preferred(query: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Sum of -log sigmoid(query right - query wrong), all [S, D]."""
    return -F.logsigmoid((query * (right - wrong)).sum(-1)).sum()


def segments(lengths: Tensor, longest: int) -> Tensor:
    """[B, T] places of a segment of each left-padded history, at most half of it (one item of a single one)."""
    size = 1 + (torch.rand(len(lengths)) * (lengths // 2).clamp_min(1)).long()
    begin = longest - lengths + (torch.rand(len(lengths)) * (lengths - size + 1)).long()
    place = torch.arange(longest)
    return (place >= begin[:, None]) & (place < (begin + size)[:, None])


def pretrain(model: S3Rec, split: Split, settings: Settings, seed: int) -> None:
    """Train on all histories for `pretrain_epochs`."""
    histories = [items[-model.longest :] for items in split.every if items]
    lengths, every = np.array([len(items) for items in histories]), torch.tensor([item for items in histories for item in items])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"], fused=True)
    model.train()
    for epoch in range(settings["pretrain_epochs"]):
        total = dict.fromkeys(WEIGHTS, 0.0)
        for rows in by_length(lengths, settings["pretrain_batch_size"], seed, epoch):
            items = padded([histories[row] for row in rows], model.longest, split.num_items)
            hidden = torch.rand(items.shape) < settings["masked"]
            hidden[:, -1] |= ~(hidden & (items < split.num_items)).any(1)  # at least one of each
            negative = torch.randint(split.num_items, items.shape)
            first = torch.randint(len(every), (len(rows), 1))  # items that follow each other somewhere else
            foreign = every[(first + torch.arange(items.shape[1])) % len(every)]
            found = model.losses(items, hidden, segments(torch.from_numpy(lengths[rows]), items.shape[1]), foreign, negative)
            optimizer.zero_grad(set_to_none=True)
            (sum(WEIGHTS[name] * each for name, each in found.items()) / len(rows)).backward()
            optimizer.step()
            total = {name: total[name] + each.item() for name, each in found.items()}
        if epoch % 10 == 9:
            print(
                f"pre-training, epoch {epoch}: " + ", ".join(f"{name} {each / len(histories):.3f}" for name, each in total.items()),
                flush=True,
            )


def words(texts: list[str], most: int) -> np.ndarray:
    """[N, A] which text has which of the most frequent words."""
    found: np.ndarray = CountVectorizer(binary=True, max_features=most, stop_words="english").fit_transform(texts).toarray()
    return found.astype(bool)


def one_hot(codes: np.ndarray) -> np.ndarray:
    """[N, A] which item has which code of codes [N, K], level by level."""
    found: np.ndarray = np.concatenate([codes[:, [level]] == np.unique(codes[:, level]) for level in range(codes.shape[1])], axis=1)
    return found


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    codes = [one_hot(read_codes(given.run, given.domain, path)) for path in given.codes]
    model = S3Rec(np.concatenate(codes, axis=1) if codes else words(split.texts, settings["attributes"]), settings)
    pretrain(model, split, settings, seed)
    return fit_encoder(model, split, settings, given, seed)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--codes", nargs="*", default=[], help="Parquet files with item_id and codes, which are the attributes")
    compare(arguments.parse_args(), "S3-Rec, full softmax", DEFAULTS, train)
