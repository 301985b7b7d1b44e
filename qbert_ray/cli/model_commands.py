"""`qbert-ray export`: the trained model for use outside of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qbert_ray.cli.terminal import shown

console = Console(highlight=False)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A finished run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")],
    domain: Annotated[str | None, typer.Option(help="Where the run has several target domains.")] = None,
) -> None:
    """Write the sequence model of a domain as ONNX, with the table from item IDs to what it reads.

    Example: qbert-ray export runs/demo -o exported/demo
    """
    from qbert_ray.ranking import export as exporting  # brings torch, which the other commands do without

    about = exporting.export(run, output, domain)
    console.print(
        f"[green]✓[/green] {shown(about['domain'])}: scores of {about['items']:,} items after up to {about['history']} others; "
        f"from PyTorch they differ by at most {about['largest_difference']:.1e} standard deviations",
        soft_wrap=True,
    )
    if about["memory"]:
        console.print(f"[yellow]! {shown(about['note'])}[/yellow]", soft_wrap=True)
    console.print(f"how to use it    {shown(str(output / exporting.README))}", soft_wrap=True)
