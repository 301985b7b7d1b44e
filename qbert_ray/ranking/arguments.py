"""Reads the arguments of a recommender: histories, items, numbers. Each iterable is read once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

UNKNOWN = ("ignore", "error")  # what can be done with unknown items
Items = str | Iterable[str] | Iterable[Iterable[str] | None]


class ArgumentError(ValueError, TypeError):
    """An argument of another type than the one that is asked for; the message names it."""


def read_count(k: object) -> int:
    """A number of items.

    Raises:
        ArgumentError: it is no whole number.
        ValueError: it is less than one.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise ArgumentError(f"k is {k!r}; it must be a whole number")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    return int(k)


def read_unknown(unknown: str) -> None:
    """Raise ValueError if it is none of `UNKNOWN`."""
    if unknown not in UNKNOWN:
        raise ValueError(f"unknown is {unknown!r}; it must be {' or '.join(map(repr, UNKNOWN))}")


def read_histories(histories: Iterable[Iterable[str]]) -> list[list[str]]:
    """The histories as lists: an iterator has nothing left for a second reading.

    Raises:
        ArgumentError: it is no list of lists of text.
    """
    if isinstance(histories, str | bytes | dict) or not isinstance(histories, Iterable):
        raise ArgumentError(f"histories is of type {type(histories).__name__}; it must be a list of lists of item_id")
    read = []
    for number, history in enumerate(histories):
        if isinstance(history, str | bytes):
            raise ArgumentError("histories must be a list of lists of item_id; for a single history write [history]")
        if isinstance(history, dict) or not isinstance(history, Iterable):
            raise ArgumentError(f"history {number} is {history!r}; it must be a list of item_id, and [] for a user without any")
        read.append(read_ids(history, f"history {number}"))
    return read


def read_ids(items: Iterable[str], name: str) -> list[str]:
    """A list of item_id.

    Args:
        items: what was given.
        name: of the argument, for errors.

    Raises:
        ArgumentError: it is no list of text.
    """
    if isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
        raise ArgumentError(f"{name} is {items!r}; it must be a list of item_id")
    found = list(items)
    wrong = next((item for item in found if not isinstance(item, str)), None)
    if wrong is not None or None in found:
        advice = "leave it out" if str(wrong).lower() in ("none", "nan", "nat", "<na>") else f"write {str(wrong)!r}"
        raise ArgumentError(f"{name} holds {wrong!r} of type {type(wrong).__name__}; item_ids are text: {advice}")
    return found


def read_filter(items: Items, name: str, histories: int) -> tuple[list[str] | None, list[list[str] | None]]:
    """Items for every history, or None and a list for each of them.

    Args:
        items: what was given for it, but for a text.
        name: "exclude" or "allow".
        histories: how many there are.

    Raises:
        ArgumentError: it is neither a list of text nor one of lists of text.
        ValueError: there are not as many lists as histories.
    """
    if isinstance(items, bytes | dict) or not isinstance(items, Iterable):
        raise ArgumentError(f"{name} is of type {type(items).__name__}; it must be a list of item_id, or a list of them for each history")
    found = list(items)
    if not found or any(isinstance(each, str) for each in found) or not all(each is None or isinstance(each, Iterable) for each in found):
        return read_ids(found, name), []  # type: ignore[arg-type]
    if len(found) != histories:
        raise ValueError(f"{name} has {len(found)} lists for {histories} histories; give one for each, or one list of item_id for all")
    return None, [None if each is None else read_ids(each, f"{name} {number}") for number, each in enumerate(found)]
