"""Where an item's picture is: which column types can hold one, and which paths may be followed.

A catalog is somebody else's file, so its paths are not trusted: they may point into the catalog's own folder or the data
root, or to a remote store or web host, but never to other local files or to this machine's own services.
"""

from __future__ import annotations

import posixpath
from typing import Any

import polars as pl

from qbert_ray.inputs.addresses import Addresses

Kind = Any  # a polars data type; polars types its inner types more loosely than its own functions take them
DEFAULT = Addresses()
PATH_FIELDS = ("path", "large", "hi_res")  # of structs, as Hugging Face and Amazon name them


def image_path(value: pl.Expr, kind: Kind) -> pl.Expr:
    """The path or URI in an image column: the text itself, the first of a list, or a struct's path."""
    if isinstance(kind, pl.Struct):
        fields = [image_path(value.struct.field(field.name), field.dtype) for field in kind.fields if field.name in PATH_FIELDS]
        return pl.coalesce(*fields, pl.lit(None, pl.String))
    if isinstance(kind, pl.List):
        return image_path(value.list.drop_nulls().list.first(), kind.inner)
    if kind not in (pl.String, pl.Categorical, pl.Enum):
        return pl.lit(None, pl.String)
    text = value.cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


def image_bytes(value: pl.Expr, kind: Kind) -> pl.Expr:
    """The encoded picture in an image column: the bytes themselves, the first of a list, or a struct's bytes."""
    if isinstance(kind, pl.Struct):
        fields = {field.name: field.dtype for field in kind.fields}
        return image_bytes(value.struct.field("bytes"), fields["bytes"]) if "bytes" in fields else pl.lit(None, pl.Binary)
    if isinstance(kind, pl.List):
        return image_bytes(value.list.drop_nulls().list.first(), kind.inner)
    return pl.when(value.bin.size() > 0).then(value) if kind == pl.Binary else pl.lit(None, pl.Binary)


def safe_paths(paths: pl.Series, folder: str, query: str, root: str, addresses: Addresses = DEFAULT) -> pl.Series:
    """Absolute paths and URIs; null where there is none or where it may not be followed.

    Args:
        paths: as the rows give them.
        folder: that relative paths start from, a local path or a URI.
        query: of that URI, with its question mark; is added to the paths in it.
        root: another local folder that absolute paths may point into.
        addresses: which schemes and hosts are allowed.
    """
    frame = pl.DataFrame({"path": paths})
    scheme = pl.col("path").str.extract(r"^([A-Za-z][A-Za-z0-9+.-]*):", 1).str.to_lowercase()
    unusual = r"(^[/~])|((^|/)\.\.(/|$))|[\\\x00]|//" + ("|[?#]" if "://" in folder else "")  # a query would choose how a store is reached
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
    if "\x00" in path or path.startswith("~") or (mark and ("?" in path or "#" in path)):
        return None
    full = posixpath.normpath(path if path.startswith("/") and not mark else f"{base}/{path}")
    allowed = [base] if not path.startswith("/") else [] if mark else [base, root]
    inside = any(full.startswith(f"{posixpath.normpath(place).rstrip('/')}/") for place in allowed if place)
    return f"{scheme}{mark}{full}{query}" if inside else None


def _allowed(frame: pl.DataFrame, addresses: Addresses) -> list[str]:
    """Addresses with a scheme that may be followed; web hosts and plain buckets are judged once each."""
    given = frame.filter(pl.col("scheme").is_not_null()).select("path", beginning=pl.col("path").str.extract(r"^(\w+://[^/?#]*)", 1))
    unusual = given.filter(pl.col("path").str.contains(r"[?#]") & ~pl.col("path").str.contains(r"^(?i)https?:"))["path"]
    good = [beginning for beginning in given["beginning"].drop_nulls().unique().to_list() if addresses.allow(beginning)]
    plain = given.filter(pl.col("beginning").is_in(good) & ~pl.col("path").is_in(unusual.to_list()))["path"].to_list()
    return plain + [path for path in unusual.to_list() if addresses.allow(path)]
