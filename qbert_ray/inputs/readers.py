"""Rows of Parquet, CSV and JSONL files as they are, plain or gzipped, batch by batch.

Values of Parquet files keep their types; those of CSV and JSONL come as text, because JSONL has no types that hold for a
whole file. A row that cannot be parsed is handed on with the reason instead of stopping the file.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, fs

from qbert_ray.inputs import limits

REASON, ROW = "_reason", "_row"  # of a rejected row: why, and the row as JSON
ROW_LENGTH = 2000  # characters of a rejected row that are kept

KINDS = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
}  # fmt: skip
SAMPLED_LINES = 10_000  # JSONL names its columns line by line; those of so many lines are known when a file is described
FRAGMENT_ROWS, FRAGMENT_BYTES = 1 << 18, 128 << 20  # Parquet row groups are read together up to this
BATCH_ROWS, BATCH_BYTES = 1 << 16, 64 << 20
BROKEN = (pa.ArrowException, pl.exceptions.PolarsError, OSError, EOFError, zlib.error, UnicodeDecodeError)

Converters = Mapping[str, Callable[[Any], str | None]]


class FileError(ValueError):
    """A file that cannot be read; the message names it."""


@dataclass(frozen=True)
class File:
    path: str  # as the file system takes it
    kind: str
    columns: tuple[str, ...]
    row_groups: tuple[tuple[int, int], ...] = ()  # rows and bytes of each row group of a Parquet file


@dataclass(frozen=True)
class Fragment:
    """What one task reads: some row groups of a Parquet file, or a whole file of text."""

    file: File
    first_row: int = 0
    row_groups: tuple[int, ...] = ()
    batch_rows: int = BATCH_ROWS


def kind_of(path: str) -> str | None:
    """parquet, csv, tsv or jsonl by the name of the file; None for others."""
    base = path.lower().removesuffix(".gz")
    return next((kind for suffix, kind in KINDS.items() if base.endswith(suffix)), None)


def describe(filesystem: fs.FileSystem, path: str) -> File:
    """Kind and columns of a file, looked into but not read.

    Raises:
        FileError: the file is empty, unreadable or of no known kind.
    """
    kind = kind_of(path)
    if kind is None:
        raise FileError(f"{path} is none of {', '.join(KINDS)} (those of text also with .gz)")
    if filesystem.get_file_info(path).size == 0:
        raise FileError(f"{path} is empty")
    try:
        if kind == "parquet":
            parquet = pq.ParquetFile(path, filesystem=filesystem)
            limits.check_schema(parquet.schema_arrow)
            groups = (parquet.metadata.row_group(number) for number in range(parquet.num_row_groups))
            return File(path, kind, tuple(parquet.schema_arrow.names), tuple((group.num_rows, group.total_byte_size) for group in groups))
        with _open(filesystem, path) as stream:
            return File(path, kind, _jsonl_columns(stream, path) if kind == "jsonl" else _csv_columns(stream, kind))
    except (*BROKEN, limits.LimitError) as error:
        raise FileError(f"{path} cannot be read as {kind}: {_brief(error)}") from None


def fragments(file: File) -> Iterator[Fragment]:
    """The pieces that tasks read side by side; they depend on the file alone."""
    if file.kind != "parquet":
        yield Fragment(file)
        return
    groups: list[int] = []
    first = rows = size = 0
    for group, (group_rows, group_bytes) in enumerate(file.row_groups):
        groups, rows, size = [*groups, group], rows + group_rows, size + group_bytes
        if rows >= FRAGMENT_ROWS or size >= FRAGMENT_BYTES or group == len(file.row_groups) - 1:
            batch_rows = min(BATCH_ROWS, max(16, BATCH_BYTES * rows // max(size, 1)))
            yield Fragment(file, first, tuple(groups), batch_rows)
            groups, first, rows, size = [], first + rows, 0, 0


def read(filesystem: fs.FileSystem, fragment: Fragment, converters: Converters) -> Iterator[tuple[int, pl.DataFrame]]:
    """Batches of a fragment with the number of their first row; reason and row are filled where parsing failed.

    Args:
        converters: wanted column -> how a JSON value becomes text. Columns that the file lacks are left out.

    Raises:
        FileError: the file is damaged.
    """
    reader = {"parquet": _read_parquet, "jsonl": _read_jsonl}.get(fragment.file.kind, _read_csv)
    try:
        yield from reader(filesystem, fragment, converters)
    except (*BROKEN, limits.LimitError) as error:
        raise FileError(f"{fragment.file.path} is damaged or not {fragment.file.kind}: {_brief(error)}") from None


def plain_text(value: Any) -> str | None:
    """A JSON value as text: whole numbers without .0, lists joined with a comma, mappings as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, list):
        texts = (text.strip() for text in map(plain_text, value) if text)
        return ", ".join(text for text in texts if text)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def first_image(value: Any) -> str | None:
    """Path or URL in a JSON value: the text itself, the first of a list, or what Amazon's and Hugging Face's mappings hold."""
    if isinstance(value, list):
        return next(filter(None, map(first_image, value)), None)
    if isinstance(value, dict):
        return next(filter(None, (first_image(value.get(key)) for key in ("large", "hi_res", "path"))), None)
    return value if isinstance(value, str) else None


def _csv_columns(stream: BinaryIO, kind: str) -> tuple[str, ...]:
    names = tuple(csv.open_csv(stream, **_csv_options(kind, lambda _: "skip")).schema.names)
    limits.check_columns(names)
    return names


def _jsonl_columns(stream: BinaryIO, path: str) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for line in itertools.islice(limits.lines(stream), SAMPLED_LINES):
        if not names and line.startswith(b"["):
            raise FileError(f"{path} is one JSON array; write one object a line (JSONL)")
        names |= dict.fromkeys(_parse(line) or {})
        limits.check_columns(names)
    if not names:
        raise FileError(f"{path}: none of the first {SAMPLED_LINES:,} lines is a JSON object (Python literals are not JSON)")
    return tuple(names)


# one reader per kind


def _read_parquet(filesystem: fs.FileSystem, fragment: Fragment, converters: Converters) -> Iterator[tuple[int, pl.DataFrame]]:
    columns = [name for name in fragment.file.columns if name in converters]
    first = fragment.first_row
    parquet = pq.ParquetFile(fragment.file.path, filesystem=filesystem)
    by_number = limits.repeated_columns(parquet.metadata, parquet.schema_arrow, columns)
    if by_number:
        parquet = pq.ParquetFile(fragment.file.path, filesystem=filesystem, metadata=parquet.metadata, read_dictionary=by_number)
    for batch in parquet.iter_batches(fragment.batch_rows, row_groups=list(fragment.row_groups), columns=columns):
        for piece in limits.unpacked(batch):
            yield first, pl.DataFrame(pa.Table.from_batches([piece]).select(columns))
            first += len(piece)


def _read_csv(filesystem: fs.FileSystem, fragment: Fragment, converters: Converters) -> Iterator[tuple[int, pl.DataFrame]]:
    columns = [name for name in fragment.file.columns if name in converters]
    broken: list[str] = []

    def keep(row: csv.InvalidRow) -> str:
        broken.append(row.text)
        return "skip"

    convert = csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns)
    first = 0
    with _open(filesystem, fragment.file.path) as stream:
        for batch in csv.open_csv(stream, **_csv_options(fragment.file.kind, keep), convert_options=convert):
            yield first, pl.DataFrame(pa.Table.from_batches([batch]))
            first += len(batch)
    if broken:
        yield first, pl.DataFrame({REASON: ["invalid CSV row"] * len(broken), ROW: [_line(text) for text in broken]})


def _csv_options(kind: str, invalid_row_handler: Callable[[csv.InvalidRow], str]) -> dict[str, Any]:
    delimiter = "\t" if kind == "tsv" else ","
    return {
        "read_options": csv.ReadOptions(use_threads=False, block_size=16 << 20),
        "parse_options": csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=invalid_row_handler),
    }


def _read_jsonl(filesystem: fs.FileSystem, fragment: Fragment, converters: Converters) -> Iterator[tuple[int, pl.DataFrame]]:
    first = 0
    with _open(filesystem, fragment.file.path) as stream:
        for batch in limits.batches(limits.lines(stream), BATCH_ROWS // 4, BATCH_BYTES):
            yield first, _parse_lines(batch, converters)
            first += len(batch)


def _parse_lines(lines: list[bytes], converters: Converters) -> pl.DataFrame:
    records = [_parse(line) for line in lines]
    broken = [line if record is None else None for record, line in zip(records, lines, strict=True)]
    data: dict[str, list[str | None]] = {
        name: [None if record is None else convert(record.get(name)) for record in records] for name, convert in converters.items()
    }
    data[REASON] = [line and "invalid JSON" for line in broken]  # type: ignore[misc]
    data[ROW] = [line and _line(line.decode(errors="replace")) for line in broken]  # type: ignore[misc]
    try:
        return pl.DataFrame(data, schema=dict.fromkeys(data, pl.String))
    except UnicodeEncodeError:  # JSON can spell halves of a character, which UTF-8 cannot
        data = {name: [value and value.encode(errors="replace").decode() for value in values] for name, values in data.items()}
        return pl.DataFrame(data, schema=dict.fromkeys(data, pl.String))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    deep = line.count(b"[") + line.count(b"{") > limits.MOST_NESTED and _is_deep(record)
    return record if isinstance(record, dict) and not deep else None


def _is_deep(value: Any) -> bool:
    """Whether a value is nested past `limits.MOST_NESTED`; by a number, since how much Python's stack bears depends on who calls."""
    level = [value]
    for _ in range(limits.MOST_NESTED):
        level = [
            inner for outer in level if isinstance(outer, dict | list) for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _line(text: str) -> str:
    return json.dumps({"line": text[:ROW_LENGTH]}, ensure_ascii=False)[:ROW_LENGTH]


def _open(filesystem: fs.FileSystem, path: str) -> BinaryIO:
    # Python's gzip rather than Arrow's: published dumps are at times several gzip streams in a row.
    stream = filesystem.open_input_stream(path, compression=None)
    return gzip.GzipFile(fileobj=stream) if path.lower().endswith(".gz") else io.BufferedReader(stream)  # type: ignore[return-value]


def _brief(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
