"""The kind `text`: each text column gives one vector of an item, by a frozen text encoder."""

from __future__ import annotations

import pyarrow as pa

from qbert_ray.config.data_sections import OF_TEXT_FIELDS
from qbert_ray.config.schema import Features
from qbert_ray.execution.device import own_device
from qbert_ray.features.encoders import TextEncoder
from qbert_ray.features.modality import Encoded, PartEncoder, Source, absent
from qbert_ray.storage.columns import ATTRIBUTE_PREFIX, TEXT_PREFIX


class Encoder(PartEncoder):
    """Equal texts of a part are encoded once."""

    def __init__(self, features: Features, modality: str, num_vectors: int) -> None:
        super().__init__(features, modality, num_vectors)
        self.encoder = TextEncoder(**self.settings.model_dump(), device=own_device())
        self.width = self.encoder.width

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        return len(texts_of(source))

    def columns(self, source: Source) -> list[str]:
        return list(texts_of(source))

    def __call__(self, items: pa.Table, source: Source) -> Encoded:
        vectors, present = absent(len(items), self.num_vectors, self.width)
        texts = []
        for slot, (column, before) in enumerate(texts_of(source).items()):
            stripped = [(text or "").strip() for text in items[column].to_pylist()]
            present[:, slot] = [bool(text) for text in stripped] if stripped else False
            texts += [before + text for text in stripped if text]
        vectors.transpose(1, 0, 2)[present.T] = self.encoder(texts)  # texts are ordered field by field
        counts = {f"{source.modality}_vectors": len(texts), f"items_without_{source.modality}": int((~present.any(axis=1)).sum())}
        return Encoded(vectors, present, counts)


def texts_of(source: Source) -> dict[str, str]:
    """Column of ingest/items -> prefix of its text: a bare value such as "Blue" needs its column's name to be understood."""
    attributes = source.domain.attributes if source.modality in OF_TEXT_FIELDS else []
    named = {f"{ATTRIBUTE_PREFIX}{name}": f"{name.replace('_', ' ')}: " for name in attributes}
    return {f"{TEXT_PREFIX}{name}": "" for name in source.domain.inputs_of(source.modality).texts} | named
