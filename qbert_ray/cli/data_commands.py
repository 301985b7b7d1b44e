"""Commands that prepare data: public data sets, the demo shop, and a first config for the user's own files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.padding import Padding
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qbert_ray.cli.terminal import open_console, printable, shown
from qbert_ray.config.loading import ConfigError, with_values
from qbert_ray.config.schema import Config

console = open_console()
PER_USER, WIDTH = 10.0, 64  # of a large demo shop: purchases, numbers of an item's vector


def fetch(
    name: Annotated[str | None, typer.Argument(help="movielens-1m, amazon-2023:CATEGORY or amazon-2018:CATEGORY; none: list them.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the files; data/NAME unless said otherwise.")] = None,
) -> None:
    """Download a public data set and check it; an interrupted download resumes.

    Example: qbert-ray fetch movielens-1m -o data/movielens-1m

    Example: qbert-ray fetch amazon-2023:Musical_Instruments -o data/instruments
    """
    from qbert_ray.inputs import public_data  # imports polars

    if name is None:
        for kind in ["movielens-1m", *public_data.CATEGORIES]:
            categories = public_data.CATEGORIES.get(kind, [])
            data = public_data.find(f"{kind}:{categories[0]}" if categories else kind)
            console.print(f"[bold]{kind}{':CATEGORY' if categories else ''}[/bold]  {shown(data.page)}", soft_wrap=True)
            console.print(Padding(shown(data.terms), (0, 0, 0, 4)))
            if categories:
                console.print(Padding(", ".join(categories), (0, 0, 0, 4)), style="dim")
        return
    folder = output or Path("data") / name.replace(":", "-")
    data = public_data.find(name)
    console.print(f"[bold]{shown(data.title)}[/bold], from {shown(data.page)}", soft_wrap=True)
    console.print(f"terms: {shown(data.terms)}\ncite:  {shown(data.cite)}", soft_wrap=True)
    with _bars() as report:
        came = public_data.fetch(name, folder, report)
    for file in data.files:
        size = (folder / file.name).stat().st_size
        console.print(
            f"[green]✓[/green] {shown(file.name)}, {size:,} bytes{'' if file.name in came else ': was there, and is what came then'}"
        )
    console.print(f"next: qbert-ray init {_argument(folder)} -o {_argument(f'{folder.name}.yaml')}", soft_wrap=True)


def init(
    files: Annotated[list[Path], typer.Argument(metavar="FOLDER|FILE", help="Items and interactions: Parquet, CSV, TSV or JSONL.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The config to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing config.")] = False,
) -> None:
    """Write a first config for your files, with what is guessed of them as comments.

    Example: qbert-ray init data/shop -o shop.yaml

    Example: qbert-ray init catalog.csv.gz "sales/*.parquet" -o shop.yaml
    """
    from qbert_ray.inputs.starter_page import write_config  # imports polars

    console.print(printable(write_config(files, output, force)), end="", markup=False, soft_wrap=True)
    console.print(f"[green]✓[/green] {shown(str(output))}; next: qbert-ray validate -c {_argument(output)}", soft_wrap=True)


def check_files(config: Config) -> bool:
    """Print one page about the input files, first their names, then their content; returns whether all can be used."""
    console.print(f"looking at the files of {', '.join(config.data.domains)} in {config.data.root}", markup=False, soft_wrap=True)
    from qbert_ray.inputs import validation  # imports polars

    sources = validation.open_sources(config)
    console.print(printable(validation.format_files(sources)), markup=False, soft_wrap=True)
    console.print()
    if validation.in_this_process(config, sources):
        config = with_values(config, {"compute.executor": "local"})
    from qbert_ray.execution.executor import open_executor

    with open_executor(config) as executor:
        report = validation.validate(config, executor, sources)
    console.print(printable(validation.format_validation(report)), markup=False, soft_wrap=True)
    return not any(domain["errors"] for domain in report.values())


def demo_data(
    folder: Annotated[Path, typer.Argument(help="Where the shop's files go.")],
    seed: Annotated[int, typer.Option(help="Another seed, another shop.")] = 0,
    media: Annotated[
        bool, typer.Option("--media", help="Also sounds and clips, for configs/demo-av.yaml (needs the extra media).")
    ] = False,
    scale: Annotated[
        int | None, typer.Option(metavar="ITEMS", help="A shop of so many items with vectors instead of images, for configs/scale.yaml.")
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="With --scale: number of users; as many as items unless said otherwise.")] = None,
    per_user: Annotated[
        float | None, typer.Option(min=5, help=f"With --scale: purchases per user, on average; {PER_USER:g} unless said otherwise.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help=f"With --scale: width of the item vectors; {WIDTH} unless said otherwise.")
    ] = None,
) -> None:
    """Generate the demo shop: a made-up catalog with images, and made-up shoppers; or a large one without images.

    Example: qbert-ray demo-data runs/demo/data

    Example: qbert-ray demo-data runs/demo-av/data --media

    Example: qbert-ray demo-data runs/scale/data --scale 100000
    """
    from qbert_ray.inputs import demo_shop, scaled_shop

    if scale is None and (users is not None or per_user is not None or width is not None):
        raise ConfigError("--users, --per-user and --width are of a shop of a given size: say --scale too")
    if scale is not None and media:
        raise ConfigError("--media is not made with --scale: such a shop has vectors, no files")
    if (folder / "interactions.parquet").exists():  # written last
        console.print(f"the demo shop is already in {shown(folder)}; delete the folder for another")
        return
    counts = (
        demo_shop.generate(folder, seed, media=media)
        if scale is None
        else scaled_shop.generate(folder, scale, users or scale, per_user or PER_USER, width or WIDTH, seed)
    )
    console.print(
        f"generated a demo shop in {shown(folder)}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
    )
    if scale is not None:
        console.print(f"next: qbert-ray run -c configs/scale.yaml data.root={_argument(folder)}", soft_wrap=True)


def _argument(path: object) -> str:
    """A path for a command that is shown: quoted where a shell would split it."""
    return shown(shlex.quote(str(path)))


@contextmanager
def _bars() -> Iterator:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def report(name: str) -> Callable[[int, int | None], None]:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield report
