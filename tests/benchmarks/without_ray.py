"""Every stage of a run by the local executor, and the CPU time of each."""

from __future__ import annotations

import time

from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import open_executor
from qbert_ray.execution.progress import Quiet
from qbert_ray.pipeline import run_stage
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import STAGES

THREADS = 2


def run_stages(config: Config, threads: int = THREADS) -> dict[str, float]:
    """Seconds of CPU of each stage, torch's threads together; outputs are in the run directory."""
    config = config.model_copy(update={"compute": config.compute.model_copy(update={"executor": "local", "threads": threads})})
    run, seconds = RunDir(config.run.dir), {}
    with open_executor(config) as executor:
        for stage in STAGES:
            started = time.process_time()
            if run_stage(stage, config, run, executor, Quiet()) is not None:
                seconds[stage.name] = time.process_time() - started
    return seconds
