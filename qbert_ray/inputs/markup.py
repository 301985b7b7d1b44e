"""Plain text from HTML in catalogs."""

from __future__ import annotations

import html
import re

import polars as pl

_HIDDEN = r"(?is)<!--.*?(?:-->|$)|<script\b.*?(?:</script\s*>|$)|<style\b.*?(?:</style\s*>|$)|<head\b.*?(?:</head\s*>|$)|<!\[CDATA\[|\]\]>"
_TAGS = r"(?s)</?[A-Za-z!][^<>]*>|<\?[^>]*\?>"
_ENTITY = r"&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"


def strip_markup(texts: pl.Series) -> pl.Series:
    """Texts without HTML tags, comments, scripts and styles, and with entities decoded; null if nothing is left.

    Texts without a tag or an entity are unchanged, spaces included.
    """
    marked = texts.str.contains(f"{_TAGS}|{_ENTITY}|<!").fill_null(False).arg_true()
    if not len(marked):
        return texts
    plain = _without_tags(texts[marked])
    for _ in range(2):  # some feeds escape twice: &amp;lt;b&amp;gt;
        escaped = plain.str.contains(_ENTITY).fill_null(False).arg_true()
        if len(escaped):
            decoded = plain[escaped].map_elements(_unescaped, pl.String)
            plain = plain.scatter(escaped, _without_tags(decoded))
    plain = plain.str.replace_all(r"\s+", " ").str.strip_chars()
    return texts.scatter(marked, plain.replace("", None))


def _unescaped(text: str) -> str:
    """A text with its entities decoded, but those that are none: html.unescape raises on numbers of thousands of digits."""
    return re.sub(_ENTITY, lambda found: html.unescape(found[0]), text)


def _without_tags(texts: pl.Series) -> pl.Series:
    return texts.str.replace_all(_HIDDEN, " ").str.replace_all(_TAGS, " ")
