"""Guesses a first config for a user's files: which table holds what, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from qbert_ray.inputs import starter_joins
from qbert_ray.inputs.names import plain_name
from qbert_ray.inputs.profile import Files
from qbert_ray.inputs.readers import kind_of
from qbert_ray.inputs.sources import AMAZON, detect_format
from qbert_ray.inputs.starter_columns import Guess, Match, item_columns, read_catalog, richness
from qbert_ray.inputs.times import as_timestamp
from qbert_ray.storage.columns import ITEM_ID, RATING, TIMESTAMP, USER_ID

MOST_ROWS = 2_000_000  # used to match items and to count interactions
LEAST_MATCH = 0.01  # share of the interactions' items that a catalog must contain
CORES, LEAST_KEPT, LEAST_USERS = (5, 3, 2), 0.3, 20  # tried in turn; share of interactions and number of users that must stay
NEARLY = 0.8  # of the best share of items found: among catalogs above it, the one with the most information on its items is chosen
ORDERS = r"(?i)order|invoice|receipt|basket|cart|transaction|voucher|ticket|trx|txn|bill|checkout|document|session|visit"
PRODUCT = r"(?i)brand|categor|genre|title|product_?name|item_?name|descri|price"
UNREAD, MOST_UNREAD = r"(?i)[.](txt|dat|data|base|tab|psv|xlsx?|arrow|feather|zip|tar|zst|bz2|xz|gz|pkl|mat|npz|sqlite|db)$", 5
LOGS = r"(?i)rating|review|interaction|transaction|event|sale|order|purchase|click|behavior|behaviour|history|log|inter\b"


class StarterError(ValueError):
    """No config can be made for the files; the message says what was found and what is expected."""


def guess(tables: list[Files], aside: dict[str, str], paths: Sequence[Path]) -> list[Guess]:
    """One guess per catalog: the table of interactions whose items it contains, and the roles of the columns.

    `aside` receives why other tables are not used.

    Raises:
        StarterError: there are no interactions or no catalogs, or no catalog contains the items.
    """
    plain = [table for table in tables if not given_features(table)]
    sales = [table for table in plain if _users(table) and _time(table)]
    catalogs = [table for table in plain if table not in sales and _keys(table)]
    if not sales:  # the user column may have an unusual name: then any table with times whose items a catalog contains
        sales = [table for table in plain if _time(table) and _best(table, catalogs)[0].share > 0.5]
        catalogs = [table for table in catalogs if table not in sales]
    if not sales:
        raise StarterError(_none_found(tables, aside, paths, "interactions", _in_two_tables(plain) or _without_time(plain, catalogs)))
    found = [guessed for table in sales if (guessed := _pair(table, catalogs, plain))]
    if not found:
        what = "items that the interactions name" if catalogs else "items"
        raise StarterError(_none_found(tables, aside, paths, what, _in_two_tables(plain) or _repeated(plain)))
    chosen = _one_for_each_catalog(found, aside)
    for domain in chosen:
        read_catalog(domain, [path for path in paths if path.is_dir()])
        domain.core = _core(domain)
    return chosen


def _pair(table: Files, catalogs: list[Files], plain: list[Files]) -> Guess | None:
    """A table of interactions with its catalog; the table itself is the catalog if it describes its items better than any other."""
    match, catalog = _best(table, catalogs)
    named = match.key in catalog.named(ITEM_ID) or plain_name(match.key) == plain_name(match.item)  # numeric IDs of other things can match
    if match.share >= LEAST_MATCH and (named or richness(catalog, match.key) or _amazon(catalog, ITEM_ID)):
        return Guess(catalog, table, detect_format((catalog.file,)), match, _names(table, match.item))
    if any(richness(other, _keys(other)[0]) for other in catalogs):
        return None
    candidates = _amazon(table, ITEM_ID) + table.named(ITEM_ID)
    item = next((name for name in candidates if name not in _users(table) and not _is_order(table, name)), None)
    if item is None or (not _describes_items(table, item) and (len(plain) == 1 or _repeated(plain))):
        return None
    return Guess(table, table, "contract", Match(1.0, 0, item, item), _names(table, item))


def _describes_items(table: Files, item: str) -> bool:
    """Whether a table of interactions also describes its items, judged by values or names of its columns."""
    taken = {_time(table), *_users(table)[:1]}
    return bool(item_columns(table, item, taken)) or any(re.search(PRODUCT, name) for name in table.columns if name != item)


def _repeated(plain: list[Files]) -> str:
    """Advice on a catalog that names its items several times, such as one of a file for each day; empty where there is none."""
    for table in plain:
        item = next((name for name in table.named(ITEM_ID) if name in _single(table)), None)
        told = [name for name in table.columns if name != item and re.search(PRODUCT, name)]
        if item and told and not _users(table) and not _keys(table):
            return f"{table.location} describes items ({', '.join(told)}), but its {item} names many of them several times: keep one row of each\n"
    return ""


def _one_for_each_catalog(found: list[Guess], aside: dict[str, str]) -> list[Guess]:
    """For each catalog, the table of interactions that looks most like purchases or ratings."""
    chosen: dict[int, Guess] = {}
    for domain in sorted(found, key=_is_main, reverse=True):
        main = chosen.setdefault(id(domain.items), domain)
        if main is not domain:
            aside[str(domain.interactions.location)] = (
                f"{domain.interactions.location}: another table of interactions with the items of {domain.items.location.name}; "
                f"{main.interactions.location.name} was taken"
            )
    return [domain for domain in found if any(domain is main for main in chosen.values())]


def _is_main(domain: Guess) -> tuple[bool, bool, int]:
    table = domain.interactions
    size = sum(path.stat().st_size for path in table.paths)
    return RATING in domain.names, bool(re.search(LOGS, table.location.name)), size


def given_features(table: Files) -> str:
    """The config key for a file of vectors or semantic IDs; empty for other files."""
    if "codes" in table.columns:
        return "data.semantic_ids"
    if {"vector", "vectors"} & set(table.columns):
        kind = next((kind for kind in ("image", "structure") if kind in table.paths[0].name.lower()), "text")
        return f"data.domains.<name>.vectors.{kind}"
    return ""


def _amazon(table: Files, name: str) -> list[str]:
    """Columns of raw Amazon files for a contract name."""
    return [column for column in AMAZON.get(detect_format((table.file,)), {}).get(name, []) if column in table.columns]


def _time(table: Files) -> str | None:
    """The column of times: by name, else the first whose values are dates."""
    named = _amazon(table, TIMESTAMP) + table.named(TIMESTAMP)
    for name in [*named, *(name for name, column in table.columns.items() if column.kind == "time")]:
        if table.columns[name].kind == "bytes":
            continue
        if _readable(table, name):
            return name
    return None


def _users(table: Files) -> list[str]:
    """Columns with a usual name for users, the most usual first."""
    return [name for name in _amazon(table, USER_ID) + table.named(USER_ID) if table.columns[name].kind != "mapping"]


def _single(table: Files) -> list[str]:
    """Columns whose values are single words or numbers, as IDs are."""
    return [name for name, column in table.columns.items() if column.kind in ("text", "number") and 0 < column.words <= 1.2]


def _keys(table: Files) -> list[str]:
    """Columns that could identify each row, the likeliest first."""
    named = _amazon(table, ITEM_ID) + table.named(ITEM_ID)
    single = [name for name in _single(table) if table.columns[name].filled > 0.95 and table.columns[name].distinct > 0.95]
    return list(dict.fromkeys([*(name for name in named if name in single), *single]))[:4]


def _best(table: Files, catalogs: list[Files]) -> tuple[Match, Files]:
    """The catalog with the most information on the items, among those that contain about as many of them as the best."""
    matches = [(_match(table, catalog), catalog) for catalog in catalogs if catalog is not table]
    most = max((match.share for match, _ in matches), default=0.0)
    near = [pair for pair in matches if pair[0].share and pair[0].share >= NEARLY * most]

    def worth(pair: tuple[Match, Files]) -> tuple[bool, bool, bool, int, Match]:
        match, catalog = pair
        texts = richness(catalog, match.key)
        together = catalog.folder == table.folder
        return texts > 0, match.share > 0.99 * most, together, texts, match

    return max(near, key=worth, default=(Match(0.0, 0, "", ""), table))


def _match(table: Files, catalog: Files) -> Match:
    """The columns that hold the item ID in both tables, found by the values that they share."""
    taken = {_time(table), *_users(table)[:1]}
    named = _amazon(table, ITEM_ID) + table.named(ITEM_ID)
    candidates = list(dict.fromkeys(name for name in [*named, *_single(table)] if name not in taken))
    values = {name: table.read([name], len(table.sample))[name].drop_nulls().unique() for name in candidates}
    best = Match(0.0, 0, "", "")
    for place, key in enumerate(_keys(catalog)):
        known = catalog.read([key], MOST_ROWS)[key].drop_nulls().unique()
        for rank, name in enumerate(candidates):
            share = round(float(values[name].is_in(known.implode()).mean() or 0), 2)  # type: ignore[arg-type]
            best = max(best, Match(share, -rank - place, name, key))
    return best


def _names(table: Files, item: str) -> dict[str, str]:
    """Contract name -> column of a table of interactions."""
    time = _time(table)
    named = [name for name in _users(table) if name != item]
    clear = [name for name in named if not re.search(ORDERS, name)]
    users = clear or named or _unnamed_users(table, item, time)
    if not users:
        orders = [name for name in _single(table) if name not in (item, time) and _is_order(table, name, time)]
        why = f"; {orders[0]} numbers orders: all rows of one have one time" if orders else ""
        raise StarterError(f"{table.location}: no column of users among {', '.join(table.columns)}{why}; call the users' column user_id")
    ratings = [name for name in _amazon(table, RATING) + table.named(RATING) if table.columns[name].kind == "number"]
    return {USER_ID: users[0], ITEM_ID: item, TIMESTAMP: str(time)} | ({RATING: ratings[0]} if ratings else {})


def _unnamed_users(table: Files, item: str, time: str | None) -> list[str]:
    """Columns without a usual name that could hold users: single words that recur at several times and with several items."""
    of_item = set(item_columns(table, item, {time}))
    repeated = [name for name in _single(table) if name not in (item, time, *table.named(RATING)) and table.columns[name].distinct < 0.95]
    users = [name for name in repeated if name not in of_item and table.columns[name].values > 10 and not _is_order(table, name, time)]
    return sorted(users, key=lambda name: -table.columns[name].values)


def _is_order(table: Files, name: str, time: str | None = None) -> bool:
    """Whether a column holds order numbers, judged by its name, or because nearly every value has a single time."""
    if re.search(ORDERS, name):
        return True
    if time is None or time == name:
        return False
    rows = table.sample.select(pl.col(name).alias("value"), pl.col(time).alias("time")).drop_nulls()
    groups = rows.group_by("value").agg(pl.len(), pl.col("time").n_unique().alias("times")).filter(pl.col("len") > 1)
    return len(groups) > 0 and float((groups["times"] == 1).mean() or 0) > 0.9  # type: ignore[arg-type]


def _in_two_tables(plain: list[Files]) -> str:
    """Advice on orders whose customers and articles are in two tables."""
    return starter_joins.advice(plain, _users, _time, _best)


def _without_time(plain: list[Files], catalogs: list[Files]) -> str:
    """Advice on a table of users and items that only lacks times."""
    for table in sorted(plain, key=lambda table: -len(table.columns)):
        users = _users(table)
        items = [name for name in table.named(ITEM_ID) if name not in users]
        if (
            not users
            or table.columns[users[0]].distinct > 0.95
            or not items
            or any(table is catalog and _keys(table)[:1] == items[:1] for catalog in catalogs)
        ):
            continue
        bad = [name for name in table.named(TIMESTAMP) if not _readable(table, name)]
        if bad:
            return f"{table.location} has users ({users[0]}) and items ({items[0]}), but the times in {bad[0]} cannot be read, such as {table.columns[bad[0]].example!r}\n"
        return (
            f"{table.location} has users ({users[0]}) and items ({items[0]}), but no column of times: the order of a history is what is learned. "
            "Where the order of the rows is that of the events, number them: "
            f'{starter_joins.reading(table)}.with_row_index("timestamp").write_parquet("interactions.parquet")\n'
        )
    return ""


def _readable(table: Files, name: str) -> bool:
    """Whether nearly all values of a column can be read as times."""
    times = table.sample.select(as_timestamp(pl.col(name), table.sample.schema[name], table.times(name))).to_series()
    return bool(len(times)) and float(times.is_not_null().mean() or 0) > 0.9  # type: ignore[arg-type]


def _core(domain: Guess) -> tuple[int, str]:
    """The largest usual k whose k-core keeps enough, and a note on what it keeps."""
    item, user = domain.match.item, domain.names[USER_ID]
    pairs = domain.interactions.read(list(dict.fromkeys([user, item])), MOST_ROWS).drop_nulls()
    known = domain.items.read([domain.match.key], MOST_ROWS)[domain.match.key].drop_nulls().unique()
    pairs = pairs.filter(pl.col(item).is_in(known.implode())).unique()
    of = f"of {len(pairs):,} interactions" + (f" among the first {MOST_ROWS:,} rows" if len(pairs) > 0.9 * MOST_ROWS else "")
    lost = ""
    for k in CORES:
        kept = _k_core(pairs, user, item, k)
        users = kept[user].n_unique()
        share = len(kept) / max(len(pairs), 1)
        if share >= LEAST_KEPT and users >= LEAST_USERS:
            return k, f"the {k}-core keeps {share:.0%} {of}, {users:,} users and {kept[item].n_unique():,} items{lost}"
        lost = lost or f"; the {k}-core only {share:.0%} and {users:,} users"
    return 0, f"everything is kept: {of.removeprefix('of ')}{lost}"


def _k_core(pairs: pl.DataFrame, user: str, item: str, k: int) -> pl.DataFrame:
    while True:
        kept = pairs.filter((pl.len().over(user) >= k) & (pl.len().over(item) >= k))
        if len(kept) == len(pairs):
            return kept
        pairs = kept


def _unread(paths: Sequence[Path]) -> str:
    """Files of other kinds in the given folders, which may be the missing tables; empty if there are none."""
    entries = (entry for path in paths if path.is_dir() for entry in sorted(path.iterdir()))
    files = [entry.name for entry in entries if re.search(UNREAD, entry.name) and not kind_of(entry.name) and entry.is_file()]
    if not files:
        return ""
    more = f" and {len(files) - MOST_UNREAD:,} more" if len(files) > MOST_UNREAD else ""
    return (
        f"not read: {', '.join(files[:MOST_UNREAD])}{more}; call a table of text .csv, with a line of names of the columns above it, and one comma, "
        "semicolon, tab or | between cells"
    )


def _none_found(tables: list[Files], aside: dict[str, str], paths: Sequence[Path], what: str, hint: str = "") -> str:
    where = ", ".join(map(str, paths))
    seen = [f"  {table.location}: {', '.join(table.columns)}" for table in tables] + [f"  {why}" for why in aside.values()]
    others = _unread(paths)
    if not seen:
        return f"no Parquet, CSV, TSV or JSONL file (text also as .gz) at {where}{'; ' if others else ''}{others}"
    seen += [f"  {others}"] if others else []
    return (
        f"no table of {what} at {where}; seen:\n" + "\n".join(seen) + f"\n{hint}"
        "expected: items, one row each with an ID, such as item_id, title, image; and interactions with the same IDs, one row each, "
        "such as user_id, item_id, timestamp (a whole number or a date like 2026-01-31 12:00:00). Name both files if there are others next to them"
    )
