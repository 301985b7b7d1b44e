"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from qbert_ray.cli import completion

Files = Annotated[
    list[str],
    typer.Option(
        "--config", "-c", metavar="FILE", help="A YAML file; several are merged left to right.", autocompletion=completion.config_files
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.FIELD=VALUE", help="Single values on top of the files.", autocompletion=completion.overrides),
]
