"""How much of a data set's order is the order of its item IDs, and what that is worth to models of order.

    python -m tests.benchmarks.artefacts /data toys14 scientific movielens     # /data/toys14/items.parquet, ...

Many public sets hold a position in place of a time: interactions of one day were sorted by item ID before their dates were dropped.
A model of order then learns the IDs' order. Of each set, one row of the table on the results page:

* pairs: share of neighbours in a history whose IDs ascend. Chance is 50 %.
* largest: share of users whose test item has the largest ID of their last three items. Chance is 33 %.
* ascending targets: share of test items with a larger ID than the item before them, which is the one a model of order sees last.
* symmetric, directed: transition counts of both directions, and of the right one alone. The gain of direction is split by targets that
  ascend and targets that descend: what customers do next does not depend on how IDs are ordered, so both should gain alike.
* shuffled: the same after each three neighbours, which may be of one day, are put in a random order: the last three items of a user, the
  three before them, and so on, test items included. Which neighbours are shuffled does not depend on IDs, since runs of ascending IDs
  would leave other test items than a random order does. Ridge regression hardly reads the order, so its change tells how much easier or
  harder the new test items are.

IDs are compared as text, padded with zeros in front, so that numbers are in their own order. Figures are ndcg@10 of test items among
unseen ones, by the ranking settings of the default config; one draw of the shuffle.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from scipy import sparse

from qbert_ray import metrics
from qbert_ray.config.loading import load_config
from qbert_ray.config.schema import Ranking
from qbert_ray.execution.executor import open_executor
from qbert_ray.execution.progress import Quiet
from qbert_ray.pipeline import run_stage
from qbert_ray.ranking.item_item import RidgeRegression, Transitions, recency
from qbert_ray.ranking.ranker import batches
from qbert_ray.storage.columns import ITEM_ID, ITEM_INDEX, USER_ID
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import BY_NAME
from qbert_ray.top_k import ranks
from tests import ROOT

SPAN = 3  # neighbours that are shuffled
LATEST = 50  # items of a history that are read
MARKED = 0.6  # share of ascending pairs from which a set is marked


class Histories(NamedTuple):
    """Whole histories of all users, end to end in time order."""

    indptr: np.ndarray  # [U + 1]
    items: np.ndarray  # item_index
    order: np.ndarray  # [N] place of each item in the order of IDs


def read(root: Path, name: str) -> Histories:
    """The histories of one data set as the stage `ingest` makes them."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            [ROOT / "configs" / f"{name}.yaml"], [f"data.root={root / name}", f"run.dir={folder}", "compute.executor=local"]
        )
        run = RunDir(folder)
        with open_executor(config) as executor:
            run_stage(BY_NAME["ingest"], config, run, executor, Quiet())
        (domain,) = config.data.domains
        items = pl.DataFrame(run.read("ingest/items", domain, [ITEM_ID, ITEM_INDEX]))
        rows = pl.DataFrame(run.read("ingest/interactions", domain))
    padded = items[ITEM_ID].str.zfill(items[ITEM_ID].str.len_bytes().max())  # type: ignore[arg-type]
    order = np.empty(len(items), np.int64)
    order[items[ITEM_INDEX].to_numpy()[padded.arg_sort().to_numpy()]] = np.arange(len(items))
    index = rows.join(items, on=ITEM_ID, maintain_order="left")[ITEM_INDEX].to_numpy().astype(np.int64)
    starts = np.flatnonzero(rows[USER_ID].rle_id().diff().fill_null(1).to_numpy())
    return Histories(np.append(starts, len(rows)), index, order)


def ascending_pairs(found: Histories) -> float:
    """Share of neighbours in a history, of two different items, whose IDs ascend."""
    own = found.order[found.items]
    step = np.diff(own)[_same_user(found)]
    return float((step > 0).sum() / np.count_nonzero(step))


def largest_of_three(found: Histories) -> float:
    """Share of users with at least three items whose last has the largest ID of the last three."""
    ends = found.indptr[1:][np.diff(found.indptr) >= 3]
    last, *before = (found.order[found.items[ends - back]] for back in (1, 2, 3))
    return float((last > np.maximum(*before)).mean())


def shuffled(found: Histories, seed: int = 0) -> Histories:
    """The histories with every SPAN neighbours in a random order, counted from each user's last item."""
    user = np.repeat(np.arange(len(found.indptr) - 1), np.diff(found.indptr))
    from_end = found.indptr[1:][user] - 1 - np.arange(len(user))
    drawn = np.random.default_rng(seed).random(len(user))
    return found._replace(items=found.items[np.lexsort((drawn, -(from_end // SPAN), user))])


def _same_user(found: Histories) -> np.ndarray:
    """[interactions - 1] whether an interaction and the next are of one user."""
    user = np.repeat(np.arange(len(found.indptr) - 1), np.diff(found.indptr))
    return user[1:] == user[:-1]


class Gains(NamedTuple):
    """ndcg@10 of each user with at least three items, by each baseline, and whether the test item ascends."""

    directed: np.ndarray
    symmetric: np.ndarray
    ridge: np.ndarray
    ascends: np.ndarray


def evaluate(found: Histories, settings: Ranking) -> Gains:
    """Every baseline of training items alone, ranked for the test items."""
    length = np.diff(found.indptr)
    users = np.flatnonzero(length >= 3)
    kept = np.where(length >= 3, length - 2, length)
    place = np.arange(len(found.items)) - np.repeat(found.indptr[:-1], length)
    train = found.items[place < np.repeat(kept, length)]
    indptr, size = np.concatenate([[0], np.cumsum(kept)]), len(found.order)
    before = [found.items[found.indptr[user] : found.indptr[user + 1] - 1] for user in users]
    target = found.items[found.indptr[users + 1] - 1]
    decays = {"directed": settings.following_decay, "symmetric": settings.following_decay, "ridge": float(settings.decay)}
    values = [_ndcg(_weights(kind, indptr, train, size, settings), before, target, decay) for kind, decay in decays.items()]
    last = np.array([history[-1] for history in before])
    return Gains(*values, found.order[target] > found.order[last])


def _weights(kind: str, indptr: np.ndarray, items: np.ndarray, size: int, settings: Ranking) -> sparse.csr_matrix:
    """[N, N] item-item weights, a row per target."""
    if kind == "ridge":
        return RidgeRegression(indptr, items, size, float(settings.regularisation), settings.neighbours).rows(np.arange(size))
    shrinkage = settings.following_shrinkage
    if kind == "symmetric":  # each history once more, backwards; every count is doubled by that
        backwards = np.concatenate([items[begin:end][::-1] for begin, end in zip(indptr[:-1], indptr[1:], strict=True)])
        indptr, items, shrinkage = np.concatenate([indptr, indptr[1:] + indptr[-1]]), np.concatenate([items, backwards]), 2 * shrinkage
    counts = Transitions(indptr, items, size, settings.following_window, settings.following_decay, shrinkage, settings.neighbours)
    return counts.rows(np.arange(size))


def _ndcg(weights: sparse.csr_matrix, histories: list[np.ndarray], target: np.ndarray, decay: float) -> np.ndarray:
    """[U] ndcg@10 of each target among unseen items."""
    columns, found = weights.T.tocsr(), []
    for rows in batches(len(histories), weights.shape[0]):
        scores = torch.from_numpy((recency(histories[rows], decay, LATEST, weights.shape[0]) @ columns).toarray())
        rank = ranks(scores, torch.from_numpy(target[rows]), histories[rows])
        found.append(metrics.ndcg(rank.numpy(), 10))
    return np.concatenate(found)


HEAD = (
    "data set", "pairs ascend, %", "test item largest of three, %", "ascending targets, %", "symmetric", "directed", "gain, ascending targets",
    "gain, descending targets", "symmetric, shuffled", "directed, shuffled", "ridge", "ridge, shuffled",
)  # fmt: skip


def row(root: Path, name: str, settings: Ranking) -> tuple[str, ...]:
    """The line of one data set."""
    found = read(root, name)
    plain, mixed = evaluate(found, settings), evaluate(shuffled(found), settings)
    pairs, ascends, gain = ascending_pairs(found), plain.ascends, plain.directed - plain.symmetric
    shares = (f"{100 * share:.1f}" for share in (pairs, largest_of_three(found), ascends.mean()))
    split = (f"{gain[some].mean():+.4f}".replace("0.", ".") for some in (ascends, ~ascends))
    after = (_shown(each) for each in (mixed.symmetric, mixed.directed, plain.ridge, mixed.ridge))
    return (f"{name}{' **!**' * (pairs >= MARKED)}", *shares, _shown(plain.symmetric), _shown(plain.directed), *split, *after)


def _shown(values: np.ndarray) -> str:
    return f"{values.mean():.4f}".removeprefix("0")


def print_table(about: str, head: tuple[str, ...], row: Callable[[Path, str, Ranking], tuple[str, ...]]) -> None:
    """Print the lines of the data sets that the command line names."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with a folder per data set")
    parser.add_argument("names", nargs="+", help="data sets with a config of that name")
    given = parser.parse_args()
    print("| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n", flush=True)
    for name in given.names:
        print("| " + " | ".join(row(given.root, name, Ranking())) + " |", flush=True)


if __name__ == "__main__":
    print_table(__doc__, HEAD, row)
