"""Decides which addresses of images, sounds and clips in a catalog may be followed, and reads the files there.

A catalog is not trusted. Its rows may name files under the catalog's folder or the data root, objects of a store, and
web addresses, of the schemes and hosts that the config allows. They never choose how a store is reached: options come only from
`data.root` and the paths of the config. A host's name is resolved once, its addresses are checked, and the connection
goes to the address that was checked; redirects are not followed, and proxies are not used.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import os
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import urllib3
from pyarrow import fs

from qbert_ray.config.schema import Domain
from qbert_ray.storage.directory import ArtifactError, join, resolve

WEB, STORES = ("http", "https"), ("s3", "gs", "gcs")
WAIT_SECONDS, WHOLE_SECONDS = 20, 60  # timeouts for the next bytes of a download, and for the whole of it
POOLED = 8  # connections that are kept open to one host
NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_UNICAST, DOCUMENTATION = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("3fff::/20")


class AddressError(ValueError):
    """An address may not be followed or cannot be read; the message is the reason of a rejected row."""


@dataclass(frozen=True)
class Addresses:
    """The sources from which images of a domain may be read.

    Args:
        schemes: of addresses with "://" in rows.
        hosts: patterns of allowed web hosts and buckets; empty: any. A host named without a wildcard may have a private address.
        folders: local folders whose files may be read.
        own: prefixes, up to the bucket or host, of the config's own addresses; these are always allowed.
        queries: of the config's own addresses, with their question mark.
        follow_links: whether symbolic links in the folders may lead outside.
    """

    schemes: tuple[str, ...] = ("https", *STORES)
    hosts: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    follow_links: bool = False

    @staticmethod
    def of(root: str, domain: Domain) -> Addresses:
        """The addresses that a domain's config allows.

        Args:
            root: data.root.
            domain: of the config.
        """
        places = [root, join(root, domain.items)]
        remote = [place for place in places if "://" in place]
        local = [resolve(place)[1] for place in places if "://" not in place or place.startswith("file://")]
        return Addresses(
            tuple(domain.image_schemes),
            tuple(domain.image_hosts),
            (*local[:1], *(os.path.dirname(re.split(r"[*?\[]", place)[0]) for place in local[1:])),
            tuple(_origin(place) for place in remote),
            tuple("?" + place.partition("?")[2] for place in remote if "?" in place),
            domain.follow_links,
        )

    def allow(self, uri: str) -> bool:
        """Whether the scheme, the host or bucket, and the form of an address in a row are allowed; without a DNS look-up."""
        scheme, mark, rest = uri.partition("://")
        scheme, authority = scheme.lower(), re.split(r"[/?#]", rest, maxsplit=1)[0]
        if not mark or not authority or re.search(r"[\x00-\x20\x7f\\%@]", authority):  # some read "%31" as "1"; "@" introduces credentials
            return False
        if scheme not in WEB and ("#" in rest or ("?" in rest and "?" + rest.partition("?")[2] not in self.queries)):
            return False
        if _origin(uri) in self.own:
            return True
        if scheme not in self.schemes:
            return False
        if scheme not in WEB:
            named = authority in self.hosts
            return named or (scheme in STORES and re.fullmatch(r"[\w.-]+", authority) is not None and self._matches(authority))
        host = _host(uri)
        return host is not None and self._matches(host) and (host in self.hosts or not _is_own_name(host))

    def _matches(self, host: str) -> bool:
        return not self.hosts or any(fnmatch.fnmatchcase(host, pattern.lower()) for pattern in self.hosts)


def read_image(uri: str, max_bytes: int, addresses: Addresses) -> bytes:
    """The first `max_bytes` + 1 bytes of a file on a local path, in an object store or on the web.

    Raises:
        AddressError: with the reason.
    """
    try:
        if "://" not in uri or uri.startswith("file://"):
            return _read_local(uri.removeprefix("file://"), max_bytes, addresses)
        if not addresses.allow(uri):
            raise AddressError("unsafe path")
        if uri.partition("://")[0].lower() in WEB:
            return _download(uri, max_bytes, addresses)
        filesystem, path = _open(uri)
        with filesystem.open_input_stream(path) as stream:
            return stream.read(max_bytes + 1)
    except AddressError:
        raise
    except FileNotFoundError:
        raise AddressError("file not found") from None
    except (OSError, ArtifactError, pa.ArrowException, urllib3.exceptions.HTTPError, ValueError):
        raise AddressError("cannot be read") from None


def is_inside(path: str, folders: tuple[str, ...]) -> bool:
    """Whether a local path lies in one of some folders, after symbolic links of both are resolved."""
    real, places = os.path.realpath(path), {os.path.realpath(folder) for folder in folders if folder}
    return any(os.path.commonpath([real, place]) == place for place in places)


def is_public(address: str) -> bool:
    """Whether an IP address is public; an IPv4 address embedded in IPv6 must be public as well."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address):
        inner = number.ipv4_mapped or number.sixtofour or (number.teredo[1] if number.teredo else None)
        if inner is None and (number in NAT64 or int(number) < 1 << 32):
            inner = ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if number not in GLOBAL_UNICAST or number in DOCUMENTATION:  # such as translations of IPv4 by other prefixes
            return False
    return number.is_global and not number.is_multicast


def _read_local(path: str, max_bytes: int, addresses: Addresses) -> bytes:
    real = "" if "\x00" in path else os.path.realpath(path)  # the path that was checked is opened, even if a link changes meanwhile
    if not real or not (addresses.follow_links or is_inside(real, addresses.folders)):
        raise AddressError("unsafe path")
    if os.path.exists(real) and not os.path.isfile(real):  # reading a pipe would wait forever
        raise AddressError("cannot be read")
    with fs.LocalFileSystem().open_input_stream(real) as stream:
        return stream.read(max_bytes + 1)


def _origin(uri: str) -> str:
    """Scheme and bucket or host of an address."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme.lower()}://{re.split(r'[/?#]', rest, maxsplit=1)[0]}"


def _host(uri: str) -> str | None:
    """Host of a web address in the form that the connection uses; None if there is none."""
    try:
        host = urllib3.util.parse_url(uri).host
    except ValueError:
        return None
    return host.strip("[]").rstrip(".").lower() if host else None


def _is_own_name(host: str) -> bool:
    """Whether a host is known, without a DNS look-up, not to be public."""
    if host == "localhost" or host.endswith((".localhost", ".internal", ".local")) or "%" in host or not host:
        return True
    try:
        return not is_public(host)
    except ValueError:
        pass
    try:
        return not is_public(socket.inet_ntoa(socket.inet_aton(host)))  # also 2130706433 and 0x7f.1
    except OSError:
        return False


def _download(uri: str, max_bytes: int, addresses: Addresses) -> bytes:
    """The beginning of a web file, read from an address that was checked."""
    parts, host = urllib3.util.parse_url(uri), _host(uri) or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if host not in addresses.hosts and not all(map(is_public, found)):
        raise AddressError("unsafe path")
    headers = {"Host": parts.netloc or host, "User-Agent": "qbert-ray", "Accept": "*/*"}
    pool = _pool(parts.scheme or "https", host, found[0], port)
    deadline, content = time.monotonic() + WHOLE_SECONDS, bytearray()
    response = pool.urlopen("GET", parts.request_uri, headers=headers, redirect=False, retries=False, preload_content=False)
    timer = _cut_after(deadline - time.monotonic(), response.connection)
    try:
        if response.status != 200:
            raise AddressError("cannot be read")
        while (
            len(content) <= max_bytes
            and time.monotonic() <= deadline
            and (piece := response.read1(max_bytes + 1 - len(content), decode_content=False))
        ):
            content += piece
        if time.monotonic() > deadline:  # what was cut can look as if it were whole
            raise AddressError("cannot be read")
    finally:
        timer.cancel()
        response.close()  # unread bytes must not reach the next image; a connection that was read to its end is already back in the pool
    return bytes(content)


def _cut_after(seconds: float, connection: Any) -> threading.Timer:
    """A timer that ends what a connection waits for: a host may send a byte now and then, of headers too, for ever."""
    sock: Any = getattr(connection, "sock", None)  # the response may have come whole, and the connection be back in its pool

    def cut() -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(seconds, 0), cut if sock is not None else lambda: None)
    timer.daemon = True
    timer.start()
    return timer


class _Bounded:
    """A connection whose wait for the headers of a response ends after `WHOLE_SECONDS`."""

    def getresponse(self) -> Any:
        timer = _cut_after(WHOLE_SECONDS, self)
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            timer.cancel()


class _HTTP(_Bounded, urllib3.connection.HTTPConnection):
    pass


class _HTTPS(_Bounded, urllib3.connection.HTTPSConnection):
    pass


@lru_cache(maxsize=64)
def _pool(scheme: str, host: str, address: str, port: int) -> Any:
    """A connection pool for an IP address, whose certificate must match the host's name."""
    options: dict[str, Any] = {"timeout": urllib3.Timeout(WAIT_SECONDS), "maxsize": POOLED}
    if scheme == "http":
        pool: Any = urllib3.HTTPConnectionPool(address, port, **options)
    else:
        pool = urllib3.HTTPSConnectionPool(address, port, server_hostname=host, assert_hostname=host, **options)
    pool.ConnectionCls = _HTTP if scheme == "http" else _HTTPS
    return pool


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """File system and path of an address; keys of object stores are used verbatim, whatever characters they hold."""
    scheme, _, rest = uri.partition("://")
    path, _, query = rest.partition("?")
    return _store(f"{scheme}://{path.partition('/')[0]}" + (f"?{query}" if query else "")), path


@lru_cache(maxsize=64)
def _store(uri: str) -> fs.FileSystem:
    return resolve(uri)[0]
