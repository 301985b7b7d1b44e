"""Reads every element of the columns that `inputs` names: files as paths or bytes, values as lists of texts.

A cell holds one element or a list; in CSV and JSONL a list is written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import polars as pl

from qbert_ray.inputs.image_columns import TEXT, image_bytes, image_path, unread_image
from qbert_ray.inputs.values import Kind, as_text
from qbert_ray.storage.columns import BYTES_PREFIX, PATH_PREFIX

MOST_ELEMENTS = 1000  # of a cell that are read


def as_values(value: pl.Expr, kind: Kind) -> pl.Expr:
    """A JSON list of the texts in a cell, nested lists flattened; null if there are none."""
    if isinstance(kind, pl.Array):
        value, kind = value.arr.to_list(), pl.List(kind.inner)
    if isinstance(kind, pl.List):
        inner = as_values(pl.element(), kind.inner) if isinstance(kind.inner, pl.List | pl.Array) else as_text(pl.element(), kind.inner)
        lists = value.list.head(MOST_ELEMENTS).list.eval(inner)
    else:
        lists = pl.concat_list(as_text(value, kind))
    return lists.map_elements(_as_json, return_dtype=pl.String)


def _as_json(texts: pl.Series) -> str | None:
    flat = [text for given in texts if given for text in _elements(given)]
    return json.dumps(flat[:MOST_ELEMENTS], ensure_ascii=False) if flat else None


def _elements(text: str) -> Iterator[str]:
    """The texts of a list that is written as JSON; any other text itself."""
    if not text.startswith("["):
        yield text
        return
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        yield text
        return
    yield from _flat(found)


def _flat(value: object) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    elif value is not None and str(value).strip():
        yield str(value).strip()


def file_lists(columns: pl.DataFrame) -> tuple[pl.Series, pl.Series]:
    """Lists of the paths and of the contents of all files in some columns, row by row and of equal length; either is null, not both."""
    frames = [columns.select(_paths(pl.col(name), kind).alias("path"), _contents(pl.col(name), kind).alias("bytes"), pl.int_range(pl.len()).alias("row"))
              for name, kind in columns.schema.items()]  # fmt: skip
    parts = [
        frame.filter(pl.col("path").list.len() > 0)
        .explode("path", "bytes")
        .filter(pl.any_horizontal(pl.col("path", "bytes").is_not_null()))
        for frame in frames
    ]
    empty = pl.DataFrame(schema={"path": pl.String, "bytes": pl.Binary, "row": pl.Int64})
    found = pl.concat([empty, *parts]).group_by("row", maintain_order=True).agg("path", "bytes")
    rows = pl.DataFrame({"row": pl.int_range(len(columns), eager=True)}).join(found, on="row", how="left", maintain_order="left")
    return rows["path"], rows["bytes"]


def several_files(
    modality: str, paths: pl.Series, contents: pl.Series, safe: Callable[[pl.Series], pl.Series]
) -> tuple[pl.Series, pl.Series]:
    """The columns of a modality's files in ingest/items; a path that may not be followed is null, and is rejected with the features."""
    rows = pl.DataFrame({"path": paths, "bytes": contents}).with_row_index("row").drop_nulls("path")
    flat = rows.explode("path", "bytes").with_columns(pl.when(pl.col("bytes").is_null()).then("path").alias("path"))
    flat = flat.with_columns(safe(flat["path"]).alias("path"))
    lists = pl.DataFrame({"row": pl.int_range(len(paths), eager=True, dtype=pl.UInt32)}).join(
        flat.group_by("row", maintain_order=True).agg("path", "bytes"), on="row", how="left", maintain_order="left"
    )
    return lists["path"].alias(f"{PATH_PREFIX}{modality}"), lists["bytes"].alias(f"{BYTES_PREFIX}{modality}")


def _paths(value: pl.Expr, kind: Kind) -> pl.Expr:
    """[list] the path of each file in a cell; null where it is given as bytes."""
    if isinstance(kind, pl.Array):
        value, kind = value.arr.to_list(), pl.List(kind.inner)
    if isinstance(kind, pl.List) and not kind.inner.is_integer():
        return value.list.head(MOST_ELEMENTS).list.eval(_path(pl.element(), kind.inner))
    return _listed(value, kind, pl.String) if kind in TEXT else pl.concat_list(_path(value, kind))


def _path(value: pl.Expr, kind: Kind) -> pl.Expr:
    """The path in an element, or the text that holds neither a path nor a file, so that it is refused with its reason later."""
    return pl.coalesce(image_path(value, kind), unread_image(value, kind))


def _contents(value: pl.Expr, kind: Kind) -> pl.Expr:
    """[list] the content of each file in a cell; null where it is given by its path."""
    if isinstance(kind, pl.Array):
        value, kind = value.arr.to_list(), pl.List(kind.inner)
    if isinstance(kind, pl.List) and not kind.inner.is_integer():
        return value.list.head(MOST_ELEMENTS).list.eval(image_bytes(pl.element(), kind.inner))
    return _listed(value, kind, pl.Binary) if kind in TEXT else pl.concat_list(image_bytes(value, kind))


def _listed(value: pl.Expr, kind: Kind, wanted: Kind) -> pl.Expr:
    """As `_paths` and `_contents` of a text, which may hold a list as JSON."""
    texts = value.cast(pl.String).map_elements(lambda text: list(_elements(text.strip()))[:MOST_ELEMENTS], return_dtype=pl.List(pl.String))
    convert = _path if wanted == pl.String else image_bytes
    return texts.list.eval(convert(pl.element(), pl.String()))
