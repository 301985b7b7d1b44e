"""Items a second that BERT4Rec of RecTools and of RecBole train with; run by the interpreter that `make peers` builds.

python tests/benchmarks/peers_bert4rec.py sequences.parquet '{"width": 128, ...}'

Prints a JSON object after each library: library -> items a second, or why it does not run. Padding is not counted.
"""

import json
import sys
import time
import traceback
import types

import numpy as np
import pandas as pd
import polars
import torch

WARM, STEPS = 1, 4


def rectools(sequences, s):
    """Its own data loader, Lightning module and trainer; the clock stands between batches."""
    import pytorch_lightning as pl
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel

    lengths = [len(items) for items in sequences]
    flat = np.concatenate(sequences)
    table = pd.DataFrame({Columns.User: np.repeat(np.arange(len(sequences)), lengths), Columns.Item: flat, Columns.Weight: 1.0})
    table[Columns.Datetime] = pd.to_datetime(np.concatenate([np.arange(length) for length in lengths]), unit="D")

    class Clock(pl.Callback):
        times, tokens = [], []

        def on_train_batch_start(self, trainer, module, batch, index):
            self.times.append(time.perf_counter())
            self.tokens.append(int((batch["x"] != 0).sum()))

    clock = Clock()

    def trainer():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
        return pl.Trainer(max_epochs=1, limit_train_batches=WARM + STEPS + 1, accelerator="cpu", callbacks=[clock], **quiet)

    BERT4RecModel(
        n_blocks=s["num_layers"],
        n_heads=s["num_heads"],
        n_factors=s["width"],
        dropout_rate=s["dropout"],
        mask_prob=s["masked"],
        session_max_len=s["max_items"],
        batch_size=s["batch_size"],
        get_trainer_func=trainer,
        transformer_layers_kwargs={"ff_factors_multiplier": s["ffn_width"] // s["width"]},
    ).fit(Dataset.construct(table))
    return np.sum(clock.tokens[WARM:-1]) / (clock.times[-1] - clock.times[WARM])


def recbole(sequences, s):
    """Its model and masking, fed with ready batches: the time of its data loader is not counted."""
    from recbole.model.sequential_recommender.bert4rec import BERT4Rec

    names = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length"}
    names |= {"NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": s["max_items"], "device": torch.device("cpu"), "loss_type": "CE"}
    names |= {"n_layers": s["num_layers"], "n_heads": s["num_heads"], "hidden_size": s["width"], "inner_size": s["ffn_width"]}
    names |= {"hidden_dropout_prob": s["dropout"], "attn_dropout_prob": s["dropout"], "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    names |= {"mask_ratio": s["masked"], "initializer_range": 0.02, "MASK_ITEM_SEQ": "masked", "POS_ITEMS": "positive"}
    names |= {"NEG_ITEMS": "negative", "MASK_INDEX": "place"}
    model = BERT4Rec(names, types.SimpleNamespace(num=lambda field: s["num_items"] + 1)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rng = np.random.default_rng(0)
    size, most = s["max_items"], int(s["masked"] * s["max_items"])
    tokens = 0
    for step in range(WARM + STEPS):
        chosen = [sequences[user][-size:] + 1 for user in rng.integers(0, len(sequences), s["batch_size"])]
        items, masked = np.zeros((2, len(chosen), size), np.int64)
        positive, negative, place = np.zeros((3, len(chosen), most), np.int64)
        for row, history in enumerate(chosen):
            items[row, : len(history)] = masked[row, : len(history)] = history
            there = np.flatnonzero(rng.random(len(history)) < s["masked"])[:most]
            masked[row, there] = model.mask_token
            positive[row, most - len(there) :], place[row, most - len(there) :] = history[there], there
        named = {"masked": masked, "positive": positive, "negative": negative, "place": place, "item_id_list": items}
        batch = {name: torch.from_numpy(array) for name, array in named.items()}
        if step == WARM:
            tokens, seconds = 0, 0.0
        started = time.perf_counter()
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()
        seconds = time.perf_counter() - started + (seconds if step else 0.0)
        tokens += int((items > 0).sum())
    return tokens / seconds


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    torch.set_num_threads(given["threads"])
    lists = [np.array(items, dtype=np.int64) for items in polars.read_parquet(sys.argv[1])["items"].to_list() if len(items) > 1]
    found = {}
    for name, measure in (("RecTools BERT4Rec", rectools), ("RecBole BERT4Rec", recbole)):
        try:
            found[name] = float(measure(lists, given))
        except Exception as error:
            traceback.print_exc()
            place = traceback.extract_tb(error.__traceback__)[-1]
            found[name] = f"{type(error).__name__}: {error} ({place.filename.split('site-packages/')[-1]}:{place.lineno})"
        print(json.dumps(found), flush=True)
