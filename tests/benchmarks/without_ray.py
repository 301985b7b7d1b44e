"""Every stage of a run in one process: what Ray would send somewhere is called where it stands.

Tasks are called directly, a table's parts one after the other, and trainings are the bare `Loop`. The stages themselves, their
tables and manifests are the same code; so is the answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
from ray.remote_function import RemoteFunction

from qbert_ray.artifacts import RunDir
from qbert_ray.config import Config
from qbert_ray.pipelines import cold, encoding, evaluation, features, ingest, memorization, scoring, stages, tokenization, training
from qbert_ray.pipelines.session import Quiet

THREADS = 2


def map_parts(
    run: RunDir, worker: Callable[..., Any], arguments: dict[str, Any], parts: list[str], output: str, actors: Any, progress: Any
) -> Counter[str]:
    total: Counter[str] = Counter()
    ready = worker(**arguments)
    for name in parts:
        total.update(ready(name))
    return total


def fit(
    make_task: Callable[..., Any], arguments: dict[str, Any], workers: Any, run: RunDir, folder: str, progress: Any, seconds: float = 0
) -> dict[str, Any]:
    loop = training.Loop(make_task(**arguments), torch.device("cpu"))
    while not loop.finished:
        loop.run_epoch()
    training.publish(loop, run, folder)
    return training._last_metrics(run, folder)


class Rows:
    """What `ingest` asks of a dataset."""

    def __init__(self, tables: list[pa.Table]) -> None:
        self.tables = tables

    def count(self) -> int:
        return sum(len(table) for table in self.tables)

    def size_bytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def to_arrow_refs(self) -> list[pa.Table]:
        return self.tables


def read(source: Any, reader: Callable[..., Iterator[pa.Table]], **arguments: Any) -> Rows:
    fragments = source.fragments()
    return Rows(list(reader({"fragment": np.arange(len(fragments))}, source, fragments, **arguments)))


def call(function: RemoteFunction, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
    return function._function(*args, **(kwargs or {}))


@contextmanager
def inline() -> Iterator[None]:
    """While it lasts, stages use no Ray."""
    with ExitStack() as stack:
        for module in (cold, evaluation, features, memorization, scoring, tokenization):
            stack.enter_context(patch.object(module, "map_parts", map_parts))
        for module in (cold, encoding, evaluation, memorization, scoring, tokenization):
            stack.enter_context(patch.object(module, "own_device", lambda: "cpu"))
        for module in (memorization, training):
            stack.enter_context(patch.object(module, "nodes", lambda: [{"CPU": float(THREADS)}]))
        stack.enter_context(patch.object(stages, "fit", fit))
        stack.enter_context(patch.object(stages, "tracking", SimpleNamespace(measure=lambda stage, counts: None)))
        stack.enter_context(patch.object(stages, "capacity", SimpleNamespace(check=lambda config, names: None)))
        stack.enter_context(patch.object(ingest, "_read", read))
        stack.enter_context(patch.object(RemoteFunction, "_remote", call))
        stack.enter_context(patch("ray.get", lambda value: value))
        stack.enter_context(patch("ray.put", lambda value: value))
        stack.enter_context(patch("ray.wait", lambda values: (values[:1], values[1:])))
        yield


def run_stages(config: Config, threads: int = THREADS) -> dict[str, float]:
    """Seconds of CPU of each stage, torch's threads together; outputs are in the run directory."""
    torch.set_num_threads(threads)
    run, seconds = RunDir(config.run.dir), {}
    with inline():
        for stage in stages.STAGES:
            started = time.process_time()
            if stages.run_stage(stage, config, run, Quiet()) is not None:
                seconds[stage.name] = time.process_time() - started
    return seconds
