"""Reads rows of CSV and TSV files, block by block.

Blocks of whole rows are parsed by Arrow. Before that, quotation marks are checked: one that opens a cell and is never closed
would swallow all rows up to the next one, so its row is read with the marks as plain text, or rejected where that does not
fit the header. In TSV, quotation marks are text.
"""

from __future__ import annotations

import csv as python_csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import csv

from qbert_ray.inputs.limits import MOST_LINE, check_columns
from qbert_ray.inputs.text_files import Text, blocks

DELIMITERS = ",;\t|"
OPEN_QUOTE, WRONG_CELLS, LONG_LINE = "open quotation mark", "invalid CSV row", "line too long"  # why a row is rejected
MOST_QUOTED = 1 << 20  # bytes of one cell: a quotation mark that is not closed within them is taken for a stray one
FEWEST_ROWS = 2  # between two stray marks; with fewer, a text of several lines is likelier
SHOWN_LINE = 1 << 14  # bytes of a line past the bound that are kept
_BLANKS = " \t\r\n\f\v\u00a0\ufeff\u200b\u200c\u200d\u2060\u200e\u200f"  # around names, the invisible ones included
_SPELLED_MARK = "\u00ef\u00bb\u00bf"  # a byte order mark that was read as Latin-1 and written again
_LINE_END, _BYTES_END = re.compile(r"\r\n?|\n"), re.compile(rb"\r\n?|\n")
_QUOTE, _NEWLINE, _RETURN = b'"'[0], b"\n"[0], b"\r"[0]


@dataclass(frozen=True)
class Dialect:
    """Delimiter, quoting and header of a CSV or TSV file."""

    delimiter: str = ","
    quoted: bool = True  # quotation marks enclose cells; else they are text
    header_lines: int = 1  # lines above the first row
    escaped: bool = False  # a quotation mark in a quoted cell has a backslash before it, as Spark and MySQL write it


@dataclass
class Rejected:
    """A row that cannot be parsed, with the reason."""

    reason: str
    line: str
    cells: int


@dataclass
class _Block:
    """The rows of a block that can be parsed, the rejected ones, and an unfinished rest."""

    content: bytes
    rest: bytes = b""  # beginning of a cell that continues in the next block
    several_lines: bool = False  # some cell holds a line end
    rejected: list[Rejected] = field(default_factory=list)


def header(content: bytes, kind: str) -> tuple[Dialect, tuple[str, ...]]:
    """Dialect and column names of a file, from its beginning; no names if it is empty.

    Args:
        content: UTF-8.
        kind: csv or tsv.
    """
    text = content.decode(errors="replace").removeprefix(_SPELLED_MARK)
    before = len(text) - len(text.lstrip("\r\n"))
    skipped = len(_LINE_END.findall(text[:before]))
    text = text[before:]
    said = re.match(r"(?i)sep=([\t -~])(?:\r\n?|\n)", text)  # a line that Excel writes above the header
    if said:
        text, skipped = text[said.end() :], skipped + 1
    if not text.strip():
        return Dialect(), ()
    choices = said[1] if said else "\t" if kind == "tsv" and "\t" in _first_line(text) else DELIMITERS
    delimiter = max(choices, key=lambda sign: len(_first_row(text, sign)[0]))  # the first of equals
    names, lines = _first_row(text, delimiter)
    quoted = kind != "tsv" or text.startswith('"') and _first_line(text).endswith('"')
    escaped = quoted and _shows_escapes(text.encode(), delimiter)
    return Dialect(delimiter, quoted, skipped + lines, escaped), _named([name.strip(_BLANKS).strip('"').strip(_BLANKS) for name in names])


def read(stream: BinaryIO, text: Text, dialect: Dialect, names: Sequence[str], wanted: Sequence[str]) -> Iterator[pa.Table | Rejected]:
    """Tables of the wanted columns as strings, and rejected rows, which do not fit the header.

    Args:
        names: of all columns.
        wanted: some of them.
    """
    rest, above = b"", dialect.header_lines
    for piece, last in _and_whether_last(blocks(stream, text)):
        while above and piece:  # by the line ends that `header` counted: files that were put together have several kinds
            end = _BYTES_END.search(piece)
            piece, above = piece[end.end() :] if end else b"", above - 1
        content, long = _short_lines(rest + piece, dialect)
        yield from long
        if dialect.quoted and not dialect.escaped and _shows_escapes(content, dialect.delimiter):  # the beginning may have had no such cell
            dialect = replace(dialect, escaped=True)
        block = _check(_unescaped(content, dialect), dialect, len(names), last)
        rest = _last_lines(content, block.rest.count(b"\n")) if block.rest else b""  # as given: no backslash is taken away twice
        yield from block.rejected
        if block.content.strip():
            yield from _parse(block, dialect, names, wanted)


def _last_lines(content: bytes, newlines: int) -> bytes:
    """The end of the content that has so many newlines and begins after one."""
    begin = len(content)
    for _ in range(newlines + 1):
        begin = content.rfind(b"\n", 0, max(begin, 0))
    return content[begin + 1 :]


def _short_lines(content: bytes, dialect: Dialect) -> tuple[bytes, list[Rejected]]:
    """A block without the lines that are longer than `MOST_LINE`, which `blocks` may have cut, and those lines."""
    if len(content) <= MOST_LINE:
        return content, []
    data = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(data == _NEWLINE) + 1
    ends = ends if len(ends) and ends[-1] == len(content) else np.append(ends, len(content))
    starts = np.concatenate([[0], ends[:-1]])
    long = np.flatnonzero(ends - starts > MOST_LINE)
    pieces, rejected, done = [], [], 0
    for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
        cells = content.count(dialect.delimiter.encode(), start, end) + 1
        rejected.append(Rejected(LONG_LINE, content[start : start + SHOWN_LINE].decode(errors="replace"), cells))
        pieces.append(content[done:start])
        done = end
    return (b"".join([*pieces, content[done:]]), rejected) if rejected else (content, [])


def _and_whether_last(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each piece and whether it is the last."""
    before = next(pieces, None)
    for piece in pieces:
        assert before is not None
        yield before, False
        before = piece
    if before is not None:
        yield before, True


def _parse(block: _Block, dialect: Dialect, names: Sequence[str], wanted: Sequence[str]) -> Iterator[pa.Table | Rejected]:
    broken: list[Rejected] = []

    def keep(row: csv.InvalidRow) -> str:
        broken.append(Rejected(WRONG_CELLS, row.text, row.actual_columns))
        return "skip"

    yield csv.read_csv(
        pa.BufferReader(block.content),
        csv.ReadOptions(use_threads=False, block_size=len(block.content) + 1, column_names=list(names)),
        csv.ParseOptions(
            delimiter=dialect.delimiter,
            quote_char='"' if dialect.quoted else False,
            newlines_in_values=block.several_lines,
            invalid_row_handler=keep,
        ),
        csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()), include_columns=list(wanted), check_utf8=False),
    )
    yield from broken


def _first_row(text: str, delimiter: str) -> tuple[list[str], int]:
    """Cells of the first row and how many lines it spans; only the first line if a quotation mark is left open."""
    rows = python_csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        cells = next(rows)
    except (StopIteration, python_csv.Error):
        cells = []
    if cells and rows.line_num < 20:
        return cells, rows.line_num
    return _first_line(text).split(delimiter), 1


def _first_line(text: str) -> str:
    return _LINE_END.split(text, maxsplit=1)[0]


def _named(names: list[str]) -> tuple[str, ...]:
    """Distinct names: a number is appended to repeated ones, and columns without a name are called as pandas calls them."""
    check_columns(names)
    found: dict[str, None] = {}
    times: dict[str, int] = {}  # a name came before
    for place, given in enumerate(names):
        name = new = given or f"Unnamed: {place}"
        while new in found:
            times[name] = times.get(name, 1) + 1
            new = f"{name}_{times[name]}"
        found[new] = None
    return tuple(found)


# quotation marks


def _shows_escapes(content: bytes, delimiter: str) -> bool:
    """Whether a quoted cell holds a quotation mark after a backslash, which no cell of the usual rules does."""
    inside = re.compile(rb'\\"[^\r\n"%s]' % re.escape(delimiter.encode()))
    return b'\\"' in content and any(inside.search(found[2]) for found in _quoted_cell(delimiter).finditer(content))


def _unescaped(content: bytes, dialect: Dialect) -> bytes:
    """The content with quotation marks inside cells doubled instead of after a backslash."""
    if not dialect.escaped or b"\\" not in content:
        return content
    plain = {b'\\"': b'""', b"\\\\": b"\\"}
    return _quoted_cell(dialect.delimiter).sub(
        lambda cell: b'%s"%s%s' % (cell[1], re.sub(rb'\\["\\]', lambda sign: plain[sign[0]], cell[2]), cell[3]), content
    )


@lru_cache(maxsize=8)
def _quoted_cell(delimiter: str) -> re.Pattern[bytes]:
    d = re.escape(delimiter.encode())
    return re.compile(rb'(\A|[%s\n])"((?:[^"\\]|\\.)*+)("(?=[%s\r\n]|\Z)|\Z)' % (d, d), re.DOTALL)  # the last may be open


def _check(content: bytes, dialect: Dialect, width: int, last: bool) -> _Block:
    """A block in which every quotation mark that opens a cell is closed."""
    if not dialect.quoted or b'"' not in content:
        return _Block(content)
    data = np.frombuffer(content, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(data == _NEWLINE) + 1])
    suspicious = _suspicious(data, starts, dialect.delimiter.encode()[0])
    if not len(suspicious):
        return _Block(content)
    block = _Block(b"")
    grammar, done = _grammar(dialect.delimiter), 0
    pieces: list[bytes] = []
    for start in starts[suspicious].tolist():
        if start < done or start >= len(content):  # inside a cell that was just closed
            continue
        end = _line_end(content, start)
        if grammar.row.fullmatch(content, start, _text_end(content, start, end)):
            continue
        closed = grammar.close(content, start, width)
        if closed is None and not last and len(content) - start < MOST_QUOTED:
            block.content, block.rest = b"".join([*pieces, content[done:start]]), content[start:]
            return block
        if closed:
            block.several_lines, end = True, closed
            pieces.append(content[done:end])
        else:
            pieces.append(content[done:start])
            pieces.append(_as_plain(content[start : _text_end(content, start, end)], dialect, width, block.rejected))
        done = end
    block.content = b"".join([*pieces, content[done:]])
    return block


def _suspicious(data: np.ndarray, starts: np.ndarray, delimiter: int) -> np.ndarray:
    """Numbers of the lines whose quotation marks do not clearly open and close cells within the line."""
    quotes = np.flatnonzero(data == _QUOTE)
    around = np.concatenate([[_NEWLINE], data, [_NEWLINE]])
    before, after = around[quotes], around[quotes + 2]
    line = np.searchsorted(starts, quotes, side="right") - 1
    opens = (before == delimiter) | (before == _NEWLINE)
    closes = (after == delimiter) | (after == _NEWLINE) | (after == _RETURN)
    inside = (before == _QUOTE) | (after == _QUOTE)
    first = np.flatnonzero(np.diff(line, prepend=-1))
    odd = np.flatnonzero(np.bincount(line) % 2)
    return np.unique(np.concatenate([odd, line[first][~opens[first]], line[~(opens | closes | inside)]]))


class _Grammar:
    """Regular expressions for cells and rows as Arrow reads them, without backtracking."""

    def __init__(self, delimiter: str) -> None:
        d = re.escape(delimiter.encode())
        quoted = rb'"(?:[^"]++|"")*+"'
        cell = rb"(?:%s[^%s\n]*+|(?!\")[^%s\n]++|(?!\"))" % (quoted, d, d)
        self.row = re.compile(rb"%s(?:%s%s)*+" % (cell, d, cell))
        self.before = re.compile(rb"(?:%s%s)*+" % (cell, d))  # the cells before the one that stays open
        self.quoted = re.compile(quoted)
        self.cell, self.delimiter = re.compile(cell), delimiter.encode()[0]

    def close(self, content: bytes, start: int, width: int) -> int | None:
        """Where a row of several lines ends; None if its quotation mark is a stray one."""
        position, limit = start, start + MOST_QUOTED
        for number in range(1, width + 1):
            opened = position < len(content) and content[position] == _QUOTE
            if opened:
                found = self.quoted.match(content, position, limit)
                if not found or not self._ends(content, found.end()) or self._holds_rows(content, found.start(), found.end(), width):
                    return None
                position = found.end()
            else:
                found = self.cell.match(content, position)
                position = found.end() if found else position
            if position >= len(content) or content[position] in (_NEWLINE, _RETURN):
                return _line_end(content, position) if number == width else None
            if content[position] != self.delimiter:
                return None
            position += 1
        return None

    def _ends(self, content: bytes, position: int) -> bool:
        return position >= len(content) or content[position] in (self.delimiter, _NEWLINE, _RETURN)

    def _holds_rows(self, content: bytes, start: int, end: int, width: int) -> bool:
        """Whether what seems to be a cell is the rows of the table between two stray marks.

        Then each line is a row, also the first and the last, which hold the marks. Lines of a text may have as many delimiters by chance, so
        the ones between have to be several and to look like the row that the cell begins in: a wrong guess invents rows.
        """
        if width < 2 or content.count(b"\n", start, end) <= FEWEST_ROWS:
            return False
        begin, sign = content.rfind(b"\n", 0, start) + 1, bytes([self.delimiter])
        rows = [line.split(sign) for line in content[begin : _line_end(content, end)].removesuffix(b"\n").split(b"\n")]
        if any(len(row) != width for row in rows):
            return False
        known = max(content.count(sign, begin, start), 1)  # cells of the first row that the marks do not touch
        return all(_alike(rows[0][:known], row) for row in rows[1:-1])


def _alike(one: list[bytes], other: list[bytes]) -> bool:
    """Whether the first cells, and numbers and times after them, are of the same kinds of signs."""
    looks = [(_look(a), _look(b)) for a, b in zip(one, other, strict=False)]
    return looks[0][0] == looks[0][1] and all(a == b for a, b in looks[1:] if a[:2] == (False, True) and any(b))


def _look(cell: bytes) -> tuple[bool, bool, bool]:
    """Whether a cell holds letters, digits and blanks."""
    return re.search(rb"[A-Za-z\x80-\xff]", cell) is not None, re.search(rb"[0-9]", cell) is not None, re.search(rb"\s", cell) is not None


@lru_cache(maxsize=8)
def _grammar(delimiter: str) -> _Grammar:
    return _Grammar(delimiter)


def _line_end(content: bytes, start: int) -> int:
    return content.find(b"\n", start) + 1 or len(content)


def _text_end(content: bytes, start: int, end: int) -> int:
    """Where the text of a line ends, before its line break."""
    return start + len(content[start:end].rstrip(b"\r\n"))


def _as_plain(line: bytes, dialect: Dialect, width: int, rejected: list[Rejected]) -> bytes:
    """A row whose quotation marks are read as text; empty, and rejected, if its number of cells differs from the header's."""
    cells = line.split(dialect.delimiter.encode())
    if len(cells) != width:
        rejected.append(Rejected(OPEN_QUOTE, line.decode(errors="replace"), len(cells)))
        return b""
    return dialect.delimiter.encode().join(b'"%s"' % cell.replace(b'"', b'""') for cell in cells) + b"\n"
