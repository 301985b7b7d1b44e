"""Ranks of SASRec and BERT4Rec of RecTools on a run's own sequences; run by the interpreter that `make peers` builds.

    .venv-peers/bin/python tests/benchmarks/peers_rectools.py runs/movielens movielens results/comparison/ranks.parquet \\
        --model SASRec --set '{"n_factors": 64, "dropout_rate": 0.2}' --epochs 100 --patience 10 --seed 0

Training items only; after each epoch ndcg@10 of the validation items among all items of the catalog, the epoch with the best is kept.
Its ranks of the test items, history with the validation item, go into the file as rows of `qbert-ray reproduce`: domain, row, seed,
user_id, rank_all, rank_unseen. Rows of the same domain, row and seed are replaced. Items that no training saw rank last.
"""

import copy

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from peers_table import Split, arguments, write
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel

MODELS = {"SASRec": SASRecModel, "BERT4Rec": BERT4RecModel}


def interactions(histories):
    lengths = [len(items) for items in histories]
    table = pd.DataFrame({Columns.User: np.repeat(np.arange(len(histories)), lengths), Columns.Item: np.concatenate(histories)})
    table[Columns.Weight] = 1.0
    table[Columns.Datetime] = pd.to_datetime(np.concatenate([np.arange(length) for length in lengths]), unit="D")
    return table


class Scorer:
    """[users, num_items] scores of histories; minus infinity where training saw no such item."""

    def __init__(self, model, network, num_items):
        preparator = self.preparator = model.data_preparator
        self.known = np.full(num_items, -1)
        self.external = preparator.item_id_map.external_ids[preparator.n_item_extra_tokens :].astype(int)
        self.known[self.external] = np.arange(preparator.n_item_extra_tokens, preparator.item_id_map.size)
        self.mask = [preparator.extra_token_ids["MASK"]] if isinstance(model, BERT4RecModel) else []
        self.network = network.eval()
        with torch.no_grad():
            self.embeddings = network.item_model.get_all_embeddings()

    def __call__(self, histories):
        x = torch.zeros(len(histories), self.preparator.session_max_len, dtype=torch.long)
        for row, history in enumerate(histories):
            session = [*(code for code in self.known[history] if code >= 0), *self.mask][-self.preparator.session_max_len :]
            if session:
                x[row, -len(session) :] = torch.tensor(session)
        towers = self.network.similarity_module
        last = towers.session_tower_forward(self.network.encode_sessions({"x": x}, self.embeddings)[:, -1])
        found = torch.full((len(histories), len(self.known)), -torch.inf)
        found[:, self.external] = last @ towers.item_tower_forward(self.embeddings)[self.known[self.external]].T
        return found


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
    given = arguments(__doc__, MODELS)
    pl.seed_everything(given.seed)
    split = Split(given.run, given.domain)

    def evaluate(network):
        return split.valid_ndcg(Scorer(model, network, split.num_items))

    def trainer():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
        return pl.Trainer(max_epochs=given.epochs, accelerator="cpu", callbacks=[Best(given.patience, evaluate)], **quiet)

    model = MODELS[given.model](get_trainer_func=trainer, **given.settings)
    model.fit(Dataset.construct(interactions(split.every)))
    network, (best,) = model.torch_model, [callback for callback in model.fit_trainer.callbacks if isinstance(callback, Best)]
    network.load_state_dict(best.weights)
    write(given, "RecTools", split, split.test_ranks(Scorer(model, network, split.num_items)), (best.epoch, best.value))


if __name__ == "__main__":
    main()
