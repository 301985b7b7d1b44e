"""A lock that lets only one process write into a run directory: a renewed lease, on local paths and on object stores.

A process that wants to write first writes a claim, its own file in `.lock`, and then lists the others: if it finds a live one, it
removes its own claim and is refused. Of two that start at the same moment, the later one sees the earlier claim, so they never both
write. All it needs is a listing that shows every finished write, which local file systems, S3, GCS and Azure provide.

A claim is live while its holder renews it. It is dead once its process is gone, if that can be checked from here, and otherwise
LEASE_SECONDS after its last renewal by the clock of the storage. A holder that was suspended for longer than that finds its claim
removed when it renews, and stops before it writes a manifest; parts that it wrote meanwhile may have overwritten another's.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pyarrow import fs

from qbert_ray.storage.directory import ArtifactError, RunDir

FOLDER = ".lock"
LEASE_SECONDS, RENEW_SECONDS = 60.0, 15.0
TRIES = 4  # of claims that began at the same moment; each waits a random time after removing its own


_held: dict[str, Lock] = {}  # of this process, by URI of the run directory


class LockedError(ArtifactError):
    """Another process writes into the run directory; the message says which."""


@dataclass(frozen=True)
class Holder:
    """The process that wrote a claim."""

    host: str
    pid: int
    place: str  # scope of the process number: boot and process namespace
    started: str  # when the process began, by its system's clock: distinguishes a reused process number
    since: str  # when it took the lock
    command: str
    held: bool = False  # false: not yet, the claim may still be removed

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


class Lock:
    """The claim of this process on a run directory, renewed by a thread until `release`."""

    def __init__(self, run: RunDir, command: str) -> None:
        self.run, self.name, self.lost = run, f"{uuid.uuid4().hex}.json", ""
        self.created = not run.exists("")
        self.holder = Holder(socket.gethostname(), os.getpid(), _place(), _started(os.getpid()), _now(), command)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LockedError: another process has it.
        """
        for attempt in range(TRIES):
            self._write()
            other = self._other()
            if other is None:
                self.holder = replace(self.holder, held=True)
                self._write()
                self.thread.start()
                _held[self.run.uri] = self
                return
            self._remove(self.name)
            if attempt + 1 < TRIES:
                self.ended.wait(random.uniform(0.05, 0.4))
        raise LockedError(
            f"{self.run.uri} is in use by {other}; wait for it to end, or choose another run.dir. "
            f"The lock of a process that is gone ends by itself, on other hosts within {LEASE_SECONDS:.0f} s"
        )

    def release(self) -> None:
        """Release the lock."""
        _held.pop(self.run.uri, None)
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        self._remove(self.name)
        if isinstance(self.run.filesystem, fs.LocalFileSystem):
            with suppress(OSError):  # they are not empty: another claim is there, or the run has outputs
                Path(self.run.path(FOLDER)).rmdir()
                if self.created:
                    Path(self.run.path()).rmdir()

    def check(self) -> None:
        """Raise LockedError if another process took the lock while this one was suspended."""
        if self.lost:
            raise LockedError(
                f"{self.run.uri}: this process was held up and lost the lock to {self.lost}; start it again when that is done"
            )

    def _renew(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            with suppress(OSError):  # the store does not answer: the lease is still running, and the next renewal tries again
                gone = self.name not in self._claims()
                if not gone:
                    self._write()
                other = self._other()  # after the renewal: it may have come a moment after the claim was removed
                if gone or (other is not None and other.held and other.since >= self.holder.since):
                    self.lost = str(other or "another process, which is done by now")
                    self._remove(self.name)
                    return

    def _write(self) -> None:
        try:
            self.run.write_json(f"{FOLDER}/{self.name}", asdict(self.holder))
        except FileNotFoundError:  # a lock that was released in this moment removed the empty folder
            self.run.write_json(f"{FOLDER}/{self.name}", asdict(self.holder))

    def _other(self) -> Holder | None:
        """The holder of a live claim other than this one, or None; dead claims are removed."""
        found = self._claims()
        now = found[self.name].mtime_ns if self.name in found else time.time_ns()
        for name, info in found.items():
            holder = self._read(name) if name != self.name else None
            if holder is None:
                continue
            if self._is_dead(holder, (now - info.mtime_ns) / 1e9):
                self._remove(name)
            else:
                return holder
        return None

    def _claims(self) -> dict[str, fs.FileInfo]:
        selector = fs.FileSelector(self.run.path(FOLDER), allow_not_found=True)
        infos = self.run.filesystem.get_file_info(selector)
        return {info.base_name: info for info in infos if info.type == fs.FileType.File and not info.base_name.startswith(".")}

    def _read(self, name: str) -> Holder | None:
        """The holder that a claim names; None if the claim was removed meanwhile."""
        try:
            return Holder(**self.run.read_json(f"{FOLDER}/{name}"))
        except FileNotFoundError:
            return None
        except (ArtifactError, TypeError):  # claims are written whole: this file is not a claim
            return Holder("an unknown host", 0, "", "", "?", f"unreadable {FOLDER}/{name}")

    def _is_dead(self, holder: Holder, age: float) -> bool:
        if holder.place and holder.place == self.holder.place:
            return _started(holder.pid) != holder.started
        return age > LEASE_SECONDS

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.run.delete(f"{FOLDER}/{name}")


@contextmanager
def locked(run: RunDir, command: str = "") -> Iterator[Lock]:
    """Context that holds the lock of a run directory while something writes into it.

    Args:
        run: the run directory.
        command: shown to processes that are refused; empty: the command line of this process.

    Raises:
        LockedError: another process has it.
    """
    lock = Lock(run, command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def check_held(run: RunDir) -> None:
    """Raise LockedError if this process had the lock of a run directory and lost it."""
    if run.uri in _held:
        _held[run.uri].check()


def _place() -> str:
    """Boot and process namespace that process numbers of this system belong to; empty if unknown."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """When a process of this system began; empty if it is gone."""
    with suppress(OSError, IndexError):
        state, *_, started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return "" if state in "ZX" else started
    return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
