"""Ranks of SASRec and BERT4Rec of RecTools on a run's own sequences; run by the interpreter that `make peers` builds.

    .venv-peers/bin/python tests/benchmarks/peers_ranks.py runs/movielens movielens results/comparison/ranks.parquet \\
        --model SASRec --set '{"n_factors": 64, "dropout_rate": 0.2}' --epochs 100 --patience 10 --seed 0

Training items only; after each epoch ndcg@10 of the validation items among all items of the catalog, the epoch with the best is kept.
Its ranks of the test items, history with the validation item, go into the file as rows of `qbert-ray reproduce`: domain, row, seed,
user_id, rank_all, rank_unseen. Rows of the same domain, row and seed are replaced. Items that no training saw rank last.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars
import pytorch_lightning as pl
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel

MODELS = {"SASRec": SASRecModel, "BERT4Rec": BERT4RecModel}
BATCH = 256  # users


def sequences(run, domain):
    """user ids, and of each user the training items, the validation item and the test item, of users who have all."""
    tables = [polars.read_parquet(part) for part in sorted(Path(run, "ingest/sequences").glob(f"{domain}-*.parquet"))]
    rows = polars.concat(tables)
    tested = rows.filter(polars.col("test").is_not_null())
    items = sum(len(polars.read_parquet(part, columns=["item_id"])) for part in Path(run, "ingest/items").glob(f"{domain}-*.parquet"))
    return rows["train"].to_list(), tested["user_id"].to_list(), *(tested[name].to_list() for name in ("train", "valid", "test")), items


def interactions(histories):
    lengths = [len(items) for items in histories]
    table = pd.DataFrame({Columns.User: np.repeat(np.arange(len(histories)), lengths), Columns.Item: np.concatenate(histories)})
    table[Columns.Weight] = 1.0
    table[Columns.Datetime] = pd.to_datetime(np.concatenate([np.arange(length) for length in lengths]), unit="D")
    return table


@torch.no_grad()
def scores(model, network, histories, num_items):
    """[users, num_items] of each batch; minus infinity where training saw no such item."""
    preparator = model.data_preparator
    known = np.full(num_items, -1)
    external = preparator.item_id_map.external_ids[preparator.n_item_extra_tokens :].astype(int)
    known[external] = np.arange(preparator.n_item_extra_tokens, preparator.item_id_map.size)
    mask = [preparator.extra_token_ids["MASK"]] if isinstance(model, BERT4RecModel) else []
    network.eval()
    embeddings = network.item_model.get_all_embeddings()
    towers = network.similarity_module
    for begin in range(0, len(histories), BATCH):
        batch = histories[begin : begin + BATCH]
        x = torch.zeros(len(batch), preparator.session_max_len, dtype=torch.long)
        for row, history in enumerate(batch):
            session = [*(code for code in known[history] if code >= 0), *mask][-preparator.session_max_len :]
            if session:
                x[row, -len(session) :] = torch.tensor(session)
        last = towers.session_tower_forward(network.encode_sessions({"x": x}, embeddings)[:, -1])
        found = torch.full((len(batch), num_items), -torch.inf)
        found[:, external] = last @ towers.item_tower_forward(embeddings)[known[external]].T
        yield slice(begin, begin + len(batch)), found


def ranks(model, network, histories, targets, num_items):
    """[users] 1-based ranks, ties at their mean: among all items, and among those that are not in the history."""
    result = np.zeros((2, len(histories)))
    for users, found in scores(model, network, histories, num_items):
        target = torch.tensor(targets[users])
        own = found.gather(1, target[:, None])
        for protocol in range(2):
            if protocol:
                for row, history in enumerate(histories[users]):
                    found[row, [item for item in history if item != target[row]]] = -torch.inf
            better, equal = (found > own).sum(1), (found == own).sum(1)
            result[protocol, users] = (1 + better + (equal - 1) / 2).numpy()
    return result


def ndcg(rank, k=10):
    return float(np.where(rank <= k, 1 / np.log2(rank + 1), 0).mean())


class Best(pl.Callback):
    """Keeps the weights of the epoch that ranks validation items best, and stops when it gets no better."""

    def __init__(self, patience, evaluate):
        self.patience, self.evaluate, self.value, self.epoch, self.weights = patience, evaluate, -1.0, 0, None

    def on_train_epoch_end(self, trainer, module):
        network = module.torch_model
        value = self.evaluate(network)
        network.train()
        if value > self.value:
            self.value, self.epoch, self.weights = value, trainer.current_epoch, copy.deepcopy(network.state_dict())
        print(f"epoch {trainer.current_epoch}: validation ndcg@10 {value:.4f}, best {self.value:.4f}", flush=True)
        trainer.should_stop = trainer.current_epoch - self.epoch >= self.patience


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("domain")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="SASRec")
    parser.add_argument("--set", default="{}", dest="settings", help="arguments of RecTools' model, as JSON")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    pl.seed_everything(given.seed)
    every, users, train, valid, test, num_items = sequences(given.run, given.domain)

    def evaluate(network):
        return ndcg(ranks(model, network, train, valid, num_items)[0])

    def trainer():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
        return pl.Trainer(max_epochs=given.epochs, accelerator="cpu", callbacks=[Best(given.patience, evaluate)], **quiet)

    model = MODELS[given.model](get_trainer_func=trainer, **json.loads(given.settings))
    started = time.monotonic()
    model.fit(Dataset.construct(interactions(every)))
    network, (best,) = model.torch_model, [callback for callback in model.fit_trainer.callbacks if isinstance(callback, Best)]
    network.load_state_dict(best.weights)
    found = ranks(model, network, [[*history, item] for history, item in zip(train, valid, strict=True)], test, num_items)
    row = f"{given.model} (RecTools)"
    new = polars.DataFrame({"domain": given.domain, "row": row, "seed": given.seed, "user_id": users})
    new = new.with_columns(polars.Series(name, rank) for name, rank in zip(("rank_all", "rank_unseen"), found.round(), strict=True))
    new = new.cast({"seed": polars.Int32, "rank_all": polars.Int32, "rank_unseen": polars.Int32})  # as `reproduce` writes them
    if given.out.exists():
        old = polars.read_parquet(given.out)
        new = polars.concat([old.join(new, on=["domain", "row", "seed"], how="anti"), new.cast(dict(old.schema))])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    new.write_parquet(given.out)
    hits, gains = ([float((rank <= 10).mean()) for rank in found], [ndcg(rank) for rank in found])
    print(
        f"{row}, {given.settings}: epoch {best.epoch}, validation ndcg@10 {best.value:.4f}; test hr@10 / ndcg@10 all {hits[0]:.4f} / {gains[0]:.4f}, "
        f"unseen {hits[1]:.4f} / {gains[1]:.4f}; {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
