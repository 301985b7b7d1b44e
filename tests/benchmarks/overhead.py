"""What Ray costs a whole run: `qbert-ray run` on a generated shop against the same stages in one process without Ray.

    python -m tests.benchmarks.overhead            # a shop of 240 items and 400 users, few epochs
    python -m tests.benchmarks.overhead --full     # `make demo`: 1,200 items, 3,000 users, configs/demo.yaml as it is

Both are processes of their own, timed from start to end, with two threads; both write the same tables (asserted of the embeddings and of the
users that are ranked) and the report. What is told per stage are the manifests' seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qbert_ray.inputs.demo_shop import generate
from qbert_ray.storage.stages import BY_NAME
from tests import ROOT
from tests.benchmarks.table import Figure, main

MOST_SECONDS = 90
QUICK = ["fusion.epochs=5", "pretrain.epochs=2", "finetune.epochs=3"]
STAGES = {name: name for name in BY_NAME}


def overrides(shop: Path, run: Path, full: bool) -> list[str]:
    return [f"data.root={shop}", f"run.dir={run}", *([] if full else QUICK)]


def measure(command: list[str], run: Path) -> tuple[float, dict[str, float]]:
    """Seconds of a process, and of each stage by its manifest."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    whole = time.monotonic() - started
    return whole, {name: json.loads((run / folder / "manifest.json").read_text())["seconds"] for name, folder in STAGES.items()}


def assert_same(one: Path, other: Path) -> None:
    """The same embeddings, as far as sums of floats in another order allow (threads differ), and the same users ranked."""
    import numpy as np
    import polars as pl

    tables = [pl.read_parquet(run / "fusion" / "embeddings" / "*.parquet").sort("item_id") for run in (one, other)]
    assert tables[0]["item_id"].equals(tables[1]["item_id"])
    a, b = (table["embedding"].to_numpy() for table in tables)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.99, f"an item's embeddings have a cosine of {cosine.min():.3f}"
    users = [pl.read_parquet(run / "score" / "*.parquet")["user_id"].unique().sort() for run in (one, other)]
    assert users[0].equals(users[1])


def figures(full: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        shop, runs = Path(folder) / "shop", {name: Path(folder) / name for name in ("ray", "alone")}
        size = {} if full else {"num_items": 240, "num_users": 400}
        generate(shop, **size)
        alone = [sys.executable, "-m", "tests.benchmarks.overhead", "--alone", *overrides(shop, runs["alone"], full)]
        inside, parts_inside = measure(alone, runs["alone"])
        with_ray = [sys.executable, "-m", "qbert_ray.cli.main", "run", "-c", "configs/demo.yaml", *overrides(shop, runs["ray"], full)]
        outside, parts = measure(with_ray, runs["ray"])
        assert_same(*runs.values())
    what = "the demo" if full else "a small demo (240 items, 400 users, few epochs)"
    rest = outside - sum(parts.values()) - (inside - sum(parts_inside.values()))
    per_stage = ", ".join(f"{name} {parts[name] - parts_inside[name]:.0f}" for name in STAGES)
    yield Figure(
        f"all stages of {what}, 2 cores; Ray adds per stage, s: {per_stage}, start, end and rest {rest:.0f}", f"{outside:.0f} s",
        f"one process without Ray: {inside:.0f} s; Ray costs {outside - inside:.0f} s", inside / outside, f"Ray <= {MOST_SECONDS} s",
        outside - inside <= MOST_SECONDS,
    )  # fmt: skip


def run_alone(given: list[str]) -> None:
    from qbert_ray.config.loading import load_config
    from qbert_ray.report.page import write
    from tests.benchmarks.without_ray import run_stages

    config = load_config([ROOT / "configs" / "demo.yaml"], given)
    run_stages(config)
    write(config.run.dir)


if __name__ == "__main__":
    if "--alone" in sys.argv:
        run_alone(sys.argv[sys.argv.index("--alone") + 1 :])
    else:
        main(figures)
