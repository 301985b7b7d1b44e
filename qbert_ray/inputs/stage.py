"""The stage `ingest`: turns the user's files into catalog, sequences, interactions, and rejected rows with their reasons.

Files are read fragment by fragment; interactions are partitioned by user (`k_core`); the tables are written part by part
in tasks. Only the catalog's IDs and one number per item ever reach the driver. Every order is that of a hash, so blocks
and workers do not change the result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import fs

from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import Executor, Handle, Rows
from qbert_ray.execution.progress import Progress
from qbert_ray.inputs.k_core import CODE, COLD_SALT, HASH, ITEM_SALT, Core, Partition, core, have_weights, partition, survivors
from qbert_ray.inputs.readers import REASON, ROW, Fragment
from qbert_ray.inputs.reasons import UNITS, nothing_left, odd_ids, rejected, suspicions
from qbert_ray.inputs.rows import UNREAD, UNSAFE, as_json, normalise_interactions, normalise_items, stable_hash
from qbert_ray.inputs.sequences import sequences_of, times_seen
from qbert_ray.inputs.sources import PERIOD, PERIODS, POSITION, SPLIT, Source, SourceError, open_source
from qbert_ray.inputs.splits import Split, find_split, remarks
from qbert_ray.storage.columns import (
    COLD,
    COLD_SEQUENCES,
    DOMAIN,
    INTERACTIONS,
    ITEM_ID,
    ITEM_INDEX,
    ITEMS,
    LATER_WEIGHTS,
    RATING,
    REJECTED,
    SEQUENCES,
    TEMPORAL_SEQUENCES,
    TIMESTAMP,
    TRAIN_WEIGHTS,
    USER_ID,
    WEIGHT,
    input_type,
)
from qbert_ray.storage.directory import Counts, RunDir, resolve

ROWS_PER_PARTITION, MAX_TASKS = 500_000, 64
EXAMPLES, KNOWN_IDS = 100, 100_000  # read to explain why no interaction is left
BYTES_PER_TASK = 128 << 20  # of the catalog
GROUP = "_group"


def ingest(config: Config, run: RunDir, executor: Executor, progress: Progress) -> Counts:
    """Write ingest/items, sequences, interactions and rejected; returns the counts of each domain.

    Raises:
        SourceError: a domain's files cannot be used, or nothing is left of them.
    """
    progress.start(4 * len(config.data.domains))
    counts: Counts = {name: ingest_domain(config, name, run, executor, progress) for name in config.data.domains}
    found = [f"domain {name}: {warning}" for name, figures in counts.items() for warning in figures.pop("warnings")]
    return counts | ({"warnings": found} if found else {})


def ingest_domain(
    config: Config, name: str, run: RunDir, executor: Executor, progress: Progress, rows_per_partition: int = ROWS_PER_PARTITION
) -> Counts:
    """Ingest one domain; the number of partitions changes where parts of the users' tables end, never rows or their order."""
    data, domain = config.data, config.data.domains[name]
    items = open_source(data.root, name, "items", domain)
    interactions = open_source(
        data.root, name, "interactions", domain, needs_rating=data.min_rating is not None, with_split=data.split == "given"
    )
    item_rows, catalog = read_catalog(config, name, items, executor)
    progress.advance()

    rows = read_rows(executor, interactions, read_interactions, min_rating=data.min_rating)
    num_rows, num_tasks = rows.count(), _clamp(rows.count() / rows_per_partition, 1, MAX_TASKS)
    partitions = partition(executor, rows.blocks(), executor.put(catalog), num_tasks)
    del rows
    progress.advance()

    min_item = data.min_interactions if data.min_item_interactions is None else data.min_item_interactions
    left = core(
        executor, partitions, _held_out(catalog, data.cold_share if domain.role == "target" else 0.0), data.min_interactions, min_item
    )
    if not sum(left.users):
        raise SourceError(f"domain {name}: {_nothing_left(executor, partitions, item_rows, catalog, num_rows)}")
    progress.advance()

    evaluated = domain.role == "target"
    split = find_split(executor, partitions, left, data, name, bool(interactions.parts) or SPLIT in interactions.columns)
    weighted = have_weights(executor, partitions, interactions)
    writer = Writer(run, executor, name, catalog, left, data.rows_per_part, data.min_interactions, weighted, split)
    counts = writer.write(item_rows, partitions)
    progress.advance()
    counts = {"items_read": item_rows.count(), "interactions_read": num_rows, **counts, "core_rounds": left.rounds}
    counts["users_evaluated"] = counts.get("users_evaluated", 0)
    counts["times"] = asdict(interactions.times)  # how they were read, so that later files are read alike
    if split is not None:
        counts["split"] = split.summary(counts, name, evaluated)
    seen = {unit: counts.pop(f"time_{unit}", 0) for unit in UNITS}
    at_one_time, implausible = counts.pop("users_at_one_time", 0), counts.pop("implausible_times", 0)
    found = counts["users_evaluated"] if evaluated else counts["users"]  # of a source domain no user has to be
    counts["warnings"] = suspicions(counts["users"], found, at_one_time, seen, implausible, counts["interactions"])
    if interactions.times.ambiguous:
        counts["warnings"].append(
            "no date shows which of its first two numbers is the day; 3/4/2024 is read as the 4th of March and 3-4-2024 as the 3rd of April: "
            "write dates as 2024-03-04 if that is wrong"
        )
    counts["warnings"] += [
        f"{file.path} is not in UTF-8 and was read as Windows-1252 (Latin-1), in which its texts make no sense: write it in UTF-8"
        for file in (*items.files, *interactions.files)
        if file.text.doubtful
    ]
    counts["warnings"] += _odd_ids(executor, partitions, catalog)
    counts["warnings"] += remarks(counts.get("split", {}), counts["users"])
    for table in ("items", "interactions"):
        assert counts[f"{table}_read"] == counts[table] + sum(counts[f"{table}_rejected"].values()), f"{table} lost rows: {counts}"
    return counts


def read_catalog(config: Config, name: str, source: Source, executor: Executor) -> tuple[Rows, pa.Table]:
    """Normalised rows of a domain's items files, and its catalog as `_catalog` makes it."""
    rows = read_rows(executor, source, read_items, domain=config.data.domains[name], root=_local(config.data.root))
    return rows, _catalog(executor, source, rows.blocks())


def read_items(number: int, source: Source, fragments: list[tuple[int, Fragment]], **arguments: Any) -> Iterator[pa.Table]:
    """Normalised rows of a fragment of the items files."""
    file, fragment = fragments[number]
    for raw in source.read(file, fragment):
        yield normalise_items(raw, source, file, **arguments).to_arrow()


def read_interactions(number: int, source: Source, fragments: list[tuple[int, Fragment]], **arguments: Any) -> Iterator[pa.Table]:
    """Normalised rows of a fragment of the interactions files."""
    for raw in source.read(*fragments[number]):
        yield normalise_interactions(raw, source, **arguments).to_arrow()


def read_rows(executor: Executor, source: Source, reader: Callable[..., Iterator[pa.Table]], **arguments: Any) -> Rows:
    """Normalised rows of the files of a source.

    Args:
        executor: reads the fragments.
        source: the files.
        reader: such as `read_interactions`, called with the number of a fragment, source, fragments and the arguments.

    Raises:
        SourceError: there are no rows.
    """
    fragments = source.fragments()
    rows = executor.read(partial(reader, source=source, fragments=fragments, **arguments), len(fragments)) if fragments else None
    if rows is None or not rows.count():
        raise SourceError(f"{source.label}: {source.uri} has no rows")
    return rows


def _catalog(executor: Executor, source: Source, blocks: list[Handle]) -> pa.Table:
    """item_id, position of the first row and hash of each item, in order of the hash; an item's row number identifies it."""
    rows = pl.concat([pl.DataFrame(executor.get(handle)) for handle in [executor.submit(_ids, block) for block in blocks]])
    if rows.is_empty():
        why = [
            f"\n  {rejected(reason, *found, sum(map(len, map(executor.get, blocks))))}"
            for reason, found in _reasons(executor, blocks).items()
        ]
        raise SourceError(f"{source.label}: no row of {source.uri} can be used: {''.join(why)}")
    first = rows.group_by(ITEM_ID).agg(pl.col(POSITION).min())
    hashed = first.with_columns(pl.Series(HASH, stable_hash(first[ITEM_ID], ITEM_SALT)))
    return hashed.sort(HASH, ITEM_ID).to_arrow()


def _ids(block: pa.Table) -> pa.Table:
    return pl.DataFrame(block).filter(pl.col(REASON).is_null()).select(ITEM_ID, POSITION).to_arrow()


def _held_out(catalog: pa.Table, share: float) -> np.ndarray:
    """[catalog] whether an item is cold; it depends on its ID alone, so another catalog or seed holds out the same items."""
    return stable_hash(pl.DataFrame(catalog)[ITEM_ID], COLD_SALT) < np.uint64(share * 2**64)


def _odd_ids(executor: Executor, partitions: list[Partition], catalog: pa.Table) -> list[str]:
    """Warnings about IDs that are used as they are, and may be others than meant."""
    items = odd_ids(pl.DataFrame(catalog)[ITEM_ID])
    found = {("items", what): (count, example) for what, (count, example) in items.items()}
    for handle in [executor.submit(_odd_users, part.kept) for part in partitions]:
        for what, (count, example) in executor.get(handle).items():
            before, first = found.get(("users", what), (0, example))
            found["users", what] = (before + count, first)
    return [f"IDs of {count:,} {of}, such as {example!a}, {what}" for (of, what), (count, example) in found.items()]


def _odd_users(kept: pa.Table) -> dict[str, tuple[int, str]]:
    return odd_ids(pl.DataFrame(kept)[USER_ID].unique(maintain_order=True))


def _nothing_left(executor: Executor, partitions: list[Partition], items: Rows, catalog: pa.Table, num_rows: int) -> str:
    found = _reasons(executor, [part.rejected for part in partitions])
    left = num_rows - sum(count for count, _ in found.values())
    known = pl.DataFrame(catalog)[ITEM_ID].head(KNOWN_IDS).to_list()
    return nothing_left(num_rows, found, left, _reasons(executor, items.blocks()), items.count(), known)


def _reasons(executor: Executor, tables: list[Handle]) -> dict[str, tuple[int, list[str]]]:
    """Reason -> how many rows it rejects and some of them as JSON, the most frequent first."""
    total: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for handle in [executor.submit(_some_rejected, table) for table in tables]:
        for reason, count, rows in executor.get(handle):
            total[reason] += count
            examples[reason] = (examples.get(reason, []) + rows)[:EXAMPLES]
    return {reason: (count, examples[reason]) for reason, count in total.most_common()}


def _some_rejected(table: pa.Table) -> list[tuple[str, int, list[str]]]:
    rows = pl.DataFrame(table).filter(pl.col(REASON).is_not_null())
    grouped = rows.group_by(REASON, maintain_order=True).agg(pl.len(), pl.col(ROW).drop_nulls().head(EXAMPLES))
    return list(grouped.select(REASON, "len", ROW).iter_rows())


def _local(root: str) -> str:
    """Path of a local root; empty for a remote one."""
    filesystem, path = resolve(root)
    return path if isinstance(filesystem, fs.LocalFileSystem) else ""


def _clamp(value: float, low: int, high: int) -> int:
    return max(low, min(math.ceil(value), high))


# writing


@dataclass(frozen=True)
class Writer:
    """Writes one domain's tables from the items and users of its k-core."""

    run: RunDir
    executor: Executor
    domain: str
    catalog: pa.Table
    left: Core
    rows_per_part: int | None
    min_user: int
    weighted: bool  # interactions have weights
    split: Split | None = None  # None: leave-one-out

    def write(self, items: Rows, partitions: list[Partition]) -> Counts:
        """Write all tables; returns the counts of kept rows, and of rejected rows by reason."""
        num_items = int(self.left.items.sum() + self.left.cold.sum())
        size = self.rows_per_part or _clamp(num_items / 16, 64, 8192)
        parts_per_task = _clamp(num_items / size / _clamp(items.size_bytes() / BYTES_PER_TASK, 1, MAX_TASKS), 1, 1 << 30)
        groups = math.ceil(num_items / (size * parts_per_task))
        catalog = self.executor.put(self._final_catalog(size * parts_per_task))
        split = [self.executor.submit(split_items, block, catalog, groups, num_returns=groups) for block in items.blocks()]
        pieces = zip(*split, strict=True) if groups > 1 else [split]
        tasks = [
            self.executor.submit(write_items, self.run, self.domain, f"{n:05d}", n * parts_per_task, size, *rows)
            for n, rows in enumerate(pieces)
        ]
        tasks += self._user_tasks(catalog, partitions, groups)
        total: Counter[tuple[str, str]] = Counter()
        for counts in map(self.executor.get, tasks):
            total.update(counts)
        return {key: count for (key, reason), count in sorted(total.items()) if not reason} | {
            f"{table}_rejected": {reason: count for (key, reason), count in sorted(total.items()) if reason and key == table}
            for table in ("items", "interactions", "images")
        }

    def _user_tasks(self, catalog: Handle, partitions: list[Partition], first_rejected: int) -> list[Handle]:
        size = self.rows_per_part or _clamp(sum(self.left.users) / 16, 64, 8192)
        first_parts = np.cumsum([0, *(math.ceil(users / size) for users in self.left.users)]).tolist()
        return [
            self.executor.submit(
                _write_users, self.run, self.domain, f"{first_rejected + n:05d}", first_parts[n], size, self.min_user, self.weighted, self.split,
                catalog, part.kept, part.rejected
            )
            for n, part in enumerate(partitions)
        ]  # fmt: skip

    def _final_catalog(self, rows_per_group: int) -> pa.Table:
        """The catalog with item_index (null: not kept; cold items come last), the group that writes the row, and whether it is cold."""
        kept, cold = self.left.items | self.left.cold, self.left.cold
        index = np.where(cold, self.left.items.sum() + np.cumsum(cold), np.cumsum(self.left.items)) - 1
        frame = pl.DataFrame(self.catalog).with_columns(
            pl.Series(GROUP, np.maximum(index, 0) // rows_per_group), pl.Series(ITEM_INDEX, index.astype(np.int32)), pl.Series(COLD, cold)
        )
        return frame.with_columns(pl.when(pl.Series(kept)).then(ITEM_INDEX).alias(ITEM_INDEX)).to_arrow()


def split_items(block: pa.Table, catalog: pa.Table, groups: int) -> list[pa.Table] | pa.Table:
    """Rows of each group, with item_index, or with the reason why they are rejected."""
    first = pl.DataFrame(catalog).rename({POSITION: "first"})
    rows = pl.DataFrame(block).join(first, on=ITEM_ID, how="left")
    repeated = pl.when(pl.col(POSITION) != pl.col("first")).then(pl.lit(f"duplicate {ITEM_ID}"))
    rare = pl.when(pl.col(ITEM_INDEX).is_null()).then(pl.lit("below min_item_interactions"))
    rows = rows.with_columns(pl.coalesce(REASON, repeated, rare).alias(REASON), pl.col(GROUP).fill_null(0)).drop("first")
    tables = [rows.filter(pl.col(GROUP) == group).to_arrow() for group in range(groups)]
    return tables if groups > 1 else tables[0]


def write_items(run: RunDir, domain: str, number: str, first_part: int, size: int, *pieces: pa.Table) -> Counter[tuple[str, str]]:
    """Write the parts of a group of items and part `number` of the rejected rows; returns counts by (table, reason), "" if kept."""
    rows = pl.concat([pl.DataFrame(piece) for piece in pieces])
    kept = rows.filter(pl.col(REASON).is_null()).sort(ITEM_INDEX).with_columns(pl.lit(domain).alias(DOMAIN))
    inputs = [name for name in rows.columns if "." in name]
    schema = pa.schema([*ITEMS, *((name, input_type(name)) for name in inputs)])
    texts = [name for name in inputs if input_type(name) == pa.string()]
    for offset in range(0, len(kept), size):
        run.write_part(
            "ingest/items", f"{domain}-{first_part + offset // size:05d}.parquet", _to_arrow(kept[offset : offset + size], schema)
        )
    lost = rows.filter(pl.col(REASON).is_not_null())
    lost = lost.with_columns(pl.coalesce(ROW, as_json(lost.select(ITEM_ID, *texts))).alias(ROW), pl.lit("items").alias("table"))
    names = ["table", POSITION, REASON, ROW]
    counts = Counter({("items", ""): len(kept), ("cold_items", ""): int(kept[COLD].sum())})
    images = [
        _unusable_images(kept, column, reason).select(names) for column, reason in ((UNSAFE, "unsafe path"), (UNREAD, "no path in image"))
    ]
    return counts + _write_rejected(run, domain, number, pl.concat([lost.select(names), *images]))


def _unusable_images(kept: pl.DataFrame, column: str, reason: str) -> pl.DataFrame:
    """Items whose image cannot be used, with the value that was given for it."""
    lost = kept.filter(pl.col(column).is_not_null())
    row = as_json(lost.select(ITEM_ID, pl.col(column).alias("image")))
    return lost.with_columns(row.alias(ROW), pl.lit("images").alias("table"), pl.lit(reason).alias(REASON))


def _write_users(
    run: RunDir,
    domain: str,
    number: str,
    first_part: int,
    size: int,
    min_user: int,
    weighted: bool,
    split: Split | None,
    catalog: pa.Table,
    kept: pa.Table,
    rejected: pa.Table,
) -> Counter[tuple[str, str]]:
    items, rows = pl.DataFrame(catalog), pl.DataFrame(kept)
    rows = rows.with_columns(
        items[ITEM_ID][rows[CODE]], items[ITEM_INDEX][rows[CODE]], items[COLD][rows[CODE]], pl.lit(domain).alias(DOMAIN)
    )
    cold = items[COLD].to_numpy()
    survives = survivors(kept, items[ITEM_INDEX].is_not_null().to_numpy() & ~cold, cold, min_user)
    sequences, left = sequences_of(rows.filter(survives), split)
    ends = [0, *sequences["rows"].cum_sum().to_list()]
    interactions_schema = INTERACTIONS.append(pa.field(WEIGHT, pa.float32())) if weighted else INTERACTIONS
    sequences_schema = SEQUENCES if split is None else TEMPORAL_SEQUENCES
    if weighted:
        for name in (TRAIN_WEIGHTS, LATER_WEIGHTS):
            sequences_schema = sequences_schema.append(pa.field(name, pa.list_(pa.float32())))
    for offset in range(0, len(sequences), size):
        name, end = f"{domain}-{first_part + offset // size:05d}.parquet", min(offset + size, len(sequences))
        run.write_part("ingest/interactions", name, _to_arrow(left[ends[offset] : ends[end]], interactions_schema))
        run.write_part("ingest/sequences", name, _to_arrow(sequences[offset:end], sequences_schema))
        if cold.any():
            run.write_part("ingest/cold", name, _to_arrow(sequences[offset:end].filter(pl.col("target").is_not_null()), COLD_SEQUENCES))
    lost = rows.filter(~survives)
    reason = (
        pl.when(pl.col(ITEM_INDEX).is_null())
        .then(pl.lit("item below min_item_interactions"))
        .otherwise(pl.lit("user below min_interactions"))
    )
    own = [PERIOD] if PERIOD in lost.columns else []
    lost = lost.select(POSITION, reason.alias(REASON), as_json(lost.select(USER_ID, ITEM_ID, TIMESTAMP, RATING)).alias(ROW), *own)
    everything = pl.concat([pl.DataFrame(rejected), lost]).with_columns(pl.lit("interactions").alias("table"))
    counts = Counter({("interactions", ""): len(left), ("users", ""): len(sequences), ("cold_interactions", ""): int(left[COLD].sum())})
    if own:
        counts.update({(f"{name}_rejected", ""): int((everything[PERIOD] == number).sum()) for number, name in enumerate(PERIODS)})
    counts["users_evaluated", ""] = int(sequences["test"].is_not_null().sum())
    if split is not None:
        counts.update({(name, ""): count for name, count in split.counts(sequences, left).items()})
    counts.update({(name, ""): count for name, count in times_seen(left[TIMESTAMP].to_numpy(), np.array(ends)).items()})
    return counts + _write_rejected(run, domain, number, everything)


def _write_rejected(run: RunDir, domain: str, number: str, rows: pl.DataFrame) -> Counter[tuple[str, str]]:
    rows = rows.sort("table", POSITION).rename({REASON: "reason", ROW: "row"}).with_columns(pl.lit(domain).alias(DOMAIN))
    run.write_part("ingest/rejected", f"{domain}-{number}.parquet", _to_arrow(rows, REJECTED))
    return Counter({(table, reason): count for table, reason, count in rows.group_by("table", "reason").len().iter_rows()})


def _to_arrow(rows: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    return rows.select(schema.names).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)  # no string views, whose cast is slow
