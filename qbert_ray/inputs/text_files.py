"""Reads text files as UTF-8: plain or gzipped, written in UTF-8, UTF-16 or Windows-1252 (Latin-1).

An encoding is recognised by its byte order mark, by the zero bytes of UTF-16, or by bytes that are invalid in UTF-8. Such bytes
are read as Windows-1252 one by one, so that a single one does not spoil an otherwise good file.
"""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from pyarrow import fs

from qbert_ray.inputs.limits import MOST_LINE

SAMPLE_BYTES = 1 << 20  # by which encoding, columns and delimiter of a file are judged
BLOCK_BYTES = 16 << 20
UTF8, LATIN = "utf-8", "windows-1252"
MOST_ACCENTS = 0.5  # share of letters outside of ASCII in a text of a Western language
MARKS = {codecs.BOM_UTF8: UTF8, codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_ERRORS = "qbert-ray-windows-1252"  # the name under which `_as_latin` is registered with `codecs`


class TextError(ValueError):
    """A text file cannot be read; the message says why, without the file's name."""


@dataclass(frozen=True)
class Text:
    """Encoding and line ends of a text file."""

    encoding: str = UTF8  # utf-8, windows-1252, utf-16-le or utf-16-be
    returns: bool = False  # lines end in carriage returns alone, as old spreadsheets write them
    doubtful: bool = False  # windows-1252, and yet most letters are outside of ASCII, which no Western language writes


def open_text(filesystem: fs.FileSystem, path: str) -> BinaryIO:
    """The decompressed bytes of a file."""
    # Python's gzip rather than Arrow's: some published dumps are several concatenated gzip streams.
    stream = filesystem.open_input_stream(path, compression=None)
    return gzip.GzipFile(fileobj=stream) if path.lower().endswith(".gz") else io.BufferedReader(stream)  # type: ignore[return-value]


def detect_encoding(filesystem: fs.FileSystem, path: str) -> tuple[Text, bytes, bool]:
    """A file's encoding, its beginning as UTF-8, and whether that is the whole file."""
    with open_text(filesystem, path) as stream:
        sample, cut = _sample(stream)
        whole = not stream.read(1) and not cut
    text = _encoding_of(sample)
    content = b"".join(blocks(io.BytesIO(sample), text))
    return text, content if whole else content[: content.rfind(b"\n") + 1] or content, whole


def _sample(stream: BinaryIO) -> tuple[bytes, bool]:
    """The first bytes of a file; if its first line is longer than that, the beginning of that line and the lines after it.

    Returns:
        The bytes, and whether the first line was cut.
    """
    sample = stream.read(SAMPLE_BYTES)
    encoding = _encoding_of(sample).encoding
    if len(sample) < SAMPLE_BYTES or _find("\n", sample, encoding) >= 0 or _find("\r", sample, encoding) >= 0:
        return sample, False
    while piece := stream.read(SAMPLE_BYTES):
        place = _find("\n", piece, encoding)
        if place >= 0:
            return sample + piece[place:] + stream.read(SAMPLE_BYTES), True
    return sample, True


def _find(sign: str, content: bytes, encoding: str) -> int:
    """Offset of the first ASCII character `sign`, or -1; of UTF-16 the content must begin with a whole character."""
    code = sign.encode(encoding if encoding.startswith("utf-16") else UTF8)
    place = content.find(code)
    while place > 0 and place % len(code):  # the end of one character and the beginning of the next
        place = content.find(code, place + 1)
    return place


def blocks(stream: BinaryIO, text: Text, size: int = BLOCK_BYTES, *, most_line: int = MOST_LINE) -> Iterator[bytes]:
    """Whole lines as UTF-8, without byte order marks at their beginning, about `size` bytes at a time.

    Args:
        most_line: bytes of a line; one that spans blocks and is longer is cut, so that memory stays bounded.
    """
    _register_decoder()
    wide = text.encoding.startswith("utf-16")
    decoder = codecs.getincrementaldecoder(text.encoding)("replace") if wide else None
    rest: list[bytes] = []
    cut = False
    while True:
        piece = stream.read(size)
        last = not piece
        if decoder:
            piece = decoder.decode(piece, last).encode(errors="replace")
        if text.returns:
            piece = piece.replace(b"\r", b"\n")
        if cut:  # of a line beyond the bound, which is rejected, only the beginning is kept
            place = piece.find(b"\n")
            piece, cut = (piece[place:], False) if place >= 0 else (b"", not last)
        end = len(piece) if last else piece.rfind(b"\n") + 1
        if end or last:
            lines = b"".join([*rest, piece[:end]])
            rest = [piece[end:]]
            if codecs.BOM_UTF8 in lines:  # files that were put together have one in the middle too
                lines = lines.removeprefix(codecs.BOM_UTF8).replace(b"\n" + codecs.BOM_UTF8, b"\n")
            if lines:
                yield lines if wide else _valid(lines)
        else:
            rest.append(piece)
            cut = cut or sum(map(len, rest)) > most_line
            rest = [b"".join(rest)[: most_line + 1]] if cut else rest  # one byte too many, so that who reads it knows
        if last:
            return


def _encoding_of(sample: bytes) -> Text:
    encoding = next((name for mark, name in MARKS.items() if sample.startswith(mark)), None) or _without_mark(sample)
    doubtful = encoding == LATIN and _foreign_letters(sample) > MOST_ACCENTS
    return Text(encoding, _find("\n", sample, encoding) < 0 <= _find("\r", sample, encoding), doubtful)


def _foreign_letters(sample: bytes) -> float:
    """Share of the letters of a text that are outside of ASCII, of the lines that hold any."""
    text = b"".join(line for line in sample.split(b"\n") if not line.isascii())
    outside = sum(byte >= 128 for byte in text)
    return outside / max(outside + sum(bytes([byte]).isalpha() for byte in text), 1)


def _without_mark(sample: bytes) -> str:
    head = sample[:4096].rstrip(b"\0")  # a file that was not closed may end in many
    zeros = np.flatnonzero(np.frombuffer(head, np.uint8) == 0)
    if len(zeros) > len(head) / 4:  # every second byte of text that is mostly ASCII
        return "utf-16-le" if (zeros % 2).mean() > 0.5 else "utf-16-be"
    try:
        codecs.getincrementaldecoder(UTF8)().decode(sample)  # a character cut off at the end is no error
    except UnicodeDecodeError:
        if len(zeros):
            raise TextError("it holds zero bytes and is neither UTF-8 nor UTF-16, so it is no text") from None
        return LATIN
    return UTF8


def _valid(content: bytes) -> bytes:
    """The content as UTF-8; bytes that are invalid in it are read as Windows-1252."""
    if content.isascii():
        return content
    try:
        content.decode()
    except UnicodeDecodeError:
        return content.decode(errors=_ERRORS).encode()
    return content


def _as_latin(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    return "".join(_character(byte) for byte in bad), error.end


def _character(byte: int) -> str:
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:  # one of the five bytes that Windows-1252 does not define
        return chr(byte)


def _register_decoder() -> None:
    """Register `_as_latin` with `codecs`; not on import, which has no side effects."""
    try:
        codecs.lookup_error(_ERRORS)
    except LookupError:
        codecs.register_error(_ERRORS, _as_latin)
