"""Population-based training: trials train side by side, and every few epochs the poor go on from the good with changed values.

Ray Tune decides who goes on from whom, and draws the values. A training is cut into segments, and a segment's folder is named
after all that it follows from: the segment before it, its values, where it ends. So whoever asks for the same training finds
it, and a sweep that was cut takes Tune's decisions once more, without training anything twice.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from qbert_ray.artifacts import RunDir
from qbert_ray.overlays import with_values
from qbert_ray.pipelines import capacity
from qbert_ray.pipelines.session import Quiet
from qbert_ray.pipelines.stages import BY_NAME, run_stage, sequence_trainings
from qbert_ray.pipelines.tasks import SequencerTask
from qbert_ray.pipelines.training import Segment, fit
from qbert_ray.pipelines.trials import CURVE, DONE, Plan, Trial, trial_metrics
from qbert_ray.sweeps import Draw

SEGMENTS = "segments"  # in the folder of a sweep, until its last trial is done
TRIAL_MEMORY = 256 * 2**20  # what a trial asks for: its workers ask for CPUs themselves, and one that held a CPU would starve them
STEPS = "steps.json"  # what a member of the population hands to Tune: how its weights came to be


class Scheduler(PopulationBasedTraining):
    """Tune's, with draws that follow from the seed, the trial and the epoch alone, and that stay inside their bounds.

    A trial that goes on from another one keeps its own number, which says where its results belong.
    """

    def __init__(self, plan: Plan) -> None:
        self.space, self.seed = plan.sweep.space, plan.config.run.seed
        super().__init__(
            time_attr="epoch",
            metric=plan.metric,
            mode=plan.objectives[plan.metric],
            perturbation_interval=plan.sweep.perturbation_epochs,
            hyperparam_mutations={path: draw.choice or domain(draw) for path, draw in self.space.items()},
            log_config=False,
            require_attrs=False,  # the report of a whole trial has no epoch: it is nothing to go on from
            synch=True,
        )

    def _checkpoint_or_exploit(self, trial: Any, *others: Any) -> None:
        drawn = int.from_bytes(_digest(self.seed, trial.config["number"], self._trial_state[trial].last_train_time), "big")
        random.seed(drawn)
        np.random.seed(drawn % 2**32)
        super()._checkpoint_or_exploit(trial, *others)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        inside = {path: within(draw, config[path]) for path, draw in self.space.items()}
        return config | inside | {"number": trial.config["number"]}, operations


def memory(plan: Plan, most: int) -> float:
    """What a trial asks for. Tune starts as many of a population as find room, so there each asks for so much that `most` do."""
    if plan.sweep.scheduler != "pbt":
        return TRIAL_MEMORY
    there = capacity.nodes()
    shares = {node.get("memory", 0.0) // number for node in there for number in range(1, most + 1)} - {0.0}
    return max((share for share in shares if capacity.room(there, {"memory": share}) >= most), default=TRIAL_MEMORY)


def domain(draw: Draw) -> Any:
    """Where Tune draws a value from."""
    if draw.choice is not None:
        return tune.choice(draw.choice)
    if draw.randint is not None:
        return tune.randint(draw.randint[0], draw.randint[1] + 1)
    return tune.uniform(*draw.uniform) if draw.uniform else tune.loguniform(*draw.loguniform)


def within(draw: Draw, value: Any) -> Any:
    """The value, or the nearest one that may be drawn."""
    bounds = draw.uniform or draw.loguniform or draw.randint
    return value if bounds is None else min(max(value, bounds[0]), bounds[1])


def train_member(plan: Plan, trial: Trial, values: dict[str, Any], report: Callable[..., None]) -> dict[str, float]:
    """Train from where Tune says to go on, with the values it says, to the end; the metrics, also left in the trial's folder.

    Args:
        report: called with the metrics at the end of each segment, and with what a trial goes on from.
    """
    started = time.monotonic()
    checkpoint = tune.get_checkpoint()
    steps: list[dict[str, Any]] = []  # of all segments that led here, each with its values and its last epoch
    if checkpoint:
        with checkpoint.as_directory() as directory:
            steps = json.loads((Path(directory) / STEPS).read_text())
    epochs = getattr(plan.config, plan.sweep.stage).epochs
    while not steps or steps[-1]["until"] < epochs:
        before = steps[-1] if steps else {"until": 0, "segment": None}
        until = min(before["until"] + plan.sweep.perturbation_epochs, epochs)
        steps = [*steps, {"until": until, "values": values, "segment": _digest(before["segment"], values, trial.seed, until).hex()}]
        log = _train_segment(plan, trial, values, Segment(until, before["segment"]), steps[-1]["segment"])
        plan.trial_run(trial).write_bytes(CURVE, log)
        if until < epochs:
            with tempfile.TemporaryDirectory() as directory:
                (Path(directory) / STEPS).write_text(json.dumps(steps))
                last = json.loads(log.splitlines()[-1])
                numbers = {name: value for name, value in last.items() if isinstance(value, float)}
                report(
                    numbers | {"epoch": until, "read": plan.sweep.perturbation_epochs}, checkpoint=tune.Checkpoint.from_directory(directory)
                )
    return _conclude(plan, trial, steps, time.monotonic() - started)


def _train_segment(plan: Plan, trial: Trial, values: dict[str, Any], segment: Segment, name: str) -> bytes:
    """Do one segment unless it is done; the metrics of all epochs up to its end, a line of JSON each."""
    stage, config, segments = plan.sweep.stage, _config(plan, trial, values), plan.folder.inside(SEGMENTS)
    (arguments,) = sequence_trainings(stage, config).values()
    arguments = {"config": config, "run": plan.trial_run(trial)} | arguments
    fit(SequencerTask, arguments, getattr(config.compute, stage), segments, name, Quiet(), config.compute.checkpoint_seconds, segment)
    return segments.read_bytes(f"{name}/metrics.jsonl")


def _config(plan: Plan, trial: Trial, values: dict[str, Any]) -> Any:
    """That of a trial with other values; nobody's patience ends before the others'."""
    return with_values(plan.trial_config(trial), values | {f"{plan.sweep.stage}.patience": None})


def _conclude(plan: Plan, trial: Trial, steps: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Make the trial's folder an ordinary run with the model that came out."""
    config, run, stage = _config(plan, trial, steps[-1]["values"]), plan.trial_run(trial), BY_NAME[plan.sweep.stage]
    ((folder, arguments),) = sequence_trainings(stage.name, config).items()
    segments, last = plan.folder.inside(SEGMENTS), steps[-1]["segment"]

    def adopt(_config: Any, _run: RunDir, _progress: Any) -> dict[str, Any]:
        tensors, description = segments.load_model(f"{last}/model")
        log = segments.read_bytes(f"{last}/metrics.jsonl")
        run.write_bytes(f"{folder}/metrics.jsonl", log)
        run.save_model(f"{folder}/model", tensors, description)
        metrics = json.loads(log.splitlines()[-1])
        domains = arguments["domains"]
        return {"domains": domains, "metrics": metrics} if stage.name == "pretrain" else {"metrics": {domains[0]: metrics}}

    run.delete(stage.folder)
    run_stage(replace(stage, work=adopt), config, run, Quiet())
    metrics = trial_metrics(plan, config, run)
    plan.check_objectives(metrics)
    plan.conclude(trial, DONE, seconds, metrics, steps=steps)
    return metrics


def _digest(*content: Any) -> bytes:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()[:8]
