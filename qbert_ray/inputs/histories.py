"""Histories from a file that `score` is given: newer interactions, laid over those of the run, or histories of other users.

Rows are read, partitioned by user and put in order as the ingest does it, so that a history comes out the same whichever file it is in.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import polars as pl
import pyarrow as pa

from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import Executor
from qbert_ray.inputs import readers
from qbert_ray.inputs.json_files import plain_text
from qbert_ray.inputs.k_core import CODE, HASH, ITEM_SALT, merge_rows, split_users
from qbert_ray.inputs.readers import REASON, ROW, FileError, Fragment
from qbert_ray.inputs.reasons import UNITS, time_units
from qbert_ray.inputs.rows import stable_hash
from qbert_ray.inputs.sources import POSITION, Source, SourceError, open_files, open_source
from qbert_ray.inputs.stage import MAX_TASKS, ROWS_PER_PARTITION, read_interactions, read_rows
from qbert_ray.inputs.times import TimeStyle
from qbert_ray.inputs.values import as_id
from qbert_ray.storage.columns import DOMAIN, HISTORIES, ITEM_ID, ITEM_INDEX, RATING, REJECTED, TIMESTAMP, USER_ID, WEIGHT
from qbert_ray.storage.directory import Manifest, RunDir

NO_UNIT = "no unit that is known"
INTERACTIONS = "score.interactions"  # key of the config
HISTORY = "history"  # column of lists of item_id, in files with a row per user
USERS_PER_PART = 8192
KNOWN, REPEATED = "known", "duplicate interaction"  # reasons of rows that the run has already, and of those that the file has twice
EMPTY = "empty history"  # reason of rows that stand for a user without items
_BETWEEN = "\x1f"  # IDs of a JSON list as one text


def open_histories(config: Config, domain: str, location: str, key: str) -> Source:
    """The files of a path of the section `score`, with their columns; rows are not read yet.

    Args:
        config: whose section `data` says how interactions are written.
        domain: whose interactions they are.
        location: file, folder or glob under data.root.
        key: of the config, for errors.

    Raises:
        SourceError: no such file, one that is unreadable, or one without the columns of interactions, or user_id and history.
    """
    data = config.data
    given = data.domains[domain].model_copy(update={"interactions": location})
    follow = None if given.follow_links else f"data.domains.{domain}.follow_links"
    uri, filesystem, files = open_files(data.root, location, f"domain {domain}: {key}", key, follow)
    if key == INTERACTIONS or not any(HISTORY in file.columns for file in files):  # a list has no times to be laid over others by
        return open_source(data.root, domain, "interactions", given, data.min_rating is not None, key)
    user = given.interaction_columns.get("user_id", USER_ID)
    for file in files:
        if user not in file.columns or HISTORY not in file.columns:
            raise SourceError(f"{key}: {file.path} needs the columns {user} and {HISTORY}; columns found: {', '.join(file.columns)}")
        if file.kind in ("csv", "tsv"):
            raise SourceError(
                f"{key}: {HISTORY} of {file.path} is a list, which Parquet and JSON lines can hold; in {file.kind} write one interaction a row"
            )
    return Source(f"domain {domain}: {key}", uri, filesystem, files, "histories", {USER_ID: (user,), HISTORY: (HISTORY,)}, None)


def read_lists(number: int, source: Source, fragments: list[tuple[int, Fragment]]) -> Iterator[pa.Table]:
    """Rows as of interactions of a fragment with a row per user; the place in the files is the time, so several rows of a user follow each other."""
    user, first = source.columns[USER_ID][0], number << 40
    try:
        for _, raw in readers.read(source.filesystem, fragments[number][1], {user: plain_text, HISTORY: _joined}):
            rows = _exploded(raw, user, first)
            first += len(rows)
            yield rows.to_arrow()
    except FileError as error:
        raise SourceError(f"{source.label}: {error}") from None


def _joined(value: Any) -> str | None:
    return _BETWEEN.join(plain_text(each) or "" for each in value) if isinstance(value, list) else plain_text(value)


def _listed(text: str) -> str | None:
    """A list that is written as JSON, as other tools write lists into texts, with its IDs joined; any other text as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _joined(found) or None  # an empty list, as one that is not written as a text


def _exploded(raw: pl.DataFrame, user: str, first: int) -> pl.DataFrame:
    raw = raw.with_columns(*(pl.lit(None, pl.String).alias(name) for name in (REASON, ROW, user, HISTORY) if name not in raw.columns))
    kind = raw.schema[HISTORY]
    if isinstance(kind, pl.Array):
        raw = raw.with_columns(pl.col(HISTORY).arr.to_list())
        kind = raw.schema[HISTORY]
    if isinstance(kind, pl.List):
        items = pl.col(HISTORY).list.eval(as_id(pl.element(), kind.inner))
    else:
        text = pl.when(pl.col(HISTORY).cast(pl.String) != "").then(pl.col(HISTORY).cast(pl.String))
        listed = pl.when(text.str.starts_with("[")).then(text.map_elements(_listed, return_dtype=pl.String)).otherwise(text)
        items = listed.str.split(_BETWEEN).list.eval(as_id(pl.element(), pl.String()))
    rows = raw.select(as_id(pl.col(user), raw.schema[user]).alias(USER_ID), items.alias(ITEM_ID), REASON, ROW)
    rows = rows.with_columns(pl.when(pl.col(ITEM_ID).list.len() > 0).then(ITEM_ID))  # a null is one row, an empty list would be none
    rows = rows.with_columns(pl.int_ranges(pl.col(ITEM_ID).list.len()).alias(TIMESTAMP)).explode(ITEM_ID, TIMESTAMP)
    empty = pl.when(pl.col(TIMESTAMP).is_null()).then(pl.lit(EMPTY))
    reasons = [empty, *(pl.when(pl.col(name).is_null()).then(pl.lit(f"missing {name}")) for name in (USER_ID, ITEM_ID))]
    position = pl.int_range(pl.len(), dtype=pl.Int64) + first
    fixed = (pl.lit(None, pl.Float32).alias(RATING), pl.lit(1.0, pl.Float32).alias(WEIGHT))
    return rows.with_columns(
        pl.coalesce(REASON, *reasons).alias(REASON), *fixed, position.alias(POSITION), position.alias(TIMESTAMP)
    ).select(USER_ID, ITEM_ID, TIMESTAMP, RATING, WEIGHT, POSITION, REASON, ROW)


def write_histories(
    config: Config, run: RunDir, domain: str, source: Source, output: str, executor: Executor, newer: bool
) -> dict[str, Any]:
    """Write <output>/histories and <output>/rejected of a domain; returns the counts of rows and users.

    Args:
        config: of the run.
        run: whose catalog the items are of.
        domain: of the run.
        source: of `open_histories`.
        output: folder of the stage.
        executor: reads the rows and writes the parts.
        newer: the rows come on top of the interactions of the run, whose users are all written; otherwise they stand alone.

    Raises:
        SourceError: there are no rows, or their times have another unit than those of the run.
    """
    lists = source.format == "histories"
    arguments = {} if lists else {"min_rating": config.data.min_rating}
    source = source if lists else replace(source, times=_times_of_run(run, domain, source.times))
    rows = read_rows(executor, source, read_lists if lists else read_interactions, **arguments)
    old = [executor.submit(_known_rows, run, part) for part in (run.parts("ingest/interactions", domain) if newer else [])]
    count = max(1, min(math.ceil(rows.count() / ROWS_PER_PARTITION) + len(old) // 8, MAX_TASKS))
    split = [executor.submit(split_users, block, count, num_returns=count) for block in [*old, *rows.blocks()]]
    pieces = zip(*split, strict=True) if count > 1 else [split]
    catalog, size = executor.put(_catalog(run, domain)), config.data.rows_per_part or USERS_PER_PART
    tasks = [executor.submit(_write_partition, run, domain, output, number, size, catalog, *blocks) for number, blocks in enumerate(pieces)]
    total: Counter[str] = Counter()
    for counts in map(executor.get, tasks):
        total.update(counts)
    _check_units(source, total)
    rejected = {name.partition(": ")[2]: number for name, number in total.items() if name.startswith("rejected: ")}
    known, _ = rejected.pop(KNOWN, 0), rejected.pop(EMPTY, 0)
    found = {"file": source.uri, "rows": rows.count(), "new": total["new"], "known": known, "rejected": rejected, "users": total["users"]}
    return found | ({"new_users": total["new_users"]} if newer else {})


def _times_of_run(run: RunDir, domain: str, seen: TimeStyle) -> TimeStyle:
    """How the run read times; a few new rows may not show which number is the day. As seen in the file where the run does not say it."""
    manifest = Manifest.load(run, "ingest")
    found = manifest.counts.get(domain, {}).get("times") if manifest else None
    return TimeStyle(**found) if found else seen


def _catalog(run: RunDir, domain: str) -> pa.Table:
    """item_id of a domain's items in the order of item_index, with the hash that breaks ties in time."""
    items = pl.DataFrame(run.read("ingest/items", domain, [ITEM_ID, ITEM_INDEX])).sort(ITEM_INDEX)
    return items.select(ITEM_ID, pl.Series(HASH, stable_hash(items[ITEM_ID], ITEM_SALT))).to_arrow()


def _known_rows(run: RunDir, part: str) -> pa.Table:
    """Interactions of the run as they were read; negative positions, so that of equal rows these are kept."""
    rows = pl.DataFrame(run.read_part("ingest/interactions", part))
    weight = pl.col(WEIGHT) if WEIGHT in rows.columns else pl.lit(1.0, pl.Float32).alias(WEIGHT)
    position = (-1 - pl.int_range(pl.len(), dtype=pl.Int64)).alias(POSITION)
    none = (pl.lit(None, pl.String).alias(name) for name in (REASON, ROW))
    return rows.select(USER_ID, ITEM_ID, TIMESTAMP, RATING, weight, position, *none).to_arrow()


def _write_partition(run: RunDir, domain: str, output: str, number: int, size: int, catalog: pa.Table, *blocks: pa.Table) -> Counter[str]:
    same = [USER_ID, ITEM_ID, TIMESTAMP]
    given = pl.concat([pl.DataFrame(block).select(*same, HASH, POSITION) for block in blocks]).drop_nulls(USER_ID)
    kept, rejected = (pl.DataFrame(table) for table in merge_rows(catalog, *blocks))
    in_file = pl.col(POSITION) >= 0
    known = given.filter(in_file).join(given.filter(~in_file), on=same, how="semi")[POSITION].implode()
    again = (pl.col(REASON) == REPEATED) & pl.col(POSITION).is_in(known)
    rejected = rejected.filter(in_file).with_columns(pl.when(again).then(pl.lit(KNOWN)).otherwise(REASON).alias(REASON))
    users = given.group_by(USER_ID, HASH).agg(in_file.all().alias("new")).sort(HASH, USER_ID)
    histories = kept.group_by(USER_ID).agg(pl.col(CODE).cast(pl.Int32).alias(HISTORY))
    table = users.join(histories, on=USER_ID, how="left", maintain_order="left").with_columns(
        pl.col(HISTORY).fill_null(pl.lit([], pl.List(pl.Int32))), pl.lit(domain).alias(DOMAIN)
    )
    for offset in range(0, len(table), size):
        name = f"{domain}-{number:05d}{offset // size:05d}.parquet"  # in order of the partitions
        run.write_part(f"{output}/histories", name, table[offset : offset + size].select(HISTORIES.names).to_arrow().cast(HISTORIES))
    counts = Counter({f"rejected: {reason}": count for reason, count in rejected.group_by(REASON).len().iter_rows()})
    lost = rejected.filter(~pl.col(REASON).is_in([KNOWN, EMPTY])).sort(POSITION)
    if len(lost):
        lost = lost.select(
            pl.lit(domain).alias(DOMAIN), pl.lit(output).alias("table"), pl.col(REASON).alias("reason"), pl.col(ROW).alias("row")
        )
        run.write_part(f"{output}/rejected", f"{domain}-{number:05d}.parquet", lost.to_arrow().cast(REJECTED))
    of_run = pl.col(POSITION).is_in(known)  # of two equal rows that of the larger weight is kept, which may be the file's
    counts[f"rejected: {KNOWN}"] += len(kept.filter(of_run))
    fresh = kept.select(in_file & ~of_run).to_series()
    counts.update({"new": int(fresh.sum()), "users": len(table), "new_users": int(table["new"].sum())})
    for name, times in (("new", kept.filter(fresh)[TIMESTAMP]), ("run", kept.filter(~fresh)[TIMESTAMP])):
        units = time_units(times.to_numpy())
        counts.update(
            {f"{name} times in {unit}": number for unit, number in units.items()}
            | {f"{name} times in {NO_UNIT}": len(times) - sum(units.values())}
        )
    return counts


def _check_units(source: Source, counts: Counter[str]) -> None:
    """Raise if most times of the file are of another unit than those of the run."""
    usual = {name: max([*UNITS, NO_UNIT], key=lambda unit: counts[f"{name} times in {unit}"]) for name in ("new", "run")}
    found = {name: counts[f"{name} times in {unit}"] for name, unit in usual.items()}
    if found["new"] and found["run"] and usual["new"] != usual["run"]:  # running numbers, 20240131 and days of a spreadsheet are in none
        raise SourceError(
            f"{source.label}: times of {source.uri} are in {usual['new']}, those of the run in {usual['run']}, so histories would be in the wrong "
            "order; write the newer ones as the run's files have them"
        )
