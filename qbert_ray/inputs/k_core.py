"""Partitions interactions by a hash of the user, and computes the k-core over all partitions.

All rows of a user are in one partition, so only item counts have to be added up: in each round the partitions count the
items of their remaining users, and the driver decides which items remain. Partitions are never rewritten; the remaining
rows of one follow from the remaining items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from qbert_ray.execution.executor import Executor, Handle
from qbert_ray.inputs.readers import REASON, ROW
from qbert_ray.inputs.rows import as_json, mix, stable_hash
from qbert_ray.inputs.sources import GIVEN_WEIGHT, PERIOD, POSITION, Source
from qbert_ray.storage.columns import ITEM_ID, RATING, TIMESTAMP, USER_ID, WEIGHT

CODE, USER, HASH = "_code", "_user", "_hash"
# Salts are constants rather than the seed, so that another seed does not change the test set.
USER_SALT, ITEM_SALT, TIE_SALT, COLD_SALT = 1, 2, 3, 4
GIVEN = [USER_ID, ITEM_ID, TIMESTAMP, RATING]


@dataclass(frozen=True)
class Partition:
    """Rows of the users whose hashes lie in one range. `kept`: in order of user and time; `rejected`: position, reason, row."""

    kept: Handle
    rejected: Handle


@dataclass(frozen=True)
class Core:
    """Items and users of the k-core."""

    items: np.ndarray  # [catalog] of bool
    cold: np.ndarray  # [catalog] of bool, held-out items with enough interactions of its users
    users: list[int]  # of each partition
    rounds: int


def partition(executor: Executor, blocks: list[Handle], catalog: Handle, count: int) -> list[Partition]:
    """Partitions in order of the user's hash; rows and their order do not depend on how blocks are divided.

    Args:
        blocks: tables as `normalise_interactions` gives them.
        catalog: table of item_id and its hash; an item's code is its row.
    """
    split = [executor.submit(split_users, block, count, num_returns=count) for block in blocks]
    pieces = zip(*split, strict=True) if count > 1 else [split]
    merged = [executor.submit(merge_rows, catalog, *rows, num_returns=2) for rows in pieces]
    return [Partition(*refs) for refs in merged]


def have_weights(executor: Executor, partitions: list[Partition], source: Source) -> bool:
    """Whether interactions have weights; where no file is known to have the column, which JSON may name late, the rows say it."""
    names = source.columns.get(GIVEN_WEIGHT, ())
    if source.events or any(set(names) & set(file.columns) for file in source.files):
        return True
    return bool(names) and any(map(executor.get, [executor.submit(_has_weights, part.kept) for part in partitions]))


def _has_weights(kept: pa.Table) -> bool:
    return bool((pl.DataFrame(kept)[WEIGHT] != 1).any())


def core(executor: Executor, partitions: list[Partition], cold: np.ndarray, min_user: int, min_item: int) -> Core:
    """The largest set without `cold` items in which each user has `min_user` and each item `min_item` interactions."""
    items, rounds = ~cold, 0
    while True:
        rounds += 1
        reference = executor.put((items, cold))
        pending = [executor.submit(_count, part.kept, reference, min_user) for part in partitions]
        total, users = np.zeros(len(cold), np.int64), []
        for handle in pending:
            counts, num_users = executor.get(handle)
            total += counts
            users.append(num_users)
        left = items & (total >= min_item)
        if (left == items).all():
            return Core(items, cold & (total >= min_item), users, rounds)
        items = left


def survivors(kept: pa.Table, items: np.ndarray, cold: np.ndarray, min_user: int) -> np.ndarray:
    """[rows] whether a row's item is remaining or cold and its user still has `min_user` of the remaining items."""
    codes, users = kept[CODE].to_numpy(), kept[USER].to_numpy()
    enough = np.bincount(users[items[codes]], minlength=1 + int(users.max(initial=0))) >= max(min_user, 1)
    return (items | cold)[codes] & enough[users]


def split_users(block: pa.Table, count: int) -> list[pa.Table] | pa.Table:
    """Rows of each of `count` partitions, with the hash of their user."""
    rows = pl.DataFrame(block)
    hashes = stable_hash(rows[USER_ID], USER_SALT)
    rows = rows.with_columns(pl.Series(HASH, hashes))
    if count == 1:
        return rows.to_arrow()
    # Contiguous ranges of the hash, so that partitions one after the other are in order of the hash.
    number = ((hashes >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
    rows = rows[np.argsort(number.astype(np.uint16), kind="stable")]
    ends = np.cumsum(np.bincount(number.astype(np.int64), minlength=count))
    return [rows[begin:end].to_arrow() for begin, end in zip([0, *ends], ends, strict=False)]


def merge_rows(catalog: pa.Table, *blocks: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows of a partition in order of user and time, each once, with the item's code; and position, reason and row of all others.

    Args:
        catalog: table of item_id and its hash; an item's code is its row.
        blocks: of `split_users`.
    """
    items = pl.DataFrame(catalog)
    codes = items.select(ITEM_ID).with_row_index(CODE)
    rows = pl.concat([pl.DataFrame(block) for block in blocks]).join(codes, on=ITEM_ID, how="left")
    unknown = pl.when(pl.col(CODE).is_null()).then(pl.lit("item not in items table"))
    rows = rows.with_columns(pl.coalesce(REASON, unknown).alias(REASON))
    own = [PERIOD] if PERIOD in rows.columns else []
    if own:  # an interaction of several parts counts in the last of them, so that nothing that is tested is trained on
        last = pl.col(PERIOD).filter(pl.col(REASON).is_null()).max().over(USER_ID, CODE, TIMESTAMP)
        rows = rows.with_columns(pl.coalesce(REASON, pl.when(pl.col(PERIOD) < last).then(pl.lit("also in a later part"))).alias(REASON))
    kept = _in_order(rows.filter(pl.col(REASON).is_null()), items[HASH].to_numpy())
    same = pl.all_horizontal(pl.col(name) == pl.col(name).shift() for name in (USER, CODE, TIMESTAMP)).fill_null(False)
    repeated = kept.filter(same).with_columns(pl.lit("duplicate interaction").alias(REASON))
    rejected = pl.concat(
        [table.select(*GIVEN, POSITION, REASON, ROW, *own) for table in (rows.filter(pl.col(REASON).is_not_null()), repeated)]
    )
    rejected = rejected.with_columns(pl.coalesce(ROW, as_json(rejected.select(GIVEN))).alias(ROW)).select(POSITION, REASON, ROW, *own)
    return kept.filter(~same).drop(ITEM_ID, REASON, ROW).to_arrow(), rejected.to_arrow()


def _in_order(rows: pl.DataFrame, items: np.ndarray) -> pl.DataFrame:
    """Rows sorted by user and time, of a split of one's own by its parts before the time.

    Ties in time are broken by a hash, since file order would leak how the file was made; of interactions with one item at one time, the
    one of the largest weight comes first.

    Args:
        items: [catalog] hash of each item.
    """
    ties = mix(rows[HASH].to_numpy() ^ mix(items[rows[CODE].to_numpy()]), TIE_SALT)
    rows = rows.with_columns(pl.Series("_tie", ties))
    period = {PERIOD: False} if PERIOD in rows.columns else {}
    order = {HASH: False, USER_ID: False} | period  # column -> descending
    order |= {TIMESTAMP: False, "_tie": False, CODE: False, WEIGHT: True, POSITION: False}
    rows = rows.sort(list(order), descending=list(order.values())).drop(HASH, "_tie")
    return rows.with_columns(pl.col(USER_ID).rle_id().alias(USER))


def _count(kept: pa.Table, masks: tuple[np.ndarray, np.ndarray], min_user: int) -> tuple[np.ndarray, int]:
    left = survivors(kept, *masks, min_user)
    users = np.bincount(kept[USER].to_numpy()[left])
    return np.bincount(kept[CODE].to_numpy()[left], minlength=len(masks[0])), int(np.count_nonzero(users))
