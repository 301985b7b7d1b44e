"""One file over HTTP: goes on where it stopped, is checked, and is there whole or not at all.

`requests` (Ray brings it) does the transport. pooch would check hashes but starts over after a break, and the one in huggingface_hub
that goes on is not part of its interface; going on is one header, so it is here.
"""

from __future__ import annotations

import gzip
import hashlib
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import requests

CHUNK = 1 << 20
TRIES, PAUSE = 4, 2.0  # without any progress; seconds, doubled each time
TIMEOUT = (10, 60)  # seconds to connect, and without a byte
TRANSIENT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)

Report = Callable[[int, int | None], None]  # bytes that are there, and of how many, where that is known


class DownloadError(ValueError):
    """A file that cannot be had or is not what it should be; the message says what was expected."""


def download(url: str, path: Path, md5: str | None = None, report: Report = lambda done, total: None) -> None:
    """Download to `path`; what an earlier try left is gone on from.

    Args:
        md5: published hash; without one, gzipped files are checked by the sums that they hold.

    Raises:
        DownloadError: the server refuses, cannot be reached, or sends something else than was published.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, tag = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.tag")
    failures = 0
    while True:
        before = _size(partial)
        try:
            _go_on(url, partial, tag, report)
            break
        except TRANSIENT as error:
            failures = 1 if _size(partial) > before else failures + 1
            if failures >= TRIES:
                raise DownloadError(
                    f"cannot reach {url}: {_brief(error)}; {_size(partial):,} bytes are kept, the same command goes on"
                ) from None
            time.sleep(PAUSE * 2 ** (failures - 1))
    try:
        check(partial, f"{path.name} from {url}", md5, path.suffix == ".gz")
    except DownloadError as error:
        partial.unlink()
        raise DownloadError(f"{error}; it is not kept") from None
    finally:
        tag.unlink(missing_ok=True)
    partial.rename(path)


def check(path: Path, name: str, md5: str | None, gzipped: bool) -> None:
    """Compare a file with its published hash, or a gzipped one with its own sums.

    Args:
        name: how errors call it.

    Raises:
        DownloadError: it is damaged or another file.
    """
    if md5 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise DownloadError(f"{name} has MD5 {found}, published is {md5}: it is damaged or was replaced")
    elif gzipped:
        try:
            with gzip.open(path) as file:
                while file.read(CHUNK):
                    pass
        except (OSError, EOFError, zlib.error) as error:
            raise DownloadError(f"{name} is damaged: {_brief(error)}") from None


def _go_on(url: str, partial: Path, tag: Path, report: Report) -> None:
    """Append what is missing of a file; from the start where the server cannot, or where its file is another one by now."""
    have = _size(partial)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag.read_text()} if tag.exists() else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing is missing, or the file is shorter by now
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            partial.unlink()
            raise requests.ConnectionError("the file on the server has changed")
        if response.status_code >= 500:
            raise requests.ConnectionError(f"{response.status_code} {response.reason}")
        if response.status_code not in (200, 206):
            raise DownloadError(f"{url}: {response.status_code} {response.reason}")
        goes_on = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        done = have if goes_on else 0
        if response.status_code == 206 and not goes_on:
            raise DownloadError(f"{url}: asked for bytes {have} on, got {response.headers.get('Content-Range')}")
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        strong = response.headers.get("ETag", "")
        tag.write_text(strong if strong and not strong.startswith("W/") else response.headers.get("Last-Modified", ""))
        if not tag.read_text():
            tag.unlink()
        with partial.open("ab" if goes_on else "wb") as file:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                done += len(chunk)
                report(done, total)
    if total is not None and done != total:
        raise requests.ConnectionError(f"{done:,} of {total:,} bytes came")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _brief(error: Exception) -> str:
    """What went wrong, from under requests' account of what it tried."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "(Caused by " in text:
        text = text.rpartition("(Caused by ")[2].rpartition(": ")[2].rstrip(")\"' ")
        text += ")" * (text.count("(") - text.count(")"))
    return text[:200]
