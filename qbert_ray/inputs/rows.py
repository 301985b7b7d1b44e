"""Converts a user's raw rows, of any column type, into IDs, times, texts and images of the input contract.

Pure functions on polars frames. A row that cannot be used stays in the frame with its reason and its JSON; nothing
is dropped here. `stable_hash` orders users, items and ties everywhere, so it never changes between versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa

from qbert_ray.config.schema import Domain
from qbert_ray.inputs.addresses import Addresses
from qbert_ray.inputs.image_columns import from_template, image_bytes, image_path, safe_paths, unread_image
from qbert_ray.inputs.input_columns import as_values, file_lists, several_files
from qbert_ray.inputs.markup import strip_markup
from qbert_ray.inputs.readers import REASON, ROW, ROW_LENGTH
from qbert_ray.inputs.sources import EVENT, GIVEN_WEIGHT, PERIOD, POSITION, SPLIT, SPLIT_NAMES, Source, file_of
from qbert_ray.inputs.times import as_timestamp
from qbert_ray.inputs.values import Kind, as_id, as_rating, as_text, inexact, is_given
from qbert_ray.random_streams import splitmix64
from qbert_ray.storage.columns import ATTRIBUTE_PREFIX, ITEM_ID, RATING, TEXT_PREFIX, TIMESTAMP, USER_ID, VALUE_PREFIX, WEIGHT

UNSAFE, UNREAD = "<unsafe image>", "<unread image>"  # the image path that was refused, the value in which no path was found
_GIVEN_TIME, _GIVEN_RATING, _GIVEN_WEIGHT, _GIVEN_PATH = "<given time>", "<given rating>", "<given weight>", "<given path>"


# hashing

MOST_HASHED = 1 << 16  # bytes of a text that are hashed as they are; a longer one by its SHA-512


def stable_hash(values: pl.Series, salt: int = 0) -> np.ndarray:
    """[N] 64-bit hash of each string's UTF-8 bytes (null counts as empty), the same on every machine and version.

    Words of eight bytes are mixed in one after the other, for all strings at once.
    """
    values = values.cast(pl.String).fill_null("")
    long = (values.str.len_bytes() > MOST_HASHED).arg_true()
    if len(long):  # of a text that is no ID; word by word it would take minutes
        values = values.scatter(long, pl.Series([hashlib.sha512(text.encode()).hexdigest() for text in values[long]]))
    strings = pa.array(values.to_arrow()).cast(pa.large_string())
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
    """64-bit numbers mixed by splitmix64, a bijection."""
    return splitmix64(values + np.uint64(0x9E3779B97F4A7C15 * (salt + 1) % 2**64))


# rows of the two tables

MOST_WEIGHT = 1e6  # of an interaction; sums of larger ones are no numbers any more
Converter = Callable[[pl.Expr, Kind], pl.Expr]


def normalise_interactions(raw: pl.DataFrame, source: Source, min_rating: float | None) -> pl.DataFrame:
    """user_id, item_id, timestamp, rating, weight, position, reason (null: kept) and row (as JSON, of rejected ones).

    With a split of the user's own also the number of its part, null where it is not understood.
    """
    rows = raw.select(
        _pick(raw, source, USER_ID, as_id),
        _pick(raw, source, ITEM_ID, as_id),
        _pick(raw, source, TIMESTAMP, partial(as_timestamp, style=source.times)),
        _pick(raw, source, RATING, as_rating),
        _pick(raw, source, TIMESTAMP, is_given).alias(_GIVEN_TIME),
        _pick(raw, source, RATING, is_given).alias(_GIVEN_RATING),
        _pick(raw, source, EVENT, as_text),
        _pick(raw, source, GIVEN_WEIGHT, as_rating),
        _pick(raw, source, GIVEN_WEIGHT, is_given).alias(_GIVEN_WEIGHT),
        _pick(raw, source, SPLIT, as_text),
        *(_pick(raw, source, name, _inexact(source)).alias(f"<inexact {name}>") for name in (USER_ID, ITEM_ID)),
        *(POSITION, REASON, ROW),
    )
    reasons = [pl.when(pl.col(name).is_null()).then(pl.lit(f"missing {name}")) for name in (USER_ID, ITEM_ID)]
    reasons += [pl.when(f"<inexact {name}>").then(pl.lit(f"inexact {name}")) for name in (USER_ID, ITEM_ID)]
    several = r'^\{".*,"'  # fields of an object, of which one may change from row to row; an object of one is an ID
    reasons += [pl.when(pl.col(name).str.contains(several)).then(pl.lit(f"nested {name}")) for name in (USER_ID, ITEM_ID)]
    periods = []
    if source.parts:
        periods = [file_of(pl.col(POSITION)).replace_strict(dict(enumerate(source.parts)), return_dtype=pl.Int8).alias(PERIOD)]
    elif SPLIT in source.columns:
        part = pl.col(SPLIT).str.to_lowercase().replace_strict(SPLIT_NAMES, default=None, return_dtype=pl.Int8)
        periods = [part.alias(PERIOD)]
        reasons += [pl.when(pl.col(SPLIT).is_null()).then(pl.lit(f"missing {SPLIT}")), pl.when(part.is_null()).then(pl.lit(f"bad {SPLIT}"))]
    reasons.append(pl.when(pl.col(_GIVEN_TIME).is_null()).then(pl.lit(f"missing {TIMESTAMP}")))
    reasons.append(pl.when(pl.col(TIMESTAMP).is_null()).then(pl.lit(f"bad {TIMESTAMP}")))
    if min_rating is not None:
        reasons.append(pl.when(pl.col(RATING).is_null() & pl.col(_GIVEN_RATING)).then(pl.lit(f"bad {RATING}")))
        reasons.append(pl.when(pl.col(RATING) < min_rating).then(pl.lit("below min_rating")))
    of_event, number = pl.lit(1.0, pl.Float32), pl.col(GIVEN_WEIGHT)
    if source.events:
        of_event = pl.col(EVENT).replace_strict(dict(source.events), default=None, return_dtype=pl.Float32)
        reasons.append(pl.when(pl.col(EVENT).is_null()).then(pl.lit(f"missing {EVENT}")))
        reasons.append(pl.when(of_event.is_null()).then(pl.lit(f"{EVENT} left out")))
    bad = number.is_null() | number.is_infinite() | (number < 0) | (number > MOST_WEIGHT)
    reasons.append(pl.when(pl.col(_GIVEN_WEIGHT) & bad).then(pl.lit(f"bad {GIVEN_WEIGHT}")))
    reasons.append(pl.when(number == 0).then(pl.lit(f"{GIVEN_WEIGHT} is 0")))
    rows = _explain(rows.with_columns((of_event * number.fill_null(1.0)).alias(WEIGHT), *periods), reasons, raw)
    return rows.select(USER_ID, ITEM_ID, TIMESTAMP, RATING, WEIGHT, POSITION, REASON, ROW, *([PERIOD] if periods else []))


def normalise_items(raw: pl.DataFrame, source: Source, file: int, domain: Domain, root: str) -> pl.DataFrame:
    """item_id, image_path, image_bytes, text.*, attribute.*, the columns of `inputs`, position, reason, row, the refused image path,
    and the unread image value.

    Args:
        file: number of the rows' file: relative image paths start in its folder.
        root: another folder that absolute image paths may point into.
    """
    fields = [*domain.text_fields, *(name for inputs in domain.inputs.values() for name in inputs.texts)]
    texts = {f"{TEXT_PREFIX}{name}": name for name in fields} | {f"{ATTRIBUTE_PREFIX}{name}": name for name in domain.attributes}
    values = {f"{VALUE_PREFIX}{name}": name for inputs in domain.inputs.values() for name in inputs.values}
    rows = raw.select(
        _pick(raw, source, ITEM_ID, as_id),
        _pick(raw, source, ITEM_ID, _inexact(source)).alias("<inexact>"),
        _pick(raw, source, source.image, image_path).alias(_GIVEN_PATH),
        _pick(raw, source, source.image, image_bytes).alias("image_bytes"),
        _pick(raw, source, source.image, unread_image).alias(UNREAD),
        *(_pick(raw, source, name, as_text).alias(column) for column, name in texts.items()),
        *(_pick(raw, source, name, as_values).alias(column) for column, name in values.items()),
        *(POSITION, REASON, ROW),
    )
    rows = rows.with_columns(strip_markup(rows[column]) for column in texts)
    if source.template:
        rows = rows.with_columns(pl.coalesce(_GIVEN_PATH, from_template(source.template, pl.col(ITEM_ID))))
    # An image given as bytes needs no path, so a bad path does not matter.
    given = rows.select(pl.when(pl.col("image_bytes").is_null()).then(_GIVEN_PATH).alias(_GIVEN_PATH)).to_series()
    addresses = Addresses.of(source.uri if "://" in source.uri else root, domain)
    safe = partial(safe_paths, folder=source.folder(file), query=source.query, root=root, addresses=addresses)
    rows = rows.with_columns(safe(given).alias("image_path"), given)
    for modality, inputs in domain.inputs.items():
        if inputs.files:
            several = file_lists(raw.select(*(pl.col(name) for field in inputs.files for name in source.columns.get(field, ()))))
            rows = rows.with_columns(*several_files(modality, *several, safe))
    refused = pl.when(pl.col("image_path").is_null()).then(_GIVEN_PATH).alias(UNSAFE)
    reasons = [
        pl.when(pl.col(ITEM_ID).is_null()).then(pl.lit(f"missing {ITEM_ID}")),
        pl.when("<inexact>").then(pl.lit(f"inexact {ITEM_ID}")),
    ]
    return _explain(rows.with_columns(refused).drop(_GIVEN_PATH), reasons, raw).drop("<inexact>")


def _inexact(source: Source) -> Converter:
    return partial(inexact, of_json=source.files[0].kind == "jsonl")


def _pick(raw: pl.DataFrame, source: Source, name: str | None, convert: Converter) -> pl.Expr:
    """The first filled one of the columns for a contract name, converted by their types."""
    columns = source.columns.get(name, ()) if name else ()
    filled = [convert(pl.col(column), raw.schema[column]) for column in columns]
    empty = convert(pl.lit(None, pl.Null), pl.Null())
    return pl.coalesce(*filled, empty).alias(name or "")


def _explain(rows: pl.DataFrame, reasons: Sequence[pl.Expr], raw: pl.DataFrame) -> pl.DataFrame:
    """`rows` with the first reason that applies; rejected ones also hold the raw row as JSON, without bytes."""
    rows = rows.with_columns(pl.coalesce(REASON, *reasons).alias(REASON))
    rejected = (rows[REASON].is_not_null() & rows[ROW].is_null()).arg_true()
    if not len(rejected):
        return rows
    shown = [name for name in raw.columns if name not in (POSITION, REASON, ROW) and not _holds_bytes(raw.schema[name])]
    return rows.with_columns(rows[ROW].scatter(rejected, as_json(raw.select(shown)[rejected])))


def as_json(rows: pl.DataFrame) -> pl.Series:
    """Each row as JSON, cut to the length that is kept."""
    return rows.select(pl.struct(pl.all()).struct.json_encode().str.slice(0, ROW_LENGTH)).to_series()


def _holds_bytes(kind: Kind) -> bool:
    if isinstance(kind, pl.Struct):
        return any(_holds_bytes(field.dtype) for field in kind.fields)
    return _holds_bytes(kind.inner) if isinstance(kind, pl.List | pl.Array) else kind == pl.Binary
