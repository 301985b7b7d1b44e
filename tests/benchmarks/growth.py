"""How the time of every stage grows with twice the users (and so twice the interactions), and with twice the items.

    python -m tests.benchmarks.growth            # 500 items, 1,000 users and twice as many of each
    python -m tests.benchmarks.growth --full     # 4,000 items, 8,000 users

Generated shops, the demo's config without images. The stages run in one process without Ray (`without_ray`), each shop in a
process of its own with one thread, so there is next to nothing in a time that does not grow: what is told is seconds of CPU. And whether memory stays
where the catalog streams through: peak of the process that assigns codes after some parts and after all.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qbert_ray.inputs.demo_shop import generate
from tests import ROOT
from tests.benchmarks.table import Figure, main

MOST = 2.2
SETTINGS = [
    "features.modalities=[text, structure]", "fusion.epochs=4", "pretrain.epochs=1", "finetune.epochs=2", "data.min_interactions=1",
]  # fmt: skip
PARTS, EARLY = 32, 8  # of the catalog that streams


def stages_of(items: int, users: int) -> dict[str, float]:
    """Seconds of CPU of each stage on a shop of that size."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "shop", num_items=items, num_users=users)
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.growth",
            "--stages",
            f"data.root={folder}/shop",
            f"run.dir={folder}/run",
            *SETTINGS,
        ]
        environment = os.environ | {
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "POLARS_MAX_THREADS": "1",
        }
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def streaming() -> dict[str, float]:
    """Peak MiB of this process after `EARLY` parts of the catalog and after all `PARTS`."""
    from qbert_ray.semantic_ids.stage import EncodePart
    from qbert_ray.storage.directory import RunDir
    from tests.benchmarks.assignment import ROWS, save_quantizer, write_catalog

    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(folder)
        write_catalog(run, PARTS * ROWS, 256)
        save_quantizer(run, "kmeans", 256)
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        worker, peaks = EncodePart(run), []
        for name in run.parts("fusion/embeddings"):
            worker(name)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"start": start, "early": peaks[EARLY - 1], "all": peaks[-1]}


def figures(full: bool) -> Iterator[Figure]:
    items, users = (4000, 8000) if full else (500, 1000)
    base = stages_of(items, users)
    for what, size in (("users and interactions", (items, 2 * users)), ("items", (2 * items, users))):
        double = stages_of(*size)
        for stage, seconds in base.items():
            if max(seconds, double[stage]) < 0.5:
                continue  # too short to say anything
            ratio = double[stage] / max(seconds, 1e-3)
            yield Figure(f"{stage}, twice the {what}: {size[0]:,} items, {size[1]:,} users", f"{double[stage]:.2f} s",
                         f"{items:,} items, {users:,} users: {seconds:.2f} s", ratio, f"<= {MOST} x time", ratio <= MOST)  # fmt: skip
    command = [sys.executable, "-m", "tests.benchmarks.growth", "--streaming"]
    peak = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    yield Figure(f"peak memory of code assignment, {PARTS} parts of 8,192 items", f"{peak['all']:.0f} MiB", f"{EARLY} parts: {peak['early']:.0f} MiB",
                 peak["all"] / peak["early"], "<= 1.05 x", peak["all"] <= 1.05 * peak["early"])  # fmt: skip


def run_stages(given: list[str]) -> None:
    from qbert_ray.config.loading import load_config
    from tests.benchmarks.without_ray import run_stages

    print(json.dumps(run_stages(load_config([ROOT / "configs" / "demo.yaml"], given), threads=1)))


if __name__ == "__main__":
    if "--stages" in sys.argv:
        run_stages(sys.argv[sys.argv.index("--stages") + 1 :])
    elif "--streaming" in sys.argv:
        print(json.dumps(streaming()))
    else:
        main(figures)
