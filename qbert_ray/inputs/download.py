"""Downloads one file over HTTP: resumes, checks the content, and publishes only a whole file.

`requests` (a dependency of Ray) does the transport. pooch checks hashes but starts over after an interruption, and the resuming
download in huggingface_hub is not part of its public interface; resuming takes one header, so it is implemented here.
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

Report = Callable[[int, int | None], None]  # bytes downloaded, and of how many, if known


class DownloadError(ValueError):
    """A file cannot be downloaded or is not what was published; the message says what was expected."""


def download(url: str, path: Path, md5: str | None = None, report: Report = lambda done, total: None) -> None:
    """Download to `path`; resumes what an earlier try left.

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
            _resume(url, partial, tag, report)
            break
        except TRANSIENT as error:
            failures = 1 if _size(partial) > before else failures + 1
            if failures >= TRIES:
                raise DownloadError(
                    f"cannot reach {url}: {_brief(error)}; {_size(partial):,} bytes are kept; run the same command again to resume"
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
    """Raise if a file does not match its published hash, or a gzipped file its own checksums.

    Args:
        name: its name in errors.

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


def _resume(url: str, partial: Path, tag: Path, report: Report) -> None:
    """Append the missing bytes of a file; start over if the server cannot resume or its file has changed."""
    have = _size(partial)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag.read_text()} if tag.exists() else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing is missing, or the server's file has become shorter
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            partial.unlink()
            raise requests.ConnectionError("the file on the server has changed")
        if response.status_code >= 500:
            raise requests.ConnectionError(f"{response.status_code} {response.reason}")
        if response.status_code not in (200, 206):
            raise DownloadError(f"{url}: {response.status_code} {response.reason}")
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        done = have if resumed else 0
        if response.status_code == 206 and not resumed:
            raise DownloadError(f"{url}: asked for bytes {have} on, got {response.headers.get('Content-Range')}")
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        strong = response.headers.get("ETag", "")
        tag.write_text(strong if strong and not strong.startswith("W/") else response.headers.get("Last-Modified", ""))
        if not tag.read_text():
            tag.unlink()
        with partial.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                done += len(chunk)
                report(done, total)
    if total is not None and done != total:
        raise requests.ConnectionError(f"{done:,} of {total:,} bytes came")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _brief(error: Exception) -> str:
    """The cause of an error, without the wrapping text of requests."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "(Caused by " in text:
        text = text.rpartition("(Caused by ")[2].rpartition(": ")[2].rstrip(")\"' ")
        text += ")" * (text.count("(") - text.count(")"))
    return text[:200]
