"""`qbert-ray`: one command for the whole run, and one per stage."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from qbert_ray import completion, config_commands, data_commands, id_commands, model_commands
from qbert_ray.artifacts import ArtifactError, RunDir
from qbert_ray.config import Config
from qbert_ray.console import StageBar, metrics_table, stage_line, sweep_table, trials_table
from qbert_ray.failures import root_cause
from qbert_ray.overlays import ConfigError, load_config

app = typer.Typer(
    name="qbert-ray",
    help="Semantic IDs and recommendations from a multimodal catalog, on Ray.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

Files = Annotated[
    list[str],
    typer.Option("--config", "-c", metavar="FILE", help="YAML overlays, merged left to right.", autocompletion=completion.config_files),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.FIELD=VALUE", help="Single values on top of the files.", autocompletion=completion.overrides),
]

app.command(rich_help_panel="Data")(data_commands.fetch)
app.command(rich_help_panel="Data")(data_commands.init)


@app.command(rich_help_panel="Whole run")
def run(
    config: Files,
    overrides: Overrides = None,
    redo: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Redo this stage and all after it.", autocompletion=lambda: list(_STAGES)),
    ] = None,
) -> None:
    """Do every stage that is not done yet, and show the metrics.

    Example: qbert-ray run -c shop.yaml

    Example: qbert-ray run -c shop.yaml --from train-rqvae rqvae.num_levels=3
    """
    settings = load_config(list(config), list(overrides or []))
    _run_stages(settings, None, redo)
    directory = RunDir(settings.run.dir)
    _show_metrics(directory)
    console.print(f"\nsemantic IDs     {escape(directory.path('semantic_ids'))}")
    console.print(f"recommendations  {escape(directory.path('recommendations'))}")
    console.print(f"metrics          {escape(directory.path('evaluation/metrics.json'))}", soft_wrap=True)
    _write_report_or_say(settings.run.dir)


def _stage_command(name: str, help_text: str) -> Callable[..., None]:
    def command(
        config: Files,
        overrides: Overrides = None,
        redo: Annotated[bool, typer.Option("--redo", help="Forget this stage and all after it first.")] = False,
    ) -> None:
        settings = load_config(list(config), list(overrides or []))
        _run_stages(settings, name, name if redo else None)
        if name == "evaluate":
            _show_metrics(RunDir(settings.run.dir))

    command.__doc__ = f"{help_text}\n\nExample: qbert-ray {name} -c shop.yaml"
    return command


def assign_ids(
    config: Files,
    overrides: Overrides = None,
    redo: Annotated[bool, typer.Option("--redo", help="Forget this stage and all after it first.")] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Only give IDs to new items of the input files; published IDs never move.")
    ] = False,
) -> None:
    """Give every item its semantic ID, without collisions.

    Example: qbert-ray assign-ids -c shop.yaml

    Example: qbert-ray assign-ids --append -c shop.yaml
    """
    if append and redo:
        raise ConfigError("--append keeps every ID and --redo forgets them all: choose one")
    if append:
        _append(load_config(list(config), list(overrides or [])))
    else:
        _stage_command("assign-ids", "")(config, overrides, redo)


_STAGES = {
    "ingest": ("Stages: input", "Read the catalog and the interactions: k-core, leave-one-out, sequences."),
    "features": ("Stages: input", "Encode texts and pictures; collaborative vectors from training interactions."),
    "train-fusion": ("Stage 1: fusion", "Train the dynamic cross-modal fusion, embed the catalog."),
    "train-rqvae": ("Stage 2: semantic IDs", "Train the residual quantizer."),
    "assign-ids": ("Stage 2: semantic IDs", ""),
    "pretrain": ("Stage 3: sequence model", "Multi-mask pre-training over the source domains."),
    "finetune": ("Stage 3: sequence model", "Fine-tune on each target domain."),
    "train-memory": ("Stages: ranking", "Item-item weights of training interactions, and how to mix them with the sequencer's scores."),
    "evaluate": ("Stages: ranking", "Rank every item for every user: hit rate and NDCG beside the floors."),
    "score": ("Stages: ranking", "The k best items for every user."),
}
for _name, (_panel, _help) in _STAGES.items():
    app.command(_name, rich_help_panel=_panel)(assign_ids if _name == "assign-ids" else _stage_command(_name, _help))


@app.command(rich_help_panel="Whole run")
def sweep(
    config: Files,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and what they will cost; run nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was begun; fail where there is none.")] = False,
) -> None:
    """Train once for each setting of some fields, on Ray Tune; a sweep that was cut goes on.

    Example: qbert-ray sweep -c shop.yaml -c configs/sweeps/paper.yaml
    """
    settings = load_config(list(config), list(overrides or []))
    console.print(f"[dim]sweep {escape(settings.sweep.name)} in {escape(settings.run.dir)}; starting Ray[/dim]")
    from qbert_ray.pipelines import tuning
    from qbert_ray.pipelines.session import session
    from qbert_ray.pipelines.trials import Plan

    plan = Plan(settings)
    tuning.check_base(plan)
    if resume and not plan.folder.exists(tuning.SWEEP):
        raise ConfigError(f"--resume: no sweep {settings.sweep.name} in {settings.run.dir}; begin it without --resume")
    if dry_run:
        _show_trials(plan, tuning.estimate(plan))
        return
    with _stoppable(), session(settings.compute.address):
        tuning.check_room(plan)
        for seed in plan.seeds:
            for name in plan.to_prepare(seed):
                started, done = time.monotonic(), tuning.is_prepared(plan, seed, name)
                with StageBar(console, name) as bar:
                    manifest = tuning.prepare(plan, seed, name, bar)
                if manifest is not None:
                    console.print(stage_line(name, manifest, None if done else time.monotonic() - started), soft_wrap=True)
        with StageBar(console, "trials") as bar:
            best = tuning.search(plan, bar)
    console.print(sweep_table(plan.folder.read_json(tuning.SWEEP), tuning.trial_rows(plan)))
    _write_report_or_say(plan.folder.uri)
    console.print(f"trials   {escape(plan.folder.path(tuning.TRIALS))}\ncurves   {escape(plan.folder.path(tuning.CURVES))}", soft_wrap=True)
    if best:
        console.print(f"best     {escape(plan.folder.path(tuning.BEST))}: qbert-ray run -c <the same files> -c <this one>", soft_wrap=True)
    else:
        raise ArtifactError("no setting was finished under every seed: the errors of failed trials are in the table above")


def _show_trials(plan: Any, seconds: list[float | None]) -> None:
    if not plan.trials:
        console.print(f"{plan.sweep.num_trials} trials that {plan.sweep.search} makes up as it goes")
        return
    shared = [(plan.shared(trial) or ["-"])[-1] for trial in plan.trials]
    console.print(trials_table([(t.name, t.values, t.seed) for t in plan.trials], shared, seconds))
    known = [cost for cost in seconds if cost is not None]
    if known:
        console.print(
            f"{sum(known) / 60:.0f} minutes one after the other, judged by how long the stages of {escape(plan.config.run.dir)} took"
        )
    else:
        console.print(f"how long they take is not known: {escape(plan.config.run.dir)} has not done the stages they repeat")


@app.command(rich_help_panel="Data")
def validate(config: Files, overrides: Overrides = None) -> None:
    """Say in one page what is wrong with the input files; nothing is written.

    Example: qbert-ray validate -c shop.yaml
    """
    from qbert_ray.pipelines.session import session
    from qbert_ray.pipelines.validation import format_validation
    from qbert_ray.pipelines.validation import validate as check

    settings = load_config(list(config), list(overrides or []))
    with session(settings.compute.address):
        report = check(settings)
    console.print(format_validation(report), markup=False)
    if any(domain["errors"] for domain in report.values()):
        raise typer.Exit(2)


@app.command(rich_help_panel="Looking")
def describe(
    config: Files,
    overrides: Overrides = None,
    items: Annotated[int, typer.Option(help="Items of the catalog.")] = 6250,
) -> None:
    """Parameters and multiply-adds of the sequencer by module, as the paper counts and as they are.

    Example: qbert-ray describe -c configs/paper.yaml --items 6250
    """
    from qbert_ray.describe import complexity_table

    settings = load_config(list(config), list(overrides or []))
    console.print(complexity_table(settings, items))


app.command(rich_help_panel="Looking")(config_commands.config)
app.command(rich_help_panel="Looking")(model_commands.export)


@app.command(rich_help_panel="Looking")
def report(
    directory: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The directory of a run, finished or not, or of a sweep.")],
) -> None:
    """Write one HTML file that shows how a run or a sweep went: figures, items, semantic IDs, recommendations.

    Example: qbert-ray report runs/movielens
    """
    _write_report(directory)


app.add_typer(id_commands.app, rich_help_panel="Looking")


@app.command("demo-data", rich_help_panel="Data")
def demo_data(
    folder: Annotated[Path, typer.Argument(help="Where the shop's files go.")],
    seed: Annotated[int, typer.Option(help="Another seed, another shop.")] = 0,
) -> None:
    """Generate the demo shop: a made-up catalog with pictures, and made-up shoppers.

    Example: qbert-ray demo-data runs/demo/data
    """
    from qbert_ray.demo import generate

    if (folder / "interactions.parquet").exists():  # written last
        console.print(f"the demo shop is already in {folder}; delete the folder for another")
        return
    counts = generate(folder, seed)
    console.print(
        f"generated a demo shop in {folder}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
    )


class Terminated(KeyboardInterrupt):
    """SIGTERM: how `ray job stop`, a scheduler or a machine that goes down ends a run."""


def _terminate(*_: object) -> None:
    raise Terminated


def _run_stages(config: Config, only: str | None, redo: str | None) -> None:
    console.print(f"[dim]run directory {escape(config.run.dir)}; starting Ray[/dim]")
    from qbert_ray.pipelines.session import session
    from qbert_ray.pipelines.stages import BY_NAME, STAGES, preflight, redo_from, run_stage, status

    if redo is not None and redo not in BY_NAME:
        raise ConfigError(f"--from {redo}: no such stage; the stages are {', '.join(BY_NAME)}")
    directory = RunDir(config.run.dir)
    first = STAGES.index(BY_NAME[redo]) if redo else len(STAGES)
    last = STAGES.index(BY_NAME[only]) + 1 if only else len(STAGES)
    for stage in STAGES[: min(first, last)]:  # refuse a changed config before anything is done or deleted
        if not stage.skipped(config):
            status(stage, config, directory)
    if redo is not None:
        redo_from(redo, directory)
    stages = [BY_NAME[only]] if only else list(STAGES)
    with _stoppable(), session(config.compute.address):
        preflight(stages, config, directory)
        for stage in stages:
            why = stage.skipped(config)
            known = None if why else status(stage, config, directory)
            started = time.monotonic()
            with StageBar(console, stage.name) as bar:
                manifest = run_stage(stage, config, directory, bar)
            console.print(stage_line(stage.name, manifest, None if known else time.monotonic() - started, why), soft_wrap=True)
            for warning in manifest.counts.get("warnings", []) if manifest else []:
                console.print(f"[yellow]! {escape(warning)}[/yellow]", soft_wrap=True)


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM end what is inside with one line and the usual exit status."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        errors.print("stopped; the same command goes on from here")
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_report_or_say(directory: str) -> None:
    """What it tells of is done, whatever becomes of the report."""
    try:
        _write_report(directory)
    except Exception as error:  # noqa: BLE001
        console.print(f"[yellow]! no report: {escape(f'{type(error).__name__}: {error}')}[/yellow]", soft_wrap=True)


def _write_report(directory: str) -> None:
    from qbert_ray.report.page import write  # brings plotly, which the other commands do without

    path, problems = write(directory)
    for problem in problems:
        console.print(f"[yellow]! {escape(problem)}[/yellow]", soft_wrap=True)
    console.print(f"report           {escape(path)}", soft_wrap=True)


def _append(config: Config) -> None:
    console.print(f"[dim]run directory {escape(config.run.dir)}; starting Ray[/dim]")
    from qbert_ray.pipelines.appending import append_ids
    from qbert_ray.pipelines.session import session

    with session(config.compute.address), StageBar(console, "append") as bar:
        version = append_ids(config, RunDir(config.run.dir), bar)
    console.print(
        f"[green]✓[/green] version {version['version']} ({version['fingerprint']}): {version['items']:,} semantic IDs, {version['added']:,} added; "
        f"of those before {version['unchanged']:,} items unchanged, {version['changed']:,} changed, {version['gone']:,} gone from the files",
        soft_wrap=True,
    )


def _show_metrics(directory: RunDir) -> None:
    for domain, content in directory.read_json("evaluation/metrics.json").items():
        console.print()
        console.print(metrics_table(domain, content))
        if "cold" in content:
            console.print(metrics_table(domain, content["cold"], "items that no training saw"))


def main(arguments: list[str] | None = None) -> None:
    """The command line; errors of the user end with one message and exit status 2, others with their traceback."""
    try:
        app(args=arguments)
    except Exception as error:
        cause = root_cause(error)
        if not isinstance(cause, (ValueError, FloatingPointError, OSError)):
            raise
        errors.print(f"[red]error:[/red] {escape(str(cause))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
