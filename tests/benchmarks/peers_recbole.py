"""Ranks of GRU4Rec, FDSA and S3-Rec of RecBole on a run's own sequences; run by the interpreter that `make peers` builds.

    .venv-peers/bin/python tests/benchmarks/peers_recbole.py runs/scientific scientific results/comparison/ranks.parquet \\
        --model FDSA --set '{"hidden_size": 64, "learning_rate": 0.001}' --epochs 100 --patience 10 --seed 0

RecBole's own data set (a sample for each prefix of a training history), loader, model and trainer's epochs; protocol and file are those of
`peers_rectools.py`. FDSA and S3-Rec read as attributes of an item the words of its text that more than a few items have. S3-Rec is
first pre-trained, for `pretrain_epochs` of the settings.
"""

import contextlib
import copy
import tempfile
from collections import Counter
from pathlib import Path

import torch
from peers_table import Split, arguments, write
from recbole.config import Config
from recbole.data import create_dataset, create_samplers
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.utils import get_model, get_trainer, init_seed

MODELS = ("GRU4Rec", "FDSA", "S3Rec")
NAME, LONGEST = "catalog", 50
WORDS, RARE, COMMON = 300, 10, 0.3  # most words, fewest items of a word, largest share of the items


def atomic_files(folder, split):
    """The catalog and the training histories as RecBole reads them."""
    texts = [set("".join(c if c.isalnum() else " " for c in (text or "").lower()).split()) for text in split.texts]
    counts = Counter(word for words in texts for word in words)
    kept = [word for word, count in counts.most_common() if RARE <= count <= COMMON * len(texts)][:WORDS] or ["none"]
    items = [f"{item}\t{' '.join(sorted(words.intersection(kept)))}" for item, words in enumerate(texts)]
    rows = [f"{user}\t{item}\t{step}" for user, history in enumerate(split.every) for step, item in enumerate(history)]
    place = Path(folder, NAME)
    place.mkdir()
    (place / f"{NAME}.item").write_text("\n".join(["item_id:token\tclass:token_seq", *items]) + "\n")
    (place / f"{NAME}.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n")


class Scorer:
    """[users, num_items] scores of histories."""

    def __init__(self, model, dataset, num_items):
        self.model, self.dataset = model.eval(), dataset
        self.known = torch.tensor([dataset.field2token_id["item_id"][str(item)] for item in range(num_items)])

    def __call__(self, histories):
        x = torch.zeros(len(histories), LONGEST, dtype=torch.long)
        lengths = torch.tensor([max(1, min(len(history), LONGEST)) for history in histories])
        for row, history in enumerate(histories):
            x[row, : len(history[-LONGEST:])] = self.known[history[-LONGEST:]]
        return self.model.full_sort_predict(Interaction({self.model.ITEM_SEQ: x, self.model.ITEM_SEQ_LEN: lengths}))[:, self.known]


def train(given, split, folder, settings):
    """A trained model and its data; with a training of S3-Rec's first stage, its weights after the last epoch."""
    basic = {"data_path": folder, "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}}
    basic |= {"eval_args": {"split": {"RS": [1, 0, 0]}, "order": "TO", "group_by": "user", "mode": "full"}, "train_neg_sample_args": None}
    basic |= {"MAX_ITEM_LIST_LENGTH": LONGEST, "selected_features": ["class"], "item_attribute": "class", "use_gpu": False}
    basic |= {"seed": given.seed, "state": "ERROR", "show_progress": False, "checkpoint_dir": folder}
    config = Config(model=given.model, dataset=NAME, config_dict=basic | settings)
    init_seed(given.seed, True)
    dataset = create_dataset(config)
    built = dataset.build()
    loader = get_dataloader(config, "train")(config, built[0], create_samplers(config, dataset, built)[0], shuffle=True)
    model = get_model(given.model)(config, built[0])
    trainer = get_trainer(config["MODEL_TYPE"], given.model)(config, model)
    if settings.get("train_stage") == "pretrain":
        for epoch in range(config["pretrain_epochs"]):
            print(f"pre-training, epoch {epoch}: loss {trainer._train_epoch(loader, epoch):.1f}", flush=True)
        return model, dataset, None
    best, weights = (0, -1.0), None
    for epoch in range(given.epochs):
        trainer._train_epoch(loader, epoch)
        value = split.valid_ndcg(Scorer(model, dataset, split.num_items))
        if value > best[1]:
            best, weights = (epoch, value), copy.deepcopy(model.state_dict())
        print(f"epoch {epoch}: validation ndcg@10 {value:.4f}, best {best[1]:.4f}", flush=True)
        if epoch - best[0] >= given.patience:
            break
    model.load_state_dict(weights)
    return model, dataset, best


def main():
    given = arguments(__doc__, dict.fromkeys(MODELS))
    split = Split(given.run, given.domain)
    given.out = given.out.absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # where RecBole leaves logs
        atomic_files(folder, split)
        settings = dict(given.settings)
        if given.model == "S3Rec":
            model, _, _ = train(given, split, folder, settings | {"train_stage": "pretrain"})
            settings |= {"train_stage": "finetune", "pre_model_path": str(Path(folder, "pretrained.pth"))}
            torch.save({"state_dict": model.state_dict()}, settings["pre_model_path"])
        model, dataset, best = train(given, split, folder, settings)
        write(given, "RecBole", split, split.test_ranks(Scorer(model, dataset, split.num_items)), best)


if __name__ == "__main__":
    main()
