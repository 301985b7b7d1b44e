"""Interactions of any size with the shape of a real set: its users drawn again and again, each from a copy of the catalog.

The real set is `games` under QBERT_REAL_DATA; without it one is made up with its counts, history lengths and popularities.
A drawn user keeps each interaction with a probability and looks at some items of other users, so that a k-core has rounds to do.
Timestamps are days, several interactions on one: ties. Rows come in random order, 1 % of them twice.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEPT, STRAY, TWICE = 0.8, 0.1, 0.01
DAY = 86_400
ROW_GROUP = 1 << 18


def base_sequences() -> tuple[str, np.ndarray, np.ndarray, int]:
    """What it is; where each user's items start [U + 1], the items of all users in time order, and how many items there are."""
    folder = os.environ.get("QBERT_REAL_DATA")
    path = Path(folder or "") / "games" / "interactions.parquet"
    if folder and path.exists():
        table = pq.read_table(path)
        user, item = (table[name].combine_chunks().dictionary_encode() for name in ("user_id", "item_id"))
        users, time = user.indices.to_numpy(), table["timestamp"].to_numpy()
        order = np.lexsort((time, users))
        items = item.indices.to_numpy()[order]
        return "games resampled", np.concatenate([[0], np.cumsum(np.bincount(users))]), items, len(item.dictionary)
    rng = np.random.default_rng(0)
    lengths = np.minimum(5 + rng.lognormal(0.8, 1.1, 42_259).astype(int), 687)
    popularity = 1 / np.arange(20, 13_839 + 20) ** 0.8
    items = rng.choice(13_839, lengths.sum(), p=popularity / popularity.sum())
    return "made up like games", np.concatenate([[0], np.cumsum(lengths)]), items, 13_839


def write_interactions(folder: Path, rows: int, files: int = 1, seed: int = 0) -> str:
    """Write folder/items.parquet and folder/interactions (Parquet); says what they are made from."""
    what, start, items, num_items = base_sequences()
    rng = np.random.default_rng(seed)
    length = np.diff(start)
    copies = max(1, rows // int(KEPT * len(items)))
    num_users = int(rows * 1.1 / (KEPT * length.mean()))
    drawn = rng.integers(len(length), size=num_users)
    user = np.repeat(np.arange(num_users, dtype=np.int32), length[drawn])
    place = np.arange(len(user)) - np.repeat(np.cumsum(length[drawn]) - length[drawn], length[drawn])
    item = items[np.repeat(start[:-1][drawn], length[drawn]) + place].astype(np.int32)
    keep = rng.random(len(user), dtype=np.float32) < KEPT
    user, place, item = user[keep][:rows], place[keep][:rows], item[keep][:rows]
    assert len(user) == rows
    item += num_items * rng.integers(copies, size=num_users, dtype=np.int32)[user]
    stray = rng.random(rows, dtype=np.float32) < STRAY
    item[stray] = item[rng.integers(rows, size=int(stray.sum()))]
    time = (DAY * (15_000 + 50 * (user % 40) + place // 2)).astype(np.int64)
    again = rng.integers(rows, size=int(TWICE * rows))
    order = rng.permutation(rows)
    order[rng.integers(rows, size=len(again))] = again
    rating = rng.integers(1, 6, rows).astype(np.float32)
    names = pa.array([f"B{number:09d}" for number in range(num_items * copies)])
    folder.mkdir(parents=True, exist_ok=True)
    titles = pa.array([f"Game {number} for the console of the year" for number in range(len(names))])
    pq.write_table(pa.table({"item_id": names, "title": titles}), folder / "items.parquet")
    (folder / "interactions").mkdir(exist_ok=True)
    for number, piece in enumerate(np.array_split(order, files)):
        _write_file(folder / "interactions" / f"{number:03d}.parquet", names, user[piece], item[piece], time[piece], rating[piece])
    return what


def _write_file(path: Path, names: pa.Array, user: np.ndarray, item: np.ndarray, time: np.ndarray, rating: np.ndarray) -> None:
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("rating", pa.float32())])
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, len(user), ROW_GROUP):
            rows = slice(begin, begin + ROW_GROUP)
            people = pa.array(np.char.add("A", np.char.zfill(user[rows].astype(str), 10)))
            columns = [people, names.take(pa.array(item[rows])), pa.array(time[rows]), pa.array(rating[rows])]
            writer.write_table(pa.table(columns, schema=schema))
