"""Which interactions of each user are trained on and which are targets: leave-one-out, or a global temporal split.

Leave-one-out takes the last two interactions of each user. A temporal split cuts all users at the same two times, so that no training
interaction is later than a target; each user's first interaction of the validation and of the test period is a target, and further
ones are neither trained on nor targets, but part of the histories that come after them.

Shapes: U users, N catalog.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from qbert_ray.config.schema import Data
from qbert_ray.execution.executor import Executor, Handle
from qbert_ray.inputs.k_core import CODE, Core, Partition, survivors
from qbert_ray.inputs.reasons import MIXED, UNITS, time_units
from qbert_ray.inputs.sources import SourceError
from qbert_ray.storage.columns import FURTHER, TIMESTAMP

THRESHOLDS = 1024  # times that each round of a search for a quantile counts up to
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Places(NamedTuple):
    """What each user's interactions with warm items are, by their places in order of time."""

    train: np.ndarray  # [U] number of training interactions, the first
    valid: np.ndarray  # [U] place of the validation target; -1: none
    test: np.ndarray  # [U] place of the test target; -1: none
    later: np.ndarray  # [U] place of the first interaction of the test period


@dataclass(frozen=True)
class TemporalSplit:
    """The cuts of one domain, and which of its items training sees."""

    valid: int  # first time of the validation period, in the unit of the domain's times
    test: int  # first time of the test period
    unit: str  # of the times, one of `reasons.UNITS`
    trained: np.ndarray  # [catalog] whether an item has interactions before the validation period
    only_later: np.ndarray  # [catalog] whether all of an item's interactions are after its beginning

    def counts(self, sequences: pl.DataFrame, rows: pl.DataFrame) -> dict[str, int]:
        """What becomes of some users: numbers that add up over users.

        Args:
            sequences: of `sequences_of`.
            rows: their interactions with their split and catalog row.
        """
        untrained = (rows["split"] == "test").to_numpy() & ~self.trained[rows[CODE].to_numpy()]
        return {
            "users_validated": sequences["valid"].count(),
            "users_only_later": int((sequences["train"].list.len() == 0).sum()),
            "further_interactions": int((rows["split"] == FURTHER).sum()),
            "untrained_targets": int(untrained.sum()),
        }

    def summary(self, counts: dict[str, Any], domain: str) -> dict[str, Any]:
        """The cuts as dates and the numbers of all users, which are taken out of the domain's counts.

        Raises:
            SourceError: there is no validation or no test target.
        """
        cuts = {"validation_from": as_date(self.valid, self.unit), "test_from": as_date(self.test, self.unit)}
        found = {name: counts.pop(name, 0) for name in ("users_validated", "users_only_later", "further_interactions", "untrained_targets")}
        for targets, period in ((found["users_validated"], "validation"), (counts["users_evaluated"], "test")):
            if not targets:
                raise SourceError(
                    f"domain {domain}: no user with interactions in the {period} period has any before it, so nothing can be predicted from a "
                    f"history (validation from {cuts['validation_from']}, test from {cuts['test_from']}): choose other data.split_cuts"
                )
        return cuts | found | {"items_only_later": int(self.only_later.sum())}


def leave_one_out(length: np.ndarray) -> Places:
    """The last two of each user with at least three interactions.

    Args:
        length: [U] interactions of each user.
    """
    enough = length >= 3
    valid, test = (np.where(enough, length - back, -1) for back in (2, 1))
    return Places(np.where(enough, length - 2, length), valid, test, np.where(enough, test, length))


def temporal(times: np.ndarray, length: np.ndarray, split: TemporalSplit) -> Places:
    """The first interaction of each period is a target, where the user has had others before it.

    Args:
        times: of all users' interactions end to end, in order of time within each user.
        length: [U] interactions of each user.
        split: the cuts.
    """
    user = np.repeat(np.arange(len(length)), length)
    train, later = (np.bincount(user[times < cut], minlength=len(length)) for cut in (split.valid, split.test))
    valid = np.where((train > 0) & (later > train), train, -1)
    return Places(train, valid, np.where((later > 0) & (length > later), later, -1), later)


def find_split(executor: Executor, partitions: list[Partition], left: Core, data: Data, domain: str) -> TemporalSplit | None:
    """The cuts of a temporal split in the unit of a domain's times; None for leave-one-out.

    Args:
        executor: runs the counting.
        partitions: of the interactions.
        left: what the k-core keeps of them.
        data: the config's section.
        domain: for messages.

    Raises:
        SourceError: the times are none, or a period has no interactions.
    """
    if data.split != "temporal":
        return None
    masks = executor.put((left.items, left.cold))
    times = [executor.submit(_times, part.kept, masks, data.min_interactions) for part in partitions]
    total, of_units, first, last = _overview(executor, times)
    unit = _unit(of_units, total, first, last, domain)
    valid, test = (_cut(executor, times, cut, total, (first, last), unit) for cut in data.split_cuts)
    before_valid, before_test = _counts(executor, times, np.array([valid - 1, test - 1]))
    for name, count in (
        ("training", before_valid),
        ("validation", before_test - before_valid),
        ("test", total - before_test),
    ):
        if not count:
            raise SourceError(
                f"domain {domain}: data.split_cuts={data.split_cuts} leaves no interaction for {name}: validation begins at "
                f"{as_date(valid, unit)}, the test period at {as_date(test, unit)}, and the interactions are from {as_date(first, unit)} "
                f"to {as_date(last, unit)}"
            )
    seen = [executor.submit(_seen, part.kept, masks, data.min_interactions, valid) for part in partitions]
    before, later = np.logical_or.reduce([executor.get(each) for each in seen])
    return TemporalSplit(valid, test, unit, before, later & ~before)


def as_date(time: int, unit: str) -> str:
    """A time as text, such as 1998-03-01 or 1998-03-01T12:00:00, in UTC."""
    found = EPOCH + timedelta(microseconds=time * 1_000_000 // int(UNITS[unit][1]))
    text = found.replace(tzinfo=None).isoformat(timespec="seconds")
    return text.removesuffix("T00:00:00")


def _unit(of_units: dict[str, int], total: int, first: int, last: int, domain: str) -> str:
    """The unit of nearly all times.

    Raises:
        SourceError: there is none.
    """
    unit = max(of_units, key=lambda name: of_units[name])
    if of_units[unit] >= (1 - MIXED) * total:
        return unit
    why = (
        "are of several units"
        if sum(of_units.values()) >= (1 - MIXED) * total
        else "are no times, but look like positions in each user's history"
    )
    raise SourceError(
        f"domain {domain}: data.split=temporal cuts all users at the same time, and the timestamps, from {first} to {last}, {why}. "
        "Give dates or Unix times, or set data.split=leave_one_out"
    )


def _cut(executor: Executor, times: list[Handle], cut: float | str, total: int, bounds: tuple[int, int], unit: str) -> int:
    """The first time of a period: a date in the unit of the times, or the time of the interaction that a share of all comes before."""
    if isinstance(cut, str):
        given = datetime.fromisoformat(cut)
        since = (given if given.tzinfo else given.replace(tzinfo=UTC)) - EPOCH
        return -(-(since // timedelta(microseconds=1) * int(UNITS[unit][1])) // 1_000_000)  # no time before the date is of the period
    return quantile(executor, times, int(cut * total), *bounds)


def quantile(executor: Executor, times: list[Handle], rank: int, low: int, high: int) -> int:
    """The time at a 0-based rank of all times in order; it does not depend on how they are divided.

    Args:
        times: handles of sorted arrays.
        low: no later than the smallest time.
        high: no earlier than the largest time.
    """
    while low < high:  # the wanted time is the smallest with more than `rank` times up to it, and lies in [low, high]
        step = -(-(high - low) // THRESHOLDS)
        thresholds = np.arange(low, high, step, dtype=np.int64)
        enough = np.flatnonzero(_counts(executor, times, thresholds) > rank)
        place = int(enough[0]) if len(enough) else len(thresholds)
        low, high = (
            int(thresholds[place - 1]) + 1 if place else low,
            int(thresholds[place]) if place < len(thresholds) else high,
        )
    return low


def _overview(executor: Executor, times: list[Handle]) -> tuple[int, dict[str, int], int, int]:
    """Number of times, how many look like each unit, the first and the last."""
    found = [executor.get(each) for each in [executor.submit(_describe, handle) for handle in times]]
    of_units = dict(zip(UNITS, np.sum([counts for _, counts, _, _ in found], axis=0).tolist(), strict=True))
    kept = [each for each in found if each[0]]
    return sum(each[0] for each in kept), of_units, min(each[2] for each in kept), max(each[3] for each in kept)


def _counts(executor: Executor, times: list[Handle], thresholds: np.ndarray) -> np.ndarray:
    """[thresholds] number of times up to each of them."""
    given = executor.put(thresholds)
    return np.sum([executor.get(each) for each in [executor.submit(_up_to, handle, given) for handle in times]], axis=0)


def _times(kept: pa.Table, masks: tuple[np.ndarray, np.ndarray], min_user: int) -> np.ndarray:
    """Times of a partition's remaining interactions, sorted."""
    return np.sort(kept[TIMESTAMP].to_numpy()[survivors(kept, *masks, min_user)])


def _describe(times: np.ndarray) -> tuple[int, np.ndarray, int, int]:
    return len(times), np.array(list(time_units(times).values())), int(times[0]) if len(times) else 0, int(times[-1]) if len(times) else 0


def _up_to(times: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return np.searchsorted(times, thresholds, side="right")


def _seen(kept: pa.Table, masks: tuple[np.ndarray, np.ndarray], min_user: int, cut: int) -> np.ndarray:
    """[2, catalog] whether an item has remaining interactions before a time, and from then on."""
    left = survivors(kept, *masks, min_user)
    before, codes = kept[TIMESTAMP].to_numpy()[left] < cut, kept[CODE].to_numpy()[left]
    return np.stack([np.bincount(codes[rows], minlength=len(masks[0])) > 0 for rows in (before, ~before)])
