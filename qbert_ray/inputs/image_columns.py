"""Where an item's picture is: which column types can hold one, and which paths may be followed.

A catalog is somebody else's file, so its paths are not trusted: they may point into the catalog's own folder or the data
root, or to a remote store or web host, but never to other local files or to this machine's own services.
"""

from __future__ import annotations

import ipaddress
import posixpath
import socket
from typing import Any
from urllib.parse import urlsplit

import polars as pl

Kind = Any  # a polars data type; polars types its inner types more loosely than its own functions take them
REMOTE_SCHEMES = ("http", "https", "s3", "gs", "gcs", "abfs", "abfss", "hdfs")
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


def safe_paths(paths: pl.Series, folder: str, query: str, root: str) -> pl.Series:
    """Absolute paths and URIs; null where there is none or where it may not be followed.

    Args:
        folder: that relative paths start from, a local path or a URI.
        query: of that URI, with its question mark; goes on to the paths in it.
        root: another local folder that absolute paths may point into.
    """
    frame = pl.DataFrame({"path": paths})
    scheme = pl.col("path").str.extract(r"^([A-Za-z][A-Za-z0-9+.-]*):", 1).str.to_lowercase()
    plain = scheme.is_null() & ~pl.col("path").str.contains(r"(^[/~])|((^|/)\.\.(/|$))|[\\\x00]|//")
    frame = frame.with_columns(scheme.alias("scheme"), plain.alias("plain"))
    joined = pl.concat_str(pl.lit(f"{folder}/"), pl.col("path").str.replace(r"^(\./)+", ""), pl.lit(query))
    remote = pl.col("scheme").is_in(REMOTE_SCHEMES) & ~pl.col("path").is_in(_own_services(frame))
    frame = frame.with_columns(pl.when("plain").then(joined).when(remote).then("path").alias("safe"))
    rest = frame.select((pl.col("scheme").is_null() & ~pl.col("plain")).fill_null(False).arg_true()).to_series()
    if not len(rest):
        return frame["safe"]
    resolved = [_inside(path, folder, query, root) for path in frame["path"][rest]]
    return frame["safe"].scatter(rest, pl.Series(resolved, dtype=pl.String))


def _inside(path: str, folder: str, query: str, root: str) -> str | None:
    """An unusual path made absolute, if it stays inside the folder (or, being absolute, inside the root)."""
    scheme, mark, base = folder.rpartition("://")
    if "\x00" in path or path.startswith("~"):
        return None
    full = posixpath.normpath(path if path.startswith("/") and not mark else f"{base}/{path}")
    allowed = [base] if not path.startswith("/") else [] if mark else [base, root]
    inside = any(full.startswith(f"{posixpath.normpath(place).rstrip('/')}/") for place in allowed if place)
    return f"{scheme}{mark}{full}{query}" if inside else None


def _own_services(frame: pl.DataFrame) -> list[str]:
    """Web addresses of this machine or its link: what a cloud machine's credentials are served from."""
    web = frame.filter(pl.col("scheme").is_in(["http", "https"])).select("path", host=pl.col("path").str.extract(r"^\w+:(//[^/?#]*)", 1))
    own = [host for host in web["host"].unique().to_list() if _is_own(host)]
    return web.filter(pl.col("host").is_in(own) | pl.col("host").is_null())["path"].to_list()


def _is_own(host: str | None) -> bool:
    try:
        name = (urlsplit(f"http:{host}").hostname or "").rstrip(".").lower()
    except ValueError:
        return True
    if not name or "\\" in name or name == "localhost" or name.endswith((".localhost", ".internal")):
        return True
    try:
        number = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:
            number = ipaddress.ip_address(socket.inet_aton(name))  # also 2130706433 and 0x7f.1
        except OSError:
            return False
    return is_own_address(str(number))


def is_own_address(address: str) -> bool:
    """Whether an IP address is of this machine or its link."""
    number = ipaddress.ip_address(address.partition("%")[0])
    number = getattr(number, "ipv4_mapped", None) or number
    return number.is_loopback or number.is_link_local or number.is_unspecified
