"""Recognises files of other kinds by their first bytes, for messages: archives, workbooks, web pages and the like."""

from __future__ import annotations

import codecs
import gzip
import re

HEAD = 512  # first bytes of a file that are looked at
_GZIP, _PARQUET = b"\x1f\x8b", (b"PAR1", b"PARE")
_WRITE = "and write Parquet, or text, plain or as .gz"
_SIGNATURES = (
    (_GZIP, "a gzip file", "add .gz to its name, or unpack it if it has been gzipped twice"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", f"unpack it (zstd -d) {_WRITE}"),
    (b"\xfd7zXZ\x00", "an xz file", f"unpack it (xz -d) {_WRITE}"),
    (b"BZh", "a bzip2 file", f"unpack it (bzip2 -d) {_WRITE}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"unpack it {_WRITE}"),
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook (.xlsx)", "unzip it, or save the sheet as CSV in UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook (.xls)", "save the sheet as CSV in UTF-8"),
    (b"ARROW1", "an Arrow or Feather file", "write it as Parquet: pl.read_ipc(...).write_parquet(...)"),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
    (b"ORC", "an ORC file", "write it as Parquet"),
    (b"SQLite format 3", "an SQLite database", "export its tables as CSV or Parquet"),
    (b"%PDF", "a PDF", "name a table"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (codecs.BOM_UTF32_LE, "text in UTF-32", "write it in UTF-8"),
    (codecs.BOM_UTF32_BE, "text in UTF-32", "write it in UTF-8"),
)
_PAGE = re.compile(rb"(?i)^\s*(<!doctype html|<html|<\?xml)")


def foreign(head: bytes, kind: str | None, path: str = "") -> str:
    """What a file is, and what to do about it, if its first bytes are not those of its kind; else empty.

    Args:
        head: the first bytes, of text after unpacking.
        kind: parquet, csv, tsv or jsonl by its name; None for others.
        path: of the file; its name may say already that it is gzipped.
    """
    if head.startswith(_GZIP) and kind in (None, "parquet") and path.lower().endswith((".gz", ".tgz")):
        return "a gzip file: call it .csv.gz, .tsv.gz or .jsonl.gz if it is such a text; unpack archives (.tar.gz) and Parquet"
    if kind != "parquet" and head.startswith(_PARQUET):
        return "a Parquet file: call it .parquet"
    for begin, what, advice in _SIGNATURES:
        if head.startswith(begin):
            return f"{what}: {advice}"
    if head[257:262] == b"ustar":
        return f"a tar archive: unpack it (tar -xf) {_WRITE}"
    if page := _PAGE.match(head):
        return (
            "XML: write a table"
            if b"xml" in page[1]
            else "a web page: is it the error message of a download, or an export for Excel in HTML? save it as CSV"
        )
    return ""


def explained(error: BaseException) -> str:
    """Why a gzip file cannot be read, where Python's message needs an explanation; else empty."""
    if not isinstance(error, gzip.BadGzipFile):
        return ""
    if "Not a gzipped file" in str(error):
        return "it is not gzipped, or other bytes follow the end of the gzipped ones; is .gz in its name by mistake?"
    return "its content does not fit its checksum; copy or download it again"
