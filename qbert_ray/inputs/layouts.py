"""Recognises published files without a header by their first line, and names their columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

import polars as pl

from qbert_ray.storage.columns import ITEM_ID, TIMESTAMP, USER_ID

MIND = "mind"  # Microsoft's news: news.tsv and behaviors.tsv
NEWS = (ITEM_ID, "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
BEHAVIORS = ("impression_id", USER_ID, TIMESTAMP, "history", "impressions")
CLICKS = (USER_ID, ITEM_ID, TIMESTAMP)  # columns that are read from behaviors: impressions and clicks


def names_of(first: Sequence[str]) -> tuple[str, ...] | None:
    """Column names of a file, recognised by the cells of its first line; None if that line is a header."""
    if len(first) == len(NEWS) and re.fullmatch(r"N[0-9]+", first[0]):
        return NEWS
    if len(first) == len(BEHAVIORS) and re.fullmatch(r"U[0-9]+", first[1]) and re.fullmatch(r"N[0-9]+-[01]( .*)?", first[4]):
        return BEHAVIORS
    return None


def clicks(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per clicked impression."""
    shown = rows.select(USER_ID, TIMESTAMP, pl.col("impressions").str.split(" ").alias(ITEM_ID)).explode(ITEM_ID)
    return shown.filter(pl.col(ITEM_ID).str.ends_with("-1")).with_columns(pl.col(ITEM_ID).str.strip_suffix("-1")).select(CLICKS)
