"""The commands of single stages, and what they share with `qbert-ray run`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from qbert_ray.cli.arguments import Files, Overrides
from qbert_ray.cli.journal import Journal, open_journal
from qbert_ray.cli.terminal import open_console
from qbert_ray.config.loading import ConfigError, load_config, with_values
from qbert_ray.config.schema import Config
from qbert_ray.execution.failures import stoppable
from qbert_ray.storage.directory import ArtifactError, RunDir
from qbert_ray.storage.lock import locked
from qbert_ray.storage.stages import BY_NAME, REQUESTED, STAGES, Stage

console = open_console()
errors = open_console(stderr=True)

Redo = Annotated[bool, typer.Option("--redo", help="Delete the outputs of this stage and of all after it, and run it again.")]


def command_of(stage: Stage) -> Callable[..., None]:
    """The command that runs a stage."""
    special = {"semantic_ids": semantic_ids, "score": score}
    if stage.name in special:
        return special[stage.name]

    def command(config: Files, overrides: Overrides = None, redo: Redo = False) -> None:
        _run_one(stage, load_config(list(config), list(overrides or [])), redo)

    command.__doc__ = f"{stage.help}\n\nExample: qbert-ray {stage.command} -c shop.yaml"
    return command


def semantic_ids(
    config: Files,
    overrides: Overrides = None,
    redo: Redo = False,
    append: Annotated[
        Literal["new", "all"] | None,
        typer.Option(
            "--append",
            metavar="[=all]",
            help="Only give IDs to new items of the input files; published IDs never change. =all: also to items that the ingest left out.",
        ),
    ] = None,
) -> None:
    """Assign every item its semantic ID, without collisions.

    Example: qbert-ray semantic-ids -c shop.yaml

    Example: qbert-ray semantic-ids --append -c shop.yaml
    """
    if append and redo:
        raise ConfigError("--append keeps every ID and --redo forgets them all: choose one")
    settings = load_config(list(config), list(overrides or []))
    if append:
        _append(settings, append == "all")
    else:
        _run_one(BY_NAME["semantic_ids"], settings, redo)


def score(
    config: Files,
    overrides: Overrides = None,
    redo: Redo = False,
    histories: Annotated[
        str | None,
        typer.Option(
            "--histories",
            metavar="FILE",
            help="Score the users of this file instead, into score_histories: a path here, or under data.root.",
        ),
    ] = None,
) -> None:
    """Write the k best items for every user.

    Example: qbert-ray score -c shop.yaml

    Example: qbert-ray score --histories new_users.parquet -c shop.yaml

    Example: qbert-ray score --redo -c shop.yaml score.interactions=today/*.parquet
    """
    settings = load_config(list(config), list(overrides or []))
    if histories:
        settings = with_values(settings, {"score.histories": str(Path(histories).absolute()) if Path(histories).exists() else histories})
    requested = [stage for stage in REQUESTED if not stage.skipped(settings)]
    _run_one(requested[0] if requested else BY_NAME["score"], settings, redo)


def serve(
    config: Files = [],  # noqa: B006 - typer hands over a list of its own
    overrides: Overrides = None,
    stop: Annotated[bool, typer.Option("--stop", help="End what is served on the cluster; needs no --config.")] = False,
) -> None:
    """Answer requests over HTTP from a finished run, with Ray Serve: /recommend, /similar and /health.

    What changes in the run is taken over while requests are answered. On a cluster, the same command with another run takes its place.

    Example: qbert-ray serve -c shop.yaml

    Example: curl -d '{"history": ["item-1"], "k": 3}' http://127.0.0.1:8000/recommend
    """
    if not (config or stop):
        raise typer.BadParameter("name the config of the run with --config")
    settings = load_config(list(config), list(overrides or []))
    from qbert_ray.execution.ray_session import session
    from qbert_ray.serving import ray_serve

    if stop:
        with session(settings.compute.address):
            ray_serve.stop()
        return
    from qbert_ray.pipeline import status

    for stage in _before(REQUESTED[0], None):  # what is served is what the config says
        if not stage.skipped(settings):
            status(stage, settings, RunDir(settings.run.dir), files=False)
    with stoppable(errors):
        ray_serve.serve_run(settings, lambda line: console.print(line, markup=False, soft_wrap=True))


def _run_one(stage: Stage, config: Config, redo: bool) -> None:
    journal = journal_of(config, config.run.dir)
    run_stages(config, journal, stage, stage.command if redo else None)
    if stage.name == "evaluate":
        show_metrics(RunDir(config.run.dir), journal)
    if stage in REQUESTED:
        journal.files({"score": RunDir(config.run.dir).path(stage.name)})


def journal_of(config: Config, folder: str) -> Journal:
    """The journal of a command that works in a folder."""
    return open_journal(config.run.log, console, folder, list(config.data.domains))


def show_metrics(directory: RunDir, journal: Journal) -> None:
    """Show the metrics of each domain of a run."""
    for domain, content in directory.read_json("evaluate/metrics.json").items():
        journal.metrics(domain, content)


def of_ray(config: Config, always: bool = False) -> str:
    """What a command does with Ray before anything else, after a semicolon; empty where it uses none.

    Args:
        always: whether it uses Ray whatever `compute.executor` says, as sweeps do.
    """
    if config.compute.executor != "ray" and not always:
        return ""
    address = config.compute.address or os.environ.get("RAY_ADDRESS")
    return f"; connecting to Ray at {address}" if address else "; starting Ray"


def run_stages(config: Config, journal: Journal, only: Stage | None, redo: str | None) -> None:
    """Run every stage that is not done yet.

    Args:
        config: of the run.
        journal: receives what happens.
        only: run this stage alone; None: all, and what the section `score` asks for in addition to them.
        redo: command of a stage that is forgotten first, with all after it.

    Raises:
        ArtifactError: existing outputs were made with another config or from other data.
    """
    journal.begin(f"run directory {config.run.dir}{of_ray(config)}")
    from qbert_ray.execution.executor import open_executor
    from qbert_ray.inputs.sources import check_root
    from qbert_ray.pipeline import preflight, redo_from, run_stage, save_config, status

    by_command = {stage.command: stage for stage in (*STAGES, *REQUESTED)}
    if redo is not None and redo not in by_command:
        raise ConfigError(f"--from {redo}: no such stage; the stages are {', '.join(stage.command for stage in STAGES)}")
    directory, forgotten = RunDir(config.run.dir), by_command[redo] if redo else None
    for stage in _before(only, forgotten):  # refuse a changed config before anything is done or deleted
        if not stage.skipped(config):
            _check_done(stage, config, directory, only, journal)
    stages = [only] if only else [*STAGES, *(stage for stage in REQUESTED if not stage.skipped(config))]
    if not directory.exists("ingest/manifest.json") and not config.compute.address:
        check_root(config.data.root)  # before Ray starts, which takes longer than this check
    with stoppable(errors), locked(directory), open_executor(config) as executor:
        if forgotten in STAGES and not (only and only.skipped(config)):
            redo_from(forgotten.name, directory)
        for stage in REQUESTED:
            if stage in stages and (stage == forgotten or _is_other(stage, config, directory)):
                directory.delete(stage.name)
        preflight(stages, config, directory, executor)
        for stage in stages:
            why = stage.skipped(config)
            known = None if why else status(stage, config, directory)
            started = time.monotonic()
            with journal.stage(stage.command) as progress:
                manifest = run_stage(stage, config, directory, executor, progress)
            journal.done(stage.command, manifest, None if known else time.monotonic() - started, why)
            for warning in manifest.counts.get("warnings", []) if manifest else []:
                journal.warn(warning)
        if only is None:  # all stages are of this config; those that were done before have not saved it
            save_config(directory, config)


def _before(only: Stage | None, forgotten: Stage | None) -> tuple[Stage, ...]:
    """The stages whose outputs are used as they are."""
    last = BY_NAME["refit"] if only in REQUESTED else only
    ends = [STAGES.index(last) + 1] if last else []
    return STAGES[: min([len(STAGES), *ends, *([STAGES.index(forgotten)] if forgotten in STAGES else [])])]


def _check_done(stage: Stage, config: Config, directory: RunDir, only: Stage | None, journal: Journal) -> None:
    """Raise if a stage was done with another config or other input files; where users are scored alone, items files may have changed.

    Raises:
        ArtifactError: the message says what differs, and how to redo the stage.
    """
    from qbert_ray.pipeline import status

    files = not _reads_others(only, config)
    try:
        status(stage, config, directory, files)
    except ArtifactError:
        if only is None or only.name != "score":
            raise
        status(stage, config, directory, files, items=False)
        if stage.name == "ingest":  # and not again for each later stage that reads them
            journal.warn(
                "the items files have changed since they were ingested: the same items are ranked as before; "
                "new, changed and removed ones are taken over by qbert-ray semantic-ids --append"
            )


def _reads_others(only: Stage | None, config: Config) -> bool:
    """Whether only histories of other files than the run's are scored, so that the run's files may have grown since."""
    return only in REQUESTED or (only is not None and only.name == "score" and bool(config.score.interactions))


def _is_other(stage: Stage, config: Config, directory: RunDir) -> bool:
    """Whether a requested stage was done for another request."""
    from qbert_ray.pipeline import status

    try:
        status(stage, config, directory)
    except ArtifactError:
        return True
    return False


def _append(config: Config, everything: bool) -> None:
    journal = journal_of(config, config.run.dir)
    journal.begin(f"run directory {config.run.dir}{of_ray(config)}")
    from qbert_ray.append import append_ids
    from qbert_ray.execution.executor import open_executor

    directory = RunDir(config.run.dir)
    with locked(directory), open_executor(config) as executor, journal.stage("append") as progress:
        version = append_ids(config, directory, executor, progress, everything)
    journal.appended(version)
