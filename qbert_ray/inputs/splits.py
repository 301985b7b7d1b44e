"""Which interactions of each user are trained on and which are targets: leave-one-out, or a split into three periods.

Leave-one-out takes the last two interactions of each user. A temporal split cuts all users at the same two times, so that no training
interaction is later than a target; `last_n` gives the last interactions of each user to the validation and the test period; a split that
the user brings along says of every interaction which of the three it belongs to. Each user's first interaction of the validation and of
the test period is a target, and further ones are neither trained on nor targets, but part of the histories that come after them.

Shapes: U users, N catalog.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from qbert_ray.config.schema import Data
from qbert_ray.execution.executor import Executor, Handle
from qbert_ray.inputs.k_core import CODE, USER, Core, Partition, survivors
from qbert_ray.inputs.reasons import MIXED, UNITS, time_units
from qbert_ray.inputs.sources import PERIOD, PERIODS, SourceError
from qbert_ray.storage.columns import FURTHER, TIMESTAMP

THRESHOLDS = 1024  # times that each round of a search for a quantile counts up to
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OF_ALL = ("users_validated", "users_only_later", "further_interactions", "untrained_targets")  # numbers that are summed over users
_OF_GIVEN = (
    *("users_without_validation", "users_without_test", "users_trained_on_later"),
    *(f"in_{one}_and_{other}" for one, other in combinations(PERIODS, 2)),
    *(f"{name}_rejected" for name in PERIODS),
)


class Places(NamedTuple):
    """What each user's interactions with warm items are, by their places in order of time."""

    train: np.ndarray  # [U] number of training interactions, the first
    valid: np.ndarray  # [U] place of the validation target; -1: none
    test: np.ndarray  # [U] place of the test target; -1: none
    later: np.ndarray  # [U] place of the first interaction of the test period


@dataclass(frozen=True)
class Split(ABC):
    """The three periods of one domain's interactions, and which of its items training sees."""

    trained: np.ndarray  # [catalog] whether an item has training interactions
    only_later: np.ndarray  # [catalog] whether an item has interactions, but no training ones
    summed: ClassVar[tuple[str, ...]] = _OF_ALL

    @abstractmethod
    def periods(self, rows: pl.DataFrame) -> np.ndarray:
        """[rows] 0 for training, 1 for validation, 2 for test; within a user they never decrease.

        Args:
            rows: with warm items, in order of user and period.
        """

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

    def summary(self, counts: dict[str, Any], domain: str, evaluated: bool = True) -> dict[str, Any]:
        """What the split is and the numbers of all users, which are taken out of the domain's counts.

        Args:
            counts: of the domain.
            domain: for messages.
            evaluated: it needs targets for validation and test.

        Raises:
            SourceError: there is no validation or no test target, and the domain is evaluated.
        """
        found = {name: counts.pop(name, 0) for name in self.summed}
        for targets, period in ((found["users_validated"], "validation"), (counts["users_evaluated"], "test")):
            if evaluated and not targets:
                raise SourceError(f"domain {domain}: {self._no_target(period)}")
        return found | {"items_only_later": int(self.only_later.sum())}

    @abstractmethod
    def _no_target(self, period: str) -> str:
        """Why no user has a target in a period, and what to do."""


@dataclass(frozen=True)
class TemporalSplit(Split):
    """All users cut at the same two times."""

    valid: int  # first time of the validation period, in the unit of the domain's times
    test: int  # first time of the test period
    unit: str  # of the times, one of `reasons.UNITS`

    def periods(self, rows: pl.DataFrame) -> np.ndarray:
        times = rows[TIMESTAMP].to_numpy()
        return (times >= self.valid).astype(np.int8) + (times >= self.test)

    def summary(self, counts: dict[str, Any], domain: str, evaluated: bool = True) -> dict[str, Any]:
        return self._cuts() | super().summary(counts, domain, evaluated)

    def _cuts(self) -> dict[str, str]:
        return {"validation_from": as_date(self.valid, self.unit), "test_from": as_date(self.test, self.unit)}

    def _no_target(self, period: str) -> str:
        cuts = self._cuts()
        return (
            f"no user with interactions in the {period} period has any before it, so nothing can be predicted from a history (validation "
            f"from {cuts['validation_from']}, test from {cuts['test_from']}): choose other data.split_cuts"
        )


@dataclass(frozen=True)
class LastSplit(Split):
    """The last interactions of each user, as many for everyone; users with too few for all three periods are trained on."""

    valid: int  # number of interactions of the validation period
    test: int

    def periods(self, rows: pl.DataFrame) -> np.ndarray:
        users = rows[USER].to_numpy()
        starts = np.flatnonzero(np.diff(users.astype(np.int64), prepend=-1))
        sizes = np.diff(starts, append=len(users))
        left = np.repeat(starts + sizes, sizes) - np.arange(len(users))  # interactions of the user from this one on, itself included
        held_out = np.repeat(sizes > self.valid + self.test, sizes)
        return np.where(held_out, (left <= self.valid + self.test).astype(np.int8) + (left <= self.test), 0)

    def summary(self, counts: dict[str, Any], domain: str, evaluated: bool = True) -> dict[str, Any]:
        return {"last": [self.valid, self.test]} | super().summary(counts, domain, evaluated)

    def _no_target(self, period: str) -> str:
        held_out = self.valid + self.test
        return (
            f"data.split_last={[self.valid, self.test]} holds out {held_out} interactions of each user, and no user has more than that: "
            "choose a smaller data.split_last or data.split=leave_one_out"
        )


@dataclass(frozen=True)
class GivenSplit(Split):
    """The split that the user's files say; interactions have the column `PERIOD`."""

    summed: ClassVar[tuple[str, ...]] = (*_OF_ALL, *_OF_GIVEN)

    def periods(self, rows: pl.DataFrame) -> np.ndarray:
        return rows[PERIOD].to_numpy()

    def counts(self, sequences: pl.DataFrame, rows: pl.DataFrame) -> dict[str, int]:
        """Also of how many users a target is missing, and what of the three files overlaps or is out of order."""
        pairs = rows.group_by(USER, CODE).agg(*((pl.col(PERIOD) == number).any().alias(name) for number, name in enumerate(PERIODS)))
        both = {f"in_{one}_and_{other}": int((pairs[one] & pairs[other]).sum()) for one, other in combinations(PERIODS, 2)}
        first, last = (pl.col(TIMESTAMP).filter(condition) for condition in (pl.col(PERIOD) > 0, pl.col(PERIOD) == 0))
        order = rows.group_by(USER).agg(first.min().alias("first"), last.max().alias("last"))
        missing = {
            f"users_without_{name}": len(sequences) - sequences[column].count()
            for name, column in (("validation", "valid"), ("test", "test"))
        }
        return super().counts(sequences, rows) | missing | both | {"users_trained_on_later": int((order["last"] > order["first"]).sum())}

    def _no_target(self, period: str) -> str:
        return (
            f"no user has both interactions for training and one of {period}, so nothing can be predicted from a history. A split that gives each "
            "user to one part alone cannot be evaluated: a user's training interactions are the history of the targets"
        )


def remarks(split: dict[str, Any], users: int) -> list[str]:
    """Warnings about a split that the user's files say.

    Args:
        split: of `GivenSplit.summary`.
        users: of the domain.
    """
    if "in_train_and_test" not in split:
        return []
    said = []
    for name in ("validation", "test"):
        if split[f"users_without_{name}"]:
            said.append(f"{split[f'users_without_{name}']:,} of {users:,} users have no {name} target")
    both = {f"{one} and {other}": split[f"in_{one}_and_{other}"] for one, other in combinations(PERIODS, 2)}
    if any(both.values()):
        shares = ", ".join(f"{count:,} in {name}" for name, count in both.items() if count)
        said.append(
            f"the same user and item are in several parts of the split: {shares}; if they are no repeated purchases, the split leaks"
        )
    if split["users_trained_on_later"]:
        said.append(
            f"{split['users_trained_on_later']:,} of {users:,} users have training interactions later than those of validation or test, so the future "
            "is trained on"
        )
    if split["further_interactions"]:
        said.append(
            f"{split['further_interactions']:,} interactions of validation and test are no targets: of each user the first of either is one, and it "
            "needs training interactions before it"
        )
    lost = {name: split[f"{name}_rejected"] for name in PERIODS[1:] if split[f"{name}_rejected"]}
    if lost:
        said.append(f"rows rejected: {', '.join(f'{count:,} of {name}' for name, count in lost.items())}; ingest/rejected says why")
    return said


def leave_one_out(length: np.ndarray) -> Places:
    """The last two of each user with at least three interactions.

    Args:
        length: [U] interactions of each user.
    """
    enough = length >= 3
    valid, test = (np.where(enough, length - back, -1) for back in (2, 1))
    return Places(np.where(enough, length - 2, length), valid, test, np.where(enough, test, length))


def by_period(periods: np.ndarray, length: np.ndarray) -> Places:
    """The first interaction of each period is a target, where the user has had others before it.

    Args:
        periods: of all users' interactions end to end, in order within each user.
        length: [U] interactions of each user.
    """
    user = np.repeat(np.arange(len(length)), length)
    train, later = (np.bincount(user[periods <= last], minlength=len(length)) for last in (0, 1))
    valid = np.where((train > 0) & (later > train), train, -1)
    return Places(train, valid, np.where((later > 0) & (length > later), later, -1), later)


def find_split(executor: Executor, partitions: list[Partition], left: Core, data: Data, domain: str, given: bool = True) -> Split | None:
    """The split of a domain; None for leave-one-out.

    Args:
        executor: runs the counting.
        partitions: of the interactions.
        left: what the k-core keeps of them.
        data: the config's section.
        domain: its name.
        given: with data.split=given, its files say the split; those of a source domain need not, and then all of it is trained on.

    Raises:
        SourceError: of a temporal split, the times are none, or a period has no interactions; of a source domain, the first.
    """
    nothing = np.zeros(len(left.items), bool)
    split: Split
    match data.split:
        case "leave_one_out":
            return None
        case "temporal":
            split = _temporal(executor, partitions, left, data, domain)
        case "last_n":
            split = LastSplit(nothing, nothing, *data.split_last)
        case "given":
            split = GivenSplit(nothing, nothing) if given else LastSplit(nothing, nothing, 0, 0)
    reference = executor.put((split, left.items))
    seen = [executor.submit(_seen, part.kept, reference, data.min_interactions) for part in partitions]
    before, later = np.logical_or.reduce([executor.get(each) for each in seen])
    return replace(split, trained=before, only_later=later & ~before)


def _temporal(executor: Executor, partitions: list[Partition], left: Core, data: Data, domain: str) -> TemporalSplit:
    """The cuts of a temporal split in the unit of a domain's times."""
    masks = executor.put((left.items, left.cold))
    times = [executor.submit(_times, part.kept, masks, data.min_interactions) for part in partitions]
    total, of_units, first, last = _overview(executor, times)
    unit = _unit(of_units, total, first, last, domain)
    valid, test = (_cut(executor, times, cut, total, (first, last), unit) for cut in data.split_cuts)
    before_valid, before_test = _counts(executor, times, np.array([valid - 1, test - 1]))
    periods = {"training": before_valid, "validation": before_test - before_valid, "test": total - before_test}
    evaluated = data.domains[domain].role == "target"
    for name, count in periods.items():
        if not count and (evaluated or name == "training"):
            raise SourceError(
                f"domain {domain}: data.split_cuts={data.split_cuts} leaves no interaction for {name}: validation begins at "
                f"{as_date(valid, unit)}, the test period at {as_date(test, unit)}, and the interactions are from {as_date(first, unit)} "
                f"to {as_date(last, unit)}"
            )
    nothing = np.zeros(len(left.items), bool)
    return TemporalSplit(nothing, nothing, valid, test, unit)


def as_date(time: int, unit: str) -> str:
    """A time as text, such as 1998-03-01 or 1998-03-01T12:00:00, in UTC; as the number where it is no date, such as the largest of 64 bits."""
    try:
        found = EPOCH + timedelta(microseconds=time * 1_000_000 // int(UNITS[unit][1]))
    except OverflowError:
        return str(time)
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


def _seen(kept: pa.Table, given: tuple[Split, np.ndarray], min_user: int) -> np.ndarray:
    """[2, catalog] whether an item has remaining training interactions, and later ones."""
    split, items = given
    rows = pl.DataFrame(kept).filter(survivors(kept, items, np.zeros_like(items), min_user))
    trained, codes = split.periods(rows) == 0, rows[CODE].to_numpy()
    return np.stack([np.bincount(codes[found], minlength=len(items)) > 0 for found in (trained, ~trained)])
