"""A first config for somebody's files: which table is which, what their columns are for, and why it is thought so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from qbert_ray.inputs.profile import Column, Files
from qbert_ray.inputs.times import as_timestamp
from qbert_ray.inputs.sources import AMAZON, detect_format
from qbert_ray.storage.columns import ITEM_ID, RATING, TIMESTAMP, USER_ID

MOST_ROWS = 2_000_000  # that items are matched and interactions counted over
LEAST_MATCH = 0.01  # share of the interactions' items that a catalog must know
CORES, LEAST_KEPT, LEAST_USERS = (5, 3, 2), 0.3, 20  # tried in turn; share of interactions and number of users that must stay
CHECKED_PICTURES = 100
TITLES = ("title", "name", "product_title", "product_name", "item_name", "headline")
PICTURE_NAMES = ("image", "img", "photo", "picture", "poster", "thumb", "cover")
AMAZON_TEXTS, AMAZON_ATTRIBUTES = ("title", "feature", "features", "description"), ("brand", "categories", "main_cat", "main_category")


class StarterError(ValueError):
    """Files of which no config can be made; the message says what was seen and what is expected."""


@dataclass
class Guess:
    """One domain: two tables, what their columns are for, and why."""

    items: Files
    interactions: Files
    form: str  # contract, amazon_2018 or amazon_2023
    match: Match
    names: dict[str, str]  # contract name -> column of the interactions
    texts: dict[str, str] = field(default_factory=dict)  # column -> why
    attributes: dict[str, str] = field(default_factory=dict)
    image: tuple[str, str] | None = None
    aside: dict[str, str] = field(default_factory=dict)
    core: tuple[int, str] = (0, "")


@dataclass(frozen=True, order=True)
class Match:
    share: float  # of the interactions' items that the catalog knows
    rank: int  # how usual the names are
    item: str  # column of the interactions
    key: str  # column of the catalog


def guess(tables: list[Files], aside: dict[str, str], paths: Sequence[Path]) -> list[Guess]:
    """Each table of interactions with the catalog that knows most of its items, and what their columns are for.

    Raises:
        StarterError: there is none of either, or no catalog knows the items.
    """
    plain = [table for table in tables if not given_features(table)]
    sales = [table for table in plain if table.named(USER_ID) + _amazon(table, USER_ID) and _time(table)]
    catalogs = [table for table in plain if table not in sales and _keys(table)]
    if not sales:  # users may have an unusual name: then what a catalog knows the items of
        sales = [table for table in plain if _time(table) and _best(table, catalogs)[0].share > 0.5]
        catalogs = [table for table in catalogs if table not in sales]
    if not sales or not catalogs:
        raise StarterError(_nothing(tables, aside, paths, "items" if sales else "interactions"))
    found = []
    for table in sales:
        match, catalog = _best(table, catalogs)
        if match.share >= LEAST_MATCH:
            found.append(Guess(catalog, table, detect_format((catalog.file,)), match, _names(table, match.item)))
    if not found:
        raise StarterError(_nothing(tables, aside, paths, "items that the interactions name"))
    for domain in found:
        _read_catalog(domain)
        domain.core = _core(domain)
    return found


def given_features(table: Files) -> str:
    """The config key for a file of vectors or semantic IDs; empty for other files."""
    if "codes" in table.columns:
        return "data.semantic_ids"
    if {"vector", "vectors"} & set(table.columns):
        kind = next((kind for kind in ("image", "structure") if kind in table.paths[0].name.lower()), "text")
        return f"data.domains.<name>.{kind}_features"
    return ""


def _amazon(table: Files, name: str) -> list[str]:
    """Columns of raw Amazon files that stand for a contract name."""
    return [column for column in AMAZON.get(detect_format((table.file,)), {}).get(name, []) if column in table.columns]


def _time(table: Files) -> str | None:
    """The column of times: by name, else the first whose values are dates."""
    named = _amazon(table, TIMESTAMP) + table.named(TIMESTAMP)
    for name in [*named, *(name for name, column in table.columns.items() if column.kind == "time")]:
        times = table.sample.select(as_timestamp(pl.col(name), table.sample.schema[name])).to_series()
        if len(times) and times.is_not_null().mean() > 0.9:  # type: ignore[operator]
            return name
    return None


def _single(table: Files) -> list[str]:
    """Columns whose values are single words or numbers, as IDs are."""
    return [name for name, column in table.columns.items() if column.kind in ("text", "number") and 0 < column.words <= 1.2]


def _keys(table: Files) -> list[str]:
    """Columns that could name each row, the likeliest first."""
    named = _amazon(table, ITEM_ID) + table.named(ITEM_ID)
    single = [name for name in _single(table) if table.columns[name].filled > 0.95 and table.columns[name].distinct > 0.95]
    return list(dict.fromkeys([*(name for name in named if name in single), *single]))[:4]


def _best(table: Files, catalogs: list[Files]) -> tuple[Match, Files]:
    matches = [(_match(table, catalog), catalog) for catalog in catalogs if catalog is not table]
    return max(matches, key=lambda pair: pair[0], default=(Match(0.0, 0, "", ""), table))


def _match(table: Files, catalog: Files) -> Match:
    """How the items of the interactions are named in both, by the values that both have."""
    taken = {_time(table), *(_amazon(table, USER_ID) + table.named(USER_ID))[:1]}
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
    users = [name for name in _amazon(table, USER_ID) + table.named(USER_ID) if name != item]
    repeated = [name for name in _single(table) if name not in (item, time, *table.named(RATING)) and table.columns[name].distinct < 0.95]
    users = users or sorted(repeated, key=lambda name: -table.columns[name].values)
    if not users:
        raise StarterError(f"{table.location}: no column of users among {', '.join(table.columns)}; call it user_id")
    ratings = [name for name in _amazon(table, RATING) + table.named(RATING) if table.columns[name].kind == "number"]
    return {USER_ID: users[0], ITEM_ID: item, TIMESTAMP: str(time)} | ({RATING: ratings[0]} if ratings else {})


# what a catalog's columns are for


def _read_catalog(domain: Guess) -> None:
    if domain.form != "contract":
        mapping = AMAZON[domain.form]
        for names, chosen in ((AMAZON_TEXTS, domain.texts), (AMAZON_ATTRIBUTES, domain.attributes)):
            for name in names:
                raw = [column for column in mapping.get(name, [name]) if column in domain.items.columns]
                if raw:
                    chosen[name] = f"Amazon's {raw[0]}"
        if _amazon(domain.items, "image"):
            domain.image = ("image", f"Amazon's {_amazon(domain.items, 'image')[0]}, links: set image_column to null to read none")
        return
    pictures: dict[str, str] = {}
    for name, column in domain.items.columns.items():
        if name != domain.match.key:
            _place(domain, column, pictures)
    domain.texts = dict(sorted(domain.texts.items(), key=lambda pair: pair[0].lower() not in TITLES))
    if pictures:
        domain.image = next(iter(pictures.items()))
        domain.aside |= {name: "also pictures; one column can be read" for name in list(pictures)[1:]}


def _place(domain: Guess, column: Column, pictures: dict[str, str]) -> None:
    """Put one column where it seems to belong."""
    name, words = column.name, f"{column.words:.1f} words on average"
    called_picture = any(word in name.lower() for word in PICTURE_NAMES)
    if not column.filled:
        domain.aside[name] = "empty"
    elif column.pictures > 0.5 or (called_picture and column.links > 0.5):
        why = _pictures(domain.items, column)
        (pictures if why else domain.aside)[name] = why or "none of its pictures is there; paths start at the items file's folder"
    elif column.kind in ("bytes", "vector", "number", "time"):
        domain.aside[name] = {"bytes": "bytes", "vector": "lists of numbers", "number": "numbers", "time": "times"}[column.kind]
    elif column.links > 0.5:
        domain.aside[name] = "links"
    elif name.lower() in TITLES or column.words >= 4:
        domain.texts[name] = words
    elif column.distinct <= 0.7 and column.values > 1:
        domain.attributes[name] = f"{column.values:,} values"
    elif column.words >= 1.5:
        domain.texts[name] = words
    else:
        domain.aside[name] = "one value" if column.values <= 1 else "single words, nearly all different: a key?"


def _pictures(table: Files, column: Column) -> str:
    """Why a column is read as pictures; empty where it holds paths and none of them exists."""
    if column.kind == "bytes":
        return "pictures themselves"
    if column.links > 0.5:
        return f"links, {column.filled:.0%} filled"
    first = table.read([column.name], 10 * CHECKED_PICTURES)[column.name].drop_nulls().head(CHECKED_PICTURES).to_list()
    there = sum((table.paths[0].parent / path).is_file() for path in first)
    return f"{column.filled:.0%} filled; {there} of the first {len(first)} files are there" if there else ""


def _core(domain: Guess) -> tuple[int, str]:
    """The largest usual k whose k-core keeps enough, and what it keeps."""
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


def _nothing(tables: list[Files], aside: dict[str, str], paths: Sequence[Path], what: str) -> str:
    where = ", ".join(map(str, paths))
    seen = [f"  {table.location}: {', '.join(table.columns)}" for table in tables] + [f"  {why}" for why in aside.values()]
    if not seen:
        return f"no Parquet, CSV, TSV or JSONL file (text also as .gz) at {where}"
    return (
        f"no table of {what} at {where}; seen:\n" + "\n".join(seen) + "\n"
        "expected: items, one row each with an ID, such as item_id, title, image; and interactions with the same IDs, one row each, "
        "such as user_id, item_id, timestamp (a whole number or a date like 2026-01-31 12:00:00). Name both files if there are others beside them"
    )
