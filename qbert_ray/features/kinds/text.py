"""The kind `text`: each text column gives one vector of an item, by a frozen text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qbert_ray.config.data_sections import OF_TEXT_FIELDS
from qbert_ray.config.schema import Features
from qbert_ray.execution.device import own_device
from qbert_ray.features.encoders import TextEncoder, Tokens
from qbert_ray.features.modality import Encoded, Source, StreamedEncoder, absent
from qbert_ray.storage.columns import ATTRIBUTE_PREFIX, TEXT_PREFIX

CHUNK = 1024  # distinct texts of a chunk


class Texts(NamedTuple):
    """A chunk: distinct texts, then their tokens, then their vectors, and where they belong."""

    texts: Any
    which: np.ndarray  # [P] number of the text at each place
    rows: np.ndarray  # [P] item
    slots: np.ndarray  # [P] column


class Encoder(StreamedEncoder):
    """Equal texts of a part are encoded once."""

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(**self.settings.model_dump(), device=own_device())

    @property
    def width(self) -> int:
        return self.encoder.width

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        return len(texts_of(source))

    def columns(self, source: Source) -> list[str]:
        return list(texts_of(source))

    def __call__(self, items: pa.Table, source: Source) -> Encoded:
        (whole,) = self.chunks(items, source, len(items) * self.num_vectors)
        return self.collect(items, source, [self.encode(self.preparer()(whole))])

    def chunks(self, items: pa.Table, source: Source, size: int = CHUNK) -> list[Texts]:
        number: dict[str, int] = {}  # of each distinct text
        places = []
        for slot, (column, before) in enumerate(texts_of(source).items()):
            for row, text in enumerate(items[column].to_pylist()):
                if stripped := (text or "").strip():
                    places.append((number.setdefault(before + stripped, len(number)), row, slot))
        which, rows, slots = np.array(sorted(places), int).reshape(-1, 3).T
        texts, pieces = list(number), []
        for start in range(0, len(texts) or 1, size or 1):
            here = slice(*np.searchsorted(which, [start, start + size]))
            pieces.append(Texts(texts[start : start + size], which[here] - start, rows[here], slots[here]))
        return pieces

    def preparer(self) -> Callable[[Texts], Texts]:
        return partial(_tokenise, tokens=self.encoder.tokens)

    def encode(self, prepared: Texts) -> Texts:
        return prepared._replace(texts=self.encoder.encode(prepared.texts))

    def collect(self, items: pa.Table, source: Source, encoded: Iterable[Texts]) -> Encoded:
        chunks = list(encoded)
        vectors, present = absent(len(items), self.num_vectors, chunks[0].texts.shape[1])
        for chunk in chunks:
            vectors[chunk.rows, chunk.slots] = chunk.texts[chunk.which]
            present[chunk.rows, chunk.slots] = True
        without = int((~present.any(axis=1)).sum())
        return Encoded(vectors, present, {f"{source.modality}_vectors": int(present.sum()), f"items_without_{source.modality}": without})


def _tokenise(chunk: Texts, tokens: Tokens) -> Texts:
    return chunk._replace(texts=tokens(chunk.texts))


def texts_of(source: Source) -> dict[str, str]:
    """Column of ingest/items -> prefix of its text: a bare value such as "Blue" needs its column's name to be understood."""
    attributes = source.domain.attributes if source.modality in OF_TEXT_FIELDS else []
    named = {f"{ATTRIBUTE_PREFIX}{name}": f"{name.replace('_', ' ')}: " for name in attributes}
    return {f"{TEXT_PREFIX}{name}": "" for name in source.domain.inputs_of(source.modality).texts} | named
