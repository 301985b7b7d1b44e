"""One Ray Data pass over the parts of a table, restartable part by part.

Every embarrassingly parallel stage is this chain: names of missing parts -> actor pool -> one count per part. An actor reads
its part, computes, and publishes an output part of the same name, so a killed stage repeats only what is missing, blocks and
actors cannot change the output, and rows never pass through the driver.

A new actor costs six seconds of CPU for imports alone. Where each would do only a few parts, and there is no GPU, tasks do
them: those of later stages find processes that have imported everything.

With a GPU, a worker that has steps runs in a pipeline of them instead (`ray_streaming`).
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray

from qbert_ray.config.schema import Actors
from qbert_ray.execution.determinism import set_threads
from qbert_ray.execution.device import use_device
from qbert_ray.execution.executor import StreamedWorker
from qbert_ray.execution.progress import Progress
from qbert_ray.execution.ray_capacity import assigned_device, is_streamed, nodes, pool
from qbert_ray.execution.ray_metrics import count_items
from qbert_ray.execution.ray_streaming import stream_parts
from qbert_ray.storage.directory import RunDir

PART = "part"
ERROR = "error"
FEW = 16  # parts of each actor


def map_parts(
    run: RunDir,
    worker: type,
    arguments: dict[str, Any],
    parts: list[str],
    output: str,
    actors: Actors,
    progress: Progress,
) -> Counter[str]:
    """See `Executor.map_parts`."""
    missing = _missing(run, parts, output)
    progress.start(len(parts), len(parts) - len(missing))
    if missing:
        resources = pool(actors, len(missing))
        if issubclass(worker, StreamedWorker) and is_streamed(actors, resources["min_size"], nodes()):
            done = _repeated(run, missing, output, partial(stream_parts, run, worker, arguments, output=output, resources=resources))
        else:
            done = _in_one_step(run, worker, arguments, missing, output, resources)
        for _ in done:
            progress.advance()
    total: Counter[str] = Counter()
    for name in parts:
        total.update(run.read_json(f"{output}/.counts/{name}.json"))
    return total


def _missing(run: RunDir, parts: list[str], output: str) -> list[str]:
    done, there = set(run.names(f"{output}/.counts")), set(run.names(output))
    return [name for name in parts if f"{name}.json" not in done or name not in there]


def _repeated(run: RunDir, missing: list[str], output: str, stream: Callable[..., Iterator[str]]) -> Iterator[str]:
    """Stream parts until each is done: those that were open in a process that died are lost from a stream."""
    while missing:
        yield from stream(missing=missing)
        left = _missing(run, missing, output)
        if len(left) == len(missing):
            raise RuntimeError(f"{output}: {len(left)} parts were not written, such as {left[0]}")
        missing = left


def _in_one_step(
    run: RunDir, worker: type, arguments: dict[str, Any], missing: list[str], output: str, resources: dict[str, Any]
) -> Iterator[str]:
    """Call a worker on parts; yields their names."""
    size, most = resources.pop("min_size"), resources.pop("max_size")
    work: dict[str, Any]
    if not resources["num_gpus"] and len(missing) <= FEW * size:
        work = {"fn": _publish, "fn_args": (uuid.uuid4().hex, worker, arguments, run, output)}
        work["compute"] = ray.data.TaskPoolStrategy(size=most)
    else:
        named = type(worker.__name__, (_Publisher,), {})  # what the dashboard calls the actors
        work = {"fn": named, "fn_constructor_args": (worker, arguments, run, output)}
        work["compute"] = ray.data.ActorPoolStrategy(min_size=size, max_size=most)
    dataset = ray.data.from_items([{PART: name} for name in missing], override_num_blocks=len(missing))
    results = dataset.map_batches(batch_size=1, **work, **resources)  # Ray refuses a GPU without a batch size
    results.set_name(output.replace("/", " "))  # in the dashboard; Ray names a log file after it
    for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
        for error in filter(None, batch[ERROR]):
            raise ValueError(error)
        yield from batch[PART]


_latest: tuple[str, _Publisher] | None = None  # of this process: the pass it belongs to, and what it has loaded


def _publish(batch: dict[str, np.ndarray], call: str, *arguments: Any) -> dict[str, np.ndarray]:
    """Process one part in a task; a process that has done a part of this pass before reuses what it loaded."""
    global _latest
    if _latest is None or _latest[0] != call:
        _latest = None  # free what another pass has loaded first
        _latest = call, _Publisher(*arguments)
    return _latest[1](batch)


class _Publisher:
    """Runs the worker on a part, then records its counts: the part's done marker."""

    def __init__(self, worker: Callable[..., Any], arguments: dict[str, Any], run: RunDir, output: str) -> None:
        set_threads(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        use_device(assigned_device())
        arguments = {name: ray.get(value) if isinstance(value, ray.ObjectRef) else value for name, value in arguments.items()}
        self.run, self.output, self.error = run, output, ""
        try:
            self.worker = worker(**arguments)
        except ValueError as error:  # the user can fix it: returned as data, since Ray would hide it in a dead actor's traceback
            self.error = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name in [] if self.error else batch[PART]:
            counts = self.worker(str(name))
            self.run.write_json(f"{self.output}/.counts/{name}.json", counts)
            count_items(self.run, self.output, str(name), int(counts.get("items", counts.get("users", 0))))
        return {PART: batch[PART], ERROR: np.full(len(batch[PART]), self.error, dtype=object)}
