"""What the scripts of other libraries share: a run's sequences, ranks of its targets, and rows for a table of `qbert-ray reproduce`."""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import numpy as np
import polars
import torch

BATCH = 256  # users


class Split:
    """A domain's sequences by item_index: training items of everybody; of users who have them, the validation and the test item."""

    def __init__(self, run, domain):
        rows = _read(run, "ingest/sequences", domain)
        if "between" in rows.columns:
            raise SystemExit(
                f"{run} is not split by leave-one-out: other splits have items between the last training item and the test item"
            )
        tested = rows.filter(polars.col("test").is_not_null())
        self.every, self.users = rows["train"].to_list(), tested["user_id"].to_list()
        self.every_valid = rows["valid"].to_list()  # None of users without
        self.train, self.valid, self.test = (tested[name].to_list() for name in ("train", "valid", "test"))
        items = _read(run, "ingest/items", domain).sort("item_index")
        told = [name for name in items.columns if name.startswith(("text.", "attribute."))]
        self.texts = [" ".join(filter(None, row)) for row in items.select(told).iter_rows()] if told else [""] * len(items)

    @property
    def num_items(self):
        return len(self.texts)

    def with_validation(self):
        """The same with validation items among what is trained on: a figure on validation items then says nothing."""
        result = copy.copy(self)
        result.every = [items if item is None else [*items, item] for items, item in zip(self.every, self.every_valid, strict=True)]
        return result

    def valid_ndcg(self, scores):
        """ndcg@10 of the validation items among all; `scores` gives [users, num_items] of histories, batch by batch."""
        return ndcg(ranks(scores, self.train, self.valid, 1)[0])

    def test_ranks(self, scores):
        return ranks(scores, [[*history, item] for history, item in zip(self.train, self.valid, strict=True)], self.test)


def table_parts(run, table, domain):
    """The files of a run's table, of one domain: another's name may begin with the same."""
    return [part for part in sorted(Path(run, table).glob("*.parquet")) if part.name.rpartition("-")[0] == domain]


def _read(run, table, domain):
    return polars.concat([polars.read_parquet(part) for part in table_parts(run, table, domain)])


@torch.no_grad()
def ranks(scores, histories, targets, protocols=2):
    """[protocols, users] 1-based ranks, ties at their mean: among all items, and among those that are not in the history."""
    result = np.zeros((protocols, len(histories)))
    for begin in range(0, len(histories), BATCH):
        users = slice(begin, begin + BATCH)
        found, target = scores(histories[users]), torch.tensor(targets[users])
        own = found.gather(1, target[:, None])
        if found.isnan().any():
            raise SystemExit("a score is not a number: the training diverged")
        for protocol in range(protocols):
            if protocol:
                for row, history in enumerate(histories[users]):
                    found[row, [item for item in history if item != target[row]]] = -torch.inf
            better, equal = (found > own).sum(1), (found == own).sum(1)
            result[protocol, users] = (1 + better + (equal - 1) / 2).numpy()
    return result


def ndcg(rank, k=10):
    return float(np.where(rank <= k, 1 / np.log2(rank + 1), 0).mean())


def arguments(about, models):
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("domain")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=models, default=next(iter(models)))
    parser.add_argument("--set", default="{}", dest="settings", help="the library's own settings, as JSON")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.settings, given.started = json.loads(given.settings), time.monotonic()
    return given


def write(given, library, split, found, best):
    """Put ranks [2, users] into the table's file, and say what they come to; `best` is what the best epoch was, and what it gave."""
    row = f"{given.model} ({library})"
    new = polars.DataFrame({"domain": given.domain, "row": row, "seed": given.seed, "user_id": split.users})
    new = new.with_columns(polars.Series(name, rank) for name, rank in zip(("rank_all", "rank_unseen"), np.ceil(found), strict=True))
    new = new.with_columns(training_seconds=time.monotonic() - given.started)
    new = new.cast({"seed": polars.Int32, "rank_all": polars.Int32, "rank_unseen": polars.Int32})  # as `reproduce` writes them
    if given.out.exists():
        old = polars.read_parquet(given.out)
        new = polars.concat([old.join(new, on=["domain", "row", "seed"], how="anti"), new], how="diagonal_relaxed")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    written = given.out.with_name(f".{given.out.name}.{os.getpid()}")
    new.write_parquet(written)
    os.replace(written, given.out)  # whoever is stopped while it writes loses no row of others
    hits, gains = ([float((rank <= 10).mean()) for rank in found], [ndcg(rank) for rank in found])
    print(
        f"{row}, {json.dumps(given.settings)}, seed {given.seed}: epoch {best[0]}, validation ndcg@10 {best[1]:.4f}; test hr@10 / ndcg@10 "
        f"all {hits[0]:.4f} / {gains[0]:.4f}, unseen {hits[1]:.4f} / {gains[1]:.4f}; {time.monotonic() - given.started:.0f} s"
    )
