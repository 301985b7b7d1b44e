"""Escapes untrusted text for a terminal: titles, IDs, paths and errors may hold control characters."""

from __future__ import annotations

import re

from rich.markup import escape

# Characters that move the cursor, change colours or titles, make the terminal reply, or change the direction of writing.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


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
