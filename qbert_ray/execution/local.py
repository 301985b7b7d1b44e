"""The executor that runs every stage in this process, one step after another, without Ray.

For a debugger, a notebook, a test, a catalog of some thousand items.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from qbert_ray.config.schema import Actors, Compute, Config, Workers
from qbert_ray.execution import tracking
from qbert_ray.execution.determinism import set_threads
from qbert_ray.execution.device import own_device, use_device
from qbert_ray.execution.progress import Progress
from qbert_ray.storage.directory import Counts, RunDir
from qbert_ray.training import STATE, Loop, M, Task, last_metrics, publish, trained


@contextmanager
def local_executor(compute: Compute) -> Iterator[LocalExecutor]:
    """A `LocalExecutor`; torch's threads and device are set as `compute` says and restored afterwards."""
    import torch

    threads, device, strict = torch.get_num_threads(), own_device(), torch.are_deterministic_algorithms_enabled()
    set_threads(compute.threads or threads)
    use_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        yield LocalExecutor()
    finally:
        torch.set_num_threads(threads)
        if strict != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(strict)
        use_device(device)


class LocalRows:
    """A `Rows` that keeps its tables in memory."""

    def __init__(self, tables: list[pa.Table]) -> None:
        self.tables = tables

    def count(self) -> int:
        return sum(table.num_rows for table in self.tables)

    def size_bytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def blocks(self) -> list[pa.Table]:
        return self.tables


class LocalExecutor:
    """Calls functions directly in this process; a handle is the value itself."""

    name = "local"

    def submit(self, function: Callable[..., Any], *arguments: Any, num_returns: int = 1, workers: Workers | None = None) -> Any:
        return function(*arguments)

    def get(self, handle: Any) -> Any:
        return handle

    def put(self, value: Any) -> Any:
        return value

    def as_completed(self, handles: Sequence[Any]) -> Iterator[Any]:
        yield from handles

    def read(self, reader: Callable[[int], Iterator[pa.Table]], count: int) -> LocalRows:
        return LocalRows([table for number in range(count) for table in reader(number)])

    def map_parts(
        self, run: RunDir, worker: type, arguments: dict[str, Any], parts: list[str], output: str, actors: Actors, progress: Progress
    ) -> Counter[str]:
        done, there = set(run.names(f"{output}/.counts")), set(run.names(output))
        missing = [name for name in parts if f"{name}.json" not in done or name not in there]
        progress.start(len(parts), len(parts) - len(missing))
        ready = worker(**arguments) if missing else None
        for name in missing:
            assert ready is not None
            run.write_json(f"{output}/.counts/{name}.json", ready(name))
            progress.advance()
        total: Counter[str] = Counter()
        for name in parts:
            total.update(run.read_json(f"{output}/.counts/{name}.json"))
        return total

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
        import torch

        if trained(run, folder):
            return last_metrics(run, folder)
        loop = Loop(make_task(config, run, **arguments), torch.device(own_device()))
        _restore(loop, run, folder)
        epochs, saved = loop.task.settings.epochs, time.monotonic()
        progress.start(epochs, loop.epoch)
        with tracking.trackers(config, run, folder, progress) as track:
            while not loop.finished:
                loop.run_epoch()
                progress.advance()
                progress.epoch(loop.log[-1])
                track(loop.log[-1]["epoch"], tracking.numbers(loop.log[-1]))
                if not loop.finished and time.monotonic() - saved > config.compute.checkpoint_seconds:
                    _save(loop, run, folder)
                    saved = time.monotonic()
        publish(loop, run, folder)
        run.delete(f"{folder}/checkpoints")
        return last_metrics(run, folder)

    def check(self, config: Config, run: RunDir, names: Iterable[str]) -> None:
        pass  # requests for cluster resources do not apply to one process

    def num_machines(self) -> int:
        return 1

    def measure(self, run: RunDir, stage: str, counts: Counts, domains: Collection[str]) -> None:
        pass


def _save(loop: Loop, run: RunDir, folder: str) -> None:
    """Write a checkpoint; the JSON is written last."""
    with tempfile.TemporaryDirectory() as directory:
        loop.save(Path(directory))
        for name in STATE:
            run.write_bytes(f"{folder}/checkpoints/{loop.epoch:06d}/{name}", (Path(directory) / name).read_bytes())
    for earlier in run.folders(f"{folder}/checkpoints")[:-1]:
        run.delete(f"{folder}/checkpoints/{earlier}")


def _restore(loop: Loop, run: RunDir, folder: str) -> None:
    """Continue from the last whole checkpoint, if there is one."""
    whole = [name for name in run.folders(f"{folder}/checkpoints") if run.exists(f"{folder}/checkpoints/{name}/{STATE[-1]}")]
    if whole:
        with tempfile.TemporaryDirectory() as directory:
            for name in STATE:
                (Path(directory) / name).write_bytes(run.read_bytes(f"{folder}/checkpoints/{whole[-1]}/{name}"))
            loop.restore(Path(directory))
