"""Runs the stages of a run directory in order, and decides on a rerun which to skip, resume or refuse.

A finished stage is skipped. A stage whose config changed since is refused, with the key that changed. `redo_from` deletes the
outputs of a stage and all after it. No stage depends on `compute`: other machines change the time, not the result.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from qbert_ray.config.loading import read_config, with_values
from qbert_ray.config.schema import Config
from qbert_ray.config.yaml_files import YamlError, read_yaml
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.inputs.fingerprints import fingerprint
from qbert_ray.inputs.histories import open_histories
from qbert_ray.inputs.rules import check_rules, rule_files
from qbert_ray.storage.directory import ArtifactError, Counts, Manifest, RunDir
from qbert_ray.storage.lock import check_held
from qbert_ray.storage.seals import MANIFEST, STARTED, seal
from qbert_ray.storage.stages import BY_NAME, REQUESTED, STAGES, Stage

# Sections that a run's config.yaml has, and hardly a user's.
WHOLE = {"run", "data", "features", "quantizer", "sequencer", "evaluate", "compute"}
# Names of a run's folders before the first release -> current names.
RENAMED = {"rqvae": "quantizer", "memory": "ranking", "evaluation": "evaluate", "recommendations": "score"}


def refuse_old_names(run: RunDir) -> None:
    """Raise if the folders of a run directory have names from before the first release.

    Raises:
        ArtifactError: the message gives the folder and its current name.
    """
    for old, new in RENAMED.items():
        if run.exists(f"{old}/manifest.json"):
            raise ArtifactError(f"{run.uri}/{old} is of an earlier version, which now writes {new}/; choose another run.dir and run again")


def status(stage: Stage, config: Config, run: RunDir, files: bool = True, items: bool = True) -> Manifest | None:
    """The manifest of a finished stage; None if it is still to do.

    Args:
        files: whether to compare the input files as well; files whose new items were appended count as unchanged.
        items: whether the items files are among these.

    Raises:
        ArtifactError: it was done with another config, or from other inputs.
    """
    done = Manifest.load(run, stage.name)
    if done is None:
        return None
    wanted = stage.depends_on(config)
    changed = [path for path in sorted(set(wanted) | set(done.config)) if wanted.get(path) != done.config.get(path)]
    if changed:
        lines = "\n".join(f"  {path}: made with {done.config.get(path)!r}, now {wanted.get(path)!r}" for path in changed[:5])
        own = "" if "://" in run.uri else f", use its own settings with -c {run.uri}/config.yaml"
        raise ArtifactError(
            f"{run.uri}/{stage.name} was made with another config:\n{lines}\nredo it with --from {stage.command}{own}, or choose another run.dir"
        )
    read_now = {name for name in stage.reads(config) if not BY_NAME[name].skipped(config)}
    for name in sorted(read_now ^ {name for name in done.inputs if name in BY_NAME}):
        how = f"without {BY_NAME[name].command}" if name in read_now else f"with {BY_NAME[name].command}, which is left out now"
        raise ArtifactError(f"{run.uri}/{stage.name} was made {how}; redo it with --from {stage.command}")
    inputs = _input_fingerprints(stage, config, run)
    stale = [name for name, fingerprint in inputs.items() if done.inputs.get(name) != fingerprint]
    read = run.read_json(APPENDED) if stale and run.exists(APPENDED) else {}
    stale = [name for name in stale if read.get(name) != inputs.get(name, "") and (files or not name.startswith("data."))]
    stale = [name for name in stale if items or not (name.startswith("data.domains.") and name.endswith(".items"))]
    if stale:
        new_items = all(name.startswith("data.domains.") and name.endswith(".items") for name in stale)
        hint = "; or give only the new items IDs: qbert-ray semantic-ids --append" if new_items else ""
        raise ArtifactError(
            f"{run.uri}/{stage.name} was made from other outputs of {', '.join(stale)}; redo it with --from {stage.command}{hint}"
        )
    return done


def run_stage(stage: Stage, config: Config, run: RunDir, executor: Executor, progress: Progress) -> Manifest | None:
    """Run a stage unless it is done; returns its manifest, or None if the config leaves it out.

    Raises:
        ArtifactError: an input stage is not done, or the outputs there were made differently.
    """
    if stage.skipped(config):
        return None
    done = status(stage, config, run)
    if done is not None:
        return done
    for name in stage.reads(config):
        source = BY_NAME[name]
        if not source.skipped(config) and Manifest.load(run, source.name) is None:
            raise ArtifactError(f"{stage.name} needs {name}, which is not done in {run.uri}; run it first: qbert-ray {source.command}")
    executor.check(config, run, stage.compute)
    manifest = Manifest(stage.name, stage.depends_on(config), _input_fingerprints(stage, config, run), _version())
    _forget_unfinished(stage, manifest, run)
    if stage in REQUESTED:  # a request says what is scored now, not what the run is
        saved = read_config(run.read_bytes("config.yaml"), f"{run.uri}/config.yaml")
        save_config(run, with_values(config, {"score.histories": saved.score.histories}))
    else:
        save_config(run, config)
    check_held(run)
    started = time.monotonic()
    manifest.counts = _function(stage)(config, run, executor, progress)
    executor.measure(run, stage.name, manifest.counts, list(config.data.domains))
    manifest.files = seal(run, stage.name)
    manifest.seconds = round(time.monotonic() - started, 2)
    check_held(run)
    manifest.save(run, stage.name)
    run.delete(f"{stage.name}/{STARTED}")
    return manifest


def save_config(run: RunDir, config: Config) -> None:
    """Write config.yaml, from which the run is read later, unless it is there."""
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
    if not run.exists("config.yaml") or run.read_bytes("config.yaml") != content:
        run.write_bytes("config.yaml", content)


def _function(stage: Stage) -> Callable[..., Counts]:
    """The function that runs a stage; importing it may import torch."""
    module, _, name = stage.work.partition(":")
    return getattr(importlib.import_module(module), name)


def preflight(stages: Sequence[Stage], config: Config, run: RunDir, executor: Executor) -> None:
    """Raise, before the first stage starts, if the executor lacks the resources for any stage that is still to do.

    Raises:
        CapacityError: what is asked for and what there is.
        SourceError: a file or an expression of the section score cannot be used.
    """
    refuse_old_names(run)
    pending = [stage for stage in stages if not stage.skipped(config) and status(stage, config, run) is None]
    if any(stage.name in FILTERED for stage in pending):
        check_rules(config)
        for stage in pending:
            for (domain, key), location in history_files(stage, config).items():
                open_histories(config, domain, location, key)
    if pending:
        executor.check(config, run, [key for stage in pending for key in stage.compute])


def redo_from(name: str, run: RunDir) -> None:
    """Delete the outputs of a stage and of all stages after it, and of those that are done at request where they read one of these."""
    _refuse_others_files(run)
    requested = () if name in ("evaluate", "score") else REQUESTED
    for stage in reversed((*STAGES[STAGES.index(BY_NAME[name]) :], *requested)):  # in this order an interruption leaves a consistent run
        run.delete(f"{stage.name}/manifest.json")
        run.delete(stage.name)


APPENDED = "ingest/appended.json"  # state of the input files up to which items were appended


def _refuse_others_files(run: RunDir) -> None:
    """Raise if the directory is no run's yet, and holds what the stages would delete or replace.

    Raises:
        ArtifactError: the message names it.
    """
    saved = _saved(run)
    if isinstance(saved, dict) and set(saved) >= WHOLE:
        return
    others = [name for name in run.folders("") if name in BY_NAME and not any(run.exists(f"{name}/{file}") for file in (MANIFEST, STARTED))]
    others = [f"{name}/" for name in others] + ["config.yaml"] * (saved is not None)
    if others:
        raise ArtifactError(
            f"{run.uri} is not the directory of a run, and a run would replace {', '.join(others)} there; choose another run.dir"
        )


def _saved(run: RunDir) -> Any:
    """The content of config.yaml, None if there is none; an error as text where it cannot be read."""
    try:
        return read_yaml(run.read_bytes("config.yaml")) if run.exists("config.yaml") else None
    except YamlError as error:
        return str(error)


def _forget_unfinished(stage: Stage, manifest: Manifest, run: RunDir) -> None:
    """Keep the partial outputs of an earlier try if this stage can resume from them; delete any others."""
    _refuse_others_files(run)
    marker = f"{stage.name}/{STARTED}"
    same = run.exists(marker) and run.read_json(marker) == {"fingerprint": manifest.fingerprint}
    if not (same and stage.keeps):
        run.delete(stage.name)
    run.write_json(marker, {"fingerprint": manifest.fingerprint})


def _input_fingerprints(stage: Stage, config: Config, run: RunDir) -> dict[str, str]:
    inputs = {}
    for name in stage.reads(config):
        source = BY_NAME[name]
        manifest = None if source.skipped(config) else Manifest.load(run, source.name)
        if manifest is not None:
            inputs[name] = manifest.fingerprint
    return inputs | file_fingerprints(stage, config)


FILTERED = ("score", "score_histories")  # stages that leave out what score.exclude and score.allow say
_FILES = {"ingest": ("items", "interactions", "validation", "test")}


def file_fingerprints(stage: Stage, config: Config) -> dict[str, str]:
    """Fingerprints of the input files a stage reads: changed data is noticed, and a copy of the same data is not."""
    named = {
        f"data.domains.{name}.{field}": getattr(d, field) for name, d in config.data.domains.items() for field in _FILES.get(stage.name, ())
    }
    if stage.name == "features":
        named |= {f"data.domains.{name}.vectors.{key}": file for name, d in config.data.domains.items() for key, file in d.vectors.items()}
    if stage.name == "semantic_ids":
        named["data.semantic_ids"] = config.data.semantic_ids
    if stage.name in FILTERED:
        named |= rule_files(config)
        named |= {f"{key} of {domain}": location for (domain, key), location in history_files(stage, config).items()}
    found = {path: fingerprint(config.data.root, location) for path, location in named.items() if location is not None}
    return {path: content for path, content in found.items() if content is not None}


def history_files(stage: Stage, config: Config) -> dict[tuple[str, str], str]:
    """Target domain and key of the config -> path of the file of histories that a stage reads for it."""
    field = {"score": "interactions", "score_histories": "histories"}.get(stage.name)
    location = getattr(config.score, field) if field else None
    return {(domain, f"score.{field}"): location.replace("{domain}", domain) for domain in config.data.targets} if location else {}


def _version() -> str:
    try:
        return version("qbert-ray")
    except PackageNotFoundError:
        return "unknown"
