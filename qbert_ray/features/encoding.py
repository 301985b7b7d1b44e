"""Encodes the texts or the images of one part of the catalog, in an actor of the stage `features`.

J vectors per item, D width, S pixels per side.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qbert_ray.config import schema as config
from qbert_ray.execution.device import own_device
from qbert_ray.features.encoders import ImageEncoder, ImageRejected, TextEncoder, decode_image
from qbert_ray.features.vectors import features_table
from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.storage.columns import DOMAIN, ITEM_ID, KEYS, REJECTED
from qbert_ray.storage.directory import RunDir

READERS = 8  # threads of an actor that read and decode images while its encoder works


def load_text_encoder(settings: config.TextEncoder) -> TextEncoder:
    return TextEncoder(**settings.model_dump(), device=own_device())


def load_image_encoder(settings: config.ImageEncoder) -> ImageEncoder:
    return ImageEncoder(**settings.model_dump(exclude={"max_bytes", "max_pixels"}), device=own_device())


class TextPart:
    """Writes the text vectors of one part of the catalog; equal texts in it are encoded once."""

    def __init__(self, run: RunDir, settings: config.TextEncoder, fields: dict[str, dict[str, str]], num_vectors: int) -> None:
        """Load the encoder.

        Args:
            fields: domain -> column of ingest/items -> prefix of its text.
            num_vectors: J, the most fields of a domain.
        """
        self.run, self.fields, self.num_vectors = run, fields, num_vectors
        self.encoder = load_text_encoder(settings)

    def __call__(self, part: str) -> dict[str, int]:
        fields = self.fields[part.rsplit("-", 1)[0]]
        items = self.run.read_part("ingest/items", part, [*KEYS, *fields])
        present = np.zeros((len(items), self.num_vectors), bool)
        texts = []
        for slot, (column, before) in enumerate(fields.items()):
            stripped = [(text or "").strip() for text in items[column].to_pylist()]
            present[:, slot] = [bool(text) for text in stripped] if stripped else False
            texts += [before + text for text in stripped if text]
        vectors = np.zeros((len(items), self.num_vectors, self.encoder.width), np.float32)
        vectors.transpose(1, 0, 2)[present.T] = self.encoder(texts)  # texts are ordered field by field
        self.run.write_part("features/text", part, features_table(items, vectors, present))
        return {"items": len(items), "text_vectors": len(texts), "items_without_text": int((~present.any(axis=1)).sum())}


class ImagePart:
    """Writes the image vectors of one part of the catalog; threads read and decode ahead of the encoder."""

    def __init__(self, run: RunDir, settings: config.ImageEncoder, num_vectors: int, addresses: dict[str, Addresses]) -> None:
        """Load the encoder.

        Args:
            run: the run directory.
            settings: of the encoder.
            num_vectors: J; more than the encoder gives if another domain has more.
            addresses: domain -> where its images may come from.
        """
        self.run, self.settings, self.num_vectors, self.addresses = run, settings, num_vectors, addresses
        self.encoder = load_image_encoder(settings)

    def __call__(self, part: str) -> dict[str, int]:
        items = self.run.read_part("ingest/items", part, [*KEYS, "image_path", "image_bytes"])
        paths, contents = items["image_path"].to_pylist(), items["image_bytes"].to_pylist()
        given = [row for row in range(len(items)) if paths[row] or contents[row] is not None]
        vectors = np.zeros((len(items), self.num_vectors, self.encoder.width), np.float32)
        rejected: dict[int, str] = {}
        addresses = self.addresses[part.rsplit("-", 1)[0]]
        with ThreadPoolExecutor(READERS) as threads:
            window = max(2 * self.settings.batch_size, READERS)
            images = ahead(threads, lambda row: self._image(paths[row], contents[row], addresses), given, window)
            for rows, batch in self._batches(zip(given, images, strict=True), rejected):
                vectors[rows, : self.encoder.num_vectors] = self.encoder(batch)
        present = np.zeros((len(items), self.num_vectors), bool)
        present[[row for row in given if row not in rejected], : self.encoder.num_vectors] = True
        lost = [(reason, {ITEM_ID: items[ITEM_ID][row].as_py(), "image_path": paths[row]}) for row, reason in rejected.items()]
        write_rejected(self.run, part.removesuffix(".parquet"), "image", "images", lost)
        self.run.write_part("features/image", part, features_table(items, vectors, present))
        return {
            "items": len(items),
            "images": len(given) - len(rejected),
            "images_missing": len(items) - len(given),
            "images_rejected": len(rejected),
        } | {f"images_rejected.{reason}": count for reason, count in Counter(rejected.values()).items()}

    def _image(self, path: str | None, content: bytes | None, addresses: Addresses) -> torch.Tensor | str:
        """[3, S, S] image, or the reason why it cannot be used."""
        try:
            content = read_image(path or "", self.settings.max_bytes, addresses) if content is None else content
            return self.encoder.preprocess(decode_image(content, self.settings.max_bytes, self.settings.max_pixels))
        except (AddressError, ImageRejected) as error:
            return str(error)

    def _batches(
        self, images: Iterable[tuple[int, torch.Tensor | str]], rejected: dict[int, str]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Rows and pixels [B, 3, S, S] of full batches; rows without an image go to `rejected`."""
        rows: list[int] = []
        pixels: list[torch.Tensor] = []
        for row, image in images:
            if isinstance(image, str):
                rejected[row] = image
                continue
            rows.append(row)
            pixels.append(image)
            if len(rows) == self.settings.batch_size:
                yield rows, torch.stack(pixels)
                rows, pixels = [], []
        if rows:
            yield rows, torch.stack(pixels)


def ahead(threads: ThreadPoolExecutor, function: Callable[[Any], Any], inputs: Iterable[Any], window: int) -> Iterator[Any]:
    """`function` of each input, in order; at most `window` results are computed ahead."""
    pending: deque[Future[Any]] = deque()
    for value in inputs:
        pending.append(threads.submit(function, value))
        if len(pending) > window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def write_rejected(run: RunDir, name: str, modality: str, table: str, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Write rejected rows to features/rejected, or remove those of an earlier try if there are none.

    Args:
        name: `<domain>-...`, of a part or a domain.
        table: table that the rows belong to.
        rows: reason and row.
    """
    domain, part = name.rsplit("-", 1)[0], f"{name}.{modality}.parquet"
    if not rows:
        run.delete(f"features/rejected/{part}")
        return
    kept = [{DOMAIN: domain, "table": table, "reason": reason, "row": json.dumps(row, ensure_ascii=False)} for reason, row in rows]
    run.write_part("features/rejected", part, pa.Table.from_pylist(kept, schema=REJECTED))
