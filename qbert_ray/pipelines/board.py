"""How far a training is, from its workers to the driver.

A module of its own, so that the process of the board imports neither torch nor Ray Data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from qbert_ray.pipelines.session import Progress


@ray.remote(num_cpus=0)
class Board:
    """Where rank 0 writes how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self.state = (0, 0, "")
        self.epochs: list[dict[str, Any]] = []

    def write(self, total: int, done: int, note: str, metrics: dict[str, Any]) -> None:
        self.state = (total, done, note)
        self.epochs.append(metrics)

    def read(self, since: int) -> tuple[int, int, str, list[dict[str, Any]]]:
        return *self.state, self.epochs[since:]


class Watch:
    """Carries the board's state to the progress, and each epoch's metrics to a tracker, while a training runs."""

    def __init__(self, board: Any, progress: Progress, tracker: Callable[[dict[str, Any]], None]) -> None:
        self.board, self.progress, self.tracker, self.stop = board, progress, tracker, threading.Event()
        self.tracked, self.seen, self.started, self.said = 0, 0, False, ""
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        ray.kill(self.board)

    def _poll(self) -> None:
        while not self.stop.wait(0.5):
            self._look()
        self._look()

    def _look(self) -> None:
        try:
            total, done, note, epochs = ray.get(self.board.read.remote(self.tracked))
        except ray.exceptions.RayError:
            return
        if total and not self.started:
            self.progress.start(total, done)
            self.started, self.seen = True, done
        if done > self.seen:
            self.progress.advance(done - self.seen)
            self.seen = done
        if note != self.said:
            self.progress.note(note)
            self.said = note
        for metrics in epochs:
            self.tracker(metrics)
        self.tracked += len(epochs)
