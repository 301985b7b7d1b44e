"""Messages about rejected rows: a hint for each reason, and an explanation if no row of a table is left."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from qbert_ray.inputs.times import FORMATS
from qbert_ray.storage.columns import ITEM_ID, TIMESTAMP

HINTS = {
    "missing item_id": "give every row an item_id; nan, NULL, None and the like are none",
    "nested user_id": "the column holds objects; write the ID as a column of its own, as jq -c '.user_id = .user.id' does",
    "nested item_id": "the column holds objects; write the ID as a column of its own, as jq -c '.item_id = .item.id' does",
    "missing user_id": "give every row a user_id; nan, NULL, None and the like are none",
    "inexact item_id": "a column of floats rounds such large numbers, so several items may have become one: write IDs as text or integers",
    "inexact user_id": "a column of floats rounds such large numbers, so several users may have become one: write IDs as text or integers",
    "missing timestamp": "give every interaction a time; a running number per user will do",
    "bad timestamp": f"understood are {FORMATS}",
    "bad rating": "with data.min_rating, a rating must be a number; leave data.min_rating out to keep all",
    "below min_rating": "data.min_rating",
    "missing split": "with data.split=given, say of every interaction which part it is in",
    "bad split": "understood are train, training, valid, validation, val, dev, eval, test and testing",
    "also in a later part": "the same user, item and time is also in validation or test, whose row was kept",
    "missing event_type": "give every interaction a type, or leave data.domains.<name>.event_weights out to keep all",
    "event_type left out": "data.domains.<name>.event_weights names the types that count, written as in the files, capital letters included",
    "bad interaction_weight": "a weight must be a number from 0 to a million; without one an interaction counts as 1",
    "interaction_weight is 0": "interactions that count for nothing are left out",
    "item not in items table": "are the IDs written in the same way in both files? if so, add the items to the items file",
    "duplicate item_id": "the first row of an item was kept",
    "duplicate interaction": "same user, item and time: one was kept",
    "below min_item_interactions": "data.min_item_interactions; 0 keeps every item of the catalog",
    "item below min_item_interactions": "data.min_item_interactions or data.min_interactions",
    "user below min_interactions": "data.min_interactions",
    "unsafe path": "keep images next to the items file or under data.root, or use https:// or s3:// addresses",
    "no path in image": "an image is a path, an address, bytes, or a mapping that holds one as path, url, src or bytes",
    "invalid JSON": "each line must be one JSON object; Python literals with single quotes are not JSON",
    "invalid CSV row": "another number of cells than the header: quote texts that hold commas",
    "open quotation mark": "a quotation mark that opens a cell is not closed; double those that belong to the text",
    "line too long": "a line may have 16 MiB; is a line end missing, or a file of another kind pasted into a cell?",
    "file not found": "image paths start from the folder of the items file",
}
UNITS = {"s": (1e8, 1.0), "ms": (1e11, 1e3), "us": (1e14, 1e6), "ns": (1e17, 1e9)}  # of times: smallest plausible value, units per second
LATEST = 4.2e9  # seconds since 1970 of the last plausible date
MIXED, MOST = 0.01, 0.5  # shares above which a second unit of time, and histories with a single time, are reported
SHOWN = 300  # characters of an example
_EXPONENT = r"^[0-9][.,]?[0-9]*[eE][+][0-9]+$"  # as spreadsheets write long numbers; the digits after the sixth are lost
# Control characters, blanks that are none of ASCII, signs without width, and those that only choose how the one before them is drawn.
_INVISIBLE = r"[\x00-\x1f\x7f-\xa0\u00ad\u2000-\u200f\u2028-\u202f\u205f-\u2064\u2066-\u2069\u3000\ufe00-\ufe0f\ufeff]"
ROUNDED = "look like numbers that a spreadsheet has rounded, so that several IDs may have become one: export them as text"
LOOK_ALIKE = "hold invisible characters or accents apart from their letters: the same ID without them would be another one"
_NEARLY_EQUAL: dict[str, Callable[[str], str]] = {  # why IDs of two files may differ -> function that makes them equal
    "they have leading zeros on one side only": lambda text: text.lstrip("0"),
    "one side is written in capitals": str.lower,
    "they are written with other Unicode characters that look alike": lambda text: unicodedata.normalize("NFKC", text),
    "one side is written with an exponent, as spreadsheets do": lambda text: _whole(text),
    "one side has spaces or signs in it": lambda text: "".join(sign for sign in text if sign.isalnum()).lower(),
    "one side has a prefix": lambda text: (
        text.rpartition("/")[2].rpartition(":")[2].lstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-#").lstrip("0")
    ),
}


def time_units(times: np.ndarray) -> dict[str, int]:
    """Unit -> how many times look like it; times that are no plausible dates look like none."""
    edges = [low for low, _ in UNITS.values()]
    counts = np.bincount(np.searchsorted(edges, times, side="right"), minlength=len(edges) + 1)[1:]
    return {unit: int(count) for unit, count in zip(UNITS, counts, strict=True)}


def implausible_times(times: np.ndarray) -> int:
    """How many times are before 1973 or after 2102 in the unit that they look like."""
    edges = np.array([low for low, _ in UNITS.values()])
    unit = np.searchsorted(edges, times, side="right") - 1
    seconds = times / np.array([scale for _, scale in UNITS.values()])[np.maximum(unit, 0)]
    return int(((unit < 0) | (seconds > LATEST)).sum())


def rejected(reason: str, count: int, examples: Sequence[str], total: int | None = None) -> str:
    """One line about the rows, out of `total`, that were rejected for one reason.

    Args:
        examples: rows as JSON.
    """
    hint = _cells(examples) if reason == "invalid CSV row" else HINTS.get(reason, "")
    shown = _shown(reason, examples)
    of = f" of {total:,}" if total else ""
    return f"{count:,}{of} {reason}" + (f", such as {shown}" if shown else "") + (f" ({hint})" if hint else "")


def suspicions(
    users: int, evaluated: int, at_one_time: int, times: dict[str, int], implausible: int = 0, interactions: int = 0
) -> list[str]:
    """Warnings about interactions that can be used but look wrong.

    Args:
        users: kept users; `evaluated` of them have at least three interactions, `at_one_time` two or more with equal times.
        times: unit -> how many times look like it.
        implausible: of the times of `interactions`, those that are no dates of a shop in the unit they look like.
    """
    said = []
    if not evaluated:
        said.append("no user has 3 interactions, so nothing can be validated or evaluated: the last two of each user are held out")
    if interactions and MIXED <= implausible / interactions <= 1 - MIXED:  # all of them: a running number is no date either
        said.append(
            f"{implausible / interactions:.1%} of the times are no plausible dates (0, or before 1973 or after 2102) next to others that are: "
            "is a missing time written as 0 or as a date far away, or a date as the number of its day, as spreadsheets have it?"
        )
    total = sum(times.values())
    often = [unit for unit, count in times.items() if total and count >= MIXED * total]
    if len(often) > 1:
        shares = " and ".join(f"{times[unit] / total:.0%} in {unit}" for unit in often)
        said.append(f"times are of several units ({shares}), so histories are in the wrong order: write all of them in one")
    if at_one_time > MOST * users:
        said.append(
            f"{at_one_time:,} of {users:,} users have all their interactions at one time, which are then ordered by a hash: "
            "is user_id the number of an order, is the time only a day, or did a spreadsheet round it?"
        )
    return said


def odd_ids(ids: pl.Series) -> dict[str, tuple[int, str]]:
    """What is odd about some IDs -> how many are so, and one of them; each ID is used as it is written."""
    bare = ids.str.replace_all(_INVISIBLE, "").str.normalize("NFC")
    found = {}
    for what, odd in ((ROUNDED, ids.str.contains(_EXPONENT)), (LOOK_ALIKE, ids != bare)):
        if odd.any():
            found[what] = (int(odd.sum()), str(ids.filter(odd)[0]))
    return found


def unknown_items(wanted: Iterable[str], known: Sequence[str]) -> str:
    """One line with an ID of each file, and the likely reason why they do not match."""
    ids = [item for item in wanted if item]
    if not ids or not known:
        return ""
    said = f"an ID of the interactions: {ids[0]!r}; one of the items: {known[0]!r}"
    for why, reduced in _NEARLY_EQUAL.items():
        there = {reduced(item) for item in known} - {""}
        found = next((item for item in ids if reduced(item) in there), None)
        if found is not None:
            same = next(item for item in known if reduced(item) == reduced(found))
            return f"{found!r} of the interactions seems to be {same!r} of the items: {why}"
    return said


def nothing_left(
    total: int,
    found: dict[str, tuple[int, list[str]]],
    left: int,
    items: dict[str, tuple[int, list[str]]],
    num_items: int,
    known: list[str],
) -> str:
    """A message that explains why no interaction is left.

    Args:
        total: interactions read.
        found: reason -> rejected interactions and some of them as JSON.
        left: interactions that no reason rejects; the k-core removed all of them.
        items: reason -> rejected ones of `num_items` items, and some of them.
        known: some of the catalog's IDs.
    """
    lines = [f"nothing is left of {total:,} interactions"]
    lines += [f"  interactions: {rejected(reason, count, examples)}" for reason, (count, examples) in found.items()]
    if "item not in items table" in found:
        ids = [_value(row, ITEM_ID) for row in found["item not in items table"][1]]
        lines.append(f"  {unknown_items([item for item in ids if item], known)}")
    lines += [f"  items: {rejected(reason, count, examples, num_items)}" for reason, (count, examples) in items.items()]
    if left:
        lines.append(
            f"  the other {left:,} are of users or items with too few interactions: lower data.min_interactions and data.min_item_interactions"
        )
    return "\n".join(lines)


def _whole(text: str) -> str:
    """A number with an exponent as a whole number; any other text as it is."""
    try:
        return str(int(float(text))) if re.fullmatch(r"[0-9.]+[eE][+]?[0-9]{1,2}", text) else text
    except ValueError:
        return text


def _shown(reason: str, examples: Sequence[str]) -> str:
    if not examples:
        return ""
    value = _value(examples[0], TIMESTAMP) if reason == "bad timestamp" else _value(examples[0], "line")
    return repr(value) if value else examples[0][:SHOWN]


def _cells(examples: Sequence[str]) -> str:
    rows = [row for row in map(_parsed, examples) if "cells" in row]
    if not rows:
        return HINTS["invalid CSV row"]
    counts = sorted({row["cells"] for row in rows})
    said = f"{' or '.join(map(str, counts))} cells, the header has {rows[0]['columns']}"
    ends = counts == [rows[0]["columns"] + 1] and all(row["line"].rstrip().endswith((",", ";")) for row in rows)
    return said + (": is there a comma at the end of each line?" if ends else "; quote texts that hold commas")


def _value(row: str, column: str) -> str | None:
    value = _parsed(row).get(column)
    return None if value is None else str(value)[:SHOWN]


def _parsed(row: str) -> dict[str, Any]:
    try:
        value = json.loads(row)
    except ValueError:  # it was cut
        return {}
    return value if isinstance(value, dict) else {}
