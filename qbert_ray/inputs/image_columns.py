"""Finds an item's image in a column: which types can hold one, and which paths may be followed.

A catalog is not trusted, and so neither are its paths: they may point into the catalog's own folder or the data
root, or to a remote store or web host, but never to other local files or to this machine's own services.
"""

from __future__ import annotations

import posixpath
import string

import numpy as np
import polars as pl
import pyarrow as pa

from qbert_ray.inputs.addresses import Addresses
from qbert_ray.inputs.json_files import IMAGE_KEYS, ROW_LENGTH
from qbert_ray.inputs.values import NOTHING, Kind

DEFAULT = Addresses()
TEXT = (pl.String, pl.Categorical, pl.Enum)
# Lists and mappings written into a text cell, as JSON or as Python prints them.
_NESTED = r"^\s*[\[{]"
_UNDER_KEY = r"""['"]%s['"]\s*:\s*(?:\[?\s*(?:(?:None|null)\s*,?\s*)*)['"]([^'"]+)['"]"""
_IN_LIST = r"""^\s*\[\s*(?:(?:None|null)\s*,?\s*)*['"]([^'"]+)['"]"""
_DATA = r"(?is)^data:[^,]{0,100};base64,(.+)$"
_ENCODED = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # how base64 of PNG, JPEG, GIF and WebP begins
_LEAST_ENCODED = 120  # characters; a shorter text is a path


def can_hold_images(kind: Kind) -> bool:
    """Whether a column of a type can hold image paths or encoded images."""
    if isinstance(kind, pl.List | pl.Array):
        return kind.inner.is_integer() or _is_map(kind) or can_hold_images(kind.inner)
    if isinstance(kind, pl.Struct):
        return any(field.name in (*IMAGE_KEYS, "bytes") and can_hold_images(field.dtype) for field in kind.fields)
    return kind in (*TEXT, pl.Binary, pl.Null)


def image_path(value: pl.Expr, kind: Kind) -> pl.Expr:
    """The path or URI in an image column: the text itself, the first of a list, or a struct's field with a usual name."""
    if isinstance(kind, pl.Array):
        value, kind = value.arr.to_list(), pl.List(kind.inner)
    if isinstance(kind, pl.Struct):
        fields = {field.name: field.dtype for field in kind.fields}
        paths = [image_path(value.struct.field(name), fields[name]) for name in IMAGE_KEYS if name in fields]
        return pl.coalesce(*paths, pl.lit(None, pl.String))
    if isinstance(kind, pl.List):
        if _is_map(kind):  # whose entries are structs of key and value
            value = value.list.eval(pl.element().filter(pl.element().struct.field("key").is_in(list(IMAGE_KEYS))).struct.field("value"))
            return image_path(value, pl.List(pl.String))
        if not can_hold_images(kind.inner):
            return pl.lit(None, pl.String)
        return value.list.eval(image_path(pl.element(), kind.inner)).list.drop_nulls().list.first()
    if kind not in TEXT:
        return pl.lit(None, pl.String)
    text = value.cast(pl.String).str.strip_chars()
    plain = (text != "") & ~text.is_in(NOTHING) & ~_is_content(text)
    return pl.when(text.str.contains(_NESTED)).then(_nested_path(text)).when(plain).then(text)


def image_bytes(value: pl.Expr, kind: Kind) -> pl.Expr:
    """The encoded image in an image column: the bytes themselves, also as numbers or base64, in a list (the first) or a struct."""
    if isinstance(kind, pl.Array):
        value, kind = value.arr.to_list(), pl.List(kind.inner)
    if isinstance(kind, pl.Struct):
        fields = {field.name: field.dtype for field in kind.fields}
        found = [image_bytes(value.struct.field(name), fields[name]) for name in ("bytes", *IMAGE_KEYS) if name in fields]
        return pl.coalesce(*found, pl.lit(None, pl.Binary))
    if isinstance(kind, pl.List) and kind.inner.is_integer():
        return value.map_batches(_from_numbers, return_dtype=pl.Binary)
    if isinstance(kind, pl.List):
        return image_bytes(value.list.drop_nulls().list.first(), kind.inner)
    if kind in TEXT:
        text = value.cast(pl.String).str.strip_chars()
        return _decoded(text)
    return pl.when(value.bin.size() > 0).then(value) if kind == pl.Binary else pl.lit(None, pl.Binary)


def unread_image(value: pl.Expr, kind: Kind) -> pl.Expr:
    """A list or mapping in a cell of text in which no path was found, or an encoded image that cannot be decoded; null elsewhere."""
    if kind not in TEXT:
        return pl.lit(None, pl.String)
    text = value.cast(pl.String).str.strip_chars()
    damaged = _is_content(text) & _decoded(text).is_null()
    unread = text.str.contains(_NESTED) & _nested_path(text).is_null() & text.str.replace_all("None|null", "").str.contains(r"[\w]")
    return pl.when(unread | damaged).then(text.str.slice(0, ROW_LENGTH))


def from_template(template: str, item_id: pl.Expr) -> pl.Expr:
    """The path of each item's image by a template such as covers/{item_id}.jpg or {item_id:.3}/{item_id}.jpg.

    Raises:
        ValueError: it holds anything else in braces, or no item_id.
    """
    parts: list[pl.Expr] = []
    names = 0
    for literal, name, spec, _ in string.Formatter().parse(template):
        parts += [pl.lit(literal)] if literal else []
        if name is None:
            continue
        if name != "item_id" or (spec and not (spec.startswith(".") and spec[1:].isdigit())):
            raise ValueError(f"{template!r} can hold {{item_id}}, or {{item_id:.3}} for its first three characters, but not {{{name}}}")
        parts.append(item_id.str.slice(0, int(spec[1:])) if spec else item_id)
        names += 1
    if not names:
        raise ValueError(f"{template!r} must hold {{item_id}}, such as covers/{{item_id}}.jpg")
    return pl.concat_str(parts)


def _is_map(kind: Kind) -> bool:
    """Whether a type is a map from text to text, as `arrow_types` converts it."""
    return isinstance(kind, pl.List) and kind.inner == pl.Struct({"key": pl.String, "value": pl.String})


def _nested_path(text: pl.Expr) -> pl.Expr:
    return pl.coalesce(*(text.str.extract(_UNDER_KEY % key, 1) for key in IMAGE_KEYS), text.str.extract(_IN_LIST, 1))


def _is_content(text: pl.Expr) -> pl.Expr:
    """Whether a text is an image itself rather than where it is."""
    return text.str.contains(r"(?i)^data:") | _is_encoded(text)


def _decoded(text: pl.Expr) -> pl.Expr:
    """The bytes of an image as base64 or as a data URI; blanks, signs for URLs (- and _) and their escapes (%2B) are understood; else null."""
    encoded = pl.when(_is_encoded(text)).then(text).otherwise(text.str.extract(_DATA, 1)).str.replace_all(r"\s", "")
    for sign, meant in (("(?i)%2B|-", "+"), ("(?i)%2F|_", "/"), ("(?i)%3D", "=")):
        encoded = encoded.str.replace_all(sign, meant)
    encoded = encoded.str.strip_chars_end("=")
    lacking = pl.when(encoded.str.len_bytes() % 4 == 2).then(pl.lit("==")).when(encoded.str.len_bytes() % 4 == 3).then(pl.lit("="))
    content = (encoded + lacking.otherwise(pl.lit(""))).str.decode("base64", strict=False)
    return pl.when(content.bin.size() > 0).then(content)


def _is_encoded(text: pl.Expr) -> pl.Expr:
    begins = pl.any_horizontal(text.str.starts_with(begin) for begin in _ENCODED)
    return begins & (text.str.len_bytes() > _LEAST_ENCODED) & ~text.str.contains(".", literal=True)


def _from_numbers(values: pl.Series) -> pl.Series:
    """Lists of numbers from 0 to 255 as bytes; null where a list is empty or holds other numbers."""
    lists = pa.array(values.to_arrow())
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    flat = lists.flatten().cast(pa.int64(), safe=False).fill_null(-1).to_numpy(zero_copy_only=False)
    lengths = np.asarray(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    ends = np.cumsum(lengths)
    bad = np.concatenate([[0], np.cumsum((flat < 0) | (flat > 255))])
    usable = (lengths > 0) & (bad[ends] == bad[ends - lengths])
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    content = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(lists), [None, pa.py_buffer(offsets), pa.py_buffer(flat.astype(np.uint8))]
    )
    return pl.select(pl.when(pl.Series(usable)).then(pl.Series(content))).to_series().alias(values.name)


def safe_paths(paths: pl.Series, folder: str, query: str, root: str, addresses: Addresses = DEFAULT) -> pl.Series:
    """Absolute paths and URIs; null where there is none or it may not be followed.

    Args:
        paths: as the rows give them.
        folder: that relative paths start from, a local path or a URI.
        query: of that URI, with its question mark; is added to the paths in it.
        root: another local folder that absolute paths may point into.
        addresses: which schemes and hosts are allowed.
    """
    frame = pl.DataFrame({"path": paths})
    scheme = pl.col("path").str.extract(r"^([A-Za-z][A-Za-z0-9+.-]*):", 1).str.to_lowercase()
    unusual = r"(^[/~])|((^|/)\.\.(/|$))|[\\\x00]|//" + ("|[?#]" if "://" in folder else "")  # a query could change how a store is reached
    frame = frame.with_columns(scheme.alias("scheme"), (scheme.is_null() & ~pl.col("path").str.contains(unusual)).alias("plain"))
    joined = pl.concat_str(pl.lit(f"{folder}/"), pl.col("path").str.replace(r"^(\./)+", ""), pl.lit(query))
    remote = pl.col("scheme").is_not_null() & pl.col("path").is_in(_allowed(frame, addresses))
    frame = frame.with_columns(pl.when("plain").then(joined).when(remote).then("path").alias("safe"))
    rest = frame.select((pl.col("scheme").is_null() & ~pl.col("plain")).fill_null(False).arg_true()).to_series()
    if not len(rest):
        return frame["safe"]
    resolved = [_inside(path, folder, query, root) for path in frame["path"][rest]]
    return frame["safe"].scatter(rest, pl.Series(resolved, dtype=pl.String))


def _inside(path: str, folder: str, query: str, root: str) -> str | None:
    """An unusual path made absolute, if it stays inside the folder (or, being absolute, inside the root)."""
    scheme, mark, base = folder.rpartition("://")
    path = path.replace("\\", "/")  # as Windows writes paths
    if "\x00" in path or path.startswith("~") or (mark and ("?" in path or "#" in path)):
        return None
    full = posixpath.normpath(path if path.startswith("/") and not mark else f"{base}/{path}")
    allowed = [base] if not path.startswith("/") else [] if mark else [base, root]
    inside = any(full.startswith(f"{posixpath.normpath(place).rstrip('/')}/") for place in allowed if place)
    return f"{scheme}{mark}{full}{query}" if inside else None


def _allowed(frame: pl.DataFrame, addresses: Addresses) -> list[str]:
    """Addresses with a scheme that may be followed; each web host or bucket is checked once."""
    given = frame.filter(pl.col("scheme").is_not_null()).select("path", beginning=pl.col("path").str.extract(r"^(\w+://[^/?#]*)", 1))
    unusual = given.filter(pl.col("path").str.contains(r"[?#]") & ~pl.col("path").str.contains(r"^(?i)https?:"))["path"]
    good = [beginning for beginning in given["beginning"].drop_nulls().unique().to_list() if addresses.allow(beginning)]
    plain = given.filter(pl.col("beginning").is_in(good) & ~pl.col("path").is_in(unusual.to_list()))["path"].to_list()
    return plain + [path for path in unusual.to_list() if addresses.allow(path)]
