"""Peak memory of a process and all its descendants while something runs.

The sum of their proportional set sizes (PSS in /proc/<pid>/smaps_rollup): a page that n processes map, such as one of Ray's
object store or of a shared library, counts 1/n in each, so nothing counts twice. Linux only.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GIB = 2**30


def descendants(root: int) -> Iterator[int]:
    """The process and all below it."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children[parent].append(int(entry.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        waiting += children[pid]
        yield pid


def memory(root: int) -> int:
    """Bytes."""
    total = 0
    for pid in descendants(root):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
    return total


class Peak:
    """`with Peak() as peak: ...`, then `peak.gib`; samples four times a second, `before` is what was there at the start."""

    def __enter__(self) -> Peak:
        self.before = self.most = memory(os.getpid())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.most = max(self.most, memory(os.getpid()))

    @property
    def gib(self) -> float:
        return self.most / GIB
