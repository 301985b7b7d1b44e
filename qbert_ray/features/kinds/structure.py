"""The kind `structure`: collaborative vectors of the training interactions (§3.1)."""

from __future__ import annotations

import numpy as np

from qbert_ray.config.schema import Features
from qbert_ray.features.modality import DomainEncoder, Encoded, Source, absent
from qbert_ray.features.structure import co_occurrence, collaborative_vectors
from qbert_ray.storage.columns import ITEM_INDEX, to_sequences
from qbert_ray.storage.directory import RunDir

SEED = 0  # of the factorisation; not a setting, since another seed only changes the last digits


class Encoder(DomainEncoder):
    """One vector for each item that training users had together with another; items that were appended later have none."""

    def __init__(self, features: Features, modality: str) -> None:
        super().__init__(features, modality)
        self.width = self.settings.dim

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        return 1

    def __call__(self, run: RunDir, source: Source, num_vectors: int) -> Encoded:
        count = run.read("ingest/items", source.name, [ITEM_INDEX]).num_rows
        indptr, items, weights = _training_items(run, source.name)
        together = co_occurrence(indptr, items, count, self.settings.window, weights)
        vectors, present = absent(count, num_vectors, self.width)
        vectors[:, 0] = collaborative_vectors(together, self.settings.dim, SEED)
        present[:, 0] = vectors[:, 0].any(axis=1)
        return Encoded(vectors, present, {})


def _training_items(run: RunDir, domain: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Offsets [U + 1] of each user's training items, the items of all users, and their weights where they have any."""
    if not run.parts("ingest/sequences", domain):
        return np.zeros(1, np.int64), np.zeros(0, np.int64), None
    sequences = to_sequences(run.read("ingest/sequences", domain))
    return sequences.indptr, sequences.items, sequences.weights
