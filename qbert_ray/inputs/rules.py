"""Reads what `score.exclude` and `score.allow` name: tables of items, tables of users and items, or expressions over item columns."""

from __future__ import annotations

from typing import Any

import polars as pl

from qbert_ray.config.schema import Config
from qbert_ray.inputs.conditions import MATCHES, check, matching
from qbert_ray.inputs.id_tables import is_table, open_ids, read_ids
from qbert_ray.inputs.reasons import unknown_items
from qbert_ray.inputs.sources import Source, open_source
from qbert_ray.storage.columns import ITEM_ID, ITEM_INDEX, USER_ID

EXCLUDE, ALLOW = "score.exclude", "score.allow"
KNOWN_IDS = 100_000  # of the catalog, compared with IDs of a table of which none is known


def given_rules(config: Config, domain: str) -> dict[str, str]:
    """`EXCLUDE` and `ALLOW`, where they are set, -> their text for a domain."""
    texts = {EXCLUDE: config.score.exclude, ALLOW: config.score.allow}
    return {key: text.replace("{domain}", domain) for key, text in texts.items() if text}


def check_rules(config: Config) -> None:
    """Raise if `score.exclude` or `score.allow` cannot be used; no rows are read.

    Raises:
        SourceError: there is no such table, it lacks a column, or an expression cannot be understood.
    """
    for domain in config.data.targets:
        for key, text in given_rules(config, domain).items():
            if is_table(text):
                open_ids(config.data.root, text, key, config.data.domains[domain])
            else:
                check(text, key, _items(config, domain))


def rule_files(config: Config) -> dict[str, str]:
    """Name -> path, under data.root, of the files that the rules are read from."""
    found = {}
    for domain in config.data.targets:
        for key, text in given_rules(config, domain).items():
            found[f"{key} of {domain}"] = text if is_table(text) else config.data.domains[domain].items
    return found


def read_rule(config: Config, domain: str, key: str, catalog: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Items of the catalog that a rule names, and what was read.

    Args:
        config: with the rule, and where the files are.
        domain: whose catalog it is.
        key: `EXCLUDE` or `ALLOW`.
        catalog: item_id and item_index.

    Returns:
        Rows of item_index, or of user_id and item_index; and counts, with a warning where no row names an item.

    Raises:
        SourceError: the table or the expression cannot be used.
    """
    text = given_rules(config, domain)[key]
    if not is_table(text):
        found = matching(text, key, _items(config, domain))
        named = catalog.join(found.filter(MATCHES), on=ITEM_ID).select(ITEM_INDEX)
        return named, {"expression": text, "items_in_files": len(found), "items": len(named)}
    rows, unusable = read_ids(open_ids(config.data.root, text, key, config.data.domains[domain]))
    known = rows.join(catalog, on=ITEM_ID).drop(ITEM_ID)
    report = {"table": text, "rows": len(rows), "without_an_id": unusable, "unknown_items": len(rows) - len(known)}
    if len(rows) and known.is_empty():
        said = unknown_items(rows[ITEM_ID].head(KNOWN_IDS), catalog[ITEM_ID].head(KNOWN_IDS).to_list())
        said = said.replace("of the interactions", f"of {text}").replace("one of the items", "one of the catalog")
        report["warning"] = f"{key}: none of the {len(rows):,} rows of {text} names an item of {domain}; {said}"
    elif unusable and USER_ID in rows.columns:
        report["warning"] = (
            f"{key}: {unusable:,} rows of {text} lack an item_id or a user_id and are left out; items that are meant for all users belong "
            "into a table without the column user_id"
        )
    return known, report | ({"users": known[USER_ID].n_unique()} if USER_ID in known.columns else {"items": len(known)})


def _items(config: Config, domain: str) -> Source:
    alone: dict[str, Any] = {
        "text_fields": [],
        "attributes": [],
        "image_column": None,
        "image_template": None,
    }  # no other columns are needed
    return open_source(config.data.root, domain, "items", config.data.domains[domain].model_copy(update=alone))
