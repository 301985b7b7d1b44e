"""Reads tables of IDs, such as items that must not be recommended: item_id, or user_id and item_id, in any kind of file."""

from __future__ import annotations

import polars as pl
import polars.selectors as cs

from qbert_ray.config.schema import Domain
from qbert_ray.inputs.readers import KINDS, REASON, kind_of
from qbert_ray.inputs.sources import POSITION, Source, SourceError, open_files
from qbert_ray.inputs.values import NOTHING, as_id
from qbert_ray.storage.columns import ITEM_ID, USER_ID


def is_table(text: str) -> bool:
    """Whether a text of the config names a table rather than an expression: by the end of its name, or "/" for a folder."""
    return kind_of(text) is not None or text.endswith("/")


def table_endings() -> str:
    """The endings of file names by which `is_table` knows a table."""
    return ", ".join(KINDS)


def open_ids(root: str, location: str, key: str, domain: Domain) -> Source:
    """A table with item_id, and user_id where it has one; rows are not read yet.

    Args:
        root: folder or URI that relative paths start from.
        location: file, folder or glob.
        key: of the config, for errors.
        domain: whose names of columns are understood too.

    Raises:
        SourceError: no such file, or one without item_id.
    """
    uri, filesystem, files = open_files(root, location, key, key)
    found = list(dict.fromkeys(column for file in files for column in file.columns))
    names: dict[str, str | None] = {ITEM_ID: domain.item_columns.get("item_id") or domain.interaction_columns.get("item_id")}
    names[USER_ID] = domain.interaction_columns.get("user_id")
    columns = {name: tuple(each for each in (name, mapped) if each in found) for name, mapped in names.items()}
    lacking = next((file for file in files if not set(columns[ITEM_ID]) & set(file.columns)), None)
    if lacking is not None:
        raise SourceError(
            f"{key}: {lacking.path} has no column {ITEM_ID}; columns found: {', '.join(lacking.columns)}; name the column of items "
            f"{ITEM_ID}, and {USER_ID} that of users where rows hold for one user each"
        )
    return Source(key, uri, filesystem, files, "contract", {name: each for name, each in columns.items() if each}, None)


def read_ids(source: Source) -> tuple[pl.DataFrame, int]:
    """The distinct rows of a table of `open_ids`, spelled as the ingest spells IDs; and how many rows lack an ID or cannot be read.

    Raises:
        SourceError: a file is damaged.
    """
    frames = []
    for number, fragment in source.fragments():
        for raw in source.read(number, fragment):
            ids = [
                pl.coalesce(*(as_id(pl.col(column), raw.schema[column]) for column in columns)).alias(name)
                for name, columns in source.columns.items()
            ]
            frames.append(raw.select(*ids, REASON))
    if not frames:
        return pl.DataFrame(schema=dict.fromkeys(source.columns, pl.String)), 0
    rows = pl.concat(frames)
    given = rows.filter(pl.all_horizontal(pl.col(name).is_not_null() for name in source.columns), pl.col(REASON).is_null())
    return given.select(source.columns.keys()).unique(maintain_order=True), len(rows) - len(given)


def read_columns(source: Source, names: list[str]) -> pl.DataFrame:
    """item_id and some further columns of the items files, as they are there, the first row of each item.

    Columns of text files are numbers or booleans where all their values are.

    Args:
        source: of `open_source`.
        names: columns of the files.

    Raises:
        SourceError: a file is damaged, or its types differ from those of the others.
    """
    item = source.columns[ITEM_ID]
    chosen = dict.fromkeys([*item, *names])
    wanted = Source(source.label, source.uri, source.filesystem, source.files, source.format, {name: (name,) for name in chosen}, None)
    frames = [raw for number, fragment in wanted.fragments() for raw in wanted.read(number, fragment)]
    if not frames:
        raise SourceError(f"{source.label}: {source.uri} has no rows")
    ids = [
        frame.select(
            pl.coalesce(*(as_id(pl.col(column), frame.schema[column]) for column in item)).alias(f"<{ITEM_ID}>"), *names, POSITION
        ).filter(pl.col(f"<{ITEM_ID}>").is_not_null())
        for frame in frames
    ]
    try:
        rows = pl.concat(ids, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise SourceError(f"{source.label}: the files of {source.uri} have columns of different types: {error}") from None
    rows = rows.sort(POSITION).unique(f"<{ITEM_ID}>", keep="first", maintain_order=True).drop(POSITION)
    if source.files[0].kind != "parquet":
        rows = rows.with_columns(_typed(rows[name]) for name in names)
    return rows.with_columns(cs.float().fill_nan(None))  # polars takes NaN for larger than every number


def _typed(values: pl.Series) -> pl.Series:
    """The column of a text file as booleans or numbers, where all values that are there are such."""
    if values.dtype != pl.String:
        return values
    text = values.str.strip_chars()
    text = text.set((text == "") | text.is_in(NOTHING), None) if text.len() else text
    lower = text.str.to_lowercase()
    if text.drop_nulls().is_empty():
        return text
    if lower.drop_nulls().is_in(["true", "false"]).all():
        return lower == "true"
    if text.drop_nulls().str.contains(r"^-?0[0-9]").any():  # a code such as 007
        return text
    for kind in (pl.Int64, pl.Float64):
        number = text.cast(kind, strict=False)
        if number.null_count() == text.null_count():
            return number
    return text
