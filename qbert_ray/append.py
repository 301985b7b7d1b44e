"""Appends new items to a finished run: the trained models give them semantic IDs; published IDs are never changed or reused.

The catalog grows only at its end: new items become further parts of ingest/items, and features, embeddings and IDs of these
parts are made as those of cold items. A part without IDs comes from an interrupted try, and the same command resumes with it.
Versions of the IDs are lists of parts in the manifest of semantic_ids, each with its parent; the manifest is written after
the parts.
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
from qbert_ray.storage.checksums import Record
from qbert_ray.storage.columns import COLD, ITEM_ID, ITEM_INDEX
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.seals import APPENDING, seal
from qbert_ray.storage.stages import BY_NAME, STAGES

IDS = "semantic_ids"
GROWN = ("ingest", "features", "fusion", IDS)  # stages that get further parts, the last written last
CONTENT = "_content"


def append_ids(config: Config, run: RunDir, executor: Executor, progress: Progress) -> Version:
    """Assign IDs to the items of the input files that have none; returns the new version, or the last one if there is nothing to do.

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
        found.update(_append_items(config, run, domain, executor))
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


def _append_items(config: Config, run: RunDir, domain: str, executor: Executor) -> Counter[str]:
    """Write a domain's new items after its last part, in order, so that an interruption leaves no gap; returns counts of the others."""
    rows, catalog = read_catalog(config, domain, open_source(config.data.root, domain, "items", config.data.domains[domain]), executor)
    parts = run.parts("ingest/items", domain)
    published = pl.concat(pl.DataFrame(executor.get(handle)) for handle in [executor.submit(_contents, run, part) for part in parts])
    new = pl.DataFrame(catalog).join(published, on=ITEM_ID, how="anti", maintain_order="left")
    size = config.data.rows_per_part or max(run.read_part("ingest/items", part, [ITEM_INDEX]).num_rows for part in parts)
    place = np.arange(len(new))
    new = new.with_columns(
        pl.Series(GROUP, place // size), pl.Series(ITEM_INDEX, (len(published) + place).astype(np.int32)), pl.lit(True).alias(COLD)
    )
    known = executor.put(pl.DataFrame(catalog).join(published, on=ITEM_ID).to_arrow())
    compared = [executor.submit(_compare, block, known, num_returns=2) for block in rows.blocks()]
    found: Counter[str] = Counter()
    for counts, _ in compared:
        found.update(executor.get(counts))
    found["gone"] = len(published) - found["changed"] - found["unchanged"]
    if len(new):
        groups, first = math.ceil(len(new) / size), 1 + int(parts[-1].removesuffix(".parquet").rsplit("-", 1)[1])
        index = executor.put(new.to_arrow())
        split = [executor.submit(split_items, block, index, groups, num_returns=groups) for _, block in compared]
        for group, pieces in enumerate(zip(*split, strict=True) if groups > 1 else [split]):
            executor.get(executor.submit(write_items, run, domain, f"append{first + group:05d}", first + group, size, *pieces))
    return found


def _contents(run: RunDir, part: str) -> pa.Table:
    rows = pl.DataFrame(run.read_part("ingest/items", part))
    return rows.select(ITEM_ID, _content(rows)).to_arrow()


def _content(rows: pl.DataFrame) -> pl.Series:
    """[N] hash of each item's encoded fields; comparable only within one version of polars, so it is never stored."""
    texts = sorted(name for name in rows.columns if "." in name)
    columns = [pl.col("image_path", *texts).cast(pl.String), pl.col("image_bytes").cast(pl.Binary)]
    return rows.select(columns).hash_rows().alias(CONTENT)


def _compare(block: pa.Table, known: pa.Table) -> tuple[Counter[str], pa.Table]:
    """Counts of changed and unchanged published items, judged by their first rows; and the rows of all other items."""
    rows = pl.DataFrame(block)
    other = rows.join(pl.DataFrame(known), on=ITEM_ID, how="anti", maintain_order="left")
    rows = rows.with_columns(_content(rows).alias("now"))
    same = rows.join(pl.DataFrame(known), on=[ITEM_ID, POSITION]).select(pl.col("now") == pl.col(CONTENT)).to_series()
    return Counter(unchanged=int(same.sum()), changed=int((~same).sum()), unusable=rows[REASON].count()), other.to_arrow()


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
    """Record a new version with all parts that are in none yet; returns it."""
    listed = {part for version in versions for part in version["parts"]}
    parts = [part for part in run.parts(IDS) if part not in listed]
    last = versions[-1]
    if not parts:
        return cast(Version, last | {"added": 0} | {name: found[name] for name in ("changed", "unchanged", "gone")})
    tables = [run.read_part(IDS, part, [ITEM_ID, "semantic_id"]) for part in parts]
    added = sum(table.num_rows for table in tables)
    version: Version = {
        "version": last["version"] + 1,
        "parent": last["fingerprint"],
        "fingerprint": _fingerprint([last["fingerprint"], last["model"], *(table.to_pydict() for table in tables)]),
        "model": last["model"],
        "items": last["items"] + added,
        "added": added,
        "changed": found["changed"],
        "unchanged": found["unchanged"],
        "gone": found["gone"],
        "parts": parts,
    }
    for stage in GROWN:
        manifest = Manifest.load(run, stage)
        assert manifest is not None
        if manifest.files is not None:
            manifest.files |= _added_files(run, stage, manifest.files)
        if stage == IDS:
            manifest.counts |= {**count_ids(config, run, config.quantizer.codebook_size), "versions": [*versions, version]}
        manifest.save(run, stage)
    return version


def _added_files(run: RunDir, stage: str, known: dict[str, Record]) -> dict[str, Record]:
    """Records of the files that an append wrote in a stage: new parts, and rewritten tables of rejected rows."""
    parts = {name: record for name, record in seal(run, stage).items() if name.endswith(".parquet")}
    return {name: record for name, record in parts.items() if name not in known or "/rejected/" in name}


def _fingerprint(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
