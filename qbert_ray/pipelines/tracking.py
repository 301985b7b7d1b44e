"""Where the figures of a run go while it runs: TensorBoard, MLflow, and Ray's metrics for Prometheus and Grafana.

All are written by the driver, from what rank 0 tells it at the end of each epoch and what a stage counted; none is ever read back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs
from ray.util.metrics import Counter, Gauge

from qbert_ray.artifacts import RunDir
from qbert_ray.config import Config
from qbert_ray.overlays import flatten
from qbert_ray.pipelines.session import Progress

EXPERIMENT = "qbert-ray"


class Tracker(Protocol):
    """Takes the metrics of one epoch."""

    def __call__(self, epoch: int, metrics: dict[str, float]) -> None: ...


@contextmanager
def trackers(config: Config, run: RunDir, folder: str, progress: Progress) -> Iterator[Tracker]:
    """What the config names, as one tracker, for the length of a training; one that fails is told of and left out, the training goes on."""
    with ExitStack() as stack:
        found: dict[str, Tracker] = {"Ray's metrics": lambda epoch, metrics: measure(folder, metrics)}
        if config.run.tensorboard:
            found["TensorBoard"] = stack.enter_context(_tensorboard(run, f"{folder}/tensorboard"))
        if config.run.mlflow:
            found["MLflow"] = stack.enter_context(_mlflow(config, config.run.mlflow, folder))

        def every(epoch: int, metrics: dict[str, float]) -> None:
            for name, tracker in list(found.items()):
                try:
                    tracker(epoch, metrics)
                except Exception as error:  # whatever a full disk or a server that is gone makes of it
                    del found[name]
                    progress.note(f"{name} gets no more figures of this training: {error}")

        yield every


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers among nested metrics by dotted name; those of a list by their place."""
    leaves: dict[str, float] = {}
    for name, value in flatten(metrics).items():
        values = {f"{name}.{place}": inner for place, inner in enumerate(value)} if isinstance(value, list) else {name: value}
        leaves |= {key: float(inner) for key, inner in values.items() if isinstance(inner, int | float) and not isinstance(inner, bool)}
    return leaves


def measure(stage: str, metrics: dict[str, Any]) -> None:
    """Show the latest figures of a stage in Ray's metrics, as `ray_qbert_value{stage, name}`."""
    for name, value in numbers(metrics).items():
        _gauge().set(value, {"stage": stage, "name": name})


def count_items(table: str, items: int) -> None:
    """Count items that an actor has done, as `ray_qbert_items_total{table}`; its rate is items per second."""
    if items:
        _counter().inc(items, {"table": table})


@cache
def _gauge() -> Gauge:
    return Gauge(
        "qbert_value", "Latest figures of a run: loss, metrics, rows kept and rejected, codebook usage", tag_keys=("stage", "name")
    )


@cache
def _counter() -> Counter:
    return Counter("qbert_items", "Items done, by the table they are written to", tag_keys=("table",))


@contextmanager
def _tensorboard(run: RunDir, folder: str) -> Iterator[Tracker]:
    """An event file in the run directory: written as it grows on a local path, when the training ends on an object store."""
    # Comes with Ray Train. Not its SummaryWriter: that writes in a thread, and waits for ever for one that a full disk has ended.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    local = isinstance(run.filesystem, fs.LocalFileSystem)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(run.path(folder) if local else scratch)
        place.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(place / "events"))

        def tell(epoch: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                writer.write_event(Event(wall_time=time.time(), step=epoch, summary=scalar(name, value)))
            writer.flush()

        try:
            yield tell
        finally:
            with suppress(OSError):  # `tell` has raised it
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
    section = folder.partition("/")[0]
    with mlflow.start_run(run_name=f"{config.run.dir} {folder}"):
        settings = {"run.seed": config.run.seed} | flatten({section: getattr(config, section).model_dump(mode="json")})
        mlflow.log_params({name: str(value)[:250] for name, value in settings.items()})
        # MLflow's names hold no @
        yield lambda epoch, metrics: mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in metrics.items()}, step=epoch)
