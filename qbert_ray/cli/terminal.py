"""Escapes untrusted text for a terminal: titles, IDs, paths and errors may hold control characters."""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Characters that move the cursor, change colours or titles, make the terminal reply, or change the direction of writing.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


WIDTH = 120  # of text in a file or a pipe, which has no width of its own
WIDEST = 10_000  # of a table there


class Piped(Console):
    """A console that is no terminal: its tables are as wide as their content."""

    def print(self, *objects: Any, **options: Any) -> None:
        wide = self.options.update(width=WIDEST)
        self.width = max([WIDTH, *(self.measure(each, options=wide).maximum for each in objects if isinstance(each, Table))])
        super().print(*objects, **options)
        self.width = WIDTH


def open_console(stderr: bool = False) -> Console:
    """A console for the output, or for errors; where it is no terminal, tables keep all their columns."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # an encoding of eight bits has no tick
    if (stream is not None and stream.isatty()) or "COLUMNS" in os.environ:  # it is None where the caller closed it
        return Console(stderr=stderr, highlight=False, emoji=False)  # an ID such as sku:100:5 is no emoji
    return Piped(stderr=stderr, highlight=False, emoji=False, width=WIDTH)


def printable(text: object) -> str:
    r"""A text whose control characters are written as \x1b or \u202e; line breaks and tabs stay."""
    return _OBEYED.sub(lambda found: _spelled(found[0]), str(text))


def shown(text: object) -> str:
    """An untrusted text for use in rich's markup: control characters and its own markup are escaped."""
    return escape(printable(text))


def json_safe(line: str) -> str:
    """A line of JSON whose control characters, of which JSON itself escapes only some, are escaped."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def _spelled(sign: str) -> str:
    return f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}"
