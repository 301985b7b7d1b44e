"""Checksums of a run's files, which detect files that were damaged, lost, copied or taken from another run.

Parquet: every page carries a CRC, which is checked as it is read; the footer carries the name of the part and a hash of all
pages; and the manifest of a stage keeps a hash of the footer. So the columns that are read are checked, and no others have to be
read. Other files are hashed whole. The checks detect accidents, not attacks: who can write a run directory can write its checksums.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pyarrow import fs

PART, PAGES = b"qbert_ray.part", b"qbert_ray.pages"  # in the footer: the part's name in its run, and the hash of its pages
MAGIC = b"PAR1"
TAIL = 1 << 16  # bytes read at the end of a file: the footer of most parts
SCRAPS = ("checkpoints", "tensorboard")  # folders of a stage that are not read once it is done
READERS = 16  # files read at the same time, for object stores


class Record(TypedDict):
    """What a manifest records of a file."""

    rows: NotRequired[int]  # of a Parquet file
    bytes: int
    checksum: str  # of the footer of a Parquet file, else of the whole file


class DamagedError(ValueError):
    """A file is not what was written; the message says how, without its name."""


def checksum(content: bytes | memoryview) -> str:
    """Hash of some bytes in hexadecimal digits; fast, and not for secrets."""
    return xxhash.xxh3_64_hexdigest(content)


def write_parquet(name: str, rows: pa.Table) -> bytes:
    """Bytes of a Parquet file whose footer names the part of the run that it is.

    Args:
        name: of the part, relative to its run directory.
        rows: what the part holds.
    """
    text = [field.name for field in rows.schema if pa.types.is_string(field.type)]  # vectors never repeat: trying costs 4 x
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, rows.schema, use_dictionary=text, write_page_checksum=True) as writer:
        writer.write_table(rows)
        writer.add_key_value_metadata({PART.decode(): name, PAGES.decode(): checksum(sink.getbuffer())})
    return sink.getvalue()


def open_parquet(file: Any, name: str, known: Record | None) -> tuple[pq.ParquetFile, Record]:
    """A Parquet file whose footer was checked and whose pages are checked as they are read, and its record.

    Args:
        file: opened for reading at any place.
        name: of the part, relative to its run directory.
        known: the file's record in the manifest; None: it has none.

    Raises:
        DamagedError: it is not what was written under that name.
    """
    size = file.size()
    footer = _footer(file, size)
    record: Record = {"rows": 0, "bytes": size, "checksum": checksum(footer)}
    if known is not None and (known["bytes"], known["checksum"]) != (record["bytes"], record["checksum"]):
        raise DamagedError("is not the file that the stage wrote")
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer))
        parquet = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"cannot be read as Parquet: {error}") from None
    record["rows"] = metadata.num_rows
    wrote = (metadata.metadata or {}).get(PART)
    if wrote is not None and wrote.decode(errors="replace") != name:
        raise DamagedError(f"was written as {wrote.decode(errors='replace')}")
    return parquet, record


def _footer(file: Any, size: int) -> bytes:
    """The end of a Parquet file, from its metadata on."""
    tail = file.read_at(min(size, TAIL), max(0, size - TAIL))
    if tail[-4:] != MAGIC or len(tail) < 12:
        raise DamagedError("was cut off: it has no Parquet footer")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > size:
        raise DamagedError("was cut off: its Parquet footer is longer than the file")
    return tail[-length:] if length <= len(tail) else file.read_at(length, size - length)


def check_bytes(name: str, content: bytes, known: Record) -> None:
    """Raise DamagedError if the content of a file does not match its record in the manifest."""
    if name.endswith(".parquet"):
        open_parquet(pa.BufferReader(content), name, known)
    elif (len(content), checksum(content)) != (known["bytes"], known["checksum"]):
        raise DamagedError("is not the file that the stage wrote")


def record_files(filesystem: fs.FileSystem, root: str, stage: str) -> dict[str, Record]:
    """Name, relative to the run directory, -> record of every file that a stage has written.

    Args:
        filesystem: of the run directory.
        root: path of the run directory.
        stage: whose folder is looked through; hidden files, manifests, checkpoints and TensorBoard's files are left out.

    Raises:
        DamagedError: a part was counted but is missing, or is not what was written; the message names it.
    """
    infos = filesystem.get_file_info(fs.FileSelector(f"{root}/{stage}", recursive=True, allow_not_found=True))
    found = [info.path[len(root) + 1 :] for info in infos if info.type == fs.FileType.File]
    _check_counted(found)
    names = sorted(name for name in found if _is_kept(name.split("/")[1:]))

    def record(name: str) -> Record:
        try:
            with filesystem.open_input_file(f"{root}/{name}") as file:
                if name.endswith(".parquet"):
                    return open_parquet(file, name, None)[1]
                content = file.read()
                return {"bytes": len(content), "checksum": checksum(content)}
        except DamagedError as error:
            raise DamagedError(f"{name} {error}") from None

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(record, names), strict=True))


def _is_kept(parts: list[str]) -> bool:
    """Whether a file below a stage's folder is one of its outputs."""
    return not any(part.startswith(".") or part in SCRAPS for part in parts) and parts not in (["manifest.json"], ["started.json"])


def _check_counted(found: Iterable[str]) -> None:
    """Raise DamagedError if a part was counted, so that it had been written, and is missing."""
    there = set(found)
    for name in sorted(there):
        folder, mark, part = name.removesuffix(".json").partition("/.counts/")
        if mark and part.endswith(".parquet") and "/." not in folder and f"{folder}/{part}" not in there:
            raise DamagedError(f"{folder}/{part} is missing, which an earlier try had written")
