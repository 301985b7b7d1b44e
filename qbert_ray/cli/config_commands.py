"""`qbert-ray config`: the effective configuration, and the reference of its fields."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml
from rich.padding import Padding

from qbert_ray.cli import completion
from qbert_ray.cli.terminal import open_console, shown
from qbert_ray.config import reference
from qbert_ray.config.loading import ConfigError, load_config

console = open_console()


def _values(ctx: typer.Context, incomplete: str) -> list[str]:
    return completion.prefixes(incomplete) if ctx.params.get("describe") else completion.overrides(incomplete)


def config(
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--config", "-c", metavar="FILE", help="A YAML file; several are merged left to right.", autocompletion=completion.config_files
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.FIELD=VALUE|SECTION",
            help="Single values on top; with --describe, the sections or fields.",
            autocompletion=_values,
        ),
    ] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="Explain the fields instead: type, default, what it is, the paper's value.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead, by which editors check config files.")] = False,
) -> None:
    """Print the configuration that files and values give, defaults included; or explain its fields.

    Example: qbert-ray config -c configs/demo.yaml finetune.epochs=5

    Example: qbert-ray config --describe sequencer

    Example: qbert-ray config --schema > config.schema.json
    """
    if (describe or schema) and (files or (describe and schema)):
        raise ConfigError("--describe and --schema are about every config: give one of them, and no --config")
    if schema:
        print(json.dumps(reference.json_schema(), indent=2, ensure_ascii=False))
    elif describe:
        for prefix in values or [""]:
            _describe(prefix)
    else:
        settings = load_config(list(files or []), list(values or []))
        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")


def _describe(prefix: str) -> None:
    section = ""
    for field in reference.fields(prefix):
        first, _, _ = field.path.partition(".")
        if first != section:
            section = first
            console.print(f"\n[bold underline]{section}[/bold underline]  {shown(reference.about(section))}".rstrip())
        paper = f" [dim](paper, {shown(field.paper)})[/dim]" if field.paper else ""
        kind, default = shown(field.type), shown(field.default)
        console.print(f"[bold]{shown(field.path)}[/bold]  {kind}, default [cyan]{default}[/cyan]{paper}", soft_wrap=True)
        console.print(Padding(shown(field.description), (0, 0, 0, 4)))
