"""The executor that runs the stages' work on a Ray cluster, connected to or started on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset

from qbert_ray.config.schema import Actors, Config, Workers
from qbert_ray.execution import ray_capacity, ray_data, ray_metrics, ray_train
from qbert_ray.execution.determinism import set_threads
from qbert_ray.execution.device import use_device
from qbert_ray.execution.progress import Progress
from qbert_ray.execution.ray_session import ANYWHERE, session
from qbert_ray.storage.directory import Counts, RunDir
from qbert_ray.training import M, Task

ERROR = "<error>"  # column of a table that is returned in place of another and says why that one could not be read


@contextmanager
def ray_executor(address: str | None = None) -> Iterator[RayExecutor]:
    """A `RayExecutor` for the duration of a Ray session."""
    with session(address):
        yield RayExecutor()


class RayRows:
    """A `Rows` of the blocks of a materialized Ray dataset."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def count(self) -> int:
        return self.dataset.count()

    def size_bytes(self) -> int:
        return self.dataset.size_bytes()

    def blocks(self) -> list[ray.ObjectRef]:
        return self.dataset.to_arrow_refs()


class RayExecutor:
    """Runs tasks with Ray Core, passes over a table with Ray Data, and trainings with Ray Train; it has no state."""

    name = "ray"

    def submit(self, function: Callable[..., Any], *arguments: Any, num_returns: int = 1, workers: Workers | None = None) -> Any:
        options: dict[str, Any] = {"num_returns": num_returns, "name": getattr(function, "__name__", type(function).__name__)}
        threads = 0
        if workers is not None:
            bundle = ray_capacity.worker_bundle(workers, ray_capacity.nodes())
            options |= {"num_cpus": bundle["CPU"], "num_gpus": bundle["GPU"]}
            options |= {"label_selector": workers.label_selector} if workers.label_selector else {}
            threads = max(1, int(bundle["CPU"]))
        return _call.options(**options).remote(threads, function, *arguments)

    def get(self, handle: Any) -> Any:
        try:
            return ray.get(handle)
        except ray.exceptions.RayTaskError as error:  # an error that the user can fix is raised as itself, without Ray's traceback
            raise error.cause if isinstance(error.cause, ValueError) else error from None

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def as_completed(self, handles: Sequence[Any]) -> Iterator[Any]:
        running = list(handles)
        while running:
            finished, running = ray.wait(running)
            yield self.get(finished[0])

    def read(self, reader: Callable[[int], Iterator[pa.Table]], count: int) -> RayRows:
        numbers = ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=max(1, count))
        dataset = numbers.map_batches(cast(Any, _read), batch_size=None, fn_kwargs={"reader": reader}).materialize()
        schema = dataset.schema()
        if schema is not None and ERROR in schema.names:
            blocks = (ray.get(block) for block in dataset.to_arrow_refs())
            found = (text for block in blocks if ERROR in block.column_names for text in block[ERROR].drop_null().to_pylist())
            raise ValueError(next(found))
        return RayRows(dataset)

    def map_parts(
        self, run: RunDir, worker: type, arguments: dict[str, Any], parts: list[str], output: str, actors: Actors, progress: Progress
    ) -> Counter[str]:
        return ray_data.map_parts(run, worker, arguments, parts, output, actors, progress)

    def fit(
        self,
        make_task: Callable[..., Task[M]],
        config: Config,
        run: RunDir,
        folder: str,
        workers: Workers,
        progress: Progress,
        **arguments: Any,
    ) -> M:
        return ray_train.fit(make_task, config, run, folder, workers, progress, **arguments)

    def check(self, config: Config, run: RunDir, names: Iterable[str]) -> None:
        ray_capacity.check(config, names)
        ray_capacity.check_reachable(config, run)

    def num_machines(self) -> int:
        return sum(node["Alive"] for node in ray.nodes())

    def measure(self, run: RunDir, stage: str, counts: Counts, domains: Collection[str]) -> None:
        ray_metrics.measure(run, stage, counts, domains)


@ray.remote(scheduling_strategy=cast(Any, ANYWHERE))
def _call(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    use_device(ray_capacity.assigned_device())
    if threads:
        set_threads(threads)
    return function(*arguments)


def _read(batch: dict[str, np.ndarray], reader: Callable[[int], Iterator[pa.Table]]) -> Iterator[pa.Table]:
    for number in batch["number"]:
        try:
            yield from reader(int(number))
        except ValueError as error:  # the user can fix it: returned as data, since Ray would print its traceback next to our message
            yield pa.table({ERROR: [str(error)]})
