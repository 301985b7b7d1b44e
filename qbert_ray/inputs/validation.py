"""What is wrong with somebody's files, in one page: a dry run of the ingest into a folder that is deleted afterwards."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl

from qbert_ray.config.schema import Config, ImageEncoder
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Quiet
from qbert_ray.features.encoders import ImageRejected, decode_image
from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.inputs.sources import Source, Table, open_source
from qbert_ray.inputs.stage import ingest_domain
from qbert_ray.storage.columns import ATTRIBUTE_PREFIX, ITEM_ID, TEXT_PREFIX, TIMESTAMP, USER_ID
from qbert_ray.storage.directory import RunDir

EXAMPLES, EXAMPLE_LENGTH = 3, 100
IMAGES_LOOKED_FOR, IMAGES_DECODED = 200, 100
HINTS = {
    "missing item_id": "give every row an item_id",
    "missing user_id": "give every row a user_id",
    "missing timestamp": "give every interaction a time; a running number per user will do",
    "bad timestamp": "whole numbers, datetimes or ISO dates are understood",
    "below min_rating": "data.min_rating",
    "item not in items table": "are the IDs of both files written alike? else add the items to the items file",
    "duplicate item_id": "the first row of an item was kept",
    "duplicate interaction": "same user, item and time: one was kept",
    "below min_item_interactions": "data.min_item_interactions; 0 keeps every item of the catalog",
    "item below min_item_interactions": "data.min_item_interactions or data.min_interactions",
    "user below min_interactions": "data.min_interactions",
    "unsafe path": "keep images in the folder of the items file or under data.root, or use https:// or s3:// addresses; others: image_schemes, "
    "image_hosts and follow_links of the domain",
    "invalid JSON": "each line must be one JSON object",
    "invalid CSV row": "another number of cells than the header: quote texts that hold commas",
    "file not found": "image paths start from the folder of the items file",
}
_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


def validate(config: Config, executor: Executor) -> dict[str, Any]:
    """The report of each domain: its files, what a run would keep and reject, and what looks wrong."""
    return {name: _validate_domain(config, name, executor) for name in config.data.domains}


def _validate_domain(config: Config, name: str, executor: Executor) -> dict[str, Any]:
    report: dict[str, Any] = {"errors": [], "files": {}}
    tables: tuple[Table, ...] = ("items", "interactions")
    for table in tables:
        try:
            needs_rating = config.data.min_rating is not None
            report["files"][table] = _describe(open_source(config.data.root, name, table, config.data.domains[name], needs_rating))
        except ValueError as error:
            report["errors"].append(str(error))
    if report["errors"]:
        return report
    with _scratch(config.run.dir, executor) as run:
        try:
            report["counts"] = ingest_domain(config, name, run, executor, Quiet())
        except ValueError as error:
            report["errors"].append(str(error))
            return report
        report["rejected"] = _rejected(run)
        report["filled"] = _filled(run)
        addresses = Addresses.of(config.data.root, config.data.domains[name])
        report["images"] = _images(run, config.features.image, addresses) if config.data.domains[name].image_column else None
        report |= _histories(run)
    return report


@contextmanager
def _scratch(run_dir: str, executor: Executor) -> Iterator[RunDir]:
    """A folder that every worker can write: this machine's own if there is no other, else one beside the run."""
    base, mark, query = run_dir.partition("?") if "://" in run_dir else (run_dir, "", "")
    if "://" not in base and executor.num_machines() == 1:
        folder = tempfile.mkdtemp()
        try:
            yield RunDir(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    run = RunDir(f"{base.rstrip('/')}.validate-{uuid.uuid4().hex[:8]}{mark}{query}")
    try:
        yield run
    finally:
        run.delete("")


def _describe(source: Source) -> dict[str, Any]:
    return {
        "uri": source.uri,
        "files": len(source.files),
        "kind": source.files[0].kind,
        "format": source.format,
        "columns": list(dict.fromkeys(column for file in source.files for column in file.columns)),
    }


def _rejected(run: RunDir) -> dict[str, dict[str, Any]]:
    """ "table: reason" -> count, hint and examples."""
    found: dict[str, dict[str, Any]] = {}
    for part in run.parts("ingest/rejected"):
        rows = pl.DataFrame(run.read_part("ingest/rejected", part))
        grouped = rows.group_by("table", "reason", maintain_order=True).agg(pl.len(), pl.col("row").head(EXAMPLES).alias("rows"))
        for table, reason, count, examples in grouped.iter_rows():
            entry = found.setdefault(f"{table}: {reason}", {"count": 0, "hint": HINTS.get(reason, ""), "examples": []})
            entry["count"] += count
            entry["examples"] = (entry["examples"] + examples)[:EXAMPLES]
    return dict(sorted(found.items(), key=lambda pair: -pair[1]["count"]))


def _filled(run: RunDir) -> dict[str, float]:
    """Column of the kept items -> share of filled values, from the parts' footers."""
    rows, filled = 0, Counter[str]()
    for part in run.parts("ingest/items"):
        metadata = run.open_part("ingest/items", part).metadata
        rows += metadata.num_rows
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                filled[column.path_in_schema] += group.num_rows - column.statistics.null_count
    wanted = (TEXT_PREFIX, ATTRIBUTE_PREFIX, "image_")
    return {name: count / rows for name, count in filled.items() if name.startswith(wanted)}


def _images(run: RunDir, settings: ImageEncoder, addresses: Addresses) -> dict[str, Any]:
    """The first pictures of the catalog, which is in hash order: how many are there and can be decoded."""
    result: dict[str, Any] = {"looked_for": 0, "decoded": 0, "web": 0, "problems": Counter[str](), "examples": []}
    for item_id, path, content in _first_images(run):
        if content is None and path.startswith(("http://", "https://")):
            result["web"] += 1  # not fetched: a page about files should not take minutes
            continue
        result["looked_for"] += 1
        decode = result["decoded"] < IMAGES_DECODED
        try:
            content = read_image(path, settings.max_bytes if decode else 0, addresses) if content is None else content
            if decode:
                result["decoded"] += 1
                decode_image(content, settings.max_bytes, settings.max_pixels)
        except (AddressError, ImageRejected) as reason:
            result["problems"][str(reason)] += 1
            result["examples"] = [*result["examples"], f"{item_id}: {path or 'bytes'}: {reason}"][:EXAMPLES]
    return result


def _first_images(run: RunDir) -> Iterator[tuple[str, str, bytes | None]]:
    left = IMAGES_LOOKED_FOR
    for part in run.parts("ingest/items"):
        table = run.read_part("ingest/items", part, [ITEM_ID, "image_path", "image_bytes"])
        rows = pl.DataFrame(table).filter(pl.col("image_path").is_not_null() | pl.col("image_bytes").is_not_null()).head(left)
        left -= len(rows)
        yield from rows.iter_rows()
        if not left:
            return


def _histories(run: RunDir) -> dict[str, Any]:
    """Range and ties of time, and quantiles of the interactions per user."""
    lengths, ties, total = [], 0, 0
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for part in run.parts("ingest/interactions"):
        rows = pl.DataFrame(run.read_part("ingest/interactions", part, [USER_ID, TIMESTAMP]))
        times = pl.col(TIMESTAMP)
        low, high, tied = rows.select(
            times.min(), times.max().alias("max"), pl.len().over(USER_ID, TIMESTAMP).gt(1).sum().alias("tied")
        ).row(0)
        first, last, ties, total = min(first, low), max(last, high), ties + tied, total + len(rows)
        lengths.append(rows.group_by(USER_ID).len()["len"].to_numpy())
    quantiles = np.quantile(np.concatenate(lengths), [0, 0.25, 0.5, 0.75, 1], method="lower").astype(int).tolist()
    return {"time": {"first": int(first), "last": int(last), "tied": ties / total}, "per_user": quantiles}


# the page


def format_validation(report: dict[str, Any]) -> str:
    """The report as one page of text."""
    return "\n\n".join("\n".join(_domain_lines(name, domain)) for name, domain in report.items())


def _domain_lines(name: str, domain: dict[str, Any]) -> Iterator[str]:
    yield f"Domain {name}: {'cannot be used' if domain['errors'] else 'can be used'}"
    for table, file in domain["files"].items():
        many = f", {file['files']} files" if file["files"] > 1 else ""
        yield f"  {table}: {file['uri']} ({file['kind']}{many}, {file['format']}); columns: {', '.join(file['columns'])}"
    yield from (f"  ERROR {error}" for error in domain["errors"])
    if domain["errors"]:
        return
    counts = domain["counts"]
    for table in ("items", "interactions"):
        yield f"  kept {counts[table]:,} of {counts[f'{table}_read']:,} {table}"
    low, quarter, median, upper, high = domain["per_user"]
    yield f"  {counts['users']:,} users; interactions per user: {low} to {high}, median {median}, middle half {quarter} to {upper}"
    time = domain["time"]
    yield f"  time: {_as_date(time['first'], time['last'])}; {time['tied']:.0%} of interactions share user and time (ordered by hash)"
    yield from (
        f"  {column}: {share:.0%} of items" for column, share in domain["filled"].items() if share or not column.startswith("image_")
    )
    if domain["images"]:
        yield from _image_lines(domain["images"])
    yield "  rejected rows:" if domain["rejected"] else "  no row is rejected"
    for problem, entry in domain["rejected"].items():
        yield f"    {entry['count']:,} {problem}{' -> ' if entry['hint'] else ''}{entry['hint']}"
        yield from (f"      {_short(example)}" for example in entry["examples"])


def _image_lines(images: dict[str, Any]) -> Iterator[str]:
    web = f"; {images['web']:,} web addresses not fetched" if images["web"] else ""
    bad = sum(images["problems"].values())
    yield f"  pictures: looked for {images['looked_for']:,}, decoded {images['decoded']:,} of them, {bad:,} bad{web}"
    for reason, count in images["problems"].most_common():
        yield f"    {count:,} {reason}{' -> ' if reason in HINTS else ''}{HINTS.get(reason, '')}"
    yield from (f"      {_short(example)}" for example in images["examples"])


def _as_date(first: int, last: int) -> str:
    """Both ends as dates where they are plausible ones in some unit, else as the numbers they are."""
    for unit, scale in _UNITS.items():
        if first / scale >= 1e8 and last / scale <= 4e9:  # 1973 to 2096
            days = [datetime.fromtimestamp(value / scale, UTC).date().isoformat() for value in (first, last)]
            return f"{days[0]} to {days[1]} (in {unit})"
    return f"{first:,} to {last:,} (numbers, not dates)"


def _short(text: str) -> str:
    return text if len(text) <= EXAMPLE_LENGTH else f"{text[:EXAMPLE_LENGTH]}..."
