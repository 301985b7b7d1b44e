"""Advice on columns that a file lacks: how to map others, or why its first line may not hold their names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from qbert_ray.inputs.names import named
from qbert_ray.inputs.readers import File
from qbert_ray.storage.columns import ITEM_ID, RATING, TIMESTAMP, USER_ID

MOST_SHOWN = 400  # characters of the names that a message lists; of a file that is no text a name may be all of it


def shown(columns: tuple[str, ...]) -> str:
    """The names of columns as a message lists them."""
    names = ", ".join(columns)
    return names if len(names) <= MOST_SHOWN else f"{names[:MOST_SHOWN]}..."


def advice(name: str, table: str, missing: list[str], file: File, given: Mapping[str, str]) -> str:
    """Advice that ends in "or", on how to map columns of the contract that have other names in a file.

    Args:
        name: of the domain.
        table: items or interactions.
        missing: columns of the contract that the file lacks.
        file: with the columns that it has.
        given: column of the contract -> what the config says that the file calls it.
    """
    found, column = file.columns, missing[0]
    if odd := _odd_header(file):
        return f"{odd}, or "
    wanted = given.get(column, column)
    twin = next((other for other in found if other != wanted and _bare(other) == _bare(wanted)), None)
    if twin is not None:
        return f"{twin!a} looks the same as {wanted!a}, but is written with other characters (accents apart from their letters, or invisible ones); rename it, or "
    if column in ("event_type", "split"):
        return f"say what the file calls it: data.domains.{name}.interaction_columns.{column}=<column>, or "
    if column not in (USER_ID, ITEM_ID, TIMESTAMP, RATING):
        return "rename it there, or "
    keys = [
        f"data.domains.{name}.{table.removesuffix('s')}_columns.{each}={next(iter(named(found, each)), '<column>')}" for each in missing
    ]
    wrong = (
        f"data.domains.{name}.{table.removesuffix('s')}_columns.{column}={wanted} names a column that is not there; "
        if column in given
        else ""
    )
    return f"{wrong}say what the file calls {'it' if len(keys) == 1 else 'them'}: {' '.join(keys)}, or "


def _bare(name: str) -> str:
    """A name in Unicode's composed form, without invisible characters."""
    return "".join(sign for sign in unicodedata.normalize("NFC", name) if unicodedata.category(sign) != "Cf")


def _odd_header(file: File) -> str:
    """Why the first line of a text file may not hold the names of its columns; empty if it seems to."""
    if file.kind not in ("csv", "tsv"):
        return ""
    if any(re.fullmatch(r"-?[0-9]{5,}([.][0-9]+)?|[0-9]{4}-[0-9]{2}-[0-9]{2}.*", name) for name in file.own_columns):
        return "the first line looks like a row: write the names of the columns above it"
    if len(file.own_columns) == 1:
        return "the first line is a single cell: remove titles and comments above the names, and separate cells with one comma, semicolon, tab or |"
    return ""
