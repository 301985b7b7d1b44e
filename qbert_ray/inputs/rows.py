"""What the values of a user's rows mean: IDs, time, text and images of the input contract, from any column type.

Pure functions on polars frames. A row that cannot be used stays in the frame with its reason and itself as JSON; nothing
is dropped here. `stable_hash` is the house's hash: it orders users, items and ties, so it never changes between versions.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from qbert_ray.config.schema import Domain
from qbert_ray.inputs.addresses import Addresses
from qbert_ray.inputs.image_columns import Kind, image_bytes, image_path, safe_paths
from qbert_ray.inputs.readers import REASON, ROW, ROW_LENGTH
from qbert_ray.inputs.sources import POSITION, Source
from qbert_ray.storage.columns import ATTRIBUTE_PREFIX, ITEM_ID, RATING, TEXT_PREFIX, TIMESTAMP, USER_ID

UNSAFE = "_unsafe_image"  # the image path that was refused
_WHOLE = 2.0**53  # floats below are exact whole numbers


# hashing


def stable_hash(values: pl.Series, salt: int = 0) -> np.ndarray:
    """64-bit hash of each string's UTF-8 bytes (null as an empty one), the same on every machine and version.

    Words of eight bytes are mixed in one after the other, for all strings at once.
    """
    strings = pa.array(values.cast(pl.String).fill_null("").to_arrow()).cast(pa.large_string())
    _, offset_buffer, data_buffer = strings.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    data = np.concatenate([np.frombuffer(data_buffer or b"", np.uint8), np.zeros(8, np.uint8)])
    windows = np.lib.stride_tricks.sliding_window_view(data, 8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    state = mix(lengths.astype(np.uint64), salt)
    for done in range(0, int(lengths.max(initial=0)), 8):
        rows = np.flatnonzero(lengths > done)
        words = windows[starts[rows] + done].copy().view("<u8")[:, 0].astype(np.uint64)
        surplus = 8 * np.maximum(8 - (lengths[rows] - done), 0).astype(np.uint64)  # bits past the end of the string
        words = (words << surplus) >> surplus
        state[rows] = mix(state[rows] ^ words)
    return state


def mix(values: np.ndarray, salt: int = 0) -> np.ndarray:
    """Splitmix64: spreads 64-bit numbers evenly, one to one."""
    x = values + np.uint64(0x9E3779B97F4A7C15 * (salt + 1) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# rows of the two tables

Converter = Callable[[pl.Expr, Kind], pl.Expr]


def normalise_interactions(raw: pl.DataFrame, source: Source, min_rating: float | None) -> pl.DataFrame:
    """user_id, item_id, timestamp, rating, position, reason (null: kept) and row (as JSON, of rejected ones)."""
    to_id = _csv_id if source.files[0].kind in ("csv", "tsv") else as_text
    rows = raw.select(
        _pick(raw, source, USER_ID, to_id),
        _pick(raw, source, ITEM_ID, to_id),
        _pick(raw, source, TIMESTAMP, as_timestamp),
        _pick(raw, source, RATING, _as_rating),
        _pick(raw, source, TIMESTAMP, _is_given).alias("given_time"),
        *(POSITION, REASON, ROW),
    )
    reasons = [pl.when(pl.col(name).is_null()).then(pl.lit(f"missing {name}")) for name in (USER_ID, ITEM_ID)]
    reasons.append(pl.when(pl.col("given_time").is_null()).then(pl.lit(f"missing {TIMESTAMP}")))
    reasons.append(pl.when(pl.col(TIMESTAMP).is_null()).then(pl.lit(f"bad {TIMESTAMP}")))
    if min_rating is not None:
        reasons.append(pl.when(pl.col(RATING) < min_rating).then(pl.lit("below min_rating")))
    return _explain(rows, reasons, raw).drop("given_time")


def normalise_items(raw: pl.DataFrame, source: Source, file: int, domain: Domain, root: str) -> pl.DataFrame:
    """item_id, image_path, image_bytes, text.*, attribute.*, position, reason, row, and an image path that was refused.

    Args:
        file: number of the file the rows are from: relative image paths start in its folder.
        root: another folder that absolute image paths may point into.
    """
    to_id = _csv_id if source.files[0].kind in ("csv", "tsv") else as_text
    texts = {f"{TEXT_PREFIX}{name}": name for name in domain.text_fields} | {
        f"{ATTRIBUTE_PREFIX}{name}": name for name in domain.attributes
    }
    rows = raw.select(
        _pick(raw, source, ITEM_ID, to_id),
        _pick(raw, source, source.image, image_path).alias("given_path"),
        _pick(raw, source, source.image, image_bytes).alias("image_bytes"),
        *(_pick(raw, source, name, as_text).alias(column) for column, name in texts.items()),
        *(POSITION, REASON, ROW),
    )
    if source.format != "contract":
        rows = rows.with_columns(strip_markup(rows[column]) for column in texts)
    # A picture that came as bytes needs no path, whatever its path says.
    given = rows.select(pl.when(pl.col("image_bytes").is_null()).then("given_path").alias("given_path")).to_series()
    addresses = Addresses.of(source.uri if "://" in source.uri else root, domain)
    paths = safe_paths(given, source.folder(file), source.query, root, addresses)
    rows = rows.with_columns(paths.alias("image_path"), given)
    refused = pl.when(pl.col("image_path").is_null()).then("given_path").alias(UNSAFE)
    reasons = [pl.when(pl.col(ITEM_ID).is_null()).then(pl.lit(f"missing {ITEM_ID}"))]
    return _explain(rows.with_columns(refused).drop("given_path"), reasons, raw)


def _pick(raw: pl.DataFrame, source: Source, name: str | None, convert: Converter) -> pl.Expr:
    """The first filled of the columns that a contract name stands for, converted by their types."""
    columns = source.columns.get(name, ()) if name else ()
    filled = [convert(pl.col(column), raw.schema[column]) for column in columns]
    empty = convert(pl.lit(None, pl.String), pl.String())
    return pl.coalesce(*filled, empty).alias(name or "")


def _explain(rows: pl.DataFrame, reasons: Sequence[pl.Expr], raw: pl.DataFrame) -> pl.DataFrame:
    """`rows` with the first reason that holds; rejected ones also hold the raw row as JSON, without bytes."""
    rows = rows.with_columns(pl.coalesce(REASON, *reasons).alias(REASON))
    rejected = (rows[REASON].is_not_null() & rows[ROW].is_null()).arg_true()
    if not len(rejected):
        return rows
    shown = [name for name in raw.columns if name not in (POSITION, REASON, ROW) and not _holds_bytes(raw.schema[name])]
    return rows.with_columns(rows[ROW].scatter(rejected, as_json(raw.select(shown)[rejected])))


def as_json(rows: pl.DataFrame) -> pl.Series:
    """Each row as JSON, cut."""
    return rows.select(pl.struct(pl.all()).struct.json_encode().str.slice(0, ROW_LENGTH)).to_series()


def _holds_bytes(kind: Kind) -> bool:
    if isinstance(kind, pl.Struct):
        return any(_holds_bytes(field.dtype) for field in kind.fields)
    return _holds_bytes(kind.inner) if isinstance(kind, pl.List | pl.Array) else kind == pl.Binary


# values by the type of their column


def as_text(value: pl.Expr, kind: Kind) -> pl.Expr:
    """Stripped text, null where nothing is left: whole numbers without .0, lists joined with a comma, structs as JSON."""
    if isinstance(kind, pl.Array):
        value, kind = value.arr.to_list(), pl.List(kind.inner)
    if isinstance(kind, pl.List):
        value = value.list.eval(as_text(pl.element(), kind.inner)).list.drop_nulls().list.join(", ")
    elif isinstance(kind, pl.Struct):
        told = [value.struct.field(field.name) for field in kind.fields if not _holds_bytes(field.dtype)]  # polars writes no bytes as JSON
        value = pl.when(value.is_not_null()).then(pl.struct(told).struct.json_encode()) if told else pl.lit(None, pl.String)
    elif kind.is_float():
        whole = (value == value.round(0)) & (value.abs() < _WHOLE)
        number = pl.when(value.is_not_nan()).then(value.cast(pl.String))
        value = pl.when(whole).then(value.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(number)
    elif kind == pl.Binary:
        value = value.map_elements(lambda content: content.decode(errors="replace"), pl.String)  # which polars refuses a whole column for
    else:
        value = value.cast(pl.String, strict=False)
    text = value.str.strip_chars()
    return pl.when(text != "").then(text)


def _is_given(value: pl.Expr, kind: Kind) -> pl.Expr:
    """True where there is a value, null elsewhere."""
    there = value if kind.is_integer() or kind.is_temporal() else as_text(value, kind)  # which are never written as nothing
    return pl.when(there.is_not_null()).then(True)


def _csv_id(value: pl.Expr, kind: Kind) -> pl.Expr:
    """CSV has no types: 12.0 is how a whole number is written whose column had gaps."""
    return as_text(value, kind).str.replace(r"^(\d+)\.0$", "$1")


def as_timestamp(value: pl.Expr, kind: Kind) -> pl.Expr:
    """Whole number, as given; dates and times as microseconds since 1970. Null where it is neither."""
    if kind.is_integer():
        return value.cast(pl.Int64, strict=False)
    if kind.is_numeric():
        return _whole_number(value.cast(pl.Float64))
    if isinstance(kind, pl.Datetime | pl.Date):
        return value.cast(pl.Datetime("us")).dt.epoch("us")
    if kind not in (pl.String, pl.Categorical, pl.Enum):
        return pl.lit(None, pl.Int64)
    text = value.cast(pl.String).str.strip_chars()
    plain = text.str.replace("[T ]", " ").str.replace(r"Z$", "+00:00")
    zoned = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%#z", time_unit="us", time_zone="UTC", strict=False).dt.epoch("us")
    clock = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False).dt.epoch("us")
    date = plain.str.to_datetime("%Y-%m-%d", time_unit="us", strict=False).dt.epoch("us")
    # Digits first: only they keep all 64 bits. Decimals and exponents are how spreadsheets write whole numbers.
    return pl.coalesce(text.cast(pl.Int64, strict=False), _whole_number(text.cast(pl.Float64, strict=False)), zoned, clock, date)


def _whole_number(value: pl.Expr) -> pl.Expr:
    return pl.when(value == value.round(0)).then(value.cast(pl.Int64, strict=False))


def _as_rating(value: pl.Expr, kind: Kind) -> pl.Expr:
    plain = kind.is_numeric() or kind == pl.String
    return value.cast(pl.Float32, strict=False).fill_nan(None) if plain else pl.lit(None, pl.Float32)


def strip_markup(texts: pl.Series) -> pl.Series:
    """Texts without HTML tags, scripts and entities."""
    marked = texts.str.contains(r"[&<]").fill_null(False).arg_true()
    if not len(marked):
        return texts
    plain = texts[marked].map_elements(html.unescape, pl.String)
    plain = plain.str.replace_all(r"(?is)<script.*?</script>|<style.*?</style>|</?[a-z!][^>]*>", " ")
    plain = plain.str.replace_all(r"\s+", " ").str.strip_chars()
    return texts.scatter(marked, plain.replace("", None))
