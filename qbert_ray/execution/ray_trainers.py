"""Ray Train's trainers with as few processes as a training needs, and recovery from failures that they do not handle."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError
from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from qbert_ray.execution.ray_session import started_locally


def fit_with_retries(trainer: DataParallelTrainer, max_failures: int) -> None:
    """Run a training; resume from the last checkpoint after failures that Ray Train does not handle, such as a dead controller."""
    failures = 0
    while True:
        try:
            trainer.fit()
            return
        except (RayActorError, ControllerError) as error:
            died = isinstance(error, RayActorError)
            if isinstance(error, ControllerError) and not isinstance(error.controller_failure, RayActorError):
                raise
            failures += 1
            # On a Ray of our own the resources of a dead controller's workers are never freed: the next one would wait forever.
            if (died and started_locally()) or failures > max_failures >= 0:
                raise


class SingleWorker(DataParallelTrainer):
    """Trainer of one worker, which needs no process group: its controller starts without torch."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Keep Ctrl-C as it is: Train's handler stays installed after the training and then swallows the signal that should end the run."""

    def _create_default_callbacks(self) -> list[Any]:
        """Train's callbacks, less those that start a process (three seconds of CPU each) for features that are unused here."""
        needless = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if started_locally() else set())
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in needless]


class WorkerGroup(SingleWorker, TorchTrainer):
    """Trainer of several workers, in torch's process group."""
