"""Trackers of a training: TensorBoard and MLflow.

Both are written by the driver, from what rank 0 reports at the end of each epoch; neither is ever read back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from pyarrow import fs

from qbert_ray.config.loading import flatten
from qbert_ray.config.schema import Config
from qbert_ray.execution.progress import Progress
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import training_section

EXPERIMENT = "qbert-ray"


class Tracker(Protocol):
    """Takes the metrics of one epoch."""

    def __call__(self, epoch: int, metrics: dict[str, float]) -> None: ...


@contextmanager
def trackers(config: Config, run: RunDir, folder: str, progress: Progress, further: dict[str, Tracker] | None = None) -> Iterator[Tracker]:
    """One tracker that combines those of the config and `further` ones, for the duration of a training.

    One that fails is reported and left out; the training continues.
    """
    with ExitStack() as stack:
        found = dict(further or {})
        if config.run.tensorboard:
            found["TensorBoard"] = stack.enter_context(_tensorboard(run, f"{folder}/tensorboard"))
        if config.run.mlflow:
            found["MLflow"] = stack.enter_context(_mlflow(config, config.run.mlflow, folder))

        def every(epoch: int, metrics: dict[str, float]) -> None:
            for name, tracker in list(found.items()):
                try:
                    tracker(epoch, metrics)
                except Exception as error:  # any error of a full disk or an unreachable server
                    del found[name]
                    progress.note(f"{name} gets no more figures of this training: {error}")

        yield every


def numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """Nested metrics flattened to dotted name -> number; elements of a list are named by their position."""
    leaves: dict[str, float] = {}
    for name, value in flatten(metrics).items():
        values = {f"{name}.{place}": inner for place, inner in enumerate(value)} if isinstance(value, list) else {name: value}
        leaves |= {key: float(inner) for key, inner in values.items() if isinstance(inner, int | float) and not isinstance(inner, bool)}
    return leaves


@contextmanager
def _tensorboard(run: RunDir, folder: str) -> Iterator[Tracker]:
    """A tracker that writes a TensorBoard event file: continuously on a local path, at the end of the training on an object store."""
    # Comes with Ray Train. Not its SummaryWriter: that writes in a thread, and waits forever for one that a full disk has ended.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    local = isinstance(run.filesystem, fs.LocalFileSystem)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(run.path(folder) if local else scratch)
        place.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(place / "events"))

        def track(epoch: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                writer.write_event(Event(wall_time=time.time(), step=epoch, summary=scalar(name, value)))
            writer.flush()

        try:
            yield track
        finally:
            with suppress(OSError):  # `track` has raised it
                writer.close()
            for file in [] if local else place.iterdir():
                run.write_bytes(f"{folder}/{file.name}", file.read_bytes())


@contextmanager
def _mlflow(config: Config, uri: str, folder: str) -> Iterator[Tracker]:
    try:
        import mlflow
    except ImportError:
        raise ValueError(f"run.mlflow is {uri}, and MLflow is not installed; pip install mlflow-skinny, or leave run.mlflow out") from None
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    section = training_section(folder)
    with mlflow.start_run(run_name=f"{config.run.dir} {folder}"):
        settings = {"run.seed": config.run.seed} | flatten({section: getattr(config, section).model_dump(mode="json")})
        mlflow.log_params({name: str(value)[:250] for name, value in settings.items()})

        def track(epoch: int, metrics: dict[str, float]) -> None:
            mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in metrics.items()}, step=epoch)  # its names hold no @

        yield track
