"""One row per user: training items, targets, and what a split into periods leaves between and after them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa

from qbert_ray.inputs.k_core import USER
from qbert_ray.inputs.reasons import implausible_times, time_units
from qbert_ray.inputs.splits import Places, Split, by_period, leave_one_out
from qbert_ray.storage.columns import COLD, DOMAIN, FURTHER, ITEM_INDEX, LATER_WEIGHTS, TRAIN_WEIGHTS, USER_ID, WEIGHT


def sequences_of(rows: pl.DataFrame, split: Split | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One row per user with train, valid, test and the last cold target with its history; and the rows with their split.

    Args:
        rows: in order of user and time.
        split: into periods; None: leave-one-out.

    Returns:
        The users, also with "between" and "after" of a split into periods; the rows.
    """
    users, cold, items = rows[USER].to_numpy(), rows[COLD].to_numpy(), rows[ITEM_INDEX].to_numpy()
    starts = np.flatnonzero(np.diff(users.astype(np.int64), prepend=-1))  # [U] first row of each user
    sizes = np.diff(starts, append=len(rows))
    above = np.cumsum(~cold) - ~cold  # [rows] warm rows above
    first = above[starts]
    length = np.diff(first, append=np.count_nonzero(~cold))  # [U] warm rows
    warm = items[~cold]
    places = leave_one_out(length) if split is None else by_period(split.periods(rows.filter(~cold)), length)
    place = above - np.repeat(first, sizes)  # [rows] warm ones above of the same user
    sequences = (
        rows[starts]
        .select(DOMAIN, USER_ID)
        .with_columns(
            pl.Series("rows", sizes),
            _lists(warm, first, places.train).alias("train"),
            _lists(rows[WEIGHT].to_numpy()[~cold], first, places.train).alias(TRAIN_WEIGHTS),
            _lists(rows[WEIGHT].to_numpy()[~cold], first + places.train, length - places.train).alias(LATER_WEIGHTS),
            *(_at(warm, first, each).alias(name) for name, each in (("valid", places.valid), ("test", places.test))),
            *_cold_targets(items, warm, cold, place, first, sizes),
        )
    )
    if split is not None:
        begin, end = places.train + (places.valid >= 0), places.later + (places.test >= 0)
        sequences = sequences.with_columns(
            _lists(warm, first + begin, places.later - begin).alias("between"), _lists(warm, first + end, length - end).alias("after")
        )
    return sequences, rows.with_columns(_labels(cold, place, places, sizes))


def _labels(cold: np.ndarray, place: np.ndarray, places: Places, sizes: np.ndarray) -> pl.Series:
    """[rows] the split of each row."""
    train, valid, test = (np.repeat(each, sizes) for each in places[:3])
    kinds = [cold, place < train, place == valid, place == test]
    names = pl.Series("split", [COLD, "train", "valid", "test", FURTHER])
    return names.gather(np.select(kinds, range(len(kinds)), len(kinds)))


def _cold_targets(
    items: np.ndarray, warm: np.ndarray, cold: np.ndarray, place: np.ndarray, first: np.ndarray, sizes: np.ndarray
) -> list[pl.Series]:
    """[U] the last cold item of each user that has other items before it, and those."""
    later = cold & (place > 0)
    target = np.full(len(sizes), -1)
    target[np.repeat(np.arange(len(sizes)), sizes)[later]] = np.flatnonzero(later)  # if there are several, the last
    history = np.where(target >= 0, place[target], 0) if len(items) else target
    found = np.where(target >= 0, items[target], -1) if len(items) else target
    return [pl.Series("target", found).replace(-1, None), _lists(warm, first, history).alias("history")]


def _at(values: np.ndarray, starts: np.ndarray, places: np.ndarray) -> pl.Series:
    """[U] the value at a place after each start; null where the place is -1."""
    found = values[np.where(places >= 0, starts + places, 0)] if len(values) else places
    return pl.Series(np.where(places >= 0, found, -1)).replace(-1, None)


def _lists(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> pl.Series:
    """[U] lists of `lengths` values, beginning at `starts`."""
    ends = np.cumsum(lengths)
    flat = values[np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths)]
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    return pl.Series(pa.LargeListArray.from_arrays(offsets, pa.array(flat)))


def times_seen(times: np.ndarray, ends: np.ndarray) -> dict[str, int]:
    """Number of users whose interactions all have one time, how many times are no plausible dates, and how many look like seconds, ...

    Args:
        times: in order of user, and of a split of one's own by its parts before the time.
        ends: [U + 1] where each user's begin, and the end of all.
    """
    first, last = ends[:-1], ends[1:]
    same = np.zeros(0, bool)
    if len(times):
        same = (last - first > 1) & (np.minimum.reduceat(times, first) == np.maximum.reduceat(times, first))
    return {"users_at_one_time": int(same.sum()), "implausible_times": implausible_times(times)} | {
        f"time_{unit}": count for unit, count in time_units(times).items()
    }
