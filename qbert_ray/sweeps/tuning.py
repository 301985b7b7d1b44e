"""Runs sweeps on Ray Tune: schedules trials, stops poor ones early, and writes the tables of results.

Tune's own state is pickled and never read again: an interrupted sweep resumes from the folders of its trials.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import Any, TypedDict

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from qbert_ray.config.loading import merge, nest
from qbert_ray.config.schema import Workers
from qbert_ray.config.search import Draw
from qbert_ray.config.section import Tree, Values
from qbert_ray.execution import ray_capacity as capacity
from qbert_ray.execution.failures import root_cause
from qbert_ray.execution.progress import Progress, Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.pipeline import run_stage
from qbert_ray.storage.columns import to_sequences
from qbert_ray.storage.directory import ArtifactError, Manifest
from qbert_ray.storage.stages import BY_NAME
from qbert_ray.sweeps.tables import TRAINED, Table, ranks_of
from qbert_ray.sweeps.trials import DONE, FAILED, STOPPED, Plan, Trial, run_trial

SWEEP, TRIALS, CURVES, BEST = "sweep.json", "trials.parquet", "curves.parquet", "best.yaml"  # in the folder of a sweep
Row = dict[str, Any]  # of the table of trials: trial_id, status, seed, ..., the swept fields and the metrics
TRIAL_MEMORY = 256 * 2**20  # of a trial, which holds no CPU: its workers request CPUs themselves


class Best(TypedDict):
    """The best setting of a sweep."""

    values: Values
    mean: float  # of the metric, over seeds
    seeds: int


def prepare(plan: Plan, seed: int, stage: str, progress: Progress) -> Manifest | None:
    """Run a stage of the base run of a seed's trials."""
    return run_stage(BY_NAME[stage], plan.seed_config(seed), plan.seed_run(seed), RayExecutor(), progress)


def check_capacity(plan: Plan) -> None:
    """Raise, before anything runs, if the cluster has no room for a trial.

    Raises:
        CapacityError: what is asked for and what there is.
    """
    capacity.check(plan.config, [name for stage in plan.stages if not stage.skipped(plan.config) for name in stage.compute])
    capacity.check_reachable(plan.config, plan.run)


def is_prepared(plan: Plan, seed: int, stage: str) -> bool:
    return plan.seed_run(seed).exists(f"{stage}/manifest.json")


def check_base(plan: Plan) -> None:
    """Raise if the sweep's folder holds trials of another base config, or without a metric that is compared now."""
    now = plan.base()
    known = plan.folder.read_json(SWEEP)["base"] if plan.folder.exists(SWEEP) else now
    if changed := plan.changed(known):
        lines = "\n".join(f"  {path}: swept on {known.get(path)!r}, now {now.get(path)!r}" for path in changed[:5])
        raise ArtifactError(
            f"{plan.folder.uri} holds a sweep on another config:\n{lines}\nchoose another sweep.name, or delete that folder"
        )
    for result in map(plan.result, plan.begun()):
        if result.get("status") == DONE:
            plan.check_objectives(result["metrics"], f"; these are finished: choose another sweep.name, or delete {plan.folder.uri}")


def unfinished(plan: Plan) -> int:
    """Number of trials to run, including failed ones, which are tried again."""
    done = sum(plan.result(trial).get("status") in (DONE, STOPPED) for trial in plan.begun())
    return max(0, (len(plan.trials) or plan.sweep.num_trials) - done)


def search(plan: Plan, progress: Progress) -> Best | None:
    """Run the unfinished trials, as many at a time as fit; returns the result of `write_tables`."""
    left, total = unfinished(plan), len(plan.trials) or plan.sweep.num_trials
    most = concurrent(plan)
    plan.folder.write_json(SWEEP, _description(plan))
    progress.start(total, total - left)
    if left:
        _run(plan, left, most, progress)
    return write_tables(plan)


def _run(plan: Plan, left: int, most: int, progress: Progress) -> None:
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's error is in the tables
    budget = _Budget(plan)
    pending = [n for n, trial in enumerate(plan.trials) if plan.result(trial).get("status") not in (DONE, STOPPED)]
    name = f"tune-{uuid.uuid4().hex[:8]}"
    try:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(_trainable, plan=plan), {"memory": TRIAL_MEMORY}),
            param_space=_space(plan, pending),
            tune_config=tune.TuneConfig(
                num_samples=1 if pending else left,
                max_concurrent_trials=most,
                search_alg=None if pending else _optuna(plan),
                scheduler=_scheduler(plan),
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=plan.folder.path(),
                storage_filesystem=plan.folder.filesystem,
                failure_config=tune.FailureConfig(max_failures=plan.sweep.max_failures),
                callbacks=[_Watch(plan, progress, budget)],
                stop=budget,
                verbose=0,
            ),
        ).fit()
    finally:
        plan.folder.delete(name)


def _space(plan: Plan, pending: list[int]) -> dict[str, Any]:
    if pending:
        return {"number": tune.grid_search(pending)}
    return {path: _domain(draw) for path, draw in plan.sweep.space.items()}


def _domain(draw: Draw) -> Any:
    """Tune's search space of one swept value."""
    if draw.choice is not None:
        return tune.choice(draw.choice)
    if draw.randint is not None:
        return tune.randint(draw.randint[0], draw.randint[1] + 1)
    if draw.uniform is not None:
        return tune.uniform(*draw.uniform)
    assert draw.loguniform is not None
    return tune.loguniform(*draw.loguniform)


def concurrent(plan: Plan) -> int:
    """Number of trials that run at the same time, given that `check_capacity` found room for one."""
    compute = plan.small_compute()
    own = [stage for stage in plan.stages if not all(stage.name in plan.to_prepare(seed) for seed in plan.seeds)]
    there, fit = capacity.nodes(), plan.sweep.max_concurrent or capacity.MOST_NODES
    for name in {name for stage in own for name in stage.compute}:
        asked = getattr(compute, name)
        if isinstance(asked, Workers):
            asked = capacity.sized(asked, there, getattr(plan.config, name).microbatches)
            fit = min(fit, capacity.count_fitting(there, capacity.worker_bundle(asked, there)) // asked.fewest)
    return max(1, fit)


def estimate(plan: Plan) -> list[float | None]:
    """Estimated seconds of each trial, from the stages of its base run; None if that run has not done them all."""
    seconds = {}
    for stage in plan.stages:
        manifest = Manifest.load(plan.run, stage.name)
        seconds[stage.name] = 0.0 if stage.skipped(plan.config) else manifest.seconds if manifest else None
    own = [[seconds[stage.name] for stage in plan.stages if stage.name not in plan.shared(trial)] for trial in plan.trials]
    return [None if None in stages else float(sum(filter(None, stages))) for stages in own]


def _trainable(config: dict[str, Any], plan: Plan) -> None:
    trial, started = _trial(plan, config), time.monotonic()
    known, reported = len(plan.curve(trial)), 0

    def report(line: dict[str, float]) -> None:
        nonlocal reported
        if all(name in line for name in plan.reported):
            reported += 1
            tune.report(line)

    try:
        metrics = run_trial(plan, trial, report)
    except Exception as error:
        cause = root_cause(error)
        plan.conclude(trial, FAILED, time.monotonic() - started, {}, f"{type(cause).__name__}: {cause}")
        raise
    epochs = len(plan.curve(trial))
    tune.report(metrics | {"whole": True, "epoch": epochs, "read": max(0, epochs - known - reported)})


def _trial(plan: Plan, config: dict[str, Any]) -> Trial:
    return plan.trials[config["number"]] if plan.trials else Trial(dict(config), plan.seeds[0])


def _scheduler(plan: Plan) -> TrialScheduler | None:
    if plan.sweep.scheduler == "none":
        return None
    epochs = plan.most_epochs()
    return ASHAScheduler(
        time_attr="epoch",
        metric=plan.metric,
        mode=plan.objectives[plan.metric],
        max_t=epochs + 1,  # the last report is that of the whole trial
        grace_period=min(plan.sweep.grace_epochs, epochs),
        reduction_factor=plan.sweep.reduction_factor,
    )


def _optuna(plan: Plan) -> Any:
    try:
        import optuna  # Ray only notices when it searches
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise ValueError("sweep.search=optuna needs Optuna: pip install 'qbert-ray[sweep]'") from None

    class Search(OptunaSearch):
        """Works around Ray's OptunaSearch, which passes several objectives of a known trial to Optuna as one."""

        _ot_study: Any
        _space: Any

        def add_evaluated_point(self, parameters: dict[str, Any], value: Any, *arguments: Any, **state: Any) -> None:
            if isinstance(value, list):
                self._ot_study.add_trial(optuna.trial.create_trial(values=value, params=parameters, distributions=self._space))
            else:
                super().add_evaluated_point(parameters, value, *arguments, **state)

    known = [trial for trial in plan.begun() if plan.result(trial).get("status") == DONE]
    rewards = [[plan.result(trial)["metrics"][name] for name in plan.objectives] for trial in known]
    single = len(plan.objectives) == 1
    return Search(
        metric=plan.metric if single else list(plan.objectives),
        mode=plan.objectives[plan.metric] if single else list(plan.objectives.values()),
        points_to_evaluate=[trial.values for trial in known] or None,
        evaluated_rewards=[reward[0] if single else reward for reward in rewards] or None,
        seed=plan.config.run.seed + len(known),  # a resumed search must not repeat earlier draws
    )


class _Budget(tune.Stopper):
    """Ends the sweep when its seconds or its tokens are spent."""

    def __init__(self, plan: Plan) -> None:
        self.seconds, self.tokens, self.started = plan.sweep.max_seconds, plan.sweep.max_tokens, time.monotonic()
        at_once = plan.sweep.stage == "pretrain"  # targets are fine-tuned one after another
        domains = plan.config.pretrained if at_once else plan.config.data.targets
        items = [len(to_sequences(plan.run.read("ingest/sequences", domain)).items) for domain in domains if self.tokens]
        self.epoch = sum(items) / (1 if at_once else len(domains))  # items that an epoch reads
        self.spent = self.epoch * sum(len(plan.curve(trial)) for trial in plan.begun())

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.spent += self.epoch * result.get("read", 0 if "whole" in result else 1)  # epochs since the last report
        return False

    def stop_all(self) -> bool:
        late = self.seconds is not None and time.monotonic() - self.started > self.seconds
        return late or (self.tokens is not None and self.spent >= self.tokens)


class _Watch(tune.Callback):
    """Reports the progress of the sweep, and writes the results of trials that were stopped or failed."""

    def __init__(self, plan: Plan, progress: Progress, budget: _Budget) -> None:
        self.plan, self.progress, self.budget = plan, progress, budget
        self.started: dict[str, float] = {}
        self.best: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"progress": Quiet()}  # Tune pickles its callbacks, and a terminal cannot be pickled

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.started.setdefault(trial.trial_id, time.monotonic())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = _trial(self.plan, trial.config)
        result = self.plan.result(mine)
        if result.get("status") != DONE:
            if self.budget.stop_all():
                return  # interrupted, not stopped by the scheduler: the same command resumes it
            best = max((line for line in self.plan.curve(mine)), key=lambda line: line[self.plan.metric] * self._sign())
            metrics = {name: value for name, value in best.items() if isinstance(value, float)}
            self.plan.conclude(mine, STOPPED, self._seconds(trial), metrics)
            result = self.plan.result(mine)
        value = result["metrics"][self.plan.metric]
        if self.best is None or value * self._sign() > self.best * self._sign():
            self.best = value
        self.progress.advance()
        self.progress.note(f"{self.plan.metric} {value:.4f}, best {self.best:.4f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = _trial(self.plan, trial.config)
        if self.plan.result(mine).get("status") != FAILED:
            self.plan.conclude(mine, FAILED, self._seconds(trial), {}, "the trial's process died")
        self.progress.advance()

    def _seconds(self, trial: Any) -> float:
        return time.monotonic() - self.started.get(trial.trial_id, time.monotonic())

    def _sign(self) -> int:
        return 1 if self.plan.objectives[self.plan.metric] == "max" else -1


def write_tables(plan: Plan) -> Best | None:
    """Write sweep.json, trials.parquet, curves.parquet and best.yaml; returns the best setting, None if no trial was finished.

    best.yaml is an overlay: the setting with the best mean over seeds, among those that all seeds finished.
    """
    rows = trial_rows(plan)
    lines = [
        {"trial_id": trial.name} | {name: value for name, value in line.items() if isinstance(value, float) or name in ("domain", "epoch")}
        for trial in plan.begun()
        for line in plan.curve(trial)
    ]
    for name, content in ((TRIALS, rows), (CURVES, lines)):
        sink = pa.BufferOutputStream()
        pq.write_table(_table(content), sink)
        plan.folder.write_bytes(name, sink.getvalue().to_pybytes())
    best = _best_setting(plan, [row for row in rows if row["status"] == DONE])
    if best:
        overlay: Tree = {}
        for path, value in best["values"].items():
            overlay = merge(overlay, nest(path, value))
        head = f"# {plan.metric} {best['mean']:.4f} over {best['seeds']} seed(s), the best of {len(rows)} trials\n"
        plan.folder.write_bytes(BEST, (head + yaml.safe_dump(overlay, sort_keys=False)).encode())
    return best


def trial_rows(plan: Plan) -> list[Row]:
    """A mapping for each trial that ended: its settings, status and metrics."""
    trials = plan.begun()
    results = [plan.result(trial) for trial in trials]
    names = sorted({name for result in results for name in result.get("metrics", {})})
    return [
        {"trial_id": trial.name, "status": result["status"], "seed": trial.seed, "epochs": len(plan.curve(trial))}
        | {"seconds": result["seconds"], "error": result["error"]}
        | plan.shown(trial)
        | {name: result["metrics"].get(name) for name in names}
        for trial, result in zip(trials, results, strict=True)
        if result
    ]


def ranks(plan: Plan, table: Table) -> pl.DataFrame:
    """Ranks of each user's target in the finished trials, in the format that `Table` needs."""
    found = []
    for trial in plan.trials:
        if plan.result(trial).get("status") == DONE:
            run = plan.trial_run(trial)
            seconds = {stage: done.seconds for stage in (*TRAINED, "ranking") if (done := Manifest.load(run, stage))}
            found.append(ranks_of(pl.DataFrame(run.read("evaluate/ranks")), plan.names[trial.name], trial.seed, table, seconds))
    if not found:
        raise ArtifactError(f"no trial of {plan.folder.uri} was finished: their errors are in {TRIALS} there")
    return pl.concat(found)


def _table(rows: list[Row]) -> pa.Table:
    """The rows as an Arrow table; a column whose values have no common type, such as lists and numbers, is JSON."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array([float(v or 0) for v in values] if {type(v) for v in values} == {int, float} else values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array([json.dumps(value) for value in values])
    return pa.table(columns)


def _best_setting(plan: Plan, rows: list[Row]) -> Best | None:
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(json.dumps([row[name] for name in parameters(plan)]), []).append(row)
    complete = [each for each in by_setting.values() if len(each) == len(plan.seeds)]
    if not complete:
        return None
    means = [float(np.mean([row[plan.metric] for row in each])) for each in complete]
    chosen = int(np.argmax(means) if plan.objectives[plan.metric] == "max" else np.argmin(means))
    won = {name: complete[chosen][0][name] for name in parameters(plan)}
    values = plan.variants[won["variant"]] if plan.variants else won
    return {"values": values, "mean": means[chosen], "seeds": len(plan.seeds)}


def parameters(plan: Plan) -> list[str]:
    """Columns of the tables that identify a trial."""
    return ["variant"] if plan.variants else list(plan.sweep.space)


def _description(plan: Plan) -> dict[str, object]:
    return {
        "name": plan.sweep.name,
        "stage": plan.sweep.stage,
        "search": plan.sweep.search,
        "scheduler": plan.sweep.scheduler,
        "metric": plan.metric,
        "mode": plan.objectives[plan.metric],
        "objectives": plan.objectives,
        "parameters": parameters(plan),
        "as_is": {} if plan.variants else plan.as_is,
        "seeds": plan.seeds,
        "base": plan.base(),
    }
