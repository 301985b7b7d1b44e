"""Bounds on untrusted input files: memory, nesting, columns, and symbolic links out of their folder.

A row beyond a bound is rejected with the reason, like any unusable row; a file beyond one is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from qbert_ray.inputs.addresses import is_inside

MOST_LINE = 16 << 20  # bytes of a line of JSONL or CSV; parsed it takes up to 40 times as much
MOST_COLUMNS = 10_000
MOST_NESTED = 64  # lists and mappings inside each other
MOST_VALUE = 64 << 20  # bytes of one text, or one image, of a Parquet file
PIECE_BYTES = 64 << 20  # of Parquet rows that are decoded at once


class LimitError(ValueError):
    """A file is beyond a bound; the message says which."""


def leading_outside(filesystem: fs.FileSystem, paths: list[str], folders: tuple[str, ...]) -> list[str]:
    """Local files that lie in none of some folders once symbolic links are resolved."""
    if not isinstance(filesystem, fs.LocalFileSystem):
        return []
    return [path for path in paths if not is_inside(path, folders)]


def check_columns(names: Iterable[str]) -> None:
    """Raise LimitError if there are more than `MOST_COLUMNS`."""
    if sum(1 for _ in names) > MOST_COLUMNS:
        raise LimitError(f"it has more than {MOST_COLUMNS:,} columns")


def check_schema(schema: pa.Schema) -> None:
    """Raise LimitError if a Parquet file has too many columns, or one whose type is nested too deeply."""
    check_columns(schema.names)
    level = list(schema.types)
    for _ in range(MOST_NESTED):
        level = [kind.field(place).type for kind in level for place in range(kind.num_fields)]
        check_columns(level)  # fields of structs count as columns
    if level:
        raise LimitError(f"a column is nested more than {MOST_NESTED} levels deep")


def repeated_columns(metadata: pq.FileMetaData, schema: pa.Schema, names: Iterable[str]) -> list[str]:
    """Dictionary-encoded columns of texts or bytes, in which a few bytes may decode to gigabytes."""
    wanted = set(names)  # looked for field by field: a file may have two columns of one name, which cannot be asked for by it
    kinds = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    plain = {field.name for field in schema if field.name in wanted and any(kind(field.type) for kind in kinds)}
    found: set[str] = set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = (group.column(place) for place in range(group.num_columns))
        found |= {chunk.path_in_schema for chunk in chunks if chunk.path_in_schema in plain and chunk.has_dictionary_page}
    return sorted(found)


def unpacked(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch with its dictionary-encoded columns decoded, in pieces of about `PIECE_BYTES`.

    Raises:
        LimitError: a value is larger than `MOST_VALUE`.
    """
    lengths = [_lengths(column) for column in batch.columns if pa.types.is_dictionary(column.type)]
    total = sum((pc.sum(each).as_py() or 0) for each in lengths)
    if any((pc.max(each).as_py() or 0) > MOST_VALUE for each in lengths):
        raise LimitError(f"a value is larger than {MOST_VALUE >> 20} MiB")
    rows = max(1, min(len(batch), len(batch) * PIECE_BYTES // max(total, 1)))
    for start in range(0, len(batch), rows):
        piece = batch.slice(start, rows)
        columns = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in piece.columns]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _lengths(column: pa.DictionaryArray) -> pa.Array:
    """Bytes of each row's value."""
    return pc.take(pc.binary_length(column.dictionary), column.indices).cast(pa.int64())
