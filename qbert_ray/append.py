"""Appends new items to a finished run: the trained models give them semantic IDs; published IDs are never changed or reused.

The catalog grows only at its end: new items become further parts of ingest/items, and features, embeddings and IDs of these
parts are made as those of cold items. A part without IDs comes from an interrupted try, and the same command resumes with it.
Versions of the IDs are lists of parts in the manifest of semantic_ids, each with its parent; the manifest is written after
the parts. Items that the k-core of the ingest dropped stay out unless they are asked for, and published items that the files do not
have any more are listed in ingest/gone, so that they are not recommended.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa

from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.features.stage import extend_features
from qbert_ray.fusion.stage import embed_catalog
from qbert_ray.inputs.readers import REASON
from qbert_ray.inputs.sources import POSITION, open_source
from qbert_ray.inputs.stage import GROUP, read_catalog, split_items, write_items
from qbert_ray.pipeline import APPENDED, file_fingerprints, status
from qbert_ray.semantic_ids.stage import Version, assign_parts, count_ids
from qbert_ray.storage.catalog import gone_items
from qbert_ray.storage.checksums import Record
from qbert_ray.storage.columns import COLD, DOMAIN, GONE, ITEM_ID, ITEM_INDEX, input_type
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.lock import check_held
from qbert_ray.storage.seals import APPENDING, seal
from qbert_ray.storage.stages import BY_NAME, REQUESTED, STAGES

IDS = "semantic_ids"
GROWN = ("ingest", "features", "fusion", IDS)  # stages that get further parts, the last written last
RANKED = ("ranking", "refit", "evaluate", "score")  # stages that read the whole catalog
CONTENT = "_content"
DROPPED = "below min_item_interactions"  # reason of ingest/rejected for items that the k-core left out


def append_ids(config: Config, run: RunDir, executor: Executor, progress: Progress, everything: bool = False) -> Version:
    """Assign IDs to the new items of the input files; returns the new version, or the last one if there is nothing to do.

    Args:
        config: that the run was made with.
        run: a run whose stages up to semantic-ids are done.
        executor: runs the work.
        progress: receives how far it is.
        everything: also the items that the ingest read and left out for their few interactions.

    Raises:
        ArtifactError: the run's stages up to semantic-ids are not done, or were made with another config.
    """
    _check(config, run)
    files = {name: state for stage in ("ingest", "features") for name, state in file_fingerprints(BY_NAME[stage], config).items()}
    versions = _versions(run)
    run.write_json(APPENDING, files)
    found: Counter[str] = Counter()
    for domain in config.data.domains:
        progress.note(domain)
        found.update(_append_items(config, run, domain, executor, everything))
    missing = [part for part in run.parts("ingest/items") if part not in set(run.parts(IDS))]
    if missing:
        extend_features(config, run, executor, progress)
        embed_catalog(config, run, executor, progress)
        assign_parts(config, run, executor, missing, progress)
    version = _publish(config, run, versions, found)
    run.write_json(APPENDED, files)
    run.delete(APPENDING)
    return version


def _check(config: Config, run: RunDir) -> None:
    if config.data.semantic_ids:
        raise ArtifactError("semantic-ids --append needs the models of stages 1 and 2; with data.semantic_ids set, add the new items there")
    for stage in STAGES[: STAGES.index(BY_NAME["semantic_ids"]) + 1]:
        if status(stage, config, run, files=False) is None:
            raise ArtifactError(
                f"semantic-ids --append needs {stage.name}, which is not done in {run.uri}; do the run first: qbert-ray run"
            )


# the catalog


def _append_items(config: Config, run: RunDir, domain: str, executor: Executor, everything: bool) -> Counter[str]:
    """Write a domain's new items after its last part, in order, so that an interruption leaves no gap; returns counts of the others."""
    rows, catalog = read_catalog(config, domain, open_source(config.data.root, domain, "items", config.data.domains[domain]), executor)
    parts = run.parts("ingest/items", domain)
    published = pl.concat(pl.DataFrame(executor.get(handle)) for handle in [executor.submit(_contents, run, part) for part in parts])
    _write_gone(run, domain, published.join(pl.DataFrame(catalog), on=ITEM_ID, how="anti").sort(ITEM_INDEX))
    new = pl.DataFrame(catalog).join(published, on=ITEM_ID, how="anti", maintain_order="left")
    absent = len(new)
    if not everything:
        new = new.join(_dropped(run, domain, executor), on=ITEM_ID, how="anti", maintain_order="left")
    size = config.data.rows_per_part or max(run.read_part("ingest/items", part, [ITEM_INDEX]).num_rows for part in parts)
    place = np.arange(len(new))
    new = new.with_columns(
        pl.Series(GROUP, place // size), pl.Series(ITEM_INDEX, (len(published) + place).astype(np.int32)), pl.lit(True).alias(COLD)
    )
    known = executor.put(pl.DataFrame(catalog).join(published.drop(ITEM_INDEX), on=ITEM_ID).to_arrow())
    compared = [executor.submit(_compare, block, known, num_returns=2) for block in rows.blocks()]
    found: Counter[str] = Counter()
    for counts, _ in compared:
        found.update(executor.get(counts))
    found["gone"], found["left_out"] = len(published) - found["changed"] - found["unchanged"], absent - len(new)
    if len(new):
        groups, first = math.ceil(len(new) / size), 1 + int(parts[-1].removesuffix(".parquet").rsplit("-", 1)[1])
        index = executor.put(new.to_arrow())
        split = [executor.submit(split_items, block, index, groups, num_returns=groups) for _, block in compared]
        for group, pieces in enumerate(zip(*split, strict=True) if groups > 1 else [split]):
            executor.get(executor.submit(write_items, run, domain, f"append{first + group:05d}", first + group, size, *pieces))
    return found


def _contents(run: RunDir, part: str) -> pa.Table:
    rows = pl.DataFrame(run.read_part("ingest/items", part))
    return rows.select(ITEM_ID, ITEM_INDEX, _content(rows)).to_arrow()


def _content(rows: pl.DataFrame) -> pl.Series:
    """[N] hash of each item's encoded fields; comparable only within one version of polars, so it is never stored."""
    inputs = pa.schema([(name, input_type(name)) for name in sorted(name for name in rows.columns if "." in name)])
    kinds = {"image_path": pl.String, "image_bytes": pl.Binary} | dict(pl.DataFrame(inputs.empty_table()).schema)
    return rows.select(pl.col(name).cast(kind) for name, kind in kinds.items()).hash_rows().alias(CONTENT)


def _compare(block: pa.Table, known: pa.Table) -> tuple[Counter[str], pa.Table]:
    """Counts of changed and unchanged published items, judged by their first rows; and the rows of all other items."""
    rows = pl.DataFrame(block)
    other = rows.join(pl.DataFrame(known), on=ITEM_ID, how="anti", maintain_order="left")
    rows = rows.with_columns(_content(rows).alias("now"))
    same = rows.join(pl.DataFrame(known), on=[ITEM_ID, POSITION]).select(pl.col("now") == pl.col(CONTENT)).to_series()
    return Counter(unchanged=int(same.sum()), changed=int((~same).sum()), unusable=rows[REASON].count()), other.to_arrow()


def _write_gone(run: RunDir, domain: str, gone: pl.DataFrame) -> None:
    """Write a further part of ingest/gone, unless the last one lists the same items."""
    if gone_items(run, domain)[ITEM_INDEX].to_pylist() != gone[ITEM_INDEX].to_list():
        table = gone.select(pl.lit(domain).alias(DOMAIN), ITEM_ID, ITEM_INDEX).to_arrow().cast(GONE)
        run.write_part("ingest/gone", f"{domain}-{len(run.parts('ingest/gone', domain)):05d}.parquet", table)


def _dropped(run: RunDir, domain: str, executor: Executor) -> pl.DataFrame:
    """item_id of the items that the ingest left out for their few interactions."""
    tables = [executor.submit(_dropped_of, run, part) for part in run.parts("ingest/rejected", domain)]
    return pl.concat([pl.DataFrame(schema={ITEM_ID: pl.String}), *(pl.DataFrame(executor.get(table)) for table in tables)]).unique()


def _dropped_of(run: RunDir, part: str) -> pa.Table:
    rows = pl.DataFrame(run.read_part("ingest/rejected", part, ["table", "reason", "row"]))
    rows = rows.filter(pl.col("table") == "items", pl.col("reason") == DROPPED)
    name = pl.col("row").str.extract(rf'^\{{"{ITEM_ID}":("(?:[^"\\]|\\.)*")')  # the rest of a long row is cut off
    return rows.select(name.str.json_decode(pl.String).alias(ITEM_ID)).to_arrow()


# versions


def _versions(run: RunDir) -> list[Version]:
    """The versions so far; the first one is that of the run itself, recorded before anything is appended."""
    manifest = Manifest.load(run, IDS)
    assert manifest is not None
    if "versions" not in manifest.counts:
        items = manifest.counts["items"]
        origin = {"version": 0, "parent": None, "fingerprint": manifest.fingerprint, "model": manifest.inputs["quantizer"]}
        first = cast(Version, origin | {"items": items, "added": items, "parts": run.parts(IDS)})
        manifest.counts["versions"] = [first]
        manifest.save(run, IDS)
    return manifest.counts["versions"]


def _publish(config: Config, run: RunDir, versions: list[Version], found: Counter[str]) -> Version:
    """Record a new version with all parts that are in none yet; returns it.

    Raises:
        LockedError: another process has taken the lock of the run meanwhile.
    """
    check_held(run)
    listed = {part for version in versions for part in version["parts"]}
    parts = [part for part in run.parts(IDS) if part not in listed]
    for later in (*(BY_NAME[name] for name in RANKED), *REQUESTED) if parts or _gone_changed(run) else ():
        if Manifest.load(run, later.name) is None:  # what an interrupted one wrote is of the catalog before
            run.delete(later.name)
    counts = {name: found[name] for name in ("left_out", "changed", "unchanged", "gone")}
    last = versions[-1]
    if not parts:
        _record_gone(run)
        return cast(Version, last | {"added": 0} | counts)
    tables = [run.read_part(IDS, part, [ITEM_ID, "semantic_id"]) for part in parts]
    added = sum(table.num_rows for table in tables)
    version: Version = {
        "version": last["version"] + 1,
        "parent": last["fingerprint"],
        "fingerprint": _fingerprint([last["fingerprint"], last["model"], *(table.to_pydict() for table in tables)]),
        "model": last["model"],
        "items": last["items"] + added,
        "added": added,
        "left_out": found["left_out"],
        "changed": found["changed"],
        "unchanged": found["unchanged"],
        "gone": found["gone"],
        "parts": parts,
    }
    for stage in GROWN:
        manifest = Manifest.load(run, stage)
        assert manifest is not None
        if manifest.files is not None:
            manifest.files = _recorded(run, stage, manifest.files)
        if stage == IDS:
            manifest.counts |= {**count_ids(config, run, config.quantizer.codebook_size), "versions": [*versions, version]}
        manifest.save(run, stage)
    return version


def _gone_changed(run: RunDir) -> bool:
    """Whether there are parts of ingest/gone that the manifest does not name; yes where it names no files."""
    manifest = Manifest.load(run, "ingest")
    assert manifest is not None
    return manifest.files is None or any(f"ingest/gone/{name}" not in manifest.files for name in run.names("ingest/gone"))


def _record_gone(run: RunDir) -> None:
    """Add parts of ingest/gone to the manifest, where nothing else was added."""
    manifest = Manifest.load(run, "ingest")
    assert manifest is not None
    if manifest.files is not None and _gone_changed(run):
        manifest.files = _recorded(run, "ingest", manifest.files)
        manifest.save(run, "ingest")


def _recorded(run: RunDir, stage: str, known: dict[str, Record]) -> dict[str, Record]:
    """Records of a stage's files: the known ones, and what an append wrote, which are new parts and tables of rejected rows.

    A table of rejected rows is rewritten, or removed where none is left: vectors of an item that was not in the catalog are in it until
    the item is appended.
    """
    parts = {name: record for name, record in seal(run, stage).items() if name.endswith(".parquet")}
    kept = {name: record for name, record in known.items() if name in parts or "/rejected/" not in name}
    return kept | {name: record for name, record in parts.items() if name not in known or "/rejected/" in name}


def _fingerprint(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
