"""kill -9 of the driver in the middle of each stage, the same command again: the outputs of an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import STAGES
from tests.shop import ROOT, SMALL, make_shop

DEADLINE = 240  # seconds that one stage may take to be entered


def start(shop: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "qbert_ray.cli.main", "run", "-c", str(ROOT / "configs" / "demo.yaml")]
    # a checkpoint after every epoch, so that trainings resume in their middle
    overrides = [f"data.root={shop}", f"run.dir={run}", *SMALL, "compute.checkpoint_seconds=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen([*command, *overrides], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_inside(process: subprocess.Popen, folder: Path, pause: float) -> bool:
    """Kill the driver once the stage of that folder has begun; False where the driver ended first."""
    until = time.monotonic() + DEADLINE
    while not (folder / "started.json").exists():
        if process.poll() is not None or (folder / "manifest.json").exists():
            return False
        assert time.monotonic() < until, f"{folder.name} did not begin in {DEADLINE} s"
        time.sleep(0.01)
    time.sleep(pause)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return not (folder / "manifest.json").exists()


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_in_every_stage_and_started_again_gives_the_same(tmp_path):
    shop = make_shop(tmp_path / "shop")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(shop, whole))
    killed = []
    for stage in STAGES:
        trains = stage.folder in ("fusion", "rqvae", "pretrain", "finetune")
        process = start(shop, cut)
        if kill_inside(process, cut / stage.folder, pause=6.0 if trains else 0.5):
            killed.append(stage.name)
        elif process.poll() is None:
            process.kill()
            process.wait()
    assert len(killed) >= 7, f"killed only in {killed}"  # a short stage can be over before the signal
    finish(start(shop, cut))
    compare(RunDir(str(whole)), RunDir(str(cut)))


def compare(a: RunDir, b: RunDir) -> None:
    exact = ("ingest/items", "ingest/interactions", "ingest/sequences", "semantic_ids", "evaluate/ranks", "score")
    for table in (*exact, "features/text", "features/structure", "fusion/embeddings"):
        assert a.parts(table) == b.parts(table)
        left, right = a.read(table), b.read(table)
        assert left.num_rows == right.num_rows
        for name in left.column_names:
            if name in ("vectors", "embedding"):
                assert np.allclose(columns.to_numpy(left[name]), columns.to_numpy(right[name]), atol=1e-5), (table, name)
            elif name == "score":
                assert np.allclose(left[name], right[name], atol=1e-4), table
            else:
                assert left[name].equals(right[name]), (table, name)
    assert a.read_json("evaluate/metrics.json") == b.read_json("evaluate/metrics.json")
