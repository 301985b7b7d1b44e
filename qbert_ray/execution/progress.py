"""The `Progress` protocol, through which a stage reports its progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # it imports torch
    from qbert_ray.training import EpochMetrics


class Progress(Protocol):
    """Receives how far a stage is: a bar on a terminal, lines in a job's log."""

    def start(self, total: int, done: int = 0) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def epoch(self, metrics: EpochMetrics) -> None:
        """Receives the metrics of an epoch that just ended."""
        ...

    def restarted(self, epoch: int, workers: int) -> None:
        """A training resumes after `epoch` epochs with so many workers, since one was lost or their number changed."""
        ...


class Quiet:
    """A `Progress` that shows nothing."""

    def start(self, total: int, done: int = 0) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def epoch(self, metrics: EpochMetrics) -> None:
        pass

    def restarted(self, epoch: int, workers: int) -> None:
        pass
