"""Encodes modalities whose input is files: threads read and decode them ahead of the encoder, and broken ones are rejected one by one.

N items of a part, J vectors per item, P vectors per piece, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qbert_ray.features.encoders import FileRejected
from qbert_ray.features.modality import Encoded, PartEncoder, Rejected, Source, absent
from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.storage.columns import BYTES_PREFIX, ITEM_ID, PATH_PREFIX

READERS = 8  # threads of an actor that read and decode files while its encoder works


class File(NamedTuple):
    """A file of an item, by its address or by its content; neither: the address was refused."""

    row: int
    path: str | None
    content: bytes | None


class FileEncoder(PartEncoder):
    """Vectors of files. A file becomes one or more pieces, such as windows of sound, and a piece becomes P vectors.

    An item's vectors are those of its files one after the other, up to J; the files after that are not read.
    """

    unit: str  # what the files are called in counts
    per_piece = 1  # P

    @abstractmethod
    def prepare(self, content: bytes) -> list[Any]:
        """The pieces of a file; called in threads.

        Raises:
            FileRejected: with the reason.
        """

    @abstractmethod
    def encode(self, pieces: list[Any]) -> np.ndarray:
        """[pieces, P, D] vectors."""

    def columns(self, source: Source) -> list[str]:
        single = ["image_path", "image_bytes"] if _has_image_column(source) else []
        several = [f"{PATH_PREFIX}{source.modality}", f"{BYTES_PREFIX}{source.modality}"]
        return single + (several if source.modality in source.domain.inputs else [])

    def __call__(self, items: pa.Table, source: Source) -> Encoded:
        vectors, present = absent(len(items), self.num_vectors, self.width)
        files, rejected, surplus = list(files_of(items, source)), dict[int, str](), 0
        fewest = Counter[int]()  # vectors that the files of each row give at least
        addresses, used = source.addresses, []
        for number, file in enumerate(files):
            if fewest[file.row] < self.num_vectors:
                used.append(number)
                fewest[file.row] += self.per_piece
            else:
                surplus += 1
        filled = np.zeros(len(items), int)
        window = max(2 * self.settings.batch_size, READERS)
        with ThreadPoolExecutor(READERS) as threads:
            prepared = ahead(threads, lambda number: self._pieces(files[number], addresses), used, window)
            for numbers, pieces in self._batches(zip(used, prepared, strict=True), rejected):
                for number, encoded in zip(numbers, self.encode(pieces), strict=True):
                    row = files[number].row
                    end = min(filled[row] + self.per_piece, self.num_vectors)
                    vectors[row, filled[row] : end] = encoded[: end - filled[row]]
                    present[row, filled[row] : end] = True
                    filled[row] = end
        rows = [
            (reason, {ITEM_ID: items[ITEM_ID][files[number].row].as_py(), "path": files[number].path})
            for number, reason in rejected.items()
        ]
        return Encoded(vectors, present, self._counts(files, len(items), rows, surplus), rows, self.unit)

    def _counts(self, files: list[File], items: int, rejected: Rejected, surplus: int) -> dict[str, int]:
        counts = {
            self.unit: len(files) - len(rejected) - surplus,
            f"{self.unit}_missing": items - len({file.row for file in files}),
            f"{self.unit}_rejected": len(rejected),
        } | ({f"{self.unit}_over_limit": surplus} if surplus else {})
        return counts | {f"{self.unit}_rejected.{reason}": count for reason, count in Counter(reason for reason, _ in rejected).items()}

    def _pieces(self, file: File, addresses: Addresses) -> list[Any] | str:
        """The pieces of a file, or the reason why it cannot be used."""
        try:
            if file.content is None and not file.path:
                return "unsafe path"
            content = read_image(file.path or "", self.settings.max_bytes, addresses) if file.content is None else file.content
            return self.prepare(content)
        except (AddressError, FileRejected) as error:
            return str(error)

    def _batches(self, prepared: Iterable[tuple[int, list[Any] | str]], rejected: dict[int, str]) -> Iterator[tuple[list[int], list[Any]]]:
        """Numbers of files, and pieces of them, of full batches; files without pieces go to `rejected`."""
        numbers: list[int] = []
        pieces: list[Any] = []
        for number, found in prepared:
            if isinstance(found, str):
                rejected[number] = found
                continue
            for piece in found:
                numbers.append(number)
                pieces.append(piece)
                if len(numbers) == self.settings.batch_size:
                    yield numbers, pieces
                    numbers, pieces = [], []
        if numbers:
            yield numbers, pieces


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
