"""Expressions over the columns of the items files, such as `in_stock == true and price < 50`, in the SQL of polars."""

from __future__ import annotations

import difflib
import re

import polars as pl

from qbert_ray.inputs.id_tables import read_columns, table_endings
from qbert_ray.inputs.sources import Source, SourceError
from qbert_ray.storage.columns import ITEM_ID

# What is in quotes, from left to right; or what an expression must not hold outside of them: queries, whose files polars opens when
# it parses them, and comments and other quotes, which would hide these.
_TOKENS = re.compile(
    r"""(?P<quoted>'(?:[^']|'')*'|"[^"]*")|"""
    r"""(?P<refused>\b(?:select|table|values|with|from|exists|read_\w+|scan_\w+)\b|--|/\*|[`$\\]|[\w&](?='))""",
    re.IGNORECASE,
)
MATCHES = "<matches>"


def parse(text: str, key: str) -> pl.Expr:
    """The expression of a text.

    Args:
        text: as SQL writes conditions; `==` is understood as `=`.
        key: of the config, for errors.

    Raises:
        SourceError: it is no expression over columns.
    """
    if refused := next((found["refused"] for found in _TOKENS.finditer(text) if found["refused"]), None):
        raise SourceError(
            f"{key}: {text!r} holds {refused!r}; write an expression over columns of the items, without queries and comments "
            "(a column of such a name stands in double quotes)"
        )
    try:
        found = pl.sql_expr(text)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SourceError(
            f"{key}: {text!r} is neither an expression such as in_stock == true ({error}) nor a table (named *{table_endings()}, or with / at its end)"
        ) from None
    if not found.meta.root_names():
        raise SourceError(f"{key}: {text!r} names no column of the items")
    return found


def check(text: str, key: str, source: Source) -> pl.Expr:
    """`parse`, and every column that it names is in the items files.

    Raises:
        SourceError: it is no expression, or names a column that is not there.
    """
    found = parse(text, key)
    there = list(dict.fromkeys(column for file in source.files for column in file.columns))
    missing = next((name for name in found.meta.root_names() if name not in there), None)
    if missing is not None:
        near = difflib.get_close_matches(missing, there, n=1)
        hint = f"did you mean {near[0]}?" if near else f"columns found: {', '.join(there)}"
        raise SourceError(
            f"{key}: {text!r} names {missing}, which {source.uri} does not have; {hint} Text is written in single quotes, as in brand = 'Acme'"
        )
    return found


def _says_true_or_false(text: str, name: str) -> bool:
    """Whether an expression compares a column with true or false; polars takes that for false where the column is a text."""
    bare = re.sub(r"'(?:[^']|'')*'", "''", text)
    column, sign, truth = rf'(?:"{re.escape(name)}"|\b{re.escape(name)}\b)', r"\s*(?:==?|!=|<>|\bis(?:\s+not)?\b)\s*", r"\b(?:true|false)\b"
    return re.search(f"{column}{sign}{truth}|{truth}{sign}{column}", bare, re.IGNORECASE) is not None


def matching(text: str, key: str, source: Source) -> pl.DataFrame:
    """item_id of each item of the files, and whether an expression holds for it; it does not where a value is missing.

    Args:
        text: of the expression.
        key: of the config, for errors.
        source: the items files, of `open_source`.

    Returns:
        Columns item_id and `MATCHES`.

    Raises:
        SourceError: the expression cannot be computed over these columns, or is neither true nor false.
    """
    found = check(text, key, source)
    names = list(dict.fromkeys(found.meta.root_names()))
    rows = read_columns(source, names)
    types = ", ".join(f"{name} {rows.schema[name]}" for name in names)
    for name in names:
        if rows.schema[name] == pl.String and _says_true_or_false(text, name):
            values = " or ".join(map(repr, rows[name].drop_nulls().unique(maintain_order=True).head(3)))
            raise SourceError(
                f"{key}: {text!r} compares {name} with true or false, and {name} is a text such as {values}; write {name} = '...'"
            )
    try:
        rows = rows.with_columns(found.alias(MATCHES))
    except pl.exceptions.PolarsError as error:
        raise SourceError(f"{key}: {text!r} cannot be computed: {error}; the columns are {types}") from None
    if rows.schema[MATCHES] != pl.Boolean:
        raise SourceError(f"{key}: {text!r} is {rows.schema[MATCHES]}, neither true nor false; the columns are {types}")
    return rows.select(pl.col(f"<{ITEM_ID}>").alias(ITEM_ID), pl.col(MATCHES).fill_null(False))
