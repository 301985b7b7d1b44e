"""Ray Train's trainers with as few processes as a training needs, and what they do not survive by themselves."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError
from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from qbert_ray.execution.ray_session import alone


def survive(trainer: DataParallelTrainer, max_failures: int) -> None:
    """Train, and again from the last checkpoint after what Train itself gives up: its controller died, or lost an actor in a bad moment."""
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
            # Alone, nobody frees what the workers of a dead controller held: the next would wait for ever.
            if (died and alone()) or failures > max_failures >= 0:
                raise


class Single(DataParallelTrainer):
    """One worker, who needs no process group: its controller starts without torch."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C alone: Train's handler stays when the training is over, and then swallows what should end the run."""

    def _create_default_callbacks(self) -> list[Any]:
        """Without those that start a process, three seconds of CPU each, for what is not here: datasets, other runs' nodes."""
        needless = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if alone() else set())
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in needless]


class Together(Single, TorchTrainer):
    """Several workers, in torch's process group."""
