"""The kind `lexical`: one vector of all texts of an item, from the words that it shares with others."""

from __future__ import annotations

import pyarrow as pa

from qbert_ray.config.schema import Features
from qbert_ray.features.kinds.text import texts_of
from qbert_ray.features.lexical import LexicalModel
from qbert_ray.features.modality import Encoded, FittedEncoder, Source, absent
from qbert_ray.random_streams import TEXT_STREAM, uniform
from qbert_ray.storage.catalog import warm_items
from qbert_ray.storage.columns import COLD, ITEM_INDEX
from qbert_ray.storage.directory import RunDir

SEED = 0  # of the factorisation; not a setting, since another seed only changes the last digits


class Encoder(FittedEncoder):
    """Terms and singular vectors are fitted on the items of all domains but cold ones, so that their vectors can be compared."""

    def __init__(self, features: Features, modality: str, num_vectors: int) -> None:
        super().__init__(features, modality, num_vectors)
        self.model: LexicalModel

    @property
    def width(self) -> int:
        return int(self.settings.dim)

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        return 1

    def columns(self, source: Source) -> list[str]:
        return list(texts_of(source))

    def fit(self, run: RunDir, sources: list[Source], folder: str) -> None:
        total = sum(warm_items(run, source.name) for source in sources)
        share = min(1.0, self.settings.fitted_on / max(total, 1))
        texts: list[str] = []
        for number, source in enumerate(sources):
            for part in run.parts("ingest/items", source.name):
                items = run.read_part("ingest/items", part, [ITEM_INDEX, COLD, *self.columns(source)])
                drawn = uniform(TEXT_STREAM, number, items[ITEM_INDEX].to_numpy(), 1)[:, 0] < share
                drawn &= ~items[COLD].to_numpy()  # their terms are as new to the model as they will be
                texts += _joined(items.filter(pa.array(drawn)), self.columns(source))
        LexicalModel.fit(texts, self.width, self.settings.max_terms, SEED).save(run, folder)

    def load(self, run: RunDir, folder: str) -> None:
        self.model = LexicalModel.load(run, folder)

    def __call__(self, items: pa.Table, source: Source) -> Encoded:
        vectors, present = absent(len(items), self.num_vectors, self.width)
        vectors[:, 0], present[:, 0] = self.model(_joined(items, self.columns(source)))
        counts = {f"{source.modality}_vectors": int(present.sum()), f"items_without_{source.modality}": int((~present[:, 0]).sum())}
        return Encoded(vectors, present, counts)


def _joined(items: pa.Table, columns: list[str]) -> list[str]:
    """The texts of each item, one after another; empty ones where a domain has no column of texts."""
    lists = [items[column].to_pylist() for column in columns]
    return [" ".join(filter(None, (texts[row] for texts in lists))) for row in range(len(items))]
