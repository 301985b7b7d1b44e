"""Profiles the columns of a user's files, by name and by a sample of values: IDs, times, texts, images, attributes."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from qbert_ray.inputs import readers
from qbert_ray.inputs.json_files import plain_text
from qbert_ray.inputs.layouts import MIND
from qbert_ray.inputs.names import named
from qbert_ray.inputs.readers import REASON, ROW, File, FileError
from qbert_ray.inputs.sources import SPLIT_NAMES, detect_format
from qbert_ray.inputs.times import TimeStyle, as_timestamp, detect_style
from qbert_ray.inputs.values import AMOUNT, as_text
from qbert_ray.storage.directory import resolve

SAMPLED_ROWS = 20_000  # by which a column is profiled
IMAGE_FILE = r"(?i)\.(jpe?g|png|webp|gif|bmp)(\?.*)?$"
LINK = r"(?i)^[a-z][a-z0-9+.-]*://"
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM")  # first bytes of encoded images


@dataclass(frozen=True)
class Column:
    """Statistics of a sample of a column's values; shares are of the filled values."""

    name: str
    kind: str  # text, number, time, bytes, mapping or vector
    filled: float  # share of all rows
    distinct: float
    values: int  # distinct ones
    words: float  # on average
    images: float  # share that ends with an image file's suffix, or begins with the bytes of an image
    links: float
    example: str


@dataclass(frozen=True)
class Files:
    """A table: files of one folder and kind with the same columns."""

    paths: tuple[Path, ...]
    file: File  # the first one, of which columns and a sample are read
    sample: pl.DataFrame
    columns: dict[str, Column]
    held_out: tuple[Path, ...] = ()  # of a split by files: those for validation and for test; `paths` are those for training

    @property
    def location(self) -> Path:
        """The file, the folder of partitions, or the glob that matches exactly these files."""
        return self.folder if _partitions(self.paths[0]) else _glob(self.paths)

    @property
    def folder(self) -> Path:
        """The folder of the files, above partitions such as date=2026-01-31."""
        return _above_partitions(self.paths[0])

    def times(self, name: str) -> TimeStyle:
        """How the times of a column are written, judged by the sample."""
        return detect_style([self.sample[name]])

    def read(self, names: Sequence[str], most: int) -> pl.DataFrame:
        """The first `most` rows of some columns, as text."""
        frames, rows = [], 0
        for path in self.paths:
            for frame in _batches(path, names):
                frames.append(frame.select(_text(frame, name) for name in names))
                rows += len(frame)
                if rows >= most:
                    return pl.concat(frames).head(most)
        return pl.concat(frames) if frames else pl.DataFrame(schema=dict.fromkeys(names, pl.String))

    def named(self, role: str) -> list[str]:
        """Columns with a usual name of a role, the most usual first."""
        return named(self.file.columns, role)


def find_tables(paths: Sequence[Path]) -> tuple[list[Files], dict[str, str]]:
    """Tables among the given files and folders, and the reason why other files were left aside."""
    tables: dict[tuple[object, ...], list[tuple[Path, File]]] = {}
    aside: dict[str, str] = {}
    for path in sorted(set(itertools.chain.from_iterable(map(_files, paths)))):
        try:
            file = readers.describe(resolve(str(path))[0], str(path))
        except FileError as error:
            aside[str(path)] = str(error)
            continue
        # Amazon's categories are separate files in one folder; other files with equal columns are parts of one table.
        part = re.sub(r"\d+", "", path.name) if detect_format((file,)) != "contract" else ""
        if wrong := _headless(file):
            aside[str(path)] = wrong
            continue
        tables.setdefault((_above_partitions(path), file.kind, file.columns, part), []).append((path, file))
    found = []
    for group in tables.values():
        files, held_out = _parts(tuple(path for path, _ in group))
        try:
            _check_glob(files)
            sample = _sample(files, group[0][1])
        except FileError as error:
            aside[str(files[0])] = str(error)
            continue
        columns = {name: _column(sample[name]) for name in group[0][1].columns}
        found.append(Files(files, group[0][1], sample, columns, held_out))
    return found, aside


def _parts(paths: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Files for training, and for validation and test, if their names say that they are such three; else all, and none."""
    parts = [next((SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", path.name.lower()) if word in SPLIT_NAMES), None) for path in paths]
    if sorted(parts, key=str) != [0, 1, 2]:
        return paths, ()
    train, valid, test = (paths[parts.index(number)] for number in range(3))
    return (train,), (valid, test)


def _partitions(path: Path) -> list[str]:
    """Folders such as date=2026-01-31 that a file lies in, from the highest."""
    return [part for part in path.parts[:-1] if "=" in part.strip("=")]


def _above_partitions(path: Path) -> Path:
    depth = next((number for number, part in enumerate(path.parts[:-1]) if "=" in part.strip("=")), len(path.parts) - 1)
    return Path(*path.parts[:depth])


def _headless(file: File) -> str:
    """Why the first line of a CSV or TSV file is not a header; empty if it may be one."""
    if file.kind not in ("csv", "tsv") or file.layout == MIND:
        return ""
    odd = [name for name in file.own_columns if re.fullmatch(r"-?[0-9]+([.][0-9]+)?|[a-z]+://.*|[0-9]{4}-[0-9]{2}-[0-9]{2}.*", name)]
    moment = any(re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.Z+]+", name) for name in file.own_columns)  # no column is called so
    if (len(odd) * 2 < len(file.own_columns) and not moment) or len(file.own_columns) < 2:
        return ""
    return f"{file.path}: its first line looks like a row ({', '.join(file.own_columns[:6])}); write the names of the columns above it"


def _glob(paths: tuple[Path, ...]) -> Path:
    if len(paths) == 1:
        return paths[0]
    begin = os.path.commonprefix([path.name for path in paths]).rstrip("0123456789")
    suffixes = {re.search(r"\.\w+(\.gz)?$", path.name)[0] for path in paths}  # type: ignore[index]
    begin = re.sub(r"[*?\[\]]", "?", begin)
    return paths[0].with_name(f"{begin}*{suffixes.pop() if len(suffixes) == 1 else ''}")


def _check_glob(paths: tuple[Path, ...]) -> None:
    if _partitions(paths[0]):
        _check_folder(paths)
        return
    glob = _glob(paths)
    others = {file for file in paths[0].parent.glob(glob.name) if readers.kind_of(file.name)} - set(paths)
    if len(paths) > 1 and others:
        names = ", ".join(path.name for path in paths)
        raise FileError(
            f"{names} have the same columns, but no pattern names them alone in {glob.parent}: give them a folder of their own, or name the one that is meant"
        )


def _check_folder(paths: tuple[Path, ...]) -> None:
    folder = _above_partitions(paths[0])
    others = [path for path in _files(folder) if path not in paths]
    if others:
        raise FileError(f"{folder} holds partitions and other files, such as {others[0].name}: give the partitions a folder of their own")


def _files(path: Path) -> list[Path]:
    if not path.exists():
        parent = Path(*itertools.takewhile(lambda part: not set(part) & set("*?["), path.parts))
        return [file for file in parent.rglob("*") if file.match(str(path)) and readers.kind_of(file.name)] if parent != path else []
    if path.is_file():
        return [path]
    inside = (file for file in path.rglob("*") if file.is_file() and readers.kind_of(file.name))
    return [file for file in inside if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)]


def _batches(path: Path, names: Sequence[str]) -> Iterator[Any]:
    filesystem, place = resolve(str(path))
    file = readers.describe(filesystem, place)
    for fragment in readers.fragments(file):
        for _, frame in readers.read(filesystem, fragment, dict.fromkeys(names, plain_text)):
            if set(names) <= set(frame.columns):
                yield frame.filter(pl.col(REASON).is_null()) if REASON in frame.columns else frame


def _sample(paths: tuple[Path, ...], file: File) -> pl.DataFrame:
    frames, rows = [], 0
    for frame in itertools.chain.from_iterable(_batches(path, file.columns) for path in paths):
        frames.append(frame.drop(REASON, ROW, strict=False))
        rows += len(frame)
        if rows >= SAMPLED_ROWS:
            break
    if not rows:
        raise FileError(f"{file.path} has no rows")
    return _one_table(frames).head(SAMPLED_ROWS)


def _one_table(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Rows of several parts, whose types may differ; a column whose types have none in common is text."""
    odd = [name for name in frames[0].columns if not _have_common_type([frame.select(name).clear() for frame in frames])]
    return pl.concat([frame.with_columns(_text(frame, name) for name in odd) for frame in frames], how="vertical_relaxed")


def _have_common_type(columns: list[pl.DataFrame]) -> bool:
    try:
        pl.concat(columns, how="vertical_relaxed")
    except pl.exceptions.PolarsError:
        return False
    return True


def _text(frame: pl.DataFrame, name: str) -> pl.Expr:
    return as_text(pl.col(name), frame.schema[name]).alias(name)


def _column(values: pl.Series) -> Column:
    kind, name = values.dtype, values.name
    inner = kind.inner if isinstance(kind, pl.List | pl.Array) else kind
    filled = values.drop_nulls()
    if (inner == pl.Binary and not _is_text(filled)) or isinstance(kind, pl.Struct):
        images = _share_of_images(filled)
        return Column(
            name,
            "bytes" if inner == pl.Binary or images else "mapping",
            len(filled) / len(values),
            1.0,
            len(filled),
            0.0,
            images,
            0.0,
            "",
        )
    text = values.to_frame().select(_text(values.to_frame(), name)).to_series().drop_nulls()
    while isinstance(inner, pl.List | pl.Array):
        inner = inner.inner
    if isinstance(kind, pl.List | pl.Array) and inner.is_numeric():
        return Column(name, "vector", len(text) / len(values), 1.0, len(text), 0.0, 0.0, 0.0, "")
    count, distinct = max(len(text), 1), text.n_unique()
    return Column(
        name,
        _kind(values, text),
        len(text) / len(values),
        distinct / count,
        distinct,
        float(text.str.count_matches(r"\S+").mean() or 0),  # type: ignore[arg-type]
        float(text.str.contains(IMAGE_FILE).mean() or 0),  # type: ignore[arg-type]
        float(text.str.contains(LINK).mean() or 0),  # type: ignore[arg-type]
        str(text[0])[:60] if len(text) else "",
    )


def _is_text(values: pl.Series) -> bool:
    """Whether bytes are texts, as which Parquet files of some writers have them."""
    try:
        return values.dtype == pl.Binary and len(values.cast(pl.String)) > 0
    except pl.exceptions.ComputeError:
        return False


def _kind(values: pl.Series, text: pl.Series) -> str:
    """The kind of a column by its values: the one as which nearly all filled values can be read."""
    if values.dtype.is_temporal():
        return "time"
    if not len(text):
        return "text"
    if text.str.contains(r"^\s*[{].*[}]\s*$").mean() > 0.95:  # type: ignore[operator]
        return "mapping"
    if (text.cast(pl.Float64, strict=False).is_not_null() | text.str.contains(AMOUNT)).mean() > 0.95:  # type: ignore[operator]
        return "number"
    times = text.to_frame().select(as_timestamp(pl.col(text.name), pl.String())).to_series()
    return "time" if times.is_not_null().mean() > 0.95 else "text"  # type: ignore[operator]


def _share_of_images(values: pl.Series) -> float:
    if isinstance(values.dtype, pl.Struct):
        names = {field.name for field in values.dtype.fields}
        return 1.0 if names & {"bytes", "path", "large", "hi_res", "url", "src"} else 0.0
    if isinstance(values.dtype, pl.List):
        values = values.explode().drop_nulls()
    first = values.head(100).to_list()
    return sum(value.startswith(MAGIC) for value in first) / max(len(first), 1)
