"""Reads the raw rows of Parquet, CSV and JSON files, plain or gzipped, batch by batch.

Values of Parquet files keep their types; those of CSV and JSON are read as text. A row that cannot be parsed is returned with
the reason and does not stop the file. Folders such as date=2026-01-31 are a column of the files in them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from qbert_ray.inputs import csv_files, json_files, layouts, limits, signatures
from qbert_ray.inputs.arrow_types import plain_table
from qbert_ray.inputs.csv_files import Dialect, Rejected
from qbert_ray.inputs.json_files import REASON, ROW, ROW_LENGTH, Converters, JsonError, as_line
from qbert_ray.inputs.text_files import LATIN, UTF8, Text, TextError, blocks, detect_encoding, open_text

__all__ = [
    "REASON",
    "ROW",
    "ROW_LENGTH",
    "Converters",
    "File",
    "FileError",
    "Fragment",
    "describe",
    "fragments",
    "kind_of",
    "may_hold",
    "read",
]

KINDS = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".inter": "tsv", ".item": "tsv", ".user": "tsv",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
}  # fmt: skip
FRAGMENT_ROWS, FRAGMENT_BYTES = 1 << 18, 128 << 20  # Parquet row groups are read together up to this
BATCH_ROWS, BATCH_BYTES = 1 << 16, 64 << 20
BROKEN = (
    *(pa.ArrowException, pl.exceptions.PolarsError, OSError, EOFError, zlib.error, UnicodeError, JsonError, TextError, RecursionError),
    json.JSONDecodeError,
)
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # how Spark and Hive name the folder of rows without a value


class FileError(ValueError):
    """A file that cannot be read; the message names it."""


@dataclass(frozen=True)
class File:
    path: str  # as the file system takes it
    kind: str
    columns: tuple[str, ...]  # its own, then those of its folders
    row_groups: tuple[tuple[int, int], ...] = ()  # rows and bytes of each row group of a Parquet file
    folders: tuple[tuple[str, str | None], ...] = ()  # column -> value, of folders such as date=2026-01-31
    text: Text = Text()
    dialect: Dialect = Dialect()
    layout: str = json_files.LINES
    schema: pa.Schema | None = None  # of a Parquet file

    @property
    def own_columns(self) -> tuple[str, ...]:
        return self.columns[: len(self.columns) - len(self.folders)]

    @property
    def remark(self) -> str:
        """Unusual properties of how the file is written; empty if there are none."""
        said = []
        if self.text.encoding == LATIN:
            said.append("not UTF-8: read as Windows-1252 (Latin-1)" + (", which seems wrong" if self.text.doubtful else ""))
        elif self.text.encoding != UTF8:
            said.append(self.text.encoding.upper())
        if self.kind in ("csv", "tsv") and self.dialect.delimiter != ("\t" if self.kind == "tsv" else ","):
            said.append({";": "semicolons", "\t": "tabs", ",": "commas"}.get(self.dialect.delimiter, repr(self.dialect.delimiter)))
        if self.layout == layouts.MIND:
            said.append("MIND, without a header")
        elif self.layout != json_files.LINES:
            said.append("one JSON value" if self.layout == json_files.ARRAY else "one JSON object")
        return "; ".join(said)


@dataclass(frozen=True)
class Fragment:
    """The unit that one task reads: some row groups of a Parquet file, or a whole text file."""

    file: File
    first_row: int = 0
    row_groups: tuple[int, ...] = ()
    batch_rows: int = BATCH_ROWS


def kind_of(path: str) -> str | None:
    """parquet, csv, tsv or jsonl by the name of the file; None for others."""
    base = path.lower().removesuffix(".gz")
    return next((kind for suffix, kind in KINDS.items() if base.endswith(suffix)), None)


def describe(filesystem: fs.FileSystem, path: str) -> File:
    """Kind and columns of a file, from its beginning or footer; a file without a header has no columns.

    Raises:
        FileError: the file is unreadable or of no known kind.
    """
    kind = kind_of(path)
    if kind is None:
        what = _foreign(filesystem, path, kind)
        others = (
            f"{path} is none of {', '.join(KINDS)} (those of text also with .gz); call a table of text .csv, whatever is between its cells"
        )
        raise FileError(f"{path} is {what}" if what else others)
    if filesystem.get_file_info(path).size == 0:
        return File(path, kind, ())
    try:
        if what := _foreign(filesystem, path, kind):
            raise FileError(f"{path} cannot be read as {kind}; it is {what}")
        if kind == "parquet":
            return _describe_parquet(filesystem, path)
        text, content, whole = detect_encoding(filesystem, path)
        if kind == "jsonl":
            layout, names = json_files.describe(content, whole)
            limits.check_columns(names)
            return _with_folders(File(path, kind, names, text=text, layout=layout))
        dialect, names = csv_files.header(content, kind)
        limits.check_columns(names)
        if known := layouts.names_of(names):
            columns = layouts.CLICKS if known == layouts.BEHAVIORS else known
            return _with_folders(File(path, kind, columns, text=text, dialect=replace(dialect, header_lines=0), layout=layouts.MIND))
        return _with_folders(File(path, kind, names, text=text, dialect=dialect))
    except JsonError as error:
        raise FileError(f"{path}: {error}") from None
    except gzip.BadGzipFile as error:
        raise FileError(f"{path} cannot be read as {kind}: {signatures.explained(error)}") from None
    except (EOFError, zlib.error) as error:
        raise FileError(f"{path} is damaged: {_brief(error)}") from None
    except (*BROKEN, limits.LimitError) as error:
        raise FileError(f"{path} cannot be read as {kind}: {_brief(error)}") from None


def may_hold(filesystem: fs.FileSystem, file: File, names: Sequence[str]) -> bool:
    """Whether a JSON file, whose lines each name their own columns, has one of some names anywhere as a text; all of it may be read.

    Raises:
        FileError: the file is damaged.
    """
    if file.kind != "jsonl":
        return False
    written = {json.dumps(name, ensure_ascii=ascii_only).encode() for name in names for ascii_only in (True, False)}
    try:
        with open_text(filesystem, file.path) as stream:
            return any(name in block for block in blocks(stream, file.text) for name in written)
    except (*BROKEN, limits.LimitError) as error:
        raise FileError(f"{file.path} is damaged: {_brief(error)}") from None


def _foreign(filesystem: fs.FileSystem, path: str, kind: str | None) -> str:
    """What a file is, if it is of another kind than its name says."""
    if kind is None or kind == "parquet":
        with filesystem.open_input_stream(path, compression=None) as stream:
            return signatures.foreign(stream.read(signatures.HEAD), kind, path)
    with open_text(filesystem, path) as stream:
        return signatures.foreign(stream.read(signatures.HEAD), kind)


def fragments(file: File) -> Iterator[Fragment]:
    """The fragments of a file that tasks read in parallel; they depend on the file alone."""
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
    """Number of the first row, and rows, of each batch of a fragment; reason and row are filled where parsing failed.

    Args:
        converters: wanted column -> how a JSON value becomes text. Columns that the file lacks are left out.

    Raises:
        FileError: the file is damaged.
    """
    reader = {"parquet": _read_parquet, "jsonl": _read_jsonl}.get(fragment.file.kind, _read_csv)
    folders = [pl.lit(value, pl.String).alias(name) for name, value in fragment.file.folders if name in converters]
    first = fragment.first_row
    try:
        for frame in reader(filesystem, fragment, converters):
            if len(frame):
                yield first, frame.with_columns(folders)
            first += len(frame)
    except (*BROKEN, limits.LimitError) as error:
        raise FileError(f"{fragment.file.path} is damaged or not {fragment.file.kind}: {_brief(error)}") from None


def _describe_parquet(filesystem: fs.FileSystem, path: str) -> File:
    parquet = pq.ParquetFile(path, filesystem=filesystem)
    groups = (parquet.metadata.row_group(number) for number in range(parquet.num_row_groups))
    sizes = tuple((group.num_rows, group.total_byte_size) for group in groups)
    limits.check_schema(parquet.schema_arrow)
    schema = parquet.schema_arrow.remove_metadata()
    return _with_folders(File(path, "parquet", tuple(schema.names), sizes, schema=schema))


def _with_folders(file: File) -> File:
    """The file with a column added for each folder of its path such as date=2026-01-31, unless it has that column."""
    pairs = [part.partition("=") for part in file.path.split("/")[:-1]]
    found = {
        unquote(name): None if value == NO_VALUE else unquote(value) for name, equals, value in pairs if equals and name.isidentifier()
    }
    folders = tuple((name, value) for name, value in found.items() if name not in file.columns)
    return File(**{**file.__dict__, "columns": (*file.columns, *(name for name, _ in folders)), "folders": folders}) if folders else file


# one reader per kind


def _read_parquet(filesystem: fs.FileSystem, fragment: Fragment, converters: Converters) -> Iterator[pl.DataFrame]:
    columns = [name for name in dict.fromkeys(fragment.file.own_columns) if name in converters]
    parquet = pq.ParquetFile(fragment.file.path, filesystem=filesystem)
    if not columns:  # only the number of rows is known
        yield pl.DataFrame(
            {REASON: pl.Series([None] * sum(fragment.file.row_groups[group][0] for group in fragment.row_groups), dtype=pl.String)}
        )
        return
    by_number = limits.repeated_columns(parquet.metadata, parquet.schema_arrow, columns)
    if by_number:
        parquet = pq.ParquetFile(fragment.file.path, filesystem=filesystem, metadata=parquet.metadata, read_dictionary=by_number)
    for batch in parquet.iter_batches(fragment.batch_rows, row_groups=list(fragment.row_groups), columns=columns):
        for piece in limits.unpacked(batch):
            yield pl.DataFrame(plain_table(pa.Table.from_batches([piece]), columns))


def _read_csv(filesystem: fs.FileSystem, fragment: Fragment, converters: Converters) -> Iterator[pl.DataFrame]:
    file = fragment.file
    columns = [name for name in file.own_columns if name in converters]
    behaviors = file.layout == layouts.MIND and file.own_columns == layouts.CLICKS
    names, wanted = (layouts.BEHAVIORS, layouts.BEHAVIORS) if behaviors else (file.own_columns, columns)
    broken: list[Rejected] = []
    with open_text(filesystem, file.path) as stream:
        for found in csv_files.read(stream, file.text, file.dialect, names, wanted):
            if isinstance(found, Rejected):
                broken.append(found)
            else:
                yield layouts.clicks(pl.DataFrame(found)).select(columns) if behaviors else pl.DataFrame(found)
    if broken:
        rows = [as_line(row.line, cells=row.cells, columns=len(file.own_columns)) for row in broken]
        yield pl.DataFrame({REASON: [row.reason for row in broken], ROW: rows})


def _read_jsonl(filesystem: fs.FileSystem, fragment: Fragment, converters: Converters) -> Iterator[pl.DataFrame]:
    file = fragment.file
    own = {name: convert for name, convert in converters.items() if name not in dict(file.folders)}
    with open_text(filesystem, file.path) as stream:
        yield from json_files.read(stream, file.text, file.layout, own)


def _brief(error: BaseException) -> str:
    if why := signatures.explained(error):
        return why
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
