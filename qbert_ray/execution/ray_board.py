"""Progress of a training, passed from its workers to the driver through an actor.

A module of its own, so that the process of the board imports neither torch nor Ray Data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from qbert_ray.execution.progress import Progress
    from qbert_ray.training import EpochMetrics


# With its own environment it starts a new process; otherwise it would take, and end, one that has already imported torch.
@ray.remote(num_cpus=0, runtime_env={"env_vars": {"QBERT_RAY_BOARD": "1"}})
class Board:
    """Actor to which rank 0 writes its progress and from which the driver reads it."""

    def __init__(self, folder: str) -> None:
        self.folder, self.total, self.done = folder, 0, 0
        self.lines: list[EpochMetrics] = []
        self.starts: list[tuple[int, int]] = []

    def __repr__(self) -> str:
        """What the dashboard calls this actor."""
        return f"Board({self.folder})"

    def begin(self, epoch: int, workers: int) -> None:
        """Rank 0 starts to train: epochs that a checkpoint holds, and number of workers."""
        self.starts.append((epoch, workers))

    def write(self, total: int, done: int, line: EpochMetrics) -> None:
        self.total, self.done = total, done
        self.lines.append(line)

    def read(self, known: int, begun: int) -> tuple[int, int, list[EpochMetrics], list[tuple[int, int]]]:
        """Total number of epochs, epochs done, the metrics of each epoch after the first `known`, and the starts after the first `begun`."""
        return self.total, self.done, self.lines[known:], self.starts[begun:]


def start_board(folder: str) -> Any:
    """A board of the training of a folder on the caller's node, so that it survives the loss of any other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board: Any = Board  # the decorator gives it options
    return board.options(scheduling_strategy=here).remote(folder)


class Watch:
    """Thread that passes the board's state to the progress, and each epoch's metrics to a tracker, while a training runs."""

    def __init__(self, board: Any, progress: Progress, tracker: Callable[[EpochMetrics], None]) -> None:
        self.board, self.progress, self.tracker, self.stop = board, progress, tracker, threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        ray.kill(self.board)

    def _poll(self) -> None:
        known, begun, seen, last = 0, 0, None, False
        while not last:
            last = self.stop.wait(0.5)  # once more after the end: the last epochs may not have been read
            try:
                total, done, lines, starts = ray.get(self.board.read.remote(known, begun))
            except ray.exceptions.RayError:
                continue
            for epoch, workers in starts if begun else starts[1:]:
                self.progress.restarted(epoch, workers)
            known, begun = known + len(lines), begun + len(starts)
            if lines and seen is None:
                self.progress.start(total, done)
                seen = done
            if seen is not None and done > seen:
                self.progress.advance(done - seen)
                seen = done
            for line in lines:
                self.tracker(line)
                self.progress.epoch(line)
