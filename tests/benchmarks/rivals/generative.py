"""What rivals that write IDs share, on top of `sequence/decoder.py` and `sequence/beam_search.py`.

Shapes: B histories, N items, K codes of an ID, R rows of a catalog of IDs (an item may have several), W beams.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qbert_ray.sequence.beam_search import Beams, Trie, search
from qbert_ray.sequence.decoder import Generator
from tests.benchmarks.peers_table import Split, ndcg, ranks
from tests.benchmarks.rivals.training import Scores, Settings

# Half of TIGER's layers and a quarter of its MLPs: what one core trains in well under an hour.
SMALL: Settings = {"width": 128, "num_layers": 2, "num_heads": 4, "head_width": 32, "ffn_width": 512, "dropout": 0.1}
VALIDATED = 2000  # users; decoding is not cheap


class Sample(NamedTuple):
    """Rows of the catalog that are read, and the one whose ID is to be written."""

    read: np.ndarray
    target: int


def generator(num_levels: int, codebook_size: int, max_items: int, settings: Settings) -> Generator:
    """A `Generator` of the sizes among the settings."""
    return Generator(num_levels, codebook_size, max_items=max_items, **{name: settings[name] for name in SMALL})


def prefixes(histories: list[list[int]], longest: int) -> list[Sample]:
    """Every prefix of every training history, cut to its latest items, and the item after it."""
    arrays = [np.array(history, np.int64) for history in histories]
    return [Sample(each[max(0, end - longest) : end], int(each[end])) for each in arrays for end in range(1, len(each))]


def token_loss(model: Generator, catalog: np.ndarray, samples: list[Sample]) -> Tensor:
    """Mean cross-entropy of the codes of the targets.

    Args:
        catalog: [R, K] codes.
    """
    lengths = np.array([len(sample.read) for sample in samples])
    reading = model.read(np.concatenate([sample.read for sample in samples]), lengths, catalog)
    targets = np.array([sample.target for sample in samples])[reading.order]
    return model.loss(reading, torch.from_numpy(catalog[targets])) / (len(samples) * catalog.shape[1])


def listed(model: Generator, catalog: np.ndarray, trie: Trie, histories: list[np.ndarray], beam: int, rows: range) -> Tensor:
    """[B, N] mean log-probability of a token of each item's ID; minus infinity for items that are in no beam.

    Args:
        catalog: [R, K] codes.
        trie: of those rows of the catalog that may be written.
        rows: those rows; the first is of item 0.
    """
    found: Beams = search(model, catalog, trie, histories, beam)
    scores = torch.full((len(histories), len(rows) + 1), -torch.inf)  # the last column is of beams that are empty
    place = torch.where(found.items >= 0, found.items - rows.start, len(rows))
    return scores.scatter(1, place, found.scores / (catalog.shape[1] + 1))[:, :-1]  # with an end token, which is certain


def valid_ndcg(scores: Scores, split: Split) -> float:
    """ndcg@10 of the validation items of `VALIDATED` users, among all items; those in no beam rank last."""
    return ndcg(ranks(scores, split.train[:VALIDATED], split.valid[:VALIDATED], 1)[0])


def allowed(rows: range, total: int) -> Tensor:
    """[total] True for some rows of a catalog."""
    return F.pad(torch.ones(len(rows), dtype=torch.bool), (rows.start, total - rows.stop))


def cut(histories: Any, longest: int) -> list[np.ndarray]:
    """The latest items of histories, as arrays."""
    return [np.array(history[-longest:], np.int64) for history in histories]
