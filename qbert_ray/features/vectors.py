"""The table features/<modality>, and the user's own vectors brought into its shape.

The user's own are read by `own_vectors`: `item_id` and either `vector` (a list of numbers) or `vectors` (a list of such lists).

N items, J vectors per item, D width, R rows of the user's table, V vectors in it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from qbert_ray.config.schema import Config
from qbert_ray.features.modality import Encoded
from qbert_ray.features.own_vectors import batches
from qbert_ray.inputs.rows import stable_hash
from qbert_ray.storage.columns import DOMAIN, ITEM_ID, ITEM_INDEX, features_schema, to_fixed_lists

DISTURB_SALT = 77
MOST_VECTORS = 256  # of an item: space for the most that any item has is made for all
LARGEST = 1e15  # number of a vector; the squares and sums of larger ones are no float32


def features_table(items: pa.Table, vectors: np.ndarray, present: np.ndarray) -> pa.Table:
    """Rows of features/<modality>.

    Args:
        items: N rows of ingest/items.
        vectors: [N, J, D], present: [N, J].
    """
    columns = [items[DOMAIN], items[ITEM_ID], items[ITEM_INDEX], to_fixed_lists(vectors), to_fixed_lists(present)]
    return pa.table(columns, schema=features_schema(*vectors.shape[1:]))


def disturb(made: Encoded, item_ids: pa.ChunkedArray, modality: str, config: Config) -> None:
    """Leave out the vectors of some items, or replace them by random ones of the same length, as `features.missing` and `noise` say.

    Which items, and the random numbers, follow from hashes of their IDs and of the modality's name.
    """
    missing, noise = config.features.missing.get(modality, 0.0), config.features.noise.get(modality, 0.0)
    if not missing and not noise:
        return
    names = pl.Series([f"{modality}\x1f{item_id}" for item_id in item_ids.to_pylist()], dtype=pl.String)
    hashed = stable_hash(names, DISTURB_SALT)
    place = hashed / 2.0**64  # [0, 1); the first are missing, so that the missing items of a share are among those of a larger one
    made.present[place < missing] = False
    for row in np.flatnonzero((place >= 1 - noise) & made.present.any(axis=1)):
        there = made.present[row]
        drawn = np.random.default_rng(int(hashed[row])).standard_normal(made.vectors[row][there].shape)
        lengths = np.linalg.norm(made.vectors[row][there], axis=1, keepdims=True)
        made.vectors[row, there] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * lengths
    made.vectors[~made.present] = 0


def vectors_shape(uri: str) -> tuple[int, int]:
    """The largest number of vectors in a row (J), and the most frequent width (D).

    Raises:
        ValueError: there is no such table, it lacks a column, or holds no vector.
    """
    most, widths = 1, Counter[int]()
    for batch in batches(uri):
        row, width, _ = _flat(batch.column(1))
        counts = np.bincount(row)
        most = max(most, int(counts[counts <= MOST_VECTORS].max(initial=1)))
        widths.update(width[width > 0].tolist())
    if not widths:
        raise ValueError(f"{uri} holds no vector")
    return most, widths.most_common(1)[0][0]


def read_vectors(uri: str, item_ids: pa.Array, num_vectors: int, width: int) -> Encoded:
    """The user's own vectors of some items; needs memory for all of them.

    Args:
        item_ids: N ids, as strings.
        num_vectors: J, at least as many as any row has.
        width: D; vectors of another width are rejected.
    """
    vectors = np.zeros((len(item_ids), num_vectors, width), np.float32)
    present = np.zeros((len(item_ids), num_vectors), bool)
    rejected: list[tuple[str, dict[str, Any]]] = []
    for batch in batches(uri):
        ids = batch.column(0)
        place = pc.fill_null(pc.index_in(ids, value_set=item_ids), -1).to_numpy()
        slots, filled, reasons = _check(batch.column(1), num_vectors, width)
        reasons[(reasons == "") & (place < 0)] = "unknown item"
        usable = np.flatnonzero(reasons == "")
        first = usable[np.unique(place[usable], return_index=True)[1]]
        good = first[~present[place[first]].any(axis=1)]
        reasons[np.setdiff1d(usable, good)] = "item given twice"
        vectors[place[good]], present[place[good]] = slots[good], filled[good]
        rejected += [(reasons[row], {ITEM_ID: ids[row].as_py()}) for row in np.flatnonzero(reasons)]
    if len(item_ids) and not present.any():
        raise ValueError(_none_placed(uri, item_ids, rejected))
    return Encoded(vectors, present, {}, rejected)


def _none_placed(uri: str, item_ids: pa.Array, rejected: list[tuple[str, dict[str, Any]]]) -> str:
    reasons = Counter(reason for reason, _ in rejected)
    said = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    ids = [row[ITEM_ID] for reason, row in rejected if reason == "unknown item"]
    return f"0 of {len(item_ids):,} items have a vector in {uri} ({said or 'it has no rows'})" + (
        f"; an ID there: {ids[0]!r}, one of the items: {item_ids[0].as_py()!r}" if ids else ""
    )


def _flat(column: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Row [V] and width [V] of each vector in a column `vector` or `vectors`, and their numbers; null vectors have width 0."""
    depth = 0
    kind = column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        depth, kind = depth + 1, kind.value_type
    if depth not in (1, 2) or not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"a column of vectors must hold lists of numbers, or lists of such lists; it holds {column.type}")
    counts, flat = (_lengths(column), pc.list_flatten(column)) if depth == 2 else (np.ones(len(column), int), column)
    return np.repeat(np.arange(len(column)), counts), _lengths(flat), flat


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy()


def _check(column: pa.Array, num_vectors: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors [R, J, D], which are there [R, J], and the reason [R] why each row is rejected, empty if it is not.

    A vector of zeros is none: it has no direction.
    """
    row, widths, flat = _flat(column)
    starts = np.searchsorted(row, np.arange(len(column)))
    slot = np.arange(len(row)) - starts[row]
    many = np.bincount(row, minlength=len(column)) > num_vectors
    fits = (widths == width) & ~many[row]
    values = pc.list_flatten(flat.filter(pa.array(fits))).cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, width)
    finite, given = np.isfinite(values).all(axis=1), values.any(axis=1)
    reasons = np.full(len(column), "", dtype=object)
    reasons[np.bincount(row[fits], given, len(column)) == 0] = "only zeros"  # which many write for an item without a vector
    reasons[np.bincount(row, minlength=len(column)) == 0] = "no vector"
    reasons[row[fits][np.abs(values).max(axis=1, initial=0) > LARGEST]] = "too large"
    reasons[row[fits][~finite]] = "not finite"
    reasons[row[~fits & (widths > 0)]] = "wrong width"
    reasons[row[widths == 0]] = "no vector"
    reasons[many] = "too many vectors"
    slots = np.zeros((len(column), num_vectors, width), np.float32)
    filled = np.zeros((len(column), num_vectors), bool)
    slots[row[fits], slot[fits]], filled[row[fits], slot[fits]] = values, given
    return slots, filled, reasons
