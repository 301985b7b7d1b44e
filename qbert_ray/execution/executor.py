"""The `Executor` protocol, which stages use to run their work in this process or on a Ray cluster.

A stage names functions and arguments; an executor decides on which machine they run. `local` runs them in this process, one
after another; `ray` sends them to a cluster. Both write equal tables.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from qbert_ray.config.schema import Actors, Config, Workers
from qbert_ray.execution.determinism import environment
from qbert_ray.execution.progress import Progress
from qbert_ray.storage.directory import Counts, RunDir

if TYPE_CHECKING:  # it imports torch, which reading files does not need
    from qbert_ray.training import M, Task

Handle = Any  # refers to a value that an executor holds; passed to `submit`, it is replaced by the value


class Rows(Protocol):
    """Tables that an executor holds, in the order in which they were read."""

    def count(self) -> int: ...

    def size_bytes(self) -> int: ...

    def blocks(self) -> list[Handle]:
        """A handle of each table."""
        ...


class StreamedWorker(ABC):
    """A worker of `map_parts` whose steps may also run in different processes, so that CPUs prepare what a GPU encodes.

    Its constructor takes `load=False`, which leaves out what only `preparer` and `encode` need. `worker(part)` does every step.
    """

    @abstractmethod
    def chunks(self, part: str) -> list[Any]:
        """A part in pieces; at least one."""

    @abstractmethod
    def preparer(self) -> Callable[[Any], Any]:
        """A function of a chunk that gives what `encode` takes; it is pickled and sent to other processes."""

    @abstractmethod
    def encode(self, prepared: Any) -> Any:
        """The result of a chunk."""

    @abstractmethod
    def write(self, part: str, encoded: list[Any]) -> dict[str, int]:
        """Write the outputs of a part from its results, in the order of its chunks; returns counts."""


class Executor(Protocol):
    """Runs the work of the stages."""

    name: str

    def submit(self, function: Callable[..., Any], *arguments: Any, num_returns: int = 1, workers: Workers | None = None) -> Any:
        """Start `function(*arguments)`; returns a handle of its result, or a list of `num_returns` handles.

        Args:
            workers: resources of one training worker for it, its threads included; None: one CPU.
        """
        ...

    def get(self, handle: Handle) -> Any:
        """The value of a handle; waits for it and raises the function's own error."""
        ...

    def put(self, value: Any) -> Handle:
        """A handle of a value that many functions read."""
        ...

    def as_completed(self, handles: Sequence[Handle]) -> Iterator[Any]:
        """Values of handles in the order in which they become ready."""
        ...

    def read(self, reader: Callable[[int], Iterator[pa.Table]], count: int) -> Rows:
        """The tables that `reader` yields for the numbers 0 to `count` - 1, in that order."""
        ...

    def map_parts(
        self, run: RunDir, worker: type, arguments: dict[str, Any], parts: list[str], output: str, actors: Actors, progress: Progress
    ) -> Counter[str]:
        """Call `worker(**arguments)(part)` once for each part that `output` lacks; returns the counts summed over all parts.

        Args:
            worker: class whose instances take a part's name, write its outputs and return counts (name -> number). The part of
                that name in `output` must be written last. Counts are kept next to the parts, so that those of earlier tries
                are summed too. The steps of a `StreamedWorker` may run in different processes.
            arguments: of the worker; those that are handles become their values, handles inside lists and mappings do not.
            parts: names of the input parts.
            output: table that holds a part of the same name once it is done.
            actors: size of the actor pool.
        """
        ...

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
        """Train `make_task(config, run, **arguments)`; returns the last epoch's metrics.

        Args:
            folder: of the run; `<folder>/model` and `<folder>/metrics.jsonl` are written.
        """
        ...

    def check(self, config: Config, run: RunDir, names: Iterable[str]) -> None:
        """Raise if keys of `compute` ask for more resources than there are, or a machine cannot see a path of the run.

        Raises:
            CapacityError: what is asked for and what there is.
        """
        ...

    def num_machines(self) -> int:
        """Number of machines that it runs on; with one, every process sees a local path."""
        ...

    def measure(self, run: RunDir, stage: str, counts: Counts, domains: Collection[str]) -> None:
        """Publish the figures of a finished stage to the cluster's monitoring; those below the name of a domain are labelled with it."""
        ...


@contextmanager
def open_executor(config: Config) -> Iterator[Executor]:
    """The executor that `compute.executor` names, ready for work until the context ends."""
    with environment(config.run.deterministic):  # before torch is loaded, and before processes start
        if config.compute.executor == "local":
            from qbert_ray.execution.local import local_executor

            with local_executor(config.compute) as executor:
                yield executor
            return
        from qbert_ray.execution import ray_session  # noqa: F401, sets the environment that Ray reads when it is imported
        from qbert_ray.execution.ray_executor import ray_executor

        with ray_executor(config.compute.address) as executor:
            yield executor
