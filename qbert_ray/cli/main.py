"""`qbert-ray`: one command for the whole run, and one per stage."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qbert_ray import __version__
from qbert_ray.cli import config_commands, data_commands, id_commands, stage_commands
from qbert_ray.cli.arguments import Files, Overrides
from qbert_ray.cli.console import trials_table
from qbert_ray.cli.journal import Journal, Terminal
from qbert_ray.cli.stage_commands import journal_of, of_ray, run_stages, show_metrics
from qbert_ray.cli.terminal import open_console, shown
from qbert_ray.config.loading import ConfigError, load_config, refuse_credentials
from qbert_ray.config.schema import Config
from qbert_ray.config.search import Sweep
from qbert_ray.execution.failures import root_cause, stoppable
from qbert_ray.storage.directory import ArtifactError, RunDir
from qbert_ray.storage.lock import locked
from qbert_ray.storage.stages import STAGES

if TYPE_CHECKING:  # they import Ray
    from qbert_ray.sweeps.trials import Plan
    from qbert_ray.sweeps.tuning import Best

app = typer.Typer(
    name="qbert-ray",
    help="Semantic IDs and recommendations from a multimodal catalog, on Ray.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = open_console()
errors = open_console(stderr=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"qbert-ray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Multimodal sequential recommendation with semantic IDs, on Ray."""


app.command(rich_help_panel="Data")(data_commands.fetch)
app.command(rich_help_panel="Data")(data_commands.init)
app.command("demo-data", rich_help_panel="Data")(data_commands.demo_data)


@app.command(rich_help_panel="Whole run")
def run(
    config: Files,
    overrides: Overrides = None,
    redo: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STAGE", help="Redo this stage and all after it.", autocompletion=lambda: [stage.command for stage in STAGES]
        ),
    ] = None,
) -> None:
    """Run every stage that is not done yet, and show the metrics.

    Example: qbert-ray run -c shop.yaml

    Example: qbert-ray run -c shop.yaml --from quantizer quantizer.num_levels=3
    """
    settings = load_config(list(config), list(overrides or []))
    journal = journal_of(settings, settings.run.dir)
    run_stages(settings, journal, None, redo)
    directory = RunDir(settings.run.dir)
    show_metrics(directory, journal)
    results = {"semantic IDs": "semantic_ids", "score": "score", "metrics": "evaluate/metrics.json"}
    journal.files({name: directory.path(folder) for name, folder in results.items()})
    _write_report_or_say(settings.run.dir, journal)


@app.command(rich_help_panel="Whole run")
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the generated shop and the run go.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Generate a small shop and run every stage on it, without a download.

    Example: qbert-ray demo

    Example: qbert-ray demo runs/demo compute.executor=local
    """
    data_commands.demo_data(folder / "data")
    places = [f"run.dir={json.dumps(str(folder))}", f"data.root={json.dumps(str(folder / 'data'))}"]  # a name may look like YAML
    run(["configs/demo.yaml"], [*places, *(overrides or [])])


for _stage in STAGES:
    app.command(_stage.command, rich_help_panel=_stage.panel)(stage_commands.command_of(_stage))
app.command(rich_help_panel="Serving")(stage_commands.serve)


@app.command(rich_help_panel="Whole run")
def sweep(
    config: Files,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and what they will cost; run nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume a sweep that was begun; fail where there is none.")] = False,
) -> None:
    """Train once for each setting of some fields, on Ray Tune; an interrupted sweep resumes.

    Example: qbert-ray sweep -c shop.yaml -c configs/sweeps/paper.yaml
    """
    settings = load_config(list(config), list(overrides or []))
    from qbert_ray.sweeps import tuning
    from qbert_ray.sweeps.trials import Plan

    plan = Plan(settings)
    journal = journal_of(settings, plan.folder.uri)
    journal.begin(f"sweep {settings.sweep.name} in {settings.run.dir}{of_ray(settings, always=True)}")
    _warn_of_local(settings, journal)
    tuning.check_base(plan)
    if resume and not plan.folder.exists(tuning.SWEEP):
        raise ConfigError(f"--resume: no sweep {settings.sweep.name} in {settings.run.dir}; begin it without --resume")
    if dry_run:
        _show_trials(plan, tuning.estimate(plan))
        return
    best = _search(plan, journal)
    _write_report_or_say(plan.folder.uri, journal)
    results = {"trials": tuning.TRIALS, "curves": tuning.CURVES} | ({"best": tuning.BEST} if best else {})
    journal.files({name: plan.folder.path(file) for name, file in results.items()})
    if not best:
        raise ArtifactError("no setting was finished under every seed: the errors of failed trials are in the table above")


@app.command(rich_help_panel="Whole run")
def reproduce(
    table: Annotated[Path, typer.Argument(help="What to compare, such as configs/tables/fusion.yaml.")],
    config: Files,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the table, or s3:// or gs://; further data sets add to it.")],
    overrides: Overrides = None,
) -> None:
    """Reproduce a table of the paper: variants of a config over seeds, with intervals, next to the published figures.

    Example: qbert-ray reproduce configs/tables/fusion.yaml -c shop.yaml -o results/fusion
    """
    from qbert_ray.sweeps import tables

    what = tables.load_table(table)
    refuse_credentials("--output", output)
    folder = RunDir(output)
    folder.exists(tables.RANKS)  # a location that cannot be opened is reported before hours of training
    settings = load_config(list(config), list(overrides or []))
    seeds = settings.sweep.seeds or what.seeds
    skipped = tables.impossible_rows(settings, what)
    variants = {name: overlay for name, overlay in what.variants.items() if name not in skipped}
    limits = settings.sweep.model_dump(include={"max_seconds", "max_tokens", "max_concurrent", "max_failures"})
    compared = {"name": f"table-{table.stem}", "stage": "evaluate", "search": "variants", "variants": variants, "seeds": seeds}
    # A search that the config has of its own is another sweep.
    settings = settings.model_copy(update={"sweep": Sweep.model_validate(limits | compared)})
    from qbert_ray.sweeps import tuning
    from qbert_ray.sweeps.trials import Plan

    plan = Plan(settings)
    journal = journal_of(settings, plan.folder.uri)
    journal.begin(f"{what.title} in {settings.run.dir}{of_ray(settings, always=True)}")
    _warn_of_local(settings, journal)
    for name, why in skipped.items():
        journal.warn(f"row {name!r} is left out: {why}")
    tuning.check_base(plan)
    _search(plan, journal)
    tables.collect(folder, tuning.ranks(plan, what), what, skipped)
    journal.files({"table": folder.inside(tables.MARKDOWN).uri, "ranks": folder.inside(tables.RANKS).uri})
    failed = [plan.names[trial.name] for trial in plan.trials if plan.result(trial).get("status") != "done"]
    if failed:
        raise ArtifactError(f"the table lacks trials of {', '.join(sorted(set(failed)))}; the same command tries them again")


def _warn_of_local(settings: Config, journal: Journal) -> None:
    if settings.compute.executor == "local":
        journal.warn("compute.executor=local is for single runs; the trials of sweeps and tables run on Ray Tune")


def _search(plan: Plan, journal: Journal) -> Best | None:
    """Run the stages that the trials of a sweep share, then the trials; returns the result of `tuning.search`."""
    from qbert_ray.execution.ray_session import session
    from qbert_ray.sweeps import tuning

    with stoppable(errors), locked(plan.folder), session(plan.config.compute.address):
        tuning.check_capacity(plan)
        with locked(plan.run):  # only while stages are written there: several sweeps may read it
            for seed in plan.seeds:
                for name in plan.to_prepare(seed):
                    started, done = time.monotonic(), tuning.is_prepared(plan, seed, name)
                    with journal.stage(name) as progress:
                        manifest = tuning.prepare(plan, seed, name, progress)
                    if manifest is not None:
                        journal.done(name, manifest, None if done else time.monotonic() - started)
        with journal.stage("trials") as progress:
            best = tuning.search(plan, progress)
    journal.trials(plan.folder.read_json(tuning.SWEEP), tuning.trial_rows(plan))
    return best


def _show_trials(plan: Plan, seconds: list[float | None]) -> None:
    if not plan.trials:
        console.print(f"{plan.sweep.num_trials} trials that {plan.sweep.search} makes up as it goes")
        return
    shared = [(plan.shared(trial) or ["-"])[-1] for trial in plan.trials]
    console.print(trials_table([(t.name, t.values, t.seed) for t in plan.trials], shared, seconds))
    known = [cost for cost in seconds if cost is not None]
    if known:
        console.print(
            f"{sum(known) / 60:.0f} minutes one after the other, judged by how long the stages of {shown(plan.config.run.dir)} took"
        )
    else:
        console.print(f"how long they take is not known: {shown(plan.config.run.dir)} has not done the stages they repeat")


@app.command(rich_help_panel="Data")
def validate(config: Files, overrides: Overrides = None) -> None:
    """Report on one page what is wrong with the input files; nothing is written.

    Example: qbert-ray validate -c shop.yaml
    """
    if not data_commands.check_files(load_config(list(config), list(overrides or []))):
        raise typer.Exit(2)


@app.command(rich_help_panel="Looking")
def describe(
    config: Files,
    overrides: Overrides = None,
    items: Annotated[int, typer.Option(min=1, help="Items of the catalog.")] = 6250,
) -> None:
    """Parameters and multiply-adds of the sequence model by module, as the paper counts and as they are.

    Example: qbert-ray describe -c configs/paper.yaml --items 6250
    """
    from qbert_ray.sequence.complexity import complexity_table

    settings = load_config(list(config), list(overrides or []))
    console.print(complexity_table(settings, items))


app.command(rich_help_panel="Looking")(config_commands.config)


@app.command(rich_help_panel="Looking")
def report(
    directory: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The directory of a run, finished or not, or of a sweep.")],
) -> None:
    """Write one HTML file that shows how a run or a sweep went: figures, items, semantic IDs, recommendations.

    Example: qbert-ray report runs/movielens
    """
    _write_report(directory, Terminal(console))


app.add_typer(id_commands.app, rich_help_panel="Looking")


def _write_report_or_say(directory: str, journal: Journal) -> None:
    """Write the report; a failure is printed and does not fail the run, which is done."""
    try:
        _write_report(directory, journal)
    except Exception as error:  # noqa: BLE001
        journal.warn(f"no report: {type(error).__name__}: {error}")


def _write_report(directory: str, journal: Journal) -> None:
    from qbert_ray.report.page import write  # imports plotly, which the other commands do not need

    path, problems = write(directory)
    for problem in problems:
        journal.warn(problem)
    journal.files({"report": path})


def _spelled_out(arguments: list[str]) -> list[str]:
    """The arguments with the value that --append has where none is written."""
    return ["--append=new" if each == "--append" else each for each in arguments]


def main(arguments: list[str] | None = None) -> None:
    """The command line; errors of the user end with one message and exit status 2, others with their traceback."""
    try:
        app(args=_spelled_out(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        cause = root_cause(error)
        if not isinstance(cause, (ValueError, FloatingPointError, OSError)):
            raise
        errors.print(f"[red]error:[/red] {shown(str(cause))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
