"""Reads a user's own item vectors from Parquet, NumPy, CSV or JSON files, as batches of item_id and lists of numbers.

Parquet (a file or a folder) with `item_id` and `vector` or `vectors`; .npz with arrays of these names; .npy with a structured
array of them, or with a matrix and the IDs of its rows in a file next to it; CSV, TSV or JSON lines with `item_id` and either
`vector` as a list or one column per dimension.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import dataset, fs

from qbert_ray.inputs.arrow_types import plain
from qbert_ray.inputs.readers import REASON, ROW, kind_of
from qbert_ray.inputs.values import as_id
from qbert_ray.storage.columns import ITEM_ID
from qbert_ray.storage.directory import resolve

BATCH_ROWS = 8192
READ = (ITEM_ID, "vector", "vectors")  # arrays of an .npz; others are not unpacked
_INDEX = r"Unnamed: [0-9]+"  # a column of row numbers, as pandas writes it
ID_FILES = ("_ids.npy", ".ids.npy", "_ids.txt", ".ids.txt", "_ids.csv", ".ids.csv")  # after the name of a matrix without .npy


def batches(uri: str) -> Iterator[pa.RecordBatch]:
    """Batches of two columns: item_id as text, and vector or vectors.

    Raises:
        ValueError: there is no such file, or it lacks a column.
    """
    filesystem, path = resolve(uri)
    name = path.lower()
    try:
        if name.endswith((".npy", ".npz")):
            tables = iter([_numpy(filesystem, path, uri)])
        elif kind_of(path) in ("csv", "tsv", "jsonl"):
            tables = iter([_text(filesystem, path, uri)])
        else:
            tables = _parquet(filesystem, path, uri)
        for table in tables:
            for batch in table.to_batches(max_chunksize=BATCH_ROWS):
                if len(batch):
                    yield pa.RecordBatch.from_arrays([_ids(batch.column(0)), plain(batch.column(1))], names=["item_id", "vector"])
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise ValueError(f"no file or folder with vectors at {uri} (Parquet, .npz, .npy, CSV or JSON lines): {error}") from None


def _parquet(filesystem: fs.FileSystem, path: str, uri: str) -> Iterator[pa.Table]:
    found = dataset.dataset(path, filesystem=filesystem, format="parquet")
    name = _column(found.schema.names, uri)
    return (pa.Table.from_batches([batch]) for batch in found.to_batches(columns=[ITEM_ID, name], batch_size=BATCH_ROWS))


def _column(names: list[str], uri: str) -> str:
    found = [name for name in ("vectors", "vector") if name in names]
    if ITEM_ID not in names or not found:
        raise ValueError(f"{uri} must have the columns item_id and vector (or vectors); it has {', '.join(names)}")
    return found[0]


def _numpy(filesystem: fs.FileSystem, path: str, uri: str) -> pa.Table:
    content = _load(filesystem, path, uri)
    if isinstance(content, np.ndarray) and not content.dtype.names:
        if content.ndim not in (2, 3):
            raise ValueError(f"{uri} holds an array of shape {content.shape}; it must be [items, width] or [items, vectors, width]")
        return _table(_row_ids(filesystem, path, uri, len(content)), content, uri)
    names = list(content.dtype.names or ()) if isinstance(content, np.ndarray) else list(content)
    name = _column(names, uri)
    return _table(np.asarray(content[ITEM_ID]), np.asarray(content[name]), uri)


def _load(filesystem: fs.FileSystem, path: str, uri: str) -> np.ndarray | dict[str, np.ndarray]:
    with filesystem.open_input_stream(path) as stream:
        raw = io.BytesIO(stream.read())
    try:
        loaded = np.load(raw, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] if name in READ else np.zeros(0) for name in loaded.files}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{uri} is damaged: {error}; copy it again") from None
    except ValueError as error:
        raise ValueError(
            f"{uri} cannot be read: {error}; save IDs as np.array(ids, dtype=str), since arrays of objects are not opened"
        ) from None


def _row_ids(filesystem: fs.FileSystem, path: str, uri: str, rows: int) -> np.ndarray:
    """IDs of the rows of a matrix, from the file next to it."""
    stem = path[: -len(".npy")]
    names = [f"{stem}{ending}" for ending in ID_FILES]
    found = next((info.path for info in filesystem.get_file_info(names) if info.type == fs.FileType.File), None)
    if found is None:
        raise ValueError(
            f"{uri} is a matrix without the IDs of its rows: write np.savez(path, item_id=ids, vector=matrix), or the IDs, one a line, "
            f"to {stem.rpartition('/')[2]}_ids.txt next to it"
        )
    if found.endswith(".npy"):
        ids = np.asarray(_load(filesystem, found, found))
    else:
        with filesystem.open_input_stream(found) as stream:
            content = stream.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{found} is not in UTF-8: write it so") from None
        lines = [line.strip().strip('"') for line in text.split("\n") if line.strip()]
        ids = np.array(lines[1:] if len(lines) == rows + 1 else lines)
    if len(ids) != rows:
        raise ValueError(f"{found} has {len(ids):,} IDs; {uri} has {rows:,} rows")
    return ids


def _table(ids: np.ndarray, vectors: np.ndarray, uri: str) -> pa.Table:
    if ids.ndim != 1 or len(ids) != len(vectors) or vectors.ndim not in (2, 3):
        raise ValueError(f"{uri}: item_id has the shape {ids.shape} and the vectors {vectors.shape}; as many rows are wanted in both")
    if vectors.dtype.kind not in "fiu":
        raise ValueError(f"{uri}: the vectors are of the type {vectors.dtype}; write them as float32")
    try:
        ids = np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids
    except UnicodeDecodeError:
        raise ValueError(f"{uri}: item_id is not in UTF-8; save the IDs as np.array(ids, dtype=str)") from None
    column = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    for size in reversed(vectors.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return pa.table({ITEM_ID: pa.array(ids), "vector": column})


def _text(filesystem: fs.FileSystem, path: str, uri: str) -> pa.Table:
    """A CSV or JSON table, as `inputs` reads them; a vector is a list in one cell, or the numbers of all other columns."""
    from qbert_ray.inputs import readers
    from qbert_ray.inputs.json_files import json_list

    file = readers.describe(filesystem, path)
    names = list(file.columns)
    width = [column for column in names if column != ITEM_ID and not re.fullmatch(_INDEX, column)]
    if ITEM_ID not in names or not width:
        raise ValueError(f"{uri} must have the column item_id, and vector or one column per dimension; it has {', '.join(names)}")
    wanted = [ITEM_ID, *width]
    frames = [
        frame for fragment in readers.fragments(file) for _, frame in readers.read(filesystem, fragment, dict.fromkeys(wanted, json_list))
    ]
    rows = pl.concat([pl.DataFrame(schema=dict.fromkeys([*wanted, REASON, ROW], pl.String)), *frames], how="diagonal")
    if len(broken := rows.filter(pl.col(REASON).is_not_null())):
        raise ValueError(
            f"{uri} has {len(broken):,} of {len(rows):,} rows that cannot be read, such as {broken[ROW][0]} ({broken[REASON][0]})"
        )
    rows = rows.filter(pl.col(ITEM_ID).is_not_null())
    name = next((name for name in ("vector", "vectors", "embedding") if name in names), None)
    if name:
        return pa.table({ITEM_ID: rows[ITEM_ID].to_arrow(), "vector": _listed(rows[name]).to_arrow()})
    vectors = rows.select(pl.concat_list(pl.col(width).cast(pl.Float32, strict=False)))
    if rows.select(pl.col(width[0]).cast(pl.Float32, strict=False).is_null().all()).item():
        raise ValueError(f"{uri} must have the column vector, or numbers in all columns but item_id; {width[0]} holds none")
    return pa.table({ITEM_ID: rows[ITEM_ID].to_arrow(), "vector": vectors.to_series().to_arrow()})


def _listed(texts: pl.Series) -> pl.Series:
    """Lists of numbers, or lists of such lists where a text has brackets in brackets; commas may be those of decimals: 1,5 2,5."""
    inside = texts.str.replace_all(r"^\s*[\[(]|[\])]\s*$", "")
    if inside.str.contains(r"[\[(]").any():
        return inside.str.extract_all(r"[^\[\]()]*[0-9][^\[\]()]*").list.eval(_numbers(pl.element()))
    return texts.to_frame("text").select(_numbers(pl.col("text"))).to_series()


def _numbers(text: pl.Expr) -> pl.Expr:
    decimal = text.str.contains(r"[0-9],[0-9]+[\s;]+[-+0-9]")
    text = pl.when(decimal).then(text.str.replace_all(r"([0-9]),([0-9])", "$1.$2")).otherwise(text)
    parts = text.str.replace_all(r"[\[\]();,\"'\s]+", " ").str.strip_chars().str.split(" ")
    return parts.list.eval(pl.element().filter(pl.element() != "").cast(pl.Float32, strict=False))


def _ids(values: pa.Array) -> pa.Array:
    """IDs as text, spelled as the ingest spells them."""
    frame = pl.DataFrame(pa.table({ITEM_ID: plain(values)}))
    return frame.select(as_id(pl.col(ITEM_ID), frame.schema[ITEM_ID]).alias(ITEM_ID))[ITEM_ID].to_arrow().cast(pa.string())
