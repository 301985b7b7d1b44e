"""Writes a first config as YAML, with the reason for each guess as a comment."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from qbert_ray.config.schema import Config
from qbert_ray.inputs.profile import Files, find_tables
from qbert_ray.inputs.sources import SPLIT, SPLIT_NAMES, open_source
from qbert_ray.inputs.starter import StarterError, given_features, guess
from qbert_ray.inputs.starter_columns import Guess
from qbert_ray.storage.columns import ITEM_ID


def write_config(paths: Sequence[Path], output: Path, force: bool = False) -> str:
    """Write a commented config for the given files and folders; returns its text.

    Raises:
        StarterError: the output exists already, or there are no items with interactions among the files.
        SourceError: the files turn out not to be usable.
    """
    if output.exists() and not force:
        raise StarterError(f"{output} is there already; choose another name, or replace it with --force")
    if remote := [str(path) for path in paths if re.match(r"[a-z][a-z0-9+.-]+:/", str(path))]:
        raise StarterError(f"{remote[0]}: init looks at local files alone; copy some of them here, and change data.root in what it writes")
    paths = [path.absolute() for path in paths]
    tables, aside = find_tables(paths)
    text = _page(guess(tables, aside, paths), tables, aside, output)
    config = Config.model_validate(yaml.safe_load(text))
    for name, domain in config.data.domains.items():
        open_source(config.data.root, name, "items", domain)
        open_source(config.data.root, name, "interactions", domain, with_split=config.data.split == "given")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(text.encode())
    return text


def _page(guesses: list[Guess], tables: list[Files], aside: dict[str, str], output: Path) -> str:
    folders = [str(table.location.parent) for found in guesses for table in (found.items, found.interactions)]
    root = os.path.commonpath(folders)
    names = [_name(output.stem)] if len(guesses) == 1 else _distinct([_name_of(found) for found in guesses])
    lines = [
        "# Written by qbert-ray init: guesses from names and values, so check them. Then",
        f"#   qbert-ray validate -c {_word(output)}",
        f"#   qbert-ray run -c {_word(output)}",
        "# Every field with its default: qbert-ray config --describe.",
        "run:",
        f"  dir: {_yaml(f'runs/{_name(output.stem)}')}",
        "data:",
        f"  root: {_yaml(root)}",
    ]
    given = all(found.interactions.held_out for found in guesses)
    if given:
        lines += [
            "  split: given # the names of the files say train, validation and test; they are used as they are, without a k-core",
            "  domains:",
        ]
    else:
        core, why = min((found.core for found in guesses), key=lambda core: core[0])
        lines += [f"  min_interactions: {core} # {_line(why)}", "  domains:"]
    for name, found in zip(names, guesses, strict=True):
        lines += [f"    {_yaml(name)}:", *(f"      {line}" for line in _domain(found, Path(root), given))]
    used = {id(table) for found in guesses for table in (found.items, found.interactions)}
    for table in tables:
        if id(table) not in used and str(table.location) not in aside:
            key = given_features(table)
            lines.append(f"# not used: {_line(table.location)}" + (f"; {key} can name it" if key else ""))
    return "\n".join([*lines, *(f"# not used: {_line(why)}" for why in aside.values())]) + "\n"


def _domain(found: Guess, root: Path, given: bool) -> Iterator[str]:
    yield f"items: {_yaml(_relative(found.items, root))} # {_columns(found.items)}"
    yield f"interactions: {_yaml(_relative(found.interactions, root))} # the catalog knows {found.match.share:.0%} of its items"
    for key, path in zip(("validation", "test"), found.interactions.held_out, strict=False):
        yield f"{'' if given else '# with data.split=given in all domains: '}{key}: {_yaml(os.path.relpath(path, root))}"
    if found.form != "contract":
        yield f"format: {found.form} # by its columns"
    else:
        if found.match.key != ITEM_ID:
            yield f"item_columns: {_yaml({ITEM_ID: found.match.key})} # the interactions name it"
        if others := {name: column for name, column in found.names.items() if name != column}:
            yield f"interaction_columns: {_yaml(others)}"
    yield f"text_fields: {_yaml(list(found.texts))}{_reasons(found.texts)}"
    yield f"attributes: {_yaml(list(found.attributes))}{_reasons(found.attributes)}"
    if found.image:
        yield f"image_column: {_yaml(found.image[0])} # {_line(found.image[1])}"
    if found.template:
        yield f"image_template: {_yaml(found.template[0])} # {_line(found.template[1])}"
    for name, why in found.aside.items():
        reason = (found.items is found.interactions and _returns(found.items, name)) or why
        yield f"# left aside: {_line(name)} ({_line(reason)})"
    if found.items is not found.interactions:
        unread = [name for name in found.interactions.columns if name not in found.names.values()]
        yield from (f"# left aside of the interactions: {_line(name)} ({_line(_unread(found.interactions, name))})" for name in unread)


def _unread(table: Files, name: str) -> str:
    """Why a column of the interactions is not read."""
    values = table.sample[name].drop_nulls()
    if values.dtype == pl.String and len(values) and values.str.to_lowercase().is_in(list(SPLIT_NAMES)).all():
        key = "" if name == SPLIT else f", interaction_columns: {{{SPLIT}: {_yaml(name)}}}"
        return f"a split of your own? data.split: given{key} uses it"
    return _returns(table, name) or "neither user, item, time nor rating"


def _returns(table: Files, name: str) -> str | None:
    """How to leave rows out whose number is negative, where only some are, as quantities of returned items are."""
    values = table.sample[name].drop_nulls() if name in table.sample.columns else pl.Series([], dtype=pl.Float64)
    if not (values.dtype.is_numeric() or values.dtype == pl.String):
        return None
    numbers = values.cast(pl.Float64, strict=False).drop_nulls()
    if len(numbers) < len(values) or not (numbers < 0).any() or (numbers < 0).mean() > 0.5:  # type: ignore[operator]
        return None
    return f"some are negative: returns? interaction_columns: {{rating: {_yaml(name)}}} and data.min_rating: 0.001 leave those rows out"


def _columns(table: Files) -> str:
    count = f"{len(table.paths)} files; " if len(table.paths) > 1 else ""
    return _line(f"{count}columns: {', '.join(table.columns)}")


def _reasons(reasons: dict[str, str]) -> str:
    return f" # {_line('; '.join(f'{name}: {why}' for name, why in reasons.items()))}" if reasons else ""


def _line(text: object) -> str:
    """A text for a comment: names of columns and files may have line breaks, which would end it, and control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in str(text))


def _word(path: Path) -> str:
    return shlex.quote(_line(path))


def _relative(table: Files, root: Path) -> str:
    return os.path.relpath(table.location, root)


def _yaml(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False).strip()[1:-1]


def _name(text: str) -> str:
    return re.sub(r"\W+", "_", text.removesuffix(".gz").split(".")[0]).strip("_") or "items"


def _name_of(found: Guess) -> str:
    """Name of a domain: that of the file for Amazon's categories, which share a folder; else that of the folder."""
    return _name(found.interactions.paths[0].name if found.form != "contract" else found.interactions.paths[0].parent.name)


def _distinct(names: list[str]) -> list[str]:
    return [f"{name}_{number}" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]
