"""How much of the time an encoder of images works: its decoders in threads of its own process, and as a pipeline of separate steps.

    python -m tests.benchmarks.streaming            # 8 parts of 2,048 images; 320 posters
    python -m tests.benchmarks.streaming --full     # twice as many

Needs no GPU. Ray is told of one GPU and nine CPUs. The encoder sleeps as long as CLIP ViT-L/14 takes on an H100, about 2,000 images
per second, and a decoder as long as an image of about 600 x 600 pixels takes, or one of 1,000 x 1,000; everything else is real:
reading 20 kB per image, passing 150 kB of pixels, writing four vectors of 768 numbers. All sleeps are four times as long, since two
cores play nine. Threads that sleep do not compete for Python's lock, which flatters them. The share is the time that the encoder had
to sleep, over the time from its first batch to its last; processes have started before.

Then both ways encode posters with efficientnet-lite0 on this machine's CPUs, in turns, and must write equal vectors.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from qbert_ray.config.schema import Actors, Config
from qbert_ray.execution import ray_data
from qbert_ray.execution.device import use_device
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_session import ray
from qbert_ray.features.files import FileEncoder
from qbert_ray.features.modality import Source
from qbert_ray.features.stage import StreamPart
from qbert_ray.storage.columns import ITEMS, to_numpy
from qbert_ray.storage.directory import RunDir
from tests.benchmarks.encoding import images
from tests.benchmarks.table import Figure, main

PER_SECOND = 2_000  # images, of the encoder
SLOWER = 4  # than on nine cores
BATCH, SIDE, WIDTH = 256, 224, 768
CPUS = 9
CONFIG = Config.model_validate({"data": {"domains": {"shop": {"image_column": "image"}}}})


class Sleeping(FileEncoder):
    """Notes when each batch began."""

    unit = "images"
    width, per_piece = WIDTH, 4

    def __init__(self, milliseconds: float, notes: Path) -> None:
        self.settings, self.num_vectors = SimpleNamespace(batch_size=BATCH, max_bytes=10**7), 4
        self.milliseconds, self.notes = milliseconds, notes

    @staticmethod
    def vectors_of(features: Any, source: Source) -> int:
        return 4

    def decoder(self) -> Callable[[bytes], list[np.ndarray]]:
        return partial(decode_slowly, seconds=SLOWER * self.milliseconds / 1000)

    def encode_pieces(self, pieces: np.ndarray) -> np.ndarray:
        began, seconds = time.monotonic(), SLOWER * len(pieces) / PER_SECOND
        time.sleep(seconds)
        with self.notes.open("a") as file:
            print(json.dumps([began, seconds]), file=file)
        return np.zeros((len(pieces), 4, WIDTH), np.float32)


def decode_slowly(content: bytes, seconds: float) -> list[np.ndarray]:
    time.sleep(seconds)
    return [np.zeros((SIDE, SIDE, 3), np.uint8)]


class SleepingPart(StreamPart):
    def __init__(self, run: RunDir, milliseconds: float, notes: Path, load: bool = True) -> None:
        self.run, self.config, self.modality = run, CONFIG, "image"
        self.encoder = Sleeping(milliseconds, notes)


class PosterPart(StreamPart):
    """On a CPU, even if Ray was told of a GPU; notes when each part was written."""

    def __init__(self, run: RunDir, notes: Path, load: bool = True) -> None:
        use_device("cpu")
        self.notes = notes
        super().__init__(run, CONFIG, "image", 4, load)

    def publish(self, *arguments: Any) -> dict[str, int]:
        counts = super().publish(*arguments)
        with self.notes.open("a") as file:
            print(json.dumps([time.monotonic(), len(arguments[1])]), file=file)
        return counts


def write_items(run: RunDir, contents: Callable[[int], list[bytes]], parts: int, size: int) -> list[str]:
    names = []
    for number in range(parts):
        index = range(number * size, (number + 1) * size)
        columns = [["shop"] * size, list(map(str, index)), list(index), [None] * size, contents(number), [False] * size]
        names.append(f"shop-{number:05d}.parquet")
        table = pa.table([pa.array(column, field.type) for column, field in zip(columns, ITEMS, strict=True)], schema=pa.schema(ITEMS))
        run.write_part("ingest/items", names[-1], table)
    return names


def measure(run: RunDir, worker: type, arguments: dict[str, Any], parts: list[str], streamed: bool, actors: Actors) -> list[Any]:
    """What the worker noted."""
    run.delete("features/image")
    chosen, ray_data.is_streamed = ray_data.is_streamed, lambda *_: streamed
    try:
        with tempfile.TemporaryDirectory() as folder:
            notes = Path(folder) / "notes"
            ray_data.map_parts(run, worker, arguments | {"notes": notes}, parts, "features/image", actors, Quiet())
            return [json.loads(line) for line in notes.read_text().splitlines()]
    finally:
        ray_data.is_streamed = chosen


def busy(notes: list[Any]) -> tuple[float, float]:
    """Share of the time that the encoder worked, and images per second."""
    span = notes[-1][0] + notes[-1][1] - notes[0][0]
    worked = sum(seconds for _, seconds in notes)
    return worked / span, PER_SECOND * worked / span


def figures(full: bool) -> Iterator[Figure]:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    ray.init(
        address="local", num_cpus=CPUS, num_gpus=1, include_dashboard=False, log_to_driver="--debug" in sys.argv,
        object_store_memory=5 * 2**30,
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        run, rng = RunDir(f"{folder}/sleeping"), np.random.default_rng(0)
        parts = write_items(run, lambda _: [rng.bytes(20_000) for _ in range(2048)], 16 if full else 8, 2048)
        measure(run, SleepingPart, {"run": run, "milliseconds": 3.0}, parts[:2], True, Actors())  # starts the processes
        for milliseconds, what in ((3.0, "600 x 600"), (8.0, "1,000 x 1,000")):
            (before, slow), (after, fast) = (
                busy(measure(run, SleepingPart, {"run": run, "milliseconds": milliseconds}, parts, streamed, Actors()))
                for streamed in (False, True)
            )
            bar = 0.9 * min(1.0, 8 * 1000 / milliseconds / PER_SECOND)  # eight decoders alone may be slower than the encoder
            yield Figure(
                f"an encoder of {PER_SECOND:,} images/s (simulated), 8 CPUs that take {milliseconds:g} ms for an image of {what} (simulated)",
                f"separate steps: busy {after:.0%}, {fast:,.0f} images/s", f"threads: busy {before:.0%}, {slow:,.0f} images/s",
                after / before, f">= {bar:.0%} busy", after >= bar,
            )  # fmt: skip
        run, size = RunDir(f"{folder}/posters"), 20
        what, contents = images(size * 16)
        parts = write_items(run, lambda number: contents[number * size : (number + 1) * size], 32 if full else 16, size)
        rates: dict[bool, list[float]] = {False: [], True: []}
        written: list[np.ndarray] = []
        for streamed in (False, True, True, False):
            notes = measure(run, PosterPart, {"run": run}, parts, streamed, Actors(min_size=2, max_size=2, num_gpus=0.5))
            rates[streamed].append(sum(count for _, count in notes[1:]) / (notes[-1][0] - notes[0][0]))
            written.append(to_numpy(run.read("features/image")["vectors"]))
            assert np.allclose(written[0], written[-1], atol=1e-5)
        threads, apart = (float(np.mean(rates[streamed])) for streamed in (False, True))
        yield Figure(
            f"{len(parts) * size} {what}, efficientnet-lite0 in two actors on CPUs, {len(os.sched_getaffinity(0))} cores",
            f"separate steps: {apart:.1f} images/s", f"threads: {threads:.1f} images/s", apart / threads, "", None,
        )  # fmt: skip
    ray.shutdown()


if __name__ == "__main__":
    main(figures)
