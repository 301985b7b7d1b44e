"""One Ray Data pipeline of separate steps over the parts of a table: CPUs prepare what GPUs encode.

    names of parts -> chunks (tasks) -> prepared (tasks, one CPU each) -> encoded (actors, with their GPUs)
                   -> gathered, part by part (one actor) -> written (tasks)

A row is a chunk of a part. Ray Data runs all steps at the same time and holds those back whose results wait for the next, so as
many CPUs prepare as the encoders keep up with, on any node. A part is written as a whole, and its counts are its done marker, so
a pass that was killed repeats the parts that were not finished.
"""

from __future__ import annotations

import pickle
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from qbert_ray.execution.determinism import set_threads
from qbert_ray.execution.device import use_device
from qbert_ray.execution.executor import StreamedWorker
from qbert_ray.execution.ray_capacity import assigned_device
from qbert_ray.execution.ray_metrics import count_items
from qbert_ray.execution.ray_session import ANYWHERE
from qbert_ray.storage.directory import RunDir

PART, NUMBER, TOTAL, ERROR, CONTENT, ARRAY = "part", "number", "total", "error", "content", "array"
READING = 2  # parts that are read at the same time, per encoder: enough to keep it busy, and few are open

Make = Callable[..., StreamedWorker]


def stream_parts(
    run: RunDir, worker: Make, arguments: dict[str, Any], missing: list[str], output: str, resources: dict[str, Any]
) -> Iterator[str]:
    """Run the steps of a worker over some parts; yields the name of each part that is done.

    Args:
        resources: of the encoders, as `ray_capacity.pool` gives them.

    Raises:
        ValueError: the worker cannot be made, for a reason that the user can mend.
    """
    size, most = resources["min_size"], resources["max_size"]
    place = {"label_selector": resources["label_selector"]}
    encoder = {name: value for name, value in resources.items() if name not in ("min_size", "max_size")}
    encoder["num_cpus"] = min(1.0, encoder["num_cpus"])  # the others prepare
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # bytes: each chunk is a block of its own
    call = uuid.uuid4().hex
    with DataContext.current(context):
        preparer = _preparer.options(**place).remote(worker, arguments)
        stream = (
            ray.data.from_items([{PART: name} for name in missing], override_num_blocks=len(missing))
            .map_batches(
                cast(Any, _read), batch_size=None, batch_format="pyarrow", fn_args=(worker, arguments), num_cpus=0,
                compute=TaskPoolStrategy(size=READING * size), **place,
            )
            .map_batches(cast(Any, _prepare), batch_size=None, batch_format="pyarrow", fn_args=(call, [preparer]), num_cpus=1, **place)
            .map_batches(
                type(worker.__name__, (_Encoder,), {}),  # named so in the dashboard
                batch_size=1, batch_format="pyarrow",  # Ray refuses a GPU without a batch size
                fn_constructor_args=(worker, arguments), compute=ActorPoolStrategy(min_size=size, max_size=most), **encoder,
            )
            .map_batches(_Gather, batch_size=None, batch_format="pyarrow", compute=ActorPoolStrategy(size=1), num_cpus=0, **place)
            .map_batches(
                cast(Any, _write), batch_size=None, batch_format="pyarrow", fn_args=(worker, arguments, run, output), num_cpus=0, **place
            )
        )  # fmt: skip
    stream.set_name(output.replace("/", " "))
    for batch in stream.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
        for error in filter(None, cast(pa.Table, batch)[ERROR].to_pylist()):
            raise ValueError(error)
        yield from cast(pa.Table, batch)[PART].to_pylist()


def pack(part: str, number: int, total: int, content: Any, error: str = "") -> pa.Table:
    """A row with an object in it. Each array of the object is a column, so that neither this nor `unpack` copies it."""
    arrays: list[pickle.PickleBuffer] = []
    columns = {PART: part, NUMBER: number, TOTAL: total, ERROR: error, CONTENT: pickle.dumps(content, 5, buffer_callback=arrays.append)}
    table = pa.table({name: [value] for name, value in columns.items()})
    for place, array in enumerate(arrays):
        content = pa.py_buffer(array.raw())
        offsets = pa.array([0, content.size], pa.int64()).buffers()[1]
        table = table.append_column(f"{ARRAY}{place}", pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content]))
    return table


def unpack(table: pa.Table) -> tuple[str, int, int, Any]:
    """Part, number, total and content of a row; arrays in the content are views of its memory and cannot be written to."""
    part, number, total, content = (table[name][0].as_py() for name in (PART, NUMBER, TOTAL, CONTENT))
    columns = [table[name].chunk(0) for name in table.column_names if name.startswith(ARRAY)]
    arrays = []
    for column in columns:
        _, offsets, data = column.buffers()
        start, end = np.frombuffer(offsets, np.int64)[column.offset : column.offset + 2]
        arrays.append(data.slice(start, end - start) if data is not None else b"")
    return part, number, total, pickle.loads(content, buffers=arrays)  # noqa: S301 - our own


def _made(worker: Make, arguments: dict[str, Any], **more: Any) -> StreamedWorker:
    return worker(**{name: ray.get(value) if isinstance(value, ray.ObjectRef) else value for name, value in arguments.items()}, **more)


@ray.remote(num_cpus=1, scheduling_strategy=cast(Any, ANYWHERE))
def _preparer(worker: Make, arguments: dict[str, Any]) -> Any:
    """A preparer, made once for all tasks since it needs the model; or what the user can mend, as a text."""
    use_device("cpu")
    try:
        return _made(worker, arguments).preparer()
    except ValueError as error:
        return str(error)


def _read(batch: pa.Table, worker: Make, arguments: dict[str, Any]) -> Iterator[pa.Table]:
    made = _made(worker, arguments, load=False)
    for part in batch[PART].to_pylist():
        chunks = made.chunks(part)
        for number, chunk in enumerate(chunks):
            yield pack(part, number, len(chunks), chunk)


_latest: tuple[str, Any] | None = None  # of this process: the pass, and its preparer


def _prepare(batch: pa.Table, call: str, preparer: list[ray.ObjectRef]) -> pa.Table:
    global _latest
    if _latest is None or _latest[0] != call:
        set_threads(1)
        _latest = call, ray.get(preparer[0])
    if isinstance(_latest[1], str):
        return pack(batch[PART][0].as_py(), 0, 1, None, _latest[1])
    part, number, total, chunk = unpack(batch)
    return pack(part, number, total, _latest[1](chunk))


class _Encoder:
    def __init__(self, worker: Make, arguments: dict[str, Any]) -> None:
        set_threads(1)
        use_device(assigned_device())
        self.error = ""
        try:
            self.worker = _made(worker, arguments)
        except ValueError as error:  # returned as data, since Ray would hide it in a dead actor's traceback
            self.error = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        error = batch[ERROR][0].as_py() or self.error
        if error:
            return pack(batch[PART][0].as_py(), 0, 1, None, error)
        part, number, total, prepared = unpack(batch)
        return pack(part, number, total, self.worker.encode(prepared))


class _Gather:
    """Holds the chunks of unfinished parts. If it dies, the parts that it held are repeated by `map_parts`."""

    def __init__(self) -> None:
        self.open: dict[str, dict[int, pa.Table]] = defaultdict(dict)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if batch[ERROR][0].as_py():
            return batch
        part, number, total = (batch[name][0].as_py() for name in (PART, NUMBER, TOTAL))
        self.open[part][number] = batch
        if len(self.open[part]) < total:
            return batch.slice(0, 0)
        chunks = self.open.pop(part)
        return pack(part, 0, 1, [unpack(chunks[number])[3] for number in range(total)])


def _write(batch: pa.Table, worker: Make, arguments: dict[str, Any], run: RunDir, output: str) -> pa.Table:
    if len(batch) and not batch[ERROR][0].as_py():
        part, _, _, encoded = unpack(batch)
        counts = _made(worker, arguments, load=False).write(part, encoded)
        run.write_json(f"{output}/.counts/{part}.json", counts)
        count_items(run, output, part, int(counts.get("items", 0)))
    return batch.select([PART, ERROR])
