"""Throughput of code assignment: the Ray Data pass of semantic-ids against the bare loop over the same parts, on one core.

    python -m tests.benchmarks.assignment                                    # 500,000 items of width 256
    python -m tests.benchmarks.assignment --items 10000000 --folder /big     # 10 GB of embeddings; about 11 GB more for the codes

Made-up embeddings are written as a run's fusion/embeddings, in parts as large as ingest makes them. "bare" reads a part,
encodes it batch by batch and writes its codes, in one process without Ray; "encoding" is the share of it that is arithmetic.
The Ray pass is timed from its first finished part to its last, so without the start of Ray and of the actor.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from qbert_ray.config.schema import Actors, Quantizer
from qbert_ray.execution.ray_data import map_parts
from qbert_ray.execution.ray_session import session
from qbert_ray.semantic_ids import kmeans
from qbert_ray.semantic_ids.quantizers import load_quantizers
from qbert_ray.semantic_ids.rqvae import RQVAE
from qbert_ray.semantic_ids.stage import ENCODED, EncodePart
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir

ROWS = 8192  # of a part: what ingest writes for large catalogs


class Measured(EncodePart):
    """Counts also the growth of the process's peak memory (KiB), so that the sum over parts is the peak."""

    peak = 0

    def __call__(self, name: str) -> dict[str, int]:
        counts = super().__call__(name)
        before, self.peak = self.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return counts | {"peak": self.peak - before}


class Clock:
    """A `Progress` that keeps when each part was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self, total: int, done: int = 0) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        self.times += [time.monotonic()] * steps

    def note(self, text: str) -> None:
        pass


def write_catalog(run: RunDir, items: int, width: int) -> None:
    """Clustered embeddings, part by part."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, width)).astype(np.float32)
    for number, begin in enumerate(range(0, items, ROWS)):
        size = min(ROWS, items - begin)
        vectors = centres[rng.integers(0, len(centres), size)] + 0.5 * rng.standard_normal((size, width), dtype=np.float32)
        index = np.arange(begin, begin + size, dtype=np.int32)
        arrays = [pa.repeat("shop", size), pa.array(index.astype(str)), index, columns.to_fixed_lists(vectors), np.ones(size, np.int32)]
        run.write_part("fusion/embeddings", f"shop-{number:05d}.parquet", pa.table(arrays, schema=columns.embeddings_schema(width)))


def save_quantizer(run: RunDir, kind: str, width: int) -> None:
    """A model of the default sizes; one that was never trained takes as long to encode."""
    defaults = Quantizer()
    description = {"width": width, "hidden": defaults.hidden if kind == "rqvae" else []}
    model = RQVAE(**description)
    embeddings = columns.to_numpy(run.read_part("fusion/embeddings", "shop-00000.parquet")["embedding"]).copy()
    if kind == "rqvae":
        model.start(torch.from_numpy(embeddings))
    else:
        kmeans.fit_residual(model, torch.from_numpy(embeddings), 0)
    run.save_model("quantizer/model", model.state_dict(), description)


@torch.inference_mode()
def bare(run: RunDir, parts: list[str]) -> tuple[float, float]:
    """Seconds of the loop over parts without Ray, and of the arithmetic alone."""
    worker, model = EncodePart(run), load_quantizers(run)[0]
    worker(parts[0])
    started = time.monotonic()
    for name in parts:
        worker(name)
    whole = time.monotonic() - started
    embeddings = torch.from_numpy(columns.to_numpy(run.read_part("fusion/embeddings", parts[0])["embedding"]).copy())
    started = time.monotonic()
    for _ in range(20):
        for batch in embeddings.split(1024):
            model.quantizer(model.encode(batch))
    return whole, (time.monotonic() - started) / 20 * len(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--quantizer", choices=["kmeans", "rqvae"], default="kmeans")
    parser.add_argument("--folder", type=Path, help="where the made-up catalog goes; left there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder or Path(tempfile.mkdtemp())
    run = RunDir(str(folder / f"assignment-{arguments.items}-{arguments.width}"))
    if not run.parts("fusion/embeddings"):
        write_catalog(run, arguments.items, arguments.width)
    save_quantizer(run, arguments.quantizer, arguments.width)
    parts = run.parts("fusion/embeddings")
    whole, encoding = bare(run, parts)
    print(f"{arguments.items:,} items of width {arguments.width}, {arguments.quantizer}, one core")
    print(f"bare loop  {arguments.items / whole:>10,.0f} items/s, {encoding / whole:.0%} of it encoding", flush=True)
    run.delete(ENCODED)
    clock = Clock()
    with session():
        counts = map_parts(run, Measured, {"run": run}, parts, ENCODED, Actors(max_size=1), clock)
    rate = (len(parts) - 1) * ROWS / (clock.times[-1] - clock.times[0])
    print(
        f"Ray Data   {rate:>10,.0f} items/s, ratio {rate * whole / arguments.items:.2f}; peak of the actor {counts['peak'] / 1024:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
