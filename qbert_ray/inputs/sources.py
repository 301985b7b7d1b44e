"""Finds the files that the config names, maps their columns to the input contract, and reads their raw rows.

A `Source` is the files of one table of one domain: one file, a folder or a glob, local, s3:// or gs://. Raw Amazon review
and metadata files are recognised by their columns. Every row has its position (number of the file, number of the row), so that
the result does not depend on which task reads what and when.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa
from pyarrow import fs

from qbert_ray.config.schema import Domain
from qbert_ray.inputs import readers
from qbert_ray.inputs.arrow_types import plain_table
from qbert_ray.inputs.column_advice import advice, shown
from qbert_ray.inputs.globs import find_files
from qbert_ray.inputs.image_columns import can_hold_images, from_template
from qbert_ray.inputs.json_files import first_image, json_list, plain_text
from qbert_ray.inputs.limits import leading_outside
from qbert_ray.inputs.readers import REASON, ROW, File, FileError, Fragment
from qbert_ray.inputs.times import TimeStyle, detect_style, one_style
from qbert_ray.storage.columns import ITEM_ID, RATING, TIMESTAMP, USER_ID
from qbert_ray.storage.directory import join, resolve

Table = Literal["items", "interactions"]
EVENT, GIVEN_WEIGHT = "event_type", "interaction_weight"  # optional columns of interactions
SPLIT = "split"  # optional column of interactions
PERIOD, PERIODS = "_period", ("train", "validation", "test")  # which part of a split of one's own a row is in, as a number
SPLIT_NAMES = {  # how a column spells the parts of a split, in small letters -> number of the part
    **dict.fromkeys(["train", "training"], 0),
    **dict.fromkeys(["valid", "validation", "val", "dev", "eval"], 1),
    **dict.fromkeys(["test", "testing"], 2),
}
POSITION = "<position>"  # a name that columns of files do not have
_FILE_BITS = 40  # rows of a file that positions can count

# Names of the input contract -> columns of Amazon's raw files; the first filled one wins.
AMAZON = {
    "amazon_2018": {
        USER_ID: ["reviewerID"], ITEM_ID: ["asin"], TIMESTAMP: ["unixReviewTime"], RATING: ["overall"],
        "categories": ["category", "categories"], "image": ["imageURLHighRes", "imageURL", "imURL", "imUrl", "image"],
    },
    "amazon_2023": {ITEM_ID: ["parent_asin"], "brand": ["store", "brand"], "image": ["images", "image"]},
}  # fmt: skip


class SourceError(ValueError):
    """Files that cannot be used; the message names the domain, the file and the config key to change."""


@dataclass(frozen=True)
class Source:
    """The files of one table of one domain, with the columns that are wanted of them."""

    label: str  # its name in errors
    uri: str
    filesystem: fs.FileSystem
    files: tuple[File, ...]
    format: str  # contract, amazon_2018 or amazon_2023
    columns: dict[str, tuple[str, ...]]  # contract name -> columns of the files; the first filled one wins
    image: str | None  # contract name of the image column
    template: str | None = None  # of image paths, such as covers/{item_id}.jpg
    times: TimeStyle = TimeStyle()
    events: Mapping[str, float] = field(default_factory=dict)  # event type -> weight; empty: types are not read
    parts: tuple[int, ...] = ()  # of a split by files: number of the part in PERIODS of each file
    lists: frozenset[str] = frozenset()  # contract names of columns of which every element of a list is read

    @property
    def raw_columns(self) -> list[str]:
        return list(dict.fromkeys(itertools.chain.from_iterable(self.columns.values())))

    @property
    def query(self) -> str:
        """Query of the URI, with its question mark; it says how to reach the store."""
        return "?" + self.uri.partition("?")[2] if "://" in self.uri and "?" in self.uri else ""

    def fragments(self) -> list[tuple[int, Fragment]]:
        """Fragments that can be read in parallel, each with the number of its file."""
        return [(number, fragment) for number, file in enumerate(self.files) for fragment in readers.fragments(file)]

    def folder(self, file: int) -> str:
        """Local path or URI, without its query, of a file's folder, from which relative image paths start."""
        folder = self.files[file].path.rpartition("/")[0]
        return f"{self.uri.partition('://')[0]}://{folder}" if "://" in self.uri else folder

    def read(self, file: int, fragment: Fragment) -> Iterator[pl.DataFrame]:
        """Batches of a fragment: raw columns (null where the file lacks one), position, reason and row.

        Raises:
            SourceError: the file is damaged.
        """
        names = self.raw_columns
        images = self.columns.get(self.image, ()) if self.image else ()
        lists = {column for name in self.lists for column in self.columns.get(name, ())}
        converters = {name: first_image if name in images else json_list if name in lists else plain_text for name in names}
        try:
            for first, frame in readers.read(self.filesystem, fragment, converters):
                position = pl.int_range(pl.len(), dtype=pl.Int64) + ((file << _FILE_BITS) + first)
                absent = [pl.lit(None, pl.String).alias(name) for name in [*names, REASON, ROW] if name not in frame.columns]
                yield frame.with_columns(position.alias(POSITION), *absent).select(*names, POSITION, REASON, ROW)
        except FileError as error:
            raise SourceError(f"{self.label}: {error}") from None


def file_of(position: pl.Expr) -> pl.Expr:
    """Number of the file, among those of its source, that a row is of."""
    return position // (1 << _FILE_BITS)


def open_source(
    root: str, name: str, table: Table, domain: Domain, needs_rating: bool = False, key: str = "", with_split: bool = False
) -> Source:
    """The files that a domain's `items` or `interactions` names, with their columns; rows are not read yet.

    Args:
        root: folder or URI that relative paths start from.
        name: of the domain, for errors.
        table: which of the two.
        domain: names the files and their columns.
        needs_rating: the rating column must be there.
        key: of the config that named the files, for errors, where it is another than that of the table.
        with_split: of interactions, also the files for validation and test, or the column that says what is; a source domain may have neither.

    Raises:
        SourceError: no such file, one that is empty or unreadable, or one without a column that the config names.
    """
    label, key = f"domain {name}: {key or table}", key or f"data.domains.{name}.{table}"
    follow = f"data.domains.{name}.follow_links"
    inside = None if domain.follow_links else follow
    uri, filesystem, files = open_files(root, getattr(domain, table), label, key, inside)
    parts: tuple[int, ...] = ()
    if with_split and table == "interactions" and domain.validation and domain.test:
        files, parts = _with_held_out(root, name, domain, files, inside)
    form = domain.format if domain.format != "auto" else detect_format(files)
    with_split = with_split and not parts and (domain.role == "target" or _says_split(domain, files))
    columns = _choose_columns(label, name, table, domain, form, filesystem, files, needs_rating, with_split)
    _check_single(label, files, columns)
    if table == "interactions":
        source = Source(label, uri, filesystem, files, form, columns, None)
        return replace(source, times=_time_style(source), events=dict(domain.event_weights), parts=parts)
    lists = frozenset(name for inputs in domain.inputs.values() for name in (*inputs.files, *inputs.values))
    source = Source(label, uri, filesystem, files, form, columns, domain.image_column, domain.image_template, lists=lists)
    _check_images(source, name)
    return source


def _says_split(domain: Domain, files: tuple[File, ...]) -> bool:
    return SPLIT in domain.interaction_columns or all(SPLIT in file.columns for file in files)


def _with_held_out(
    root: str, name: str, domain: Domain, train: tuple[File, ...], inside: str | None
) -> tuple[tuple[File, ...], tuple[int, ...]]:
    """The files for training, validation and test, and which of the three each is for.

    Raises:
        SourceError: one of them is not there, or one is in two of the three.
    """
    found = [train]
    for part in ("validation", "test"):
        location, key = getattr(domain, part), f"data.domains.{name}.{part}"
        found.append(open_files(root, location, f"domain {name}: {part}", key, inside)[2])
    owner: dict[str, str] = {}
    for part, files in zip(("interactions", "validation", "test"), found, strict=True):
        for file in files:
            if owner.setdefault(file.path, part) != part:
                raise SourceError(
                    f"domain {name}: {file.path} is among the files of both {owner[file.path]} and {part}; narrow data.domains.{name}.{owner[file.path]} "
                    f"(given: {getattr(domain, owner[file.path])}), so that it holds those for training alone"
                    if owner[file.path] == "interactions"
                    else f"domain {name}: {file.path} is among the files of both {owner[file.path]} and {part}; give each files of its own"
                )
    return tuple(itertools.chain.from_iterable(found)), tuple(number for number, files in enumerate(found) for _ in files)


def open_files(root: str, location: str, label: str, key: str, inside: str | None = None) -> tuple[str, fs.FileSystem, tuple[File, ...]]:
    """URI and file system of a path of the config, and its files that have columns.

    Args:
        root: folder or URI that relative paths start from.
        location: file, folder or glob.
        label: what the files are, for errors.
        key: of the config, for errors.
        inside: key of the config that permits links that lead out of the folder; None: they are followed.

    Raises:
        SourceError: no such file, or one that is empty or unreadable.
    """
    uri = join(root, location)
    filesystem, path = resolve(uri)
    check_root(root)
    _check_versions(filesystem, path, f"{label}: {uri}")
    paths = find_files(filesystem, path)
    if not paths:
        others = find_files(filesystem, path, lambda name: True)
        if root == "." and location in (Domain.model_fields[field].default for field in ("items", "interactions")):
            hint = "does the config name your data? one such as configs/paper.yaml names none: -c shop.yaml -c configs/paper.yaml"
            raise SourceError(f"{label}: no {location} here, and neither {key} nor data.root is set; {hint}")
        seen = f"; there is {os.path.basename(others[0])}, which is none of these" if others else ""
        raise SourceError(
            f"{label}: no Parquet, CSV or JSONL file at {uri}{seen}; set {key} (given: {location}) or data.root (given: {root})"
        )
    folder = os.path.dirname(re.split(r"[*?\[]", path)[0]) if filesystem.get_file_info(path).type != fs.FileType.Directory else path
    away = leading_outside(filesystem, paths, (folder, "" if "://" in root else resolve(root)[1])) if inside else []
    if away:
        raise SourceError(f"{label}: {away[0]} leads outside {folder}; set {inside}=true if that is meant")
    kinds = sorted({str(readers.kind_of(path)) for path in paths})
    if len(kinds) > 1:
        raise SourceError(f"{label}: {uri} holds files of several kinds ({', '.join(kinds)}); choose among them with a glob in {key}")
    try:
        with ThreadPoolExecutor(16) as pool:
            described = tuple(pool.map(lambda path: readers.describe(filesystem, path), paths))
    except FileError as error:
        raise SourceError(f"{label}: {error}; set {key}") from None
    files = tuple(file for file in described if file.own_columns)  # empty parts are common: Spark writes hundreds
    if not files:
        raise SourceError(f"{label}: {uri} is empty; set {key}")
    return uri, filesystem, files


def _check_versions(filesystem: fs.FileSystem, path: str, what: str) -> None:
    """Raise if a folder is a table with versions, whose files also hold rows that were changed or deleted since."""
    for log, kind in (("_delta_log", "a Delta table"), (".hoodie", "a Hudi table"), ("metadata/version-hint.text", "an Iceberg table")):
        if filesystem.get_file_info(f"{path.rstrip('/')}/{log}").type != fs.FileType.NotFound:
            raise SourceError(
                f"{what} is {kind}, whose files also hold rows that were changed or deleted since; write the rows of today as Parquet, such as "
                "pl.read_delta(...).write_parquet(...), or name all files with a glob, such as sales/*.parquet, if rows were only ever added"
            )


def check_root(root: str) -> None:
    """Raise if a local data.root does not exist.

    Raises:
        SourceError: with the most similar name that exists.
    """
    filesystem, path = resolve(root)
    if not isinstance(filesystem, fs.LocalFileSystem) or Path(path).exists():
        return
    parent = next(folder for folder in Path(path).absolute().parents if folder.exists())
    missing = Path(path).absolute().relative_to(parent).parts[0]
    near = difflib.get_close_matches(missing, [entry.name for entry in itertools.islice(parent.iterdir(), 10_000)], n=1)
    hint = f"did you mean {parent / near[0]}?" if near else f"{parent} is there and holds no {missing}"
    raise SourceError(f"data.root: no folder at {path}; {hint}")


def _check_images(source: Source, name: str) -> None:
    """Raise if an image column's type can hold neither paths nor images, or a template names no item."""
    for file, column in itertools.product(source.files, source.columns.get(source.image or "", ())):
        if file.schema is None or column not in file.schema.names:
            continue
        table = plain_table(file.schema.empty_table().select([file.schema.names.index(column)]), [column])
        if not can_hold_images(pl.DataFrame(table).schema[column]):
            raise SourceError(
                f"{source.label}: the image column {column} of {file.path} has the type {file.schema.field(column).type}, which can hold neither paths "
                f"nor images; text, bytes, lists of these and structs with path, url, src or bytes are read; change data.domains.{name}.image_column"
            )
    if source.template:
        try:
            from_template(source.template, pl.lit(""))
        except ValueError as error:
            raise SourceError(f"data.domains.{name}.image_template: {error}") from None


def _check_single(label: str, files: tuple[File, ...], columns: dict[str, tuple[str, ...]]) -> None:
    """Raise if a column that holds one value a row is a list."""
    for file, name in itertools.product(files, (USER_ID, ITEM_ID, TIMESTAMP)):
        for column in columns.get(name, ()):
            kind = file.schema.field(column).type if file.schema is not None and file.schema.names.count(column) == 1 else None
            if kind is not None and pa.types.is_nested(kind) and not pa.types.is_struct(kind):
                raise SourceError(
                    f"{label}: the column {column} of {file.path} has the type {kind}, and {name} is one value a row; write a row for each: "
                    f'pl.read_parquet(...).explode("{column}")'
                )


def _time_style(source: Source) -> TimeStyle:
    """How times are written, judged by the first values of every file, or by more of one if these are ambiguous."""

    def of_file(file: File) -> TimeStyle:
        return detect_style(
            frame[column]
            for column in source.columns[TIMESTAMP]
            for fragment in readers.fragments(file)
            for _, frame in readers.read(source.filesystem, fragment, {column: plain_text})
            if column in frame.columns and len(frame)
        )

    try:
        with ThreadPoolExecutor(16) as pool:
            return one_style(pool.map(of_file, source.files))
    except FileError:  # it is found again and reported when the rows are read
        return TimeStyle()


def detect_format(files: tuple[File, ...]) -> str:
    """Format of a table's files by their columns: contract, amazon_2018 or amazon_2023."""
    found = {name for file in files for name in file.columns}
    if ITEM_ID in found:
        return "contract"
    return "amazon_2023" if "parent_asin" in found else "amazon_2018" if "asin" in found else "contract"


def _choose_columns(
    label: str,
    name: str,
    table: Table,
    domain: Domain,
    form: str,
    filesystem: fs.FileSystem,
    files: tuple[File, ...],
    needs_rating: bool,
    needs_split: bool,
) -> dict[str, tuple[str, ...]]:
    """Contract name -> columns of the files; raises if a wanted column is missing.

    JSON names columns row by row, and only the first rows are known: columns that need not be in all rows may come later.
    """
    required = [ITEM_ID] if table == "items" else [USER_ID, ITEM_ID, TIMESTAMP, *([SPLIT] if needs_split else [])]
    given: dict[str, str] = dict(domain.item_columns.items() if table == "items" else domain.interaction_columns.items())
    wanted = _wanted(name, table, domain, needs_rating, needs_split)
    anywhere = {column for file in files for column in file.columns}
    chosen, known_in_part = {}, any(file.kind == "jsonl" for file in files)
    for column, key in wanted.items():
        candidates = [given[column]] if column in given else AMAZON.get(form, {}).get(column, [column])
        there = any(candidate in anywhere for candidate in candidates)
        chosen[column] = tuple(candidate for candidate in candidates if candidate in anywhere or known_in_part)
        lacking = [file for file in files if column in required and not set(candidates) & set(file.columns)]
        if lacking or (key and not there and not any(readers.may_hold(filesystem, file, candidates) for file in files)):
            file = (lacking or files)[0]
            raise SourceError(
                f"{label}: {file.path} has no column {' or '.join(candidates)}, wanted for {column}; "
                f"columns found: {shown(file.columns)}; {advice(name, table, [column, *_others(column, required, given, form, file)], file, given)}change {key}"
            )
    return chosen


def _others(column: str, required: list[str], given: dict[str, str], form: str, file: File) -> list[str]:
    """Further columns that a file lacks, so that all can be named at once."""
    known = {name: [given[name]] if name in given else AMAZON.get(form, {}).get(name, [name]) for name in required if name != column}
    return [name for name, candidates in known.items() if not set(candidates) & set(file.columns)]


def _wanted(name: str, table: Table, domain: Domain, needs_rating: bool, needs_split: bool) -> dict[str, str]:
    """Column -> config key that asks for it; empty if the column may be absent."""
    here = f"data.domains.{name}"
    if table == "interactions":
        rating = "data.min_rating" if needs_rating else ""
        optional = {RATING: rating, GIVEN_WEIGHT: f"{here}.interaction_columns" if GIVEN_WEIGHT in domain.interaction_columns else ""}
        event = {EVENT: f"{here}.event_weights"} if domain.event_weights else {}
        split = {SPLIT: f"data.split, or name files: {here}.validation and {here}.test"} if needs_split else {}
        return dict.fromkeys([USER_ID, ITEM_ID, TIMESTAMP], f"{here}.interactions or {here}.format") | optional | event | split
    wanted = {ITEM_ID: f"{here}.items or {here}.format"}
    wanted |= dict.fromkeys(domain.text_fields, f"{here}.text_fields") | dict.fromkeys(domain.attributes, f"{here}.attributes")
    for modality, inputs in domain.inputs.items():
        wanted |= dict.fromkeys([*inputs.files, *inputs.texts, *inputs.values], f"{here}.inputs.{modality}")
    return wanted | ({domain.image_column: f"{here}.image_column"} if domain.image_column else {})
