"""Guesses the roles of a catalog's columns for a first config: texts, attributes, images; and why others are left out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from qbert_ray.inputs.names import plain_name
from qbert_ray.inputs.profile import Column, Files
from qbert_ray.inputs.sources import AMAZON, detect_format

CHECKED_IMAGES = 100
MOST_FILES = 20_000  # of a folder that are searched for images
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
TITLES = ("title", "name", "product_title", "product_name", "prod_name", "item_name", "headline", "book_title", "original_title")
CATEGORIES = r"(?i)categor|genre|brand|tag|type|colou?r|department|class|group|section|maker|vendor|publisher|author|artist"
IMAGE_NAMES = ("image", "img", "photo", "picture", "poster", "thumb", "cover")
AMAZON_TEXTS, AMAZON_ATTRIBUTES = ("title", "feature", "features", "description"), ("brand", "categories", "main_cat", "main_category")
SAME = 0.9  # share of items whose rows must agree for a column to belong to the item


@dataclass(frozen=True, order=True)
class Match:
    share: float  # of the interactions' items that the catalog contains
    rank: int  # how usual the names are
    item: str  # column of the interactions
    key: str  # column of the catalog


@dataclass
class Guess:
    """A guessed domain: its two tables, the roles of their columns, and why."""

    items: Files
    interactions: Files
    form: str  # contract, amazon_2018 or amazon_2023
    match: Match
    names: dict[str, str]  # contract name -> column of the interactions
    texts: dict[str, str] = field(default_factory=dict)  # column -> why
    attributes: dict[str, str] = field(default_factory=dict)
    image: tuple[str, str] | None = None
    template: tuple[str, str] | None = None
    aside: dict[str, str] = field(default_factory=dict)
    core: tuple[int, str] = (0, "")


def richness(table: Files, key: str) -> int:
    """How much information a catalog has on its items: two points for a text column, one for a column of words."""
    others = [column for name, column in table.columns.items() if name != key and column.kind == "text" and column.filled > 0.1]
    return sum(2 if column.words >= 1.5 else 1 for column in others if column.links < 0.5 or column.words >= 1.5)


def item_columns(table: Files, item: str, taken: set[str | None]) -> list[str]:
    """Columns of a table of interactions that belong to the item: nearly all rows of one item agree."""
    others = [name for name in table.columns if name not in taken | {item} and table.columns[name].kind in ("text", "number")]
    rows = table.sample.select(pl.col(item).alias("<item>"), *others).with_columns(
        pl.col(name).str.strip_chars().replace("", None) for name in others if table.sample.schema[name] == pl.String
    )
    groups = rows.group_by("<item>").agg(pl.len().alias("<rows>"), pl.col(others).drop_nulls().n_unique()).filter(pl.col("<rows>") > 1)
    if groups.is_empty():
        return []
    return [name for name in others if (groups[name] <= 1).mean() > SAME and groups[name].max() and table.columns[name].values > 1]  # type: ignore[operator]


def read_catalog(domain: Guess, folders: Sequence[Path]) -> None:
    """Set the roles of the catalog's columns in a domain.

    Args:
        folders: the given folders; images in them may be named by item IDs.
    """
    if domain.form != "contract":
        _read_amazon(domain)
        return
    images: dict[str, str] = {}
    own = set(item_columns(domain.items, domain.match.key, set())) if domain.items is domain.interactions else None
    for name, column in domain.items.columns.items():
        if name == domain.match.key or (own is not None and name in domain.names.values()):
            continue
        if own is not None and name not in own:
            domain.aside[name] = "rows of one item differ in it" if column.values > 1 else "all rows have one value"
        else:
            _place(domain, column, images)
    domain.texts = dict(sorted(domain.texts.items(), key=lambda pair: plain_name(pair[0]) not in TITLES))
    if images:
        domain.image = next(iter(images.items()))
        domain.aside |= {name: "also images; one column can be read" for name in list(images)[1:]}
    else:
        domain.template = _template(domain, folders)


def _read_amazon(domain: Guess) -> None:
    mapping = AMAZON[domain.form]
    for names, chosen in ((AMAZON_TEXTS, domain.texts), (AMAZON_ATTRIBUTES, domain.attributes)):
        for name in names:
            raw = [column for column in mapping.get(name, [name]) if column in domain.items.columns]
            if raw:
                chosen[name] = f"Amazon's {raw[0]}"
    images = [column for column in AMAZON.get(detect_format((domain.items.file,)), {}).get("image", []) if column in domain.items.columns]
    if images:
        domain.image = ("image", f"Amazon's {images[0]}, links: set image_column to null to read none")
    used = {
        *domain.texts,
        *domain.attributes,
        domain.match.key,
        *images,
        *(column for name in [*domain.texts, *domain.attributes] for column in mapping.get(name, [])),
    }
    domain.aside |= {name: "not usual as a text or attribute of Amazon's items" for name in domain.items.columns if name not in used}


def _place(domain: Guess, column: Column, images: dict[str, str]) -> None:
    """Assign a role to one column."""
    name, called, words = column.name, plain_name(column.name), f"{column.words:.1f} words on average"
    named_image = any(word in called for word in IMAGE_NAMES)
    repeats = column.distinct <= 0.7 and column.values > 1
    if not column.filled:
        domain.aside[name] = "empty"
    elif column.images > 0.5 or (named_image and column.links > 0.5):
        why = _as_images(domain.items, column)
        (images if why else domain.aside)[name] = why or "none of its images is there; paths start at the items file's folder"
    elif column.kind in ("bytes", "mapping", "vector", "number", "time"):
        kinds = {"bytes": "bytes", "mapping": "mappings", "vector": "lists of numbers", "number": "numbers", "time": "times"}
        domain.aside[name] = kinds[column.kind]
    elif column.links > 0.5:
        domain.aside[name] = "links"
    elif column.values <= 1:
        domain.aside[name] = "one value"
    elif repeats and re.search(CATEGORIES, called):
        domain.attributes[name] = f"{column.values:,} values"
    elif called in TITLES or column.words >= 4:
        domain.texts[name] = words
    elif repeats:
        domain.attributes[name] = f"{column.values:,} values"
    elif column.words >= 1.5:
        domain.texts[name] = words
    else:
        domain.aside[name] = "single words, nearly all different: a key?"


def _as_images(table: Files, column: Column) -> str:
    """Why a column is read as images; empty if it holds paths of which none exists."""
    if column.kind == "bytes":
        return "images themselves"
    if column.links > 0.5:
        return f"links, {column.filled:.0%} filled"
    first = table.read([column.name], 10 * CHECKED_IMAGES)[column.name].drop_nulls().head(CHECKED_IMAGES).to_list()
    there = sum((table.paths[0].parent / path).is_file() for path in first)
    return f"{column.filled:.0%} filled; {there} of the first {len(first)} files are there" if there else ""


def _template(domain: Guess, folders: Sequence[Path]) -> tuple[str, str] | None:
    """Path template of image files near the tables that are named by item IDs, and why; None if there are none."""
    known = set(domain.items.read([domain.match.key], 2_000_000)[domain.match.key].drop_nulls().to_list())
    counts: dict[tuple[Path, str], int] = {}
    seen = 0
    for folder in dict.fromkeys([*folders, domain.items.folder]):
        for path in folder.rglob("*"):
            seen += 1
            if seen > MOST_FILES:
                break
            if path.suffix.lower() in IMAGE_FILES and path.stem in known:
                start = path.parent.name
                grouped = len(start) < len(path.stem) and path.stem.startswith(start) and path.parent != folder
                place, pattern = (
                    (path.parent.parent, f"{{item_id:.{len(start)}}}/{{item_id}}{path.suffix}")
                    if grouped
                    else (path.parent, f"{{item_id}}{path.suffix}")
                )
                counts[place, pattern] = counts.get((place, pattern), 0) + 1
    if not counts:
        return None
    (place, pattern), count = max(counts.items(), key=lambda pair: pair[1])
    base = domain.items.paths[0].parent
    begin = os.path.relpath(place, base) if place.is_relative_to(base) else str(place)
    return (pattern if begin == "." else f"{begin}/{pattern}"), f"{count:,} images there are called by the ID of an item"
