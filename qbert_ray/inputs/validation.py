"""Validates a user's files and reports on one page: a dry run of the ingest into a temporary folder."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypedDict

import numpy as np
import polars as pl
from pyarrow import fs

from qbert_ray.config.schema import Config, ImageEncoder
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Quiet
from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.inputs.reasons import HINTS, UNITS
from qbert_ray.inputs.sources import PERIODS, Source, Table, check_root, open_source
from qbert_ray.inputs.stage import ingest_domain
from qbert_ray.storage.columns import ATTRIBUTE_PREFIX, ITEM_ID, TEXT_PREFIX, TIMESTAMP, USER_ID
from qbert_ray.storage.directory import Counts, RunDir

EXAMPLES, EXAMPLE_LENGTH = 3, 100
IMAGES_LOOKED_FOR, IMAGES_DECODED = 200, 100
SMALL_BYTES = 512 << 20  # total size of local input files up to which they are checked in this process
MOST_PATHS = 6  # of validation and test files that are listed
TABLES: tuple[Table, ...] = ("items", "interactions")


class Problem(TypedDict):
    """Rows that are rejected for one reason."""

    count: int
    hint: str
    examples: list[str]


class ImageReport(TypedDict):
    """What the first images of a catalog are."""

    looked_for: int
    decoded: int
    web: int  # addresses that were not fetched
    problems: Counter[str]
    examples: list[str]


class DomainValidation(TypedDict, total=False):
    """What a run would make of a domain's files; of files that cannot be used only the errors."""

    errors: list[str]
    warnings: list[str]
    counts: Counts  # of `ingest_domain`
    rejected: dict[str, Problem]  # by "table: reason"
    filled: dict[str, float]  # column -> share of the kept items
    images: ImageReport | None
    time: dict[str, float]  # first, last; tied: share of interactions
    per_user: list[int]  # interactions: least, quartiles and most


Sources = dict[str, dict[Table, Source | str]]  # domain -> table -> its files, or why they cannot be used


def open_sources(config: Config) -> Sources:
    """The files of each domain with their columns; rows are not read yet.

    Raises:
        SourceError: data.root is not there.
    """
    check_root(config.data.root)
    return {name: {table: _open(config, name, table) for table in TABLES} for name in config.data.domains}


def in_this_process(config: Config, sources: Sources) -> bool:
    """Whether all input files are local and so small that starting Ray would take longer than reading them."""
    if config.compute.executor == "local":
        return True
    given = [source for tables in sources.values() for source in tables.values() if isinstance(source, Source)]
    local = all(isinstance(source.filesystem, fs.LocalFileSystem) for source in given)
    if config.compute.address or os.environ.get("RAY_ADDRESS") or not local:
        return False
    return sum(source.filesystem.get_file_info(file.path).size or 0 for source in given for file in source.files) <= SMALL_BYTES


def validate(config: Config, executor: Executor, sources: Sources | None = None) -> dict[str, DomainValidation]:
    """A report per domain: its files, what a run would keep and reject, and what looks wrong.

    Args:
        sources: as `open_sources` gives them.
    """
    sources = open_sources(config) if sources is None else sources
    return {name: _validate_domain(config, name, executor, tables) for name, tables in sources.items()}


def _open(config: Config, name: str, table: Table) -> Source | str:
    try:
        domain, data = config.data.domains[name], config.data
        return open_source(data.root, name, table, domain, data.min_rating is not None, with_split=data.split == "given")
    except ValueError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - a file that breaks a reader must not hide the reports on the others
        return _unexpected(name, error)


def _unexpected(name: str, error: Exception) -> str:
    return f"domain {name}: reading it ended with {type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}"


def _validate_domain(config: Config, name: str, executor: Executor, tables: dict[Table, Source | str]) -> DomainValidation:
    report: DomainValidation = {"errors": [source for source in tables.values() if isinstance(source, str)]}
    if report["errors"]:
        return report
    try:
        with _scratch(config.run.dir, executor) as run:
            counts = ingest_domain(config, name, run, executor, Quiet())
            domain = config.data.domains[name]
            report.update({"warnings": counts.pop("warnings"), "counts": counts, "rejected": _rejected(run), "filled": _filled(run)})
            addresses = Addresses.of(config.data.root, domain)
            report["images"] = _images(run, config.features.image, addresses) if domain.image_column or domain.image_template else None
            report["time"], report["per_user"] = _histories(run)
    except ValueError as error:
        report["errors"].append(str(error))
    except Exception as error:  # noqa: BLE001 - as above
        report["errors"].append(_unexpected(name, error))
    return report


@contextmanager
def _scratch(run_dir: str, executor: Executor) -> Iterator[RunDir]:
    """A temporary folder that every worker can write: local if there is only one machine, else next to the run directory."""
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


def _rejected(run: RunDir) -> dict[str, Problem]:
    """ "table: reason" -> count, hint and examples."""
    found: dict[str, Problem] = {}
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


def _images(run: RunDir, settings: ImageEncoder, addresses: Addresses) -> ImageReport:
    """How many of the catalog's first images, in hash order, exist and can be decoded."""
    from qbert_ray.features.encoders import ImageRejected, decode_image  # imports torch

    result: ImageReport = {"looked_for": 0, "decoded": 0, "web": 0, "problems": Counter[str](), "examples": []}
    tried = 0
    for item_id, path, content in _first_images(run):
        if content is None and path.startswith(("http://", "https://")):
            result["web"] += 1  # not fetched, which would take minutes
            continue
        result["looked_for"] += 1
        decode = tried < IMAGES_DECODED
        tried += decode
        try:
            content = read_image(path, settings.max_bytes if decode else 0, addresses) if content is None else content
            if decode:
                decode_image(content, settings.max_bytes, settings.max_pixels)
                result["decoded"] += 1
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


def _histories(run: RunDir) -> tuple[dict[str, float], list[int]]:
    """Range and ties of the times, and quantiles of the interactions per user."""
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
    return {"first": int(first), "last": int(last), "tied": ties / total}, quantiles


# the page


def format_files(sources: Sources) -> str:
    """The files of each domain as text: what is known before their rows are read."""
    lines = []
    for name, tables in sources.items():
        lines += [f"Domain {name}", *(_file_line(table, source) for table, source in tables.items() if isinstance(source, Source))]
    return "\n".join(lines)


def format_validation(report: dict[str, DomainValidation]) -> str:
    """The validation report as one page of text; `format_files` lists the files."""
    return "\n\n".join("\n".join(_domain_lines(name, domain)) for name, domain in report.items())


def _file_line(table: str, source: Source) -> str:
    many = f", {len(source.files)} files" if len(source.files) > 1 else ""
    remarks = "".join(f"; {remark}" for remark in sorted({file.remark for file in source.files} - {""}))
    names = dict.fromkeys(column for file in source.files for column in file.columns)
    held_out = [(PERIODS[part], file.path) for part, file in zip(source.parts, source.files, strict=False) if part]
    own = "".join(f"; {name}: {path}" for name, path in held_out[:MOST_PATHS]) + (", ..." if len(held_out) > MOST_PATHS else "")
    return f"  {table}: {source.uri} ({source.files[0].kind}{many}, {source.format}{remarks}){own}; columns: {', '.join(names)}"


def _domain_lines(name: str, domain: DomainValidation) -> Iterator[str]:
    yield f"Domain {name}: {'cannot be used' if domain['errors'] else 'can be used'}"
    yield from (f"  ERROR {error}" for error in domain["errors"])
    if domain["errors"]:
        return
    yield from (f"  WARNING {warning}" for warning in domain["warnings"])
    counts = domain["counts"]
    for table in ("items", "interactions"):
        yield f"  kept {counts[table]:,} of {counts[f'{table}_read']:,} {table}"
    if split := counts.get("split"):
        yield f"  targets: of {split['users_validated']:,} users for validation, of {counts['users_evaluated']:,} for test"
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


def _image_lines(images: ImageReport) -> Iterator[str]:
    web = f"; {images['web']:,} web addresses not fetched" if images["web"] else ""
    bad = sum(images["problems"].values())
    yield f"  images: looked for {images['looked_for']:,}, decoded {images['decoded']:,} of them, {bad:,} bad{web}"
    for reason, count in images["problems"].most_common():
        yield f"    {count:,} {reason}{' -> ' if reason in HINTS else ''}{HINTS.get(reason, '')}"
    yield from (f"      {_short(example)}" for example in images["examples"])


def _as_date(first: float, last: float) -> str:
    """The first and last time as dates if they are plausible in some unit, else as numbers."""
    for unit, (_, scale) in UNITS.items():
        if first / scale >= 1e8 and last / scale <= 4e9:  # 1973 to 2096
            days = [datetime.fromtimestamp(value / scale, UTC).date().isoformat() for value in (first, last)]
            return f"{days[0]} to {days[1]} (in {unit})"
    return f"{first:,} to {last:,} (numbers, not dates)"


def _short(text: str) -> str:
    return text if len(text) <= EXAMPLE_LENGTH else f"{text[:EXAMPLE_LENGTH]}..."
