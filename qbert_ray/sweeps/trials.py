"""The trials of a sweep: ordinary runs that share the outputs of stages that they do not change.

A trial is a run directory inside that of its sweep. It reads the outputs of unchanged stages from the base run of the sweep
and runs the others itself, so it resumes from stages and checkpoints as any run does. Its folder is named after its values,
so that a resumed sweep finds it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch

from qbert_ray.config.loading import ConfigError, settings_of, with_values
from qbert_ray.config.schema import Actors, Compute, Config, Workers
from qbert_ray.config.search import objectives, settings
from qbert_ray.config.section import Values
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.pipeline import FILTERED, file_fingerprints, run_stage, save_config
from qbert_ray.ranking.generative import load_catalog_ranker
from qbert_ray.ranking.ranker import batches
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import BY_NAME, REQUESTED, STAGES, Stage
from qbert_ray.training import EpochMetrics

CONTENT = "content of "  # in `Plan.base`, before the setting that names a file
BEGUN, RESULT, CURVE = "trial.json", "result.json", "curve.jsonl"  # in the folder of a trial
DONE, STOPPED, FAILED = "done", "stopped", "failed"
EPOCH_METRICS = ("ndcg@10", "hr@10", "train_loss")  # of pre-training and fine-tuning
TIMED_USERS = 512
FIXED = ("run", "data", "compute", "gates", "sweep")
MASKING = ("masks", "mask_ratio", "last_item_share", "prefix_share")  # settings of a training that no causal one reads
LIKELY = 100  # random settings that stand for those of Optuna


@dataclass(frozen=True)
class Trial:
    """One setting of the swept fields (dotted path -> value) under one seed."""

    values: Values
    seed: int

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps([self.values, self.seed], sort_keys=True).encode()).hexdigest()[:8]


class Result(TypedDict, total=False):
    """How a trial ended; empty if it is still to do."""

    status: str  # DONE, STOPPED or FAILED
    seconds: float
    metrics: dict[str, float]
    error: str | None


class Plan:
    """The plan of a sweep: its trials, their folders, and the stages they share.

    Raises:
        ValueError: a swept path or value is not valid, or search, stage and scheduler do not fit together.
    """

    def __init__(self, config: Config) -> None:
        if config.refit.include == "all":  # for score and serve, which trials do not run
            config = with_values(config, {"refit.include": "none"})
        self.config, self.sweep = config, config.sweep
        self.objectives = objectives(config.sweep)
        self.metric = next(iter(self.objectives))
        self.reported = list(self.objectives) if config.sweep.search == "optuna" else [self.metric]  # Tune needs them of every epoch
        self.seeds = config.sweep.seeds or [config.run.seed]
        self.run = RunDir(config.run.dir)
        self.folder = self.run.inside(config.sweep.name)
        self.stages = STAGES[: STAGES.index(BY_NAME[config.sweep.stage]) + 1]
        self.variants = {name: settings_of(overlay) for name, overlay in config.sweep.variants.items()}
        self.paths = list(dict.fromkeys(path for values in (config.sweep.space, *self.variants.values()) for path in values))
        self._check()
        self.as_is = {path: _at(config, path) for path in self.paths}
        given = list(self.variants.values()) or settings(config.sweep, self.as_is, config.run.seed)
        # as the config parses them, since YAML reads 1e-3 as text; an invalid value fails here, before anything runs
        configs = [with_values(config, values) for values in given]
        chosen = [{path: _at(each, path) for path in values} for each, values in zip(configs, given, strict=True)]
        if any(each.refit.include == "all" for each in configs):
            raise ValueError("refit.include=all trains for score and serve, which trials do not run: compare none and validation")
        if not any(each.refit.include == "validation" for each in [config, *configs]):
            self.stages = tuple(stage for stage in self.stages if stage.name != "refit")
        self._check_read(configs or self._likely() or [config])
        self._check_variants(chosen)
        different = {Trial(values, 0).name: values for values in chosen}  # values that were given in two ways are one setting
        self.trials = [Trial(values, seed) for seed in self.seeds for values in different.values()]
        self.names = {Trial(values, seed).name: name for seed in self.seeds for name, values in zip(self.variants, chosen, strict=False)}

    def _check(self) -> None:
        sweep = self.sweep
        if bool(sweep.variants) != (sweep.search == "variants") or (sweep.variants and sweep.space):
            raise ValueError("sweep.search=variants compares sweep.variants, the other searches sweep.space: give what belongs together")
        if sweep.name in (*BY_NAME, *(stage.name for stage in REQUESTED)) or not re.fullmatch(r"\w[\w.-]*", sweep.name):
            raise ValueError(f"sweep.name={sweep.name!r} becomes a folder of the run: letters, digits, _, . and -, and no name of a stage")
        fixed = [path for path in self.paths if path.split(".")[0] in FIXED]
        if fixed:
            raise ValueError(
                f"sweep.{'variants' if sweep.variants else 'space'} names {', '.join(fixed)}: a sweep varies features, trainings and ranking; seeds are sweep.seeds"
            )
        for path, draw in sweep.space.items():
            with_values(self.config, {path: draw.examples()[0]})
        unused = [path for path in self.paths if not any(_affects(path, stage) for stage in self.stages)]
        if unused:
            raise ValueError(f"no stage up to {sweep.stage} depends on {', '.join(unused)}; set sweep.stage to a later one")
        one_training = sweep.stage == "pretrain" or (sweep.stage == "finetune" and len(self.config.data.targets) <= 1)
        if sweep.scheduler != "none" and not one_training:
            raise ValueError(f"sweep.scheduler={sweep.scheduler} compares the epochs of one training: pretrain, or finetune of one target")
        lacking = [name for name in self.reported if name not in EPOCH_METRICS]
        if sweep.scheduler != "none" and lacking:
            known = ", ".join(EPOCH_METRICS)
            advice = f"with optuna, name none but {known}" if sweep.search == "optuna" else f"name one of {known} first"
            raise ValueError(
                f"sweep.scheduler={sweep.scheduler} compares epochs, which have no {', '.join(lacking)}; {advice} in sweep.objectives"
            )
        if sweep.search == "optuna" and len(self.seeds) > 1:
            raise ValueError(
                "sweep.search=optuna tries each setting once: give one seed, and compare the best settings by grid over several"
            )

    def _likely(self) -> list[Config]:
        """Configs of random settings, for a search whose settings are not known in advance."""
        found = []
        for values in settings(self.sweep.model_copy(update={"search": "random", "num_trials": LIKELY}), self.as_is, seed=0):
            with contextlib.suppress(ConfigError):  # values that do not go together end their trial, and not the sweep
                found.append(with_values(self.config, values))
        return found

    def _check_read(self, configs: list[Config]) -> None:
        """Raise if no trial runs the last stage, or reads a swept field or anything of a variant: equal trials would be compared.

        Args:
            configs: the config with the values of each trial.
        """
        skipped = {stage.name: why for stage in self.stages if (why := stage.skipped(self.config)) and all(map(stage.skipped, configs))}
        if self.sweep.stage in skipped:
            raise ValueError(f"sweep.stage={self.sweep.stage}: no trial runs that stage, since {skipped[self.sweep.stage]}")
        unread = {path: why for path in self.paths if (why := _unread(path, skipped, configs))}
        said = "".join(f"\n  {path}: {why}" for path, why in unread.items())
        if unread and not self.variants:
            raise ValueError(f"sweep.space names what no trial reads:{said}")
        equal = [repr(name) for name, values in self.variants.items() if values and unread.keys() >= values.keys()]
        if equal:  # other variants may set what is not read in addition, as whole files of settings do
            raise ValueError(f"sweep.variants: {', '.join(equal)} would be the config as it is, since no trial reads these:{said}")

    def _check_variants(self, chosen: list[Values]) -> None:
        """Raise if two variants set the same values, and would share a trial."""
        alike: dict[str, list[str]] = {}
        for name, values in zip(self.variants, chosen, strict=False):
            alike.setdefault(Trial(values, 0).name, []).append(repr(name))
        for names in alike.values():
            if len(names) > 1:
                raise ValueError(f"sweep.variants: {' and '.join(names)} set the same values; leave all but one of them out")

    def most_epochs(self) -> int:
        """Most epochs of the last stage of a trial, which the sweep may vary."""
        stage = self.sweep.stage
        swept = [path for path in self.sweep.space if f"{stage}.epochs.".startswith(f"{path}.")]
        drawn = [{path: value} for path in swept for value in self.sweep.space[path].examples()]
        values = [trial.values for trial in self.trials] or drawn or [{}]
        return max(getattr(with_values(self.config, each), stage).epochs for each in values)

    def trial_config(self, trial: Trial) -> Config:
        """The config of a trial's run."""
        values = trial.values | {"run.seed": trial.seed, "run.dir": self._trial_folder(trial).uri}
        return with_values(self.config.model_copy(update={"compute": self.small_compute()}), values)

    def small_compute(self) -> Compute:
        """The `compute` section with the smallest size wherever the config sets none, since trials share the cluster."""
        compute = self.config.compute
        sizes: dict[str, Workers | Actors] = {}
        for name, asked in compute:
            if isinstance(asked, Workers) and asked.cpus_per_worker is None:
                sizes[name] = asked.model_copy(update={"cpus_per_worker": 1.0})
            elif isinstance(asked, Actors) and asked.max_size is None:
                sizes[name] = asked.model_copy(update={"max_size": asked.min_size})
        return compute.model_copy(update=sizes)

    def trial_run(self, trial: Trial) -> RunDir:
        folders = self.shared(trial)
        return self._trial_folder(trial).sharing(self.seed_run(trial.seed), folders)

    def _trial_folder(self, trial: Trial) -> RunDir:
        return self.folder.inside(f"trials/{trial.name}")

    def shared(self, trial: Trial) -> list[str]:
        """Stages that a trial does not change and therefore reads from the base run."""
        return self._unchanged([path for path, value in trial.values.items() if not self.trials or value != self.as_is[path]])

    def to_prepare(self, seed: int) -> list[str]:
        """Stages that some trial of a seed reads from the base run, in order, including those that the config leaves out."""
        if not self.trials:
            return self._unchanged(self.paths)
        shared = {name for trial in self.trials if trial.seed == seed for name in self.shared(trial)}
        return [stage.name for stage in self.stages if stage.name in shared]

    def seed_config(self, seed: int) -> Config:
        """The config without the swept values, under a seed."""
        return with_values(self.config, {"run.seed": seed, "run.dir": self.seed_run(seed).uri})

    def seed_run(self, seed: int) -> RunDir:
        """The base run of the trials of a seed: the config's own, or a sibling that shares the stages that do not depend on the seed."""
        if seed == self.config.run.seed:
            return self.run
        folders = self._unchanged(["run.seed"])
        return self.folder.inside(f"seeds/{seed}").sharing(self.run, folders)

    def _unchanged(self, paths: list[str]) -> list[str]:
        kept: list[str] = []
        for stage in self.stages[:-1]:
            if not any(_affects(path, stage) for path in paths) and all(name in kept for name in stage.inputs):
                kept.append(stage.name)
        return kept

    def begun(self) -> list[Trial]:
        """The trials of the plan; if the search draws them one by one, those that have begun."""
        if self.trials:
            return self.trials
        folders = [name for name in self.folder.folders("trials") if self.folder.exists(f"trials/{name}/{BEGUN}")]
        trials = [Trial(**self.folder.read_json(f"trials/{name}/{BEGUN}")) for name in folders]
        return [trial for trial in trials if trial.seed in self.seeds]

    def result(self, trial: Trial) -> Result:
        """How a trial ended."""
        run = self._trial_folder(trial)
        return run.read_json(RESULT) if run.exists(RESULT) else {}

    def conclude(self, trial: Trial, status: str, seconds: float, metrics: dict[str, float], error: str | None = None) -> None:
        """Write the result of a trial."""
        content: Result = {"status": status, "seconds": round(seconds, 1), "metrics": metrics, "error": error}
        self._trial_folder(trial).write_json(RESULT, content)

    def check_objectives(self, metrics: dict[str, float], advice: str = "") -> None:
        """Raise, with some advice, if a finished trial lacks a metric that the sweep compares."""
        lacking = [name for name in self.objectives if name not in metrics]
        if lacking:
            raise ValueError(
                f"sweep.objectives names {', '.join(lacking)}; a trial up to {self.sweep.stage} has {', '.join(sorted(metrics))}{advice}"
            )

    def curve(self, trial: Trial) -> list[dict[str, Any]]:
        """Recorded metrics of each epoch of the trial's last stage."""
        return self._trial_folder(trial).read_lines(CURVE)

    def shown(self, trial: Trial) -> Values:
        """What identifies a trial in tables: the name of its variant, or its values."""
        return {"variant": self.names[trial.name]} if self.variants else trial.values

    def base(self) -> Values:
        """Dotted path -> value of all settings that the trials have in common; and what their input files hold."""
        leaves = [stage.depends_on(self.config) for stage in self.stages]
        swept = tuple(f"{path}." for path in ("run.seed", *self.paths))
        base = {path: value for common in leaves for path, value in common.items() if not f"{path}.".startswith(swept)}
        files = [file_fingerprints(stage, self.config) for stage in self.stages if stage.name not in FILTERED]
        return base | {f"{CONTENT}{path}": content for found in files for path, content in found.items()}

    def changed(self, known: Values) -> list[str]:
        """What differs from another `base`; files that are gone, or that it does not know, count as the same."""
        now = self.base()
        of_both = {path for path in known.keys() | now.keys() if not path.startswith(CONTENT)} | (known.keys() & now.keys())
        return sorted(path for path in of_both if known.get(path) != now.get(path))


def _affects(path: str, stage: Stage) -> bool:
    """Whether a stage's outputs depend on a path, or on something below it."""
    if any(path == key or path.startswith(f"{key}.") for key in stage.ignores):
        return False
    return any(path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.") for key in stage.config)


def _unread(path: str, skipped: dict[str, str], configs: list[Config]) -> str | None:
    """Why no trial reads a field; None if one may.

    Args:
        skipped: stage that no trial runs -> why.
        configs: of the trials.
    """
    section, _, field = path.partition(".")
    of_structure = path == "features" or f"{path}.".startswith("features.structure.")  # which stage 3 reads too
    if section in skipped and not of_structure:
        return f"{section} is skipped: {skipped[section]}"
    if section in ("pretrain", "finetune") and field.partition(".")[0] in MASKING:
        if all(each.sequencer.kind == "generative" for each in configs):
            return "a generative model has no masks"
        if all(getattr(each, section).objective == "causal" for each in configs):
            return f"nothing is masked with {section}.objective=causal"
    return None


def _at(config: Config, path: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


class TrialProgress(Quiet):
    """Records the curve of a trial's last stage, and passes each epoch's metrics to `report`."""

    def __init__(self, run: RunDir, lines: list[dict[str, Any]], report: Callable[[dict[str, float]], None]) -> None:
        self.run, self.lines, self.report, self.domain = run, lines, report, ""

    def note(self, text: str) -> None:
        self.domain = text

    def epoch(self, metrics: EpochMetrics) -> None:
        self.lines = [line for line in self.lines if line["epoch"] < metrics["epoch"] or line.get("domain", "") != self.domain]
        self.lines.append({"domain": self.domain} | metrics)
        self.run.write_bytes(CURVE, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self.report({name: value for name, value in metrics.items() if isinstance(value, float)} | {"epoch": metrics["epoch"] + 1})


def run_trial(plan: Plan, trial: Trial, report: Callable[[dict[str, float]], None]) -> dict[str, float]:
    """Run the stages of a trial that it does not share; returns its metrics, which its folder keeps. `report` gets those of each epoch."""
    config, run, started = plan.trial_config(trial), plan.trial_run(trial), time.monotonic()
    run.write_json(BEGUN, {"values": trial.values, "seed": trial.seed})
    save_config(run, config)  # no stage does it where the trial leaves out all of its own
    progress = TrialProgress(run, plan.curve(trial), report)
    for stage in plan.stages:
        if stage.name not in run.shared:
            run_stage(stage, config, run, RayExecutor(), progress if stage is plan.stages[-1] else Quiet())
    metrics = trial_metrics(plan, config, run)
    plan.check_objectives(metrics)
    plan.conclude(trial, DONE, time.monotonic() - started, metrics)
    return metrics


def trial_metrics(plan: Plan, config: Config, run: RunDir) -> dict[str, float]:
    """Metrics of a finished trial: of its best epochs, averaged over target domains; those on test items begin with "test_"."""
    done = [stage.name for stage in plan.stages if not stage.skipped(config)]
    found: dict[str, float] = {}
    for name, folder in (("fusion", "fusion"), ("quantizer", "quantizer"), ("pretrain", "pretrain")):
        if name in done:
            found |= _best(run, folder)
    targets = config.data.targets
    if "finetune" in done:
        found |= _mean([_best(run, f"finetune/{domain}") for domain in targets])
        weights = [run.load_model(f"finetune/{domain}/model")[0] for domain in targets]
        found["parameters"] = float(np.mean([sum(tensor.numel() for tensor in tensors.values()) for tensors in weights]))
    if "ranking" in done:
        counts = run.read_json("ranking/manifest.json")["counts"]
        figures = _mean([{name: value for name, value in counts[domain].items() if name.startswith("model_")} for domain in targets])
        found |= {name.removeprefix("model_"): value for name, value in figures.items()}
    if "evaluate" in done:
        tested = run.read_json("evaluate/metrics.json")
        found |= _mean(
            [{f"test_{name}": value["value"] for name, value in tested[d]["protocols"]["all"].get("model", {}).items()} for d in targets]
        )
    if "ms_per_user" in plan.objectives and "finetune" in done:
        found["ms_per_user"] = float(np.mean([milliseconds_per_user(config, run, domain) for domain in targets]))
    return found


def _best(run: RunDir, folder: str) -> dict[str, float]:
    """Metrics of the epoch whose weights were kept."""
    lines = run.read_lines(f"{folder}/metrics.jsonl")
    best = max(lines, key=lambda line: line["ndcg@10"]) if "ndcg@10" in lines[-1] else lines[-1]
    numbers = {name: min(value) if name == "codebook_usage" else value for name, value in best.items()}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, float)}


def _mean(figures: list[dict[str, float]]) -> dict[str, float]:
    """Means over the domains that have a figure: those without validation or test items have none."""
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: float(np.mean([each[name] for each in figures if name in each])) for name in names}


@torch.inference_mode()
def milliseconds_per_user(config: Config, run: RunDir, domain: str) -> float:
    """Milliseconds per user to rank the catalog with the trial's models, in batches on one thread; median of five passes."""
    enabled = config.ranking.enabled and bool(run.parts("ranking/weights", domain))
    torch.set_num_threads(1)
    ranker = load_catalog_ranker(run, domain, config.ranking.model_copy(update={"enabled": enabled}))
    sequences = columns.to_sequences(run.read("ingest/sequences", domain))
    users = min(TIMED_USERS, len(sequences.valid))
    histories = [sequences.history(user, "test") for user in range(users)]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for batch in batches(users):
            ranker.best(histories[batch], config.score.top_k, config.score.remove_seen)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) / users * 1e3
