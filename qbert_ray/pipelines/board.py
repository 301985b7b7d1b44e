"""How far a training is, from its workers to the driver.

A module of its own, so that the process of the board imports neither torch nor Ray Data.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from qbert_ray.pipelines.session import Progress


@ray.remote(num_cpus=0)
class Board:
    """Where rank 0 writes how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self.state = (0, 0, "")

    def write(self, total: int, done: int, note: str) -> None:
        self.state = (total, done, note)

    def read(self) -> tuple[int, int, str]:
        return self.state


class Watch:
    """Carries the board's state to the progress while a training runs."""

    def __init__(self, board: Any, progress: Progress) -> None:
        self.board, self.progress, self.stop = board, progress, threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        ray.kill(self.board)

    def _poll(self) -> None:
        seen, started, said = 0, False, ""
        while not self.stop.wait(0.5):
            try:
                total, done, note = ray.get(self.board.read.remote())
            except ray.exceptions.RayError:
                continue
            if total and not started:
                self.progress.start(total, done)
                started, seen = True, done
            if done > seen:
                self.progress.advance(done - seen)
                seen = done
            if note != said:
                self.progress.note(note)
                said = note
