"""Reads rows of JSON files: one object per line, one array of objects, or one object that maps IDs to rows.

A JSON file has no schema, so values become text, line by line.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import polars as pl

from qbert_ray.inputs.limits import MOST_LINE
from qbert_ray.inputs.text_files import Text, blocks
from qbert_ray.storage.columns import ITEM_ID, TIMESTAMP, USER_ID

REASON, ROW = "<reason>", "<row>"  # of a rejected row: why, and the row as JSON; names that columns of files do not have
ROW_LENGTH = 2000  # characters of a rejected row that are kept
MOST_NESTED = 64  # lists and mappings inside each other in a line
MOST_BYTES = 2 << 30  # of a file that has to be parsed as one value
SAMPLED_LINES = 10_000  # each line names its own columns; `describe` collects those of so many lines
BATCH_LINES, BATCH_BYTES = 1 << 14, 16 << 20  # parsed at once, whichever is reached first
MOST_SIGNS = 1 << 20  # brackets and commas of a line: about the number of its values, each of which takes a hundred bytes parsed
LINES, ARRAY, KEYED, HISTORIES = "lines", "array", "keyed", "histories"
IMAGE_KEYS = (  # of mappings, the best first
    *("large", "hi_res", "path", "url", "src", "href", "link", "uri", "image", "original", "full", "medium", "small", "thumb", "thumbnail"),
    *("image_url", "imageUrl", "contentUrl", "file_name", "filename", "file", "filepath"),
)
# How MongoDB's exports write values with a type, such as {"$oid": "65a1"}.
MONGO = {"$oid", "$date", "$numberLong", "$numberInt", "$numberDouble", "$numberDecimal", "$uuid"}
_COLUMN_NAMES = {USER_ID, ITEM_ID, TIMESTAMP, "title", "name", "id", "rating", "index", "columns", "data"}

Converters = Mapping[str, Callable[[Any], str | None]]


class JsonError(ValueError):
    """A JSON file cannot be read; the message says why, without the file's name."""


# values


def plain_text(value: Any) -> str | None:
    """A JSON value as text: whole numbers without .0, lists joined with a comma, mappings as JSON; NaN is none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in MONGO:
        return plain_text(next(iter(value.values())))
    if isinstance(value, list):
        texts = (text.strip() for text in map(plain_text, value) if text)
        return ", ".join(text for text in texts if text)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def json_list(value: Any) -> str | None:
    """A JSON value as text, with lists and mappings as JSON: `input_columns` reads every element."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else plain_text(value)


def first_image(value: Any) -> str | None:
    """Path, URL or data URI in a JSON value: the text itself, the first of a list, or a mapping's value under a usual key.

    A value in which none is found is returned as its JSON, so that it differs from a missing value.
    """
    found = _first_image(value)
    if found or not _holds_something(value):
        return found
    return json.dumps(value, ensure_ascii=False)[:ROW_LENGTH]


def _first_image(value: Any) -> str | None:
    if isinstance(value, list):
        if len(value) > 8 and all(type(byte) is int and 0 <= byte < 256 for byte in value):
            return f"data:;base64,{base64.b64encode(bytes(value)).decode()}"
        return next(filter(None, map(_first_image, value)), None)
    if isinstance(value, dict):
        content = value.get("bytes")
        encoded = f"data:;base64,{content}" if isinstance(content, str) and content and len(content) % 4 == 0 else _first_image(content)
        return next(filter(None, (*(_first_image(value.get(key)) for key in IMAGE_KEYS), encoded)), None)
    return value if isinstance(value, str) else None


def _holds_something(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(map(_holds_something, value.values() if isinstance(value, dict) else value))
    return value is not None and value != "" and value == value


# files


def describe(content: bytes, whole: bool) -> tuple[str, tuple[str, ...]]:
    """Layout and columns of a file, from its beginning.

    Args:
        content: UTF-8, of whole lines.
        whole: whether that is all of the file.

    Raises:
        JsonError: it is JSON of another layout, or none.
    """
    lines = [line for line in map(bytes.strip, content.split(b"\n")) if line]
    if not lines:
        return LINES, ()
    begin = lines[0][:1]
    first = _parse(lines[0])
    if begin == b"[":
        return ARRAY, _names(_sampled_array(content, whole))
    if begin == b"{" and (first is None or len(lines) == 1):
        one = _one_object(content) if whole else None
        layout = _layout(one) if one is not None else None
        if layout:
            return layout, _layout_columns(layout, one or {})
        if not whole and (lines[0] == b"{" or len(lines) == 1):
            return _layout_of_part(content, one_line=len(lines) == 1)
        if one is not None:
            return (LINES, tuple(one)) if len(lines) == 1 else (ARRAY, tuple(one))
    names = _names(filter(None, map(_parse, lines[:SAMPLED_LINES])))
    if not names:
        raise JsonError(f"none of the first {SAMPLED_LINES:,} lines is a JSON object {_why_none(content)}")
    return LINES, names


def _why_none(content: bytes) -> str:
    """Why no line is an object, and what to do."""
    text = content.decode(errors="replace").lstrip()
    if re.match(r"\{\s*u?'", text):
        return (
            'but Python literals; write JSON: python -c "import ast, json, sys; [print(json.dumps(ast.literal_eval(line))) for line in sys.stdin]" '
            "< <file> > <other file>"
        )
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text)
    except (ValueError, RecursionError):
        return "(comments, names without quotation marks and texts over several lines are not JSON)"
    if not isinstance(value, dict):
        return f"but {'null' if value is None else type(value).__name__}; write one object a line, with the names of the columns"
    if re.match(r"\s*,\s*\n", text[end:]):
        return "by itself: each ends in a comma; remove these: sed 's/,[[:space:]]*$//' <file>"
    return "by itself: objects span several lines, or stand one after the other on one; write one a line: jq -c . <file>"


def read(stream: BinaryIO, text: Text, layout: str, converters: Converters) -> Iterator[pl.DataFrame]:
    """Frames of the wanted values as text, with reason and row where a line is no object.

    Args:
        converters: wanted column -> how its values become text.
    """
    if layout == LINES:
        for batch in _batches((line, len(line)) for line in _lines(stream, text)):
            yield _frame([_parse(line) for line in batch], batch, converters)
        return
    content = b"".join(_limited(blocks(stream, text, most_line=MOST_BYTES)))  # an array is often a single line
    one_by_one = layout == ARRAY and content.lstrip()[:1] == b"["
    records = _elements(content.decode()) if one_by_one else ((each, 0) for each in _records(json.loads(content, strict=False), layout))
    del content
    for rows in _batches(records):
        yield _frame(
            [record if isinstance(record, dict) else None for record in rows], [json.dumps(record).encode() for record in rows], converters
        )


def as_line(text: str, **more: Any) -> str:
    """A rejected line as JSON, cut to the length that is kept."""
    return json.dumps({"line": text[:ROW_LENGTH], **more}, ensure_ascii=False)[:ROW_LENGTH]


def _frame(records: list[dict[str, Any] | None], lines: list[bytes], converters: Converters) -> pl.DataFrame:
    broken = [line if record is None else None for record, line in zip(records, lines, strict=True)]
    data: dict[str, list[str | None]] = {
        name: [None if record is None else convert(record.get(name)) for record in records] for name, convert in converters.items()
    }
    data[REASON] = [None if line is None else "invalid JSON" for line in broken]
    data[ROW] = [None if line is None else as_line(line.decode(errors="replace")) for line in broken]
    try:
        return pl.DataFrame(data, schema=dict.fromkeys(data, pl.String))
    except UnicodeEncodeError:  # JSON can spell halves of a character, which UTF-8 cannot
        data = {name: [value and value.encode(errors="replace").decode() for value in values] for name, values in data.items()}
        return pl.DataFrame(data, schema=dict.fromkeys(data, pl.String))


def _parse(line: bytes) -> dict[str, Any] | None:
    if len(line) > MOST_SIGNS and line.count(b",") + line.count(b"[") + line.count(b"{") > MOST_SIGNS:
        return None
    try:
        record = json.loads(line, strict=False)  # tabs and other control characters in texts are no error
    except (ValueError, RecursionError):
        return None
    deep = line.count(b"[") + line.count(b"{") > MOST_NESTED and _is_deep(record)
    return record if isinstance(record, dict) and not deep else None


def _is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than `MOST_NESTED`; a fixed bound, since Python's own limit depends on the caller's stack."""
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner for outer in level if isinstance(outer, dict | list) for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _lines(stream: BinaryIO, text: Text) -> Iterator[bytes]:
    stripped = (line.strip() for block in blocks(stream, text) for line in block.split(b"\n"))
    return (line[:MOST_LINE] for line in stripped if line)  # cut, an object is no JSON: the row is rejected


def _batches(sized: Iterable[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Lines or elements, given with their lengths, in lists of at most `BATCH_LINES`, and of about `BATCH_BYTES` where they are long."""
    batch: list[Any] = []
    size = 0
    for each, length in sized:
        batch.append(each)
        size += length
        if len(batch) == BATCH_LINES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _limited(pieces: Iterable[bytes]) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MOST_BYTES:
            raise JsonError(f"it is one JSON value of more than {MOST_BYTES >> 30} GiB; write one object a line (JSONL)")
        yield piece


def _names(records: Iterable[Any]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for record in records:
        names |= dict.fromkeys(record if isinstance(record, dict) else ())
    return tuple(names)


# files that are one JSON value


def _records(value: Any, layout: str) -> Iterator[Any]:
    if layout == ARRAY:
        yield from value if isinstance(value, list) else [value]
    elif layout == KEYED:
        yield from ({ITEM_ID: key} | row if isinstance(row, dict) else row for key, row in value.items())
    else:
        for user, items in value.items():
            yield from ({USER_ID: user, ITEM_ID: item, TIMESTAMP: number} for number, item in enumerate(items))


def _elements(text: str) -> Iterator[tuple[Any, int]]:
    """The elements of an array with their lengths as text, one after another: all at once take forty times the memory of the text.

    Raises:
        ValueError: the text is no array.
    """
    decoder, position = json.JSONDecoder(strict=False), _after_spaces(text, text.index("[") + 1)
    sign = "]" if text[position : position + 1] == "]" else ","
    position += sign == "]"
    while sign == ",":
        value, end = decoder.raw_decode(text, position)
        yield value, end - position
        place = _after_spaces(text, end)
        sign, position = text[place : place + 1], _after_spaces(text, place + 1)
    if sign != "]" or text[position:].strip():
        raise ValueError(f"its array ends before {text[position : position + 20]!r}")


def _after_spaces(text: str, position: int) -> int:
    found = json.decoder.WHITESPACE.match(text, position)  # type: ignore[attr-defined]
    return int(found.end())


def _layout(value: dict[str, Any]) -> str | None:
    """Layout of an object that holds many rows; None if it is a single row.

    Raises:
        JsonError: it holds columns, or something else.
    """
    kinds = {type(inner) for inner in value.values()}
    rows = next(
        (
            name
            for name, inner in value.items()
            if isinstance(inner, list) and len(inner) > 1 and all(isinstance(row, dict) for row in inner)
        ),
        None,
    )
    if rows is not None and not set(value) & (_COLUMN_NAMES - {"data", "index", "columns"}) and ("data" in value or kinds != {list}):
        raise JsonError(f"its rows are the list under {rows!r}; write them alone, one a line: jq -c '.{rows}[]' <file>")
    if kinds not in ({dict}, {list}) and not {"columns", "data"} <= set(value):
        return None
    if len(value) > 1 and (set(value) & _COLUMN_NAMES or (kinds == {dict} and _numbered(next(iter(value.values()))))):
        if kinds == {list} and not {"columns", "data"} <= set(value) and len({len(inner) for inner in value.values()}) > 1:
            return None  # one row whose values are lists
        raise JsonError("it is one JSON object of columns; write one object a line: df.to_json(path, orient='records', lines=True)")
    if kinds == {dict}:
        return KEYED if len(value) > 1 else None
    flat = list(itertools.islice(itertools.chain.from_iterable(value.values()), 100))
    if any(isinstance(item, list | dict) for item in flat):
        raise JsonError("it is one JSON object of lists, whose elements are no IDs; write one object a line (JSONL)")
    if flat and all(isinstance(item, str) and item.startswith("<") and item.endswith(">") for item in flat):
        raise JsonError("it holds semantic IDs as tokens, neither items nor interactions; data.semantic_ids takes item_id and codes")
    return HISTORIES if len(value) > 1 else None


def _numbered(row: dict[str, Any]) -> bool:
    return bool(row) and all(key.isdigit() for key in row)


def _layout_columns(layout: str, value: dict[str, Any]) -> tuple[str, ...]:
    if layout == HISTORIES:
        return USER_ID, ITEM_ID, TIMESTAMP
    return _names([{ITEM_ID: None}, *itertools.islice(value.values(), SAMPLED_LINES)])


def _one_object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not _is_deep(value) else None


def _layout_of_part(content: bytes, one_line: bool) -> tuple[str, tuple[str, ...]]:
    """Layout of an object of which only the beginning is known, by its complete values.

    Args:
        content: the beginning.
        one_line: whether it has no line end, so that it may be the first of many lines.
    """
    text, decoder, position = content.decode(errors="replace"), json.JSONDecoder(strict=False), content.find(b"{") + 1
    found: dict[str, Any] = {}
    last: str | None = None
    try:
        while True:
            position = _skip(text, position)
            key, position = decoder.raw_decode(text, position)
            position = _skip(text, text.index(":", position) + 1)
            last = str(key)
            found[key], position = decoder.raw_decode(text, position)
            if len(found) >= 1000:
                break
    except (ValueError, RecursionError):
        pass
    layout = _layout(found)
    if not layout and one_line and last is not None:
        return LINES, tuple(dict.fromkeys([*found, last]))
    if not layout:
        raise JsonError("it is one JSON object; write one object a line (JSONL)")
    return layout, _layout_columns(layout, found)


def _skip(text: str, position: int) -> int:
    """The next position that is neither space nor comma."""
    while text[position : position + 1] in (" ", "\t", "\r", "\n", ","):
        position += 1
    return position


def _sampled_array(content: bytes, whole: bool) -> list[Any]:
    """The first elements of an array.

    Raises:
        JsonError: it holds no objects.
    """
    text, decoder, position = content.decode(errors="replace"), json.JSONDecoder(strict=False), content.find(b"[") + 1
    found: list[Any] = []
    try:
        while len(found) < 1000:
            value, position = decoder.raw_decode(text, _skip(text, position))
            found.append(value)
    except (ValueError, RecursionError):
        pass
    if not any(isinstance(row, dict) and row for row in found):
        raise JsonError("it is one JSON array, but not of objects with names; write one object a line (JSONL)")
    return found
