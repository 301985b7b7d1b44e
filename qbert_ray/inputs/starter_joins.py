"""Advice for shops that keep an order in two tables: one with its customer and time, one with a row per article of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from qbert_ray.inputs.profile import Files
from qbert_ray.inputs.starter_columns import Match, richness
from qbert_ray.inputs.text_files import UTF8
from qbert_ray.storage.columns import ITEM_ID, TIMESTAMP, USER_ID

LEAST_SHARED = 0.5  # share of the rows of articles whose order is in the table of orders
RUNNING = r"(?i)order_?(number|seq)"  # a number that counts the orders of a customer
ROWS = 100_000  # by which columns of two tables are compared


def advice(
    tables: Sequence[Files],
    users: Callable[[Files], list[str]],
    times: Callable[[Files], str | None],
    best: Callable[[Files, list[Files]], tuple[Match, Files]],
) -> str:
    """How to join a table of orders with the table of their articles; empty if there are no two such tables.

    Args:
        tables: all that were found.
        users: columns of a table with a usual name for users.
        times: the column of a table that holds times.
        best: the catalog that describes the items of a table, and the columns that both share.
    """
    found: list[tuple[bool, int, str]] = []  # whether the customer has a usual name, how much the catalog tells, the advice
    for orders in tables:
        time = times(orders) or next((name for name in orders.columns if re.search(RUNNING, name)), None)
        if not time:
            continue
        user = next((name for name in [*users(orders), *_recurring(orders)] if name != time), None)
        if not user:
            continue
        for lines in tables:
            if lines is orders or (users(lines) and times(lines)):
                continue
            match, catalog = best(lines, [table for table in tables if table not in (orders, lines)])
            number = _number(orders, lines, {user, time}, match.item)
            if match.share > LEAST_SHARED and number:
                said = _said(orders, lines, number, user, time, match.item, catalog)
                found.append((bool(users(orders)), richness(catalog, match.key), said))
    return max(found)[2] if found else ""


def _recurring(table: Files) -> list[str]:
    """Columns of single words or numbers that recur, as customers do, those with the most values first."""
    found = [column for column in table.columns.values() if 0 < column.words <= 1.2 and column.distinct < 0.95 and column.values > 10]
    return [column.name for column in sorted(found, key=lambda column: -column.values)]


def _number(orders: Files, lines: Files, taken: set[str], item: str) -> tuple[str, str] | None:
    """The columns of both tables that hold the number of an order."""
    unique = [name for name, column in orders.columns.items() if column.distinct > 0.95 < column.filled and name not in taken]
    others = [name for name, column in lines.columns.items() if column.words and column.words <= 1.2 and name != item]
    known = {name: orders.read([name], ROWS)[name].drop_nulls().unique() for name in unique}
    best, found = LEAST_SHARED, None
    for name in others:
        values = lines.read([name], ROWS)[name].drop_nulls()
        for key, numbers in known.items():
            share = float(values.is_in(numbers.implode()).mean() or 0) + (key == name)  # type: ignore[arg-type]
            if share > best and values.n_unique() > 1:
                best, found = share, (key, name)
    return found


def _said(orders: Files, lines: Files, number: tuple[str, str], user: str, time: str, item: str, catalog: Files) -> str:
    key, other = number
    columns = ", ".join(f'{name}="{column}"' for name, column in ((USER_ID, user), (ITEM_ID, item), (TIMESTAMP, time)))
    on = f'on="{key}"' if key == other else f'left_on="{other}", right_on="{key}"'
    target = orders.folder / "interactions.parquet"
    return (
        f"{orders.location.name} has the customer ({user}) and the time ({time}) of each order ({key}), {lines.location.name} its articles ({item}), "
        f"which {catalog.location.name} describes. Join the two with Python, then name the result and {catalog.location.name} here:\n"
        f"  import polars as pl\n"
        f"  orders = {reading(orders)}\n"
        f"  articles = {reading(lines)}\n"
        f'  articles.join(orders, {on}, suffix="_of_order").select({columns}).write_parquet("{target}")\n'
        f"  qbert-ray init {catalog.location} {target} -o <config>.yaml\n"
    )


def reading(table: Files) -> str:
    """The call of polars that reads a table; IDs of text files stay as they are written."""
    file, path = table.file, table.location
    if file.kind == "parquet":
        return f'pl.read_parquet("{path}")'
    if file.kind == "jsonl":
        return f'pl.read_ndjson("{path}")'
    encoding = "" if file.text.encoding == UTF8 else f', encoding="{file.text.encoding}"'
    quotes = "" if file.dialect.quoted else ", quote_char=None"
    return f'pl.read_csv("{path}", separator={file.dialect.delimiter!r}, infer_schema=False{quotes}{encoding})'
