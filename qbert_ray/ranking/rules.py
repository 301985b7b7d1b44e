"""The rules of `score.exclude` and `score.allow` over the catalog of a run.

Shapes: N catalog, U users with rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from qbert_ray.config.schema import Config
from qbert_ray.inputs.rules import ALLOW, EXCLUDE, given_rules, read_rule
from qbert_ray.inputs.sources import SourceError
from qbert_ray.ranking.filters import Filter
from qbert_ray.storage.columns import ITEM_ID, ITEM_INDEX, USER_ID
from qbert_ray.storage.directory import RunDir


@dataclass(frozen=True)
class UserItems:
    """Items of users: `items[indptr[u]:indptr[u + 1]]` are those of `users[u]`."""

    users: pl.Series  # [U] user_id in order
    indptr: np.ndarray  # [U + 1]
    items: np.ndarray  # item_index

    @classmethod
    def of(cls, rows: pl.DataFrame) -> UserItems:
        """From rows of user_id and item_index."""
        found = rows.group_by(USER_ID).agg(ITEM_INDEX).sort(USER_ID)
        counts = found[ITEM_INDEX].list.len().to_numpy()
        return cls(found[USER_ID], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), found[ITEM_INDEX].explode().to_numpy())

    def named(self, users: Sequence[str]) -> int:
        """How many of some users are there."""
        return int(pl.Series(users, dtype=pl.String).is_in(self.users.implode()).sum())

    def __call__(self, users: Sequence[str]) -> list[np.ndarray]:
        """The items of each of some users; none for a user who is not there."""
        if not len(self.users):
            return [self.items[:0]] * len(users)
        asked = pl.Series(users, dtype=pl.String)
        place = self.users.search_sorted(asked).to_numpy().clip(max=len(self.users) - 1)
        there = (self.users.gather(place) == asked).to_list()
        return [
            self.items[self.indptr[row] : self.indptr[row + 1]] if known else self.items[:0]
            for row, known in zip(place, there, strict=True)
        ]


@dataclass(frozen=True)
class Rules:
    """`score.exclude` and `score.allow` of one domain.

    Args:
        items: [N] booleans, items that may be recommended to anybody; None: all.
        excluded: items that must not be recommended to some users.
        allowed: items of which each user gets some; a user without any gets nothing. None: of all.
    """

    items: np.ndarray | None = None
    excluded: UserItems | None = None
    allowed: UserItems | None = None

    @property
    def by_user(self) -> bool:
        """Whether users have rules of their own."""
        return self.excluded is not None or self.allowed is not None

    def named(self, users: Sequence[str]) -> int:
        """How many of some users have rows of their own; each table of users that names some adds them."""
        return sum(each.named(users) for each in (self.excluded, self.allowed) if each is not None)

    def of(self, users: Sequence[str]) -> Filter:
        """The filter of histories of these users."""
        excluded, allowed = (None if each is None else each(users) for each in (self.excluded, self.allowed))
        return Filter(self.items, excluded, allowed)


EVERYBODY = Rules()


def load_rules(config: Config, run: RunDir, domain: str) -> tuple[Rules, dict[str, Any]]:
    """The rules of a domain, and what was read: key -> counts of rows, items and users.

    Args:
        config: whose section `score` says what to read, and whose section `data` where the files are.
        run: whose catalog is meant.
        domain: of the run.

    Raises:
        SourceError: a table or an expression cannot be used, or nothing is allowed.
    """
    catalog = pl.DataFrame(run.read("ingest/items", domain, [ITEM_ID, ITEM_INDEX]))
    given = given_rules(config, domain)
    items: np.ndarray | None = None
    by_user: dict[str, UserItems] = {}
    report: dict[str, Any] = {}
    for key in given:
        found, report[key] = read_rule(config, domain, key, catalog)
        if USER_ID in found.columns:
            by_user[key] = UserItems.of(found)
            continue
        mask = np.full(len(catalog), key == EXCLUDE)
        mask[found[ITEM_INDEX].to_numpy()] = key == ALLOW
        items = mask if items is None else items & mask
    if items is not None and not items.any():
        said = " and ".join(f"{key}={text!r}" for key, text in given.items())
        raise SourceError(f"domain {domain}: {said} leave none of {len(catalog):,} items to recommend")
    return Rules(items, by_user.get(EXCLUDE), by_user.get(ALLOW)), report
