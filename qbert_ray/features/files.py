"""Encodes modalities whose input is files: they are read and decoded ahead of the encoder, and broken ones are rejected one by one.

N items of a part, J vectors per item, P vectors per piece, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from qbert_ray.execution.device import own_device
from qbert_ray.features.encoders import FileRejected
from qbert_ray.features.modality import Encoded, Rejected, Source, StreamedEncoder, absent
from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.storage.columns import BYTES_PREFIX, ITEM_ID, PATH_PREFIX

READERS = 8  # threads that wait for files, or that decode for a GPU
CHUNK = 256  # pieces of a chunk, or one batch if that is more: a tenth of a second of a large encoder on a GPU, and 40 MB of pixels


class File(NamedTuple):
    """A file of an item, by its address or by its content; neither: the address was refused."""

    row: int
    path: str | None
    content: bytes | None


class Files(NamedTuple):
    """A chunk: files to read, item by item, and the further files of these items, which already have J vectors unless some are rejected."""

    files: list[File]
    addresses: Addresses
    spare: dict[int, list[File]]  # by row


class Batch(NamedTuple):
    """At most `batch_size` pieces. After the encoder they are vectors."""

    pieces: Any  # as `FileEncoder.stack` makes them, or [pieces, P, D] vectors; None if there are none
    rows: list[int]  # of the item that each piece is of
    files: list[int]  # of the item that each file is of
    rejected: list[tuple[str, int, str | None]]  # reason, row and path of each file that cannot be used
    surplus: int  # spare files that were not read


class FileEncoder(StreamedEncoder):
    """Vectors of files. A file becomes one or more pieces, such as windows of sound, and a piece becomes P vectors.

    An item's vectors are those of its files one after the other, up to J; the files after that are read in place of rejected ones.
    """

    unit: str  # what the files are called in counts

    @property
    def per_piece(self) -> int:
        """P."""
        return 1

    @property
    def most_pieces(self) -> int:
        """Of a file."""
        return 1

    @abstractmethod
    def decoder(self) -> Callable[[bytes], list[Any]]:
        """A function of a file's content that gives its pieces, or raises `FileRejected`; it can be pickled, and called in threads."""

    @staticmethod
    def stack(pieces: list[Any]) -> Any:
        """Pieces as one array, or some arrays."""
        return np.stack(pieces)

    @abstractmethod
    def encode_pieces(self, pieces: Any) -> np.ndarray:
        """[pieces, P, D] vectors of stacked pieces."""

    def columns(self, source: Source) -> list[str]:
        single = ["image_path", "image_bytes"] if _has_image_column(source) else []
        several = [f"{PATH_PREFIX}{source.modality}", f"{BYTES_PREFIX}{source.modality}"]
        return single + (several if source.modality in source.domain.inputs else [])

    def __call__(self, items: pa.Table, source: Source) -> Encoded:
        """The vectors of some rows; threads read and decode the next files while a batch is encoded."""
        (whole,), prepare = self.chunks(items, source, len(items) * self.num_vectors), self.preparer()
        # Next to an encoder on the CPU, as many threads decode as the worker has CPUs: more take turns holding Python's lock, and sounds,
        # which are decoded in many short steps, then take twice as long. A GPU should not wait.
        with ThreadPoolExecutor(torch.get_num_threads() if own_device() == "cpu" else READERS) as threads:
            decoded = ahead(threads, prepare.decoded, prepare.contents(whole), 2 * self.settings.batch_size)
            return self.collect(items, source, (self.encode([batch]) for batch in prepare.batches(whole, decoded)))

    def chunks(self, items: pa.Table, source: Source, size: int | None = None) -> list[Files]:
        most = -(-self.num_vectors // self.per_piece)  # files of an item that give J vectors at least
        size = size or max(1, max(CHUNK, self.settings.batch_size) // self.most_pieces)
        chunks = [Files([], source.addresses, {})]
        for row, its in groupby(files_of(items, source), key=lambda file: file.row):
            files = list(its)
            if len(chunks[-1].files) >= size:
                chunks.append(Files([], source.addresses, {}))
            chunks[-1].files.extend(files[:most])
            if files[most:]:
                chunks[-1].spare[row] = files[most:]
        return chunks

    def preparer(self) -> Preparer:
        return Preparer(self.decoder(), self.stack, self.settings.batch_size, self.settings.max_bytes)

    def encode(self, prepared: list[Batch]) -> list[Batch]:
        nothing = np.zeros((0, self.per_piece, self.width), np.float32)
        return [batch._replace(pieces=self.encode_pieces(batch.pieces) if batch.rows else nothing) for batch in prepared]

    def collect(self, items: pa.Table, source: Source, encoded: Iterable[list[Batch]]) -> Encoded:
        vectors = present = None
        files, surplus, filled = list[int](), 0, np.zeros(len(items), int)
        rejected: Rejected = []
        for batch in (batch for chunk in encoded for batch in chunk):
            if vectors is None or present is None:
                vectors, present = absent(len(items), self.num_vectors, batch.pieces.shape[2])
            for row, piece in zip(batch.rows, batch.pieces, strict=True):
                end = min(filled[row] + self.per_piece, self.num_vectors)
                vectors[row, filled[row] : end] = piece[: end - filled[row]]
                present[row, filled[row] : end] = True
                filled[row] = end
            rejected += [(reason, {ITEM_ID: items[ITEM_ID][row].as_py(), "path": path}) for reason, row, path in batch.rejected]
            files += batch.files
            surplus += batch.surplus
        assert vectors is not None and present is not None
        counts = {
            self.unit: len(files) - len(rejected),
            f"{self.unit}_missing": len(items) - len(set(files)),
            f"{self.unit}_rejected": len(rejected),
        } | ({f"{self.unit}_over_limit": surplus} if surplus else {})
        counts |= {f"{self.unit}_rejected.{reason}": count for reason, count in Counter(reason for reason, _ in rejected).items()}
        return Encoded(vectors, present, counts, rejected, self.unit)


@dataclass(frozen=True)
class Preparer:
    """Reads and decodes a chunk of files."""

    decode: Callable[[bytes], list[Any]]
    stack: Callable[[list[Any]], Any]
    batch_size: int
    max_bytes: int

    def __call__(self, chunk: Files) -> list[Batch]:
        """Decoding has one CPU and takes one thread."""
        return list(self.batches(chunk, map(self.decoded, self.contents(chunk))))

    def contents(self, chunk: Files) -> Iterator[bytes | str]:
        """What `content` gives for each file; threads wait for those that have to be read."""
        if all(file.content is not None for file in chunk.files):
            yield from (file.content or b"" for file in chunk.files)
            return
        with ThreadPoolExecutor(READERS) as threads:
            yield from ahead(threads, lambda file: self.content(file, chunk.addresses), chunk.files, 2 * READERS)

    def content(self, file: File, addresses: Addresses) -> bytes | str:
        """The content of a file, or the reason why there is none."""
        if file.content is not None:
            return file.content
        try:
            return read_image(file.path, self.max_bytes, addresses) if file.path else "unsafe path"
        except AddressError as error:
            return str(error)

    def decoded(self, content: bytes | str) -> list[Any] | str:
        """The pieces of a file, or the reason why it cannot be used."""
        try:
            return content if isinstance(content, str) else self.decode(content)
        except FileRejected as error:
            return str(error)

    def batches(self, chunk: Files, decoded: Iterable[list[Any] | str]) -> Iterator[Batch]:
        """Full batches, and the rest, which may be empty."""
        pieces: list[Any] = []
        batch = Batch(None, [], [], [], sum(map(len, chunk.spare.values())))
        for file, found, spare in self._with_spare(chunk, decoded):
            batch = batch._replace(surplus=batch.surplus - spare)
            batch.files.append(file.row)
            if isinstance(found, str):
                batch.rejected.append((found, file.row, file.path))
                continue
            for piece in found:
                batch.rows.append(file.row)
                pieces.append(piece)
                if len(pieces) == self.batch_size:
                    yield batch._replace(pieces=self.stack(pieces))
                    pieces, batch = [], Batch(None, [], [], [], 0)
        yield batch._replace(pieces=self.stack(pieces) if pieces else None)

    def _with_spare(self, chunk: Files, decoded: Iterable[list[Any] | str]) -> Iterator[tuple[File, list[Any] | str, bool]]:
        """Each file with its pieces or the reason why it is rejected; after those of an item as many spare ones as were rejected (True)."""
        for row, pairs in groupby(zip(chunk.files, decoded, strict=True), key=lambda pair: pair[0].row):
            rejected = 0
            for file, found in pairs:
                rejected += isinstance(found, str)
                yield file, found, False
            for file in chunk.spare.get(row, []):
                if not rejected:
                    break
                found = self.decoded(self.content(file, chunk.addresses))
                rejected -= not isinstance(found, str)
                yield file, found, True


def _has_image_column(source: Source) -> bool:
    return source.modality == "image" and (source.domain.image_column is not None or source.domain.image_template is not None)


def files_of(items: pa.Table, source: Source) -> Iterator[File]:
    """The files of some items, item by item."""
    nothing = [None] * len(items)
    names = items.column_names
    paths, contents = (
        items[name].to_pylist() if name in names and _has_image_column(source) else nothing for name in ("image_path", "image_bytes")
    )
    lists = [
        items[f"{prefix}{source.modality}"].to_pylist() if f"{prefix}{source.modality}" in names else nothing
        for prefix in (PATH_PREFIX, BYTES_PREFIX)
    ]
    for row in range(len(items)):
        if paths[row] or contents[row] is not None:
            yield File(row, paths[row], contents[row])
        for path, content in zip(lists[0][row] or [], lists[1][row] or [], strict=True):
            yield File(row, path, content)


def ahead(threads: ThreadPoolExecutor, function: Callable[[Any], Any], inputs: Iterable[Any], window: int) -> Iterator[Any]:
    """`function` of each input, in order; at most `window` results are computed ahead."""
    pending: deque[Future[Any]] = deque()
    for value in inputs:
        pending.append(threads.submit(function, value))
        if len(pending) > window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
