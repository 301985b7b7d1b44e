"""The stage ingest (catalog, k-core, sequences, splits, rejected rows) on Ray and by the local executor against polars and pandas.

    python -m tests.benchmarks.ingesting            # 1,000,000 interactions
    python -m tests.benchmarks.ingesting --full     # 10,000,000
    python -m tests.benchmarks.ingesting --rows 30000000 --only ours

All write the same catalog, interactions with their split, and sequences; these are compared row by row. Only ours keeps rejected
rows with their reasons. Ties in time fall by our hash in all three; polars and pandas use its function. Each runs in a process
of its own, with as many threads as there are cores; time is from the first file opened to the last one written, for ours also
from before Ray starts. Memory is that of the process and all of Ray's (`process_tree`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import polars as pl

from qbert_ray.config.loading import load_config
from qbert_ray.execution.executor import Executor
from qbert_ray.inputs.rows import mix, stable_hash
from qbert_ray.storage.columns import ITEM_ID, ITEM_INDEX, TIMESTAMP, USER_ID
from qbert_ray.storage.directory import RunDir
from tests.benchmarks.process_tree import GIB, Peak
from tests.benchmarks.resampling import write_interactions
from tests.benchmarks.table import Figure, main

K = 5
USER_SALT, ITEM_SALT, TIE_SALT = 1, 2, 3  # of qbert_ray/inputs/k_core.py
SEQUENCES = [USER_ID, "train", "valid", "test"]
INTERACTIONS = [USER_ID, ITEM_ID, TIMESTAMP, "rating", "split"]
MOST_SECONDS, MOST_GIB = 300, 8


def ours(shop: Path, out: Path) -> dict[str, float]:
    from qbert_ray.execution.ray_executor import ray_executor

    return ingested(shop, out, ray_executor())


def in_this_process(shop: Path, out: Path) -> dict[str, float]:
    from qbert_ray.config.schema import Compute
    from qbert_ray.execution.local import local_executor

    return ingested(shop, out, local_executor(Compute()))


def ingested(shop: Path, out: Path, opened: AbstractContextManager[Executor]) -> dict[str, float]:
    from qbert_ray.inputs.stage import ingest

    settings = [
        f"data.root={shop}",
        "data.domains.shop={text_fields: [title], interactions: interactions}",
        f"data.min_interactions={K}",
        f"run.dir={out}",
    ]
    config = load_config([], settings)
    with opened as executor:
        ready, clock = time.monotonic(), Laps()
        counts = ingest(config, RunDir(str(out)), executor, clock)["shop"]
        seconds = time.monotonic() - ready
    return {"seconds": seconds, "rounds": counts["core_rounds"], "laps": clock.laps()}


class Laps:
    """A `Progress` that keeps when the steps of a stage were done."""

    def __init__(self) -> None:
        self.times = [time.monotonic()]

    def start(self, total: int, done: int = 0) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        self.times.append(time.monotonic())

    def note(self, text: str) -> None:
        pass

    def laps(self) -> list[float]:
        return [round(float(lap), 2) for lap in np.diff(self.times)]


def in_polars(shop: Path, out: Path) -> dict[str, float]:
    started = time.monotonic()
    items = pl.read_parquet(shop / "items.parquet").unique(ITEM_ID, keep="first", maintain_order=True)
    items = items.with_columns(pl.Series("hash", stable_hash(items[ITEM_ID], ITEM_SALT))).sort("hash", ITEM_ID).with_row_index("code")
    people = pl.scan_parquet(shop / "interactions").select(pl.col(USER_ID).unique()).collect()
    people = people.with_columns(pl.Series("user_hash", stable_hash(people[USER_ID], USER_SALT)))
    people = people.sort("user_hash", USER_ID).with_row_index("user")
    rows = pl.scan_parquet(shop / "interactions").with_row_index("position")
    rows = rows.join(people.lazy(), on=USER_ID).join(items.lazy().select(ITEM_ID, "code", "hash"), on=ITEM_ID)
    rows = rows.select("position", "user", "code", TIMESTAMP, "rating", "user_hash", "hash").collect()
    ties = mix(rows["user_hash"].to_numpy() ^ mix(rows["hash"].to_numpy()), TIE_SALT)
    rows = rows.drop("user_hash", "hash").with_columns(pl.Series("tie", ties))
    rows = rows.sort("user", TIMESTAMP, "tie", "code", "position").unique(["user", "code", TIMESTAMP], keep="first", maintain_order=True)
    rows = rows.drop("tie", "position")
    rounds, before = 0, -1
    while before != len(rows):
        before, rounds = len(rows), rounds + 1
        rows = rows.filter(pl.len().over("code") >= K)
        rows = rows.filter(pl.len().over("user") >= K)
    left = items.join(rows.select("code").unique(), on="code", how="semi", maintain_order="left").drop("hash").with_row_index(ITEM_INDEX)
    rows = rows.join(left.select("code", ITEM_ID, pl.col(ITEM_INDEX).cast(pl.Int32)), on="code", maintain_order="left")
    rows = rows.join(people.select("user", USER_ID), on="user", maintain_order="left")
    after = pl.len().over("user") - pl.int_range(pl.len()).over("user")
    split = pl.when(after == 1).then(pl.lit("test")).when(after == 2).then(pl.lit("valid")).otherwise(pl.lit("train"))
    rows = rows.with_columns(split.alias("split"))
    item = pl.col(ITEM_INDEX)
    sequences = rows.group_by("user", maintain_order=True).agg(
        pl.first(USER_ID), item.head(pl.len() - 2).alias("train"), item.get(-2).alias("valid"), item.get(-1).alias("test")
    )
    _write(out, left, sequences, rows)
    return {"seconds": time.monotonic() - started, "rounds": rounds}


def in_pandas(shop: Path, out: Path) -> dict[str, float]:
    import pandas as pd

    started = time.monotonic()
    items = pd.read_parquet(shop / "items.parquet").drop_duplicates(ITEM_ID)
    items["hash"] = stable_hash(pl.Series(items[ITEM_ID]), ITEM_SALT)
    items = items.sort_values(["hash", ITEM_ID], ignore_index=True)
    items["code"] = np.arange(len(items))
    rows = pd.read_parquet(shop / "interactions")
    rows["position"] = np.arange(len(rows))
    rows["user_hash"] = stable_hash(pl.Series(rows[USER_ID]), USER_SALT)
    rows = rows.merge(items[[ITEM_ID, "code", "hash"]], on=ITEM_ID)
    rows["tie"] = mix(rows["user_hash"].to_numpy() ^ mix(rows["hash"].to_numpy()), TIE_SALT)
    rows = rows.sort_values(["user_hash", USER_ID, TIMESTAMP, "tie", "code", "position"])
    rows = rows.drop_duplicates([USER_ID, "code", TIMESTAMP])
    rounds, before = 0, -1
    while before != len(rows):
        before, rounds = len(rows), rounds + 1
        rows = rows[rows.groupby("code")["position"].transform("size") >= K]
        rows = rows[rows.groupby(USER_ID)["position"].transform("size") >= K]
    left = items[items["code"].isin(rows["code"])].reset_index(drop=True)
    left[ITEM_INDEX] = np.arange(len(left), dtype=np.int32)
    rows = rows.merge(left[["code", ITEM_INDEX]], on="code", how="left")
    after = rows.groupby(USER_ID).cumcount(ascending=False)
    rows["split"] = np.where(after == 0, "test", np.where(after == 1, "valid", "train"))
    grouped = rows.groupby(USER_ID, sort=False)[ITEM_INDEX].agg(list)
    sequences = pd.DataFrame({USER_ID: grouped.index, "train": grouped.str[:-2].to_numpy(), "valid": grouped.str[-2].to_numpy()})
    sequences["test"] = grouped.str[-1].to_numpy()
    left.to_parquet(out / "items.parquet")
    sequences.to_parquet(out / "sequences.parquet")
    rows[INTERACTIONS].to_parquet(out / "interactions.parquet")
    return {"seconds": time.monotonic() - started, "rounds": rounds}


def _write(out: Path, items: pl.DataFrame, sequences: pl.DataFrame, rows: pl.DataFrame) -> None:
    items.write_parquet(out / "items.parquet")
    sequences.select(SEQUENCES).write_parquet(out / "sequences.parquet")
    rows.select(INTERACTIONS).write_parquet(out / "interactions.parquet")


WAYS = {"ours": ours, "local": in_this_process, "polars": in_polars, "pandas": in_pandas}


def once(name: str, shop: Path, out: Path) -> None:
    """What a process of its own does; prints its figures."""
    started = time.monotonic()
    out.mkdir(parents=True)
    with Peak() as peak:
        found = WAYS[name](shop, out)
    whole = time.monotonic() - started
    print(json.dumps(found | {"whole": whole, "gib": peak.gib, "before": peak.before / GIB}), flush=True)


def assert_equal(ours: Path, theirs: Path) -> None:
    """The same sequences, splits and item indices, row by row."""
    for table, columns in (("items", [ITEM_ID, ITEM_INDEX]), ("sequences", SEQUENCES), ("interactions", INTERACTIONS)):
        mine, other = (
            pl.read_parquet(ours / "ingest" / table, columns=columns),
            pl.read_parquet(theirs / f"{table}.parquet", columns=columns),
        )
        assert mine.equals(other.select(pl.col(name).cast(mine.schema[name]) for name in columns)), f"{table} of {theirs.name} differ"


def run(name: str, shop: Path, out: Path) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.ingesting", "--once", name, "--shop", str(shop), "--out", str(out)]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "POLARS_MAX_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def figures(full: bool, rows: int | None = None) -> Iterator[Figure]:
    size = rows or (10_000_000 if full else 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        shop = Path(folder) / "shop"
        what = f"ingest, {size:,} interactions ({write_interactions(shop, size)})"
        found = {}
        for name in WAYS:
            found[name] = run(name, shop, Path(folder) / name)
            if name not in ("ours", "local"):
                for executor in ("ours", "local"):
                    assert_equal(Path(folder) / executor, Path(folder) / name)
                shutil.rmtree(Path(folder) / name)
        mine = found["ours"]
        cores = os.cpu_count()
        print(f"laps of ours (catalog, read and split, order and core, write): {mine['laps']}", file=sys.stderr)
        yield Figure(
            f"{what}, with the start of Ray, {cores} cores", f"{mine['whole']:.0f} s", "", None, f"<= {MOST_SECONDS} s",
            mine["whole"] <= MOST_SECONDS,
        )  # fmt: skip
        yield Figure(f"{what}, peak memory of all processes", f"{mine['gib']:.1f} GiB", f"polars: {found['polars']['gib']:.1f} GiB",
                     found["polars"]["gib"] / mine["gib"], f"< {MOST_GIB} GiB", mine["gib"] < MOST_GIB)  # fmt: skip
        for name in ("polars", "pandas"):
            yield Figure(what, f"{mine['seconds']:.1f} s", f"{name}: {found[name]['seconds']:.1f} s",
                         found[name]["seconds"] / mine["seconds"], "", None)  # fmt: skip
        local, ratio = found["local"]["seconds"], found["polars"]["seconds"] / found["local"]["seconds"]
        yield Figure(
            f"{what}, local executor", f"{local:.1f} s", f"polars: {found['polars']['seconds']:.1f} s", ratio, ">= .8 x", ratio >= 0.8
        )


def command_line() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=list(WAYS))
    for name in ("--shop", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--once", choices=list(WAYS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        once(given.once, given.shop, given.out)
    elif given.only:
        with tempfile.TemporaryDirectory() as folder:
            write_interactions(Path(folder) / "shop", given.rows or 1_000_000)
            print(run(given.only, Path(folder) / "shop", Path(folder) / given.only))
    else:
        main(lambda full: figures(full, given.rows))


if __name__ == "__main__":
    command_line()
