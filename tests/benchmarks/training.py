"""Training of the sequencer: items a second of the ordinary SequencerTask and Loop, forward, backward, optimizer and averaging.

    python -m tests.benchmarks.training

Against a dense padded batch of 50 with the head at all positions, written here with the same weights; and against BERT4Rec of RecTools
and RecBole, in the environment that `make peers` builds. Items are those of the sequences, padding is not counted. Both sides have
2 layers of width 128, 4 heads, MLPs of 256, at most 50 items, batches of 128, 30 % masked at random, softmax over the catalog, one thread:
threads that wait for each other measure what else the machine does.
Real histories where QBERT_REAL_DATA names a folder with instruments/interactions.parquet, else generated ones.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from qbert_ray.config.schema import Config
from qbert_ray.semantic_ids.collisions import to_tokens
from qbert_ray.sequence.masking import draw_masks
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir
from qbert_ray.training import Loop
from tests.benchmarks.scoring import histories_of_instruments
from tests.benchmarks.table import Figure, main

SIZES: dict[str, Any] = {"width": 128, "num_layers": 2, "num_heads": 4, "ffn_width": 256, "dropout": 0.2, "max_items": 50}
BATCH, MASKED, THREADS, STEPS, ROUNDS = 128, 0.3, 1, 6, 7
PEERS, SCRIPT = Path(".venv-peers/bin/python"), Path(__file__).with_name("peers_bert4rec.py")
PATIENCE = 240  # seconds that other libraries get
LARGEST_DIFFERENCE = 1e-5  # between the losses of an item by both layouts, relative


class PaddedTask(SequencerTask):
    """The obvious way to train: every sequence padded to the longest allowed, every place scored, then those that count chosen."""

    def loss(self, model: Any, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        name, size = self.domains[0], model.max_items
        histories = [self.sequences[name].items[begin:end] for begin, end in samples[:, 2:4]]
        lengths = np.array([len(history) for history in histories])
        s = self.settings
        masks = draw_masks(lengths, samples[:, 4], self.seed, epoch, dict(s.masks), dict(s.mask_ratio), s.last_item_share)
        items, there = map(torch.from_numpy, padded(histories, size))
        masked = torch.zeros(len(histories), size, dtype=torch.bool)
        masked[there] = torch.from_numpy(masks[np.arange(masks.shape[1]) < lengths[:, None]])
        table = self._table_on(name, device)
        vectors = model.compose(table, items.flatten()).view(len(histories), size, -1)
        states = torch.where(masked[..., None], model.mask_embedding, vectors)
        states = model.dropout(states + model.position_embedding(torch.arange(size - 1, -1, -1)))
        for layer in model.layers:
            projected = layer.query_key_value(layer.norm_attention(states)).view(len(histories), size, 3, layer.num_heads, -1)
            query, key, value = projected.permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None]).transpose(1, 2).flatten(2)
            states = states + layer.dropout(layer.out(attended))
            states = states + layer.dropout(layer.ffn(layer.norm_ffn(states)))
        logits = model.scores(model.norm(states).flatten(0, 1), *model.catalog_vectors(table))
        losses = F.cross_entropy(logits, items.flatten(), reduction="none")
        return losses[masked.flatten()].sum(), float(masked.sum())


def padded(histories: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The latest `length` items of each history as [B, T] item_index and mask, padded at the front."""
    items = np.zeros((len(histories), length), dtype=np.int64)
    mask = np.zeros((len(histories), length), dtype=bool)
    for row, history in enumerate(histories):
        count = min(len(history), length)
        items[row, length - count :] = history[len(history) - count :]
        mask[row, length - count :] = True
    return items, mask


def make_run(folder: str, histories: list[np.ndarray], num_items: int) -> tuple[RunDir, Config]:
    """The tables that training reads, with semantic IDs at random."""
    run = RunDir(folder)
    masks = {"masks": {"random": 1.0}, "mask_ratio": {"random": MASKED}, "last_item_share": 0.0, "batch_size": BATCH}
    finetune = {**masks, "objective": "masked", "schedule": "constant", "microbatches": 1, "averaging": 0.99, "patience": None}
    sequencer = SIZES | {"content": "none", "recall": False, "code_dropout": 0.0, "start": "random"}
    domains = {"run": {"dir": run.uri}, "data": {"domains": {"shop": {}}}}
    config = Config.model_validate(domains | {"sequencer": sequencer, "finetune": finetune})
    run.write_bytes("config.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    codes = np.random.default_rng(0).integers(0, 256, (num_items, 4)).astype(np.int32)
    rows = np.arange(num_items, dtype=np.int32)
    keys = [pa.array(["shop"] * num_items), pa.array(rows.astype(str)), pa.array(rows)]
    items = [*keys, pa.nulls(num_items, pa.string()), pa.nulls(num_items, pa.binary()), pa.array(np.zeros(num_items, bool))]
    run.write_part("ingest/items", "shop-00000.parquet", pa.table(items, schema=columns.ITEMS))
    nested = pa.array(codes.tolist(), pa.list_(pa.int32()))
    ids = [*keys, nested, to_tokens(codes), pa.array(np.zeros(num_items, bool)), nested]
    run.write_part("semantic_ids", "shop-00000.parquet", pa.table(ids, schema=columns.SEMANTIC_IDS))
    run.write_json("semantic_ids/manifest.json", {"counts": {"codebook_size": 256, "num_levels": 4}})
    users = [
        pa.array(["shop"] * len(histories)),
        pa.array([str(user) for user in range(len(histories))]),
        pa.array([history.tolist() for history in histories], pa.list_(pa.int32())),
        *(pa.nulls(len(histories), pa.int32()) for _ in range(2)),
    ]
    run.write_part("ingest/sequences", "shop-00000.parquet", pa.table(users, schema=columns.SEQUENCES))
    return run, config


def steps(loop: Loop, batches: list[np.ndarray]) -> float:
    """Items a second of some steps of the loop."""
    started = time.perf_counter()
    for samples in batches:
        loop._step(samples, loop.task.settings.learning_rate)
    return sum(int((samples[:, 3] - samples[:, 2]).sum()) for samples in batches) / (time.perf_counter() - started)


def check(run: RunDir, config: Config) -> None:
    """Packed and padded give one loss, where nothing is dropped."""
    config = config.model_copy(update={"sequencer": config.sequencer.model_copy(update={"dropout": 0.0})})
    tasks = [kind(config, run, ["shop"], config.finetune) for kind in (SequencerTask, PaddedTask)]
    torch.manual_seed(0)
    model = tasks[0].build()
    samples = tasks[0].batches(0)[0]
    with torch.no_grad():
        (packed, size), (dense, other) = (task.loss(model, samples, 0, torch.device("cpu")) for task in tasks)
    assert size == other and abs(float(packed - dense)) <= LARGEST_DIFFERENCE * float(packed), (float(packed), float(dense))


def peers(histories: list[np.ndarray], num_items: int) -> dict[str, Any]:
    """Library -> items a second, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sequences.parquet"
        pl.DataFrame({"items": [history.tolist() for history in histories]}).write_parquet(file)
        settings = SIZES | {"num_items": num_items, "batch_size": BATCH, "masked": MASKED, "threads": THREADS}
        try:
            done = subprocess.run([PEERS, SCRIPT, file, json.dumps(settings)], capture_output=True, timeout=PATIENCE)
            said, wrong = done.stdout, done.stderr[-300:].decode()
        except subprocess.TimeoutExpired as error:
            said, wrong = error.stdout or b"", f"not done after {PATIENCE} s"
    lines = [line for line in said.decode().splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"peers": wrong}


def figures(full: bool) -> Iterator[Figure]:
    torch.set_num_threads(THREADS)
    histories, source = histories_of_instruments(np.random.default_rng(0))
    num_items = 1 + max(int(history.max()) for history in histories)
    training = [history[:-2] for history in histories]
    with tempfile.TemporaryDirectory() as folder:
        run, config = make_run(folder, training, num_items)
        check(run, config)
        tasks = [kind(config, run, ["shop"], config.finetune) for kind in (SequencerTask, PaddedTask)]
        packed, dense = (Loop(task, torch.device("cpu")) for task in tasks)
        batches = tasks[0].batches(0)
        steps(packed, batches[:5])
        rates: dict[str, list[float]] = {"packed": [], "padded": []}
        for number in range(ROUNDS * (2 if full else 1)):
            chosen = batches[number * STEPS : (number + 1) * STEPS]
            rates["packed"].append(steps(packed, chosen))
            rates["padded"].append(steps(dense, chosen[:1]))
        mine, plain = (float(np.median(rates[name])) for name in ("packed", "padded"))
        what = f"{num_items:,} items, {source}"
        against = f"padded to 50, head at all positions: {plain:,.0f}"
        yield Figure(f"training; {what}", f"{mine:,.0f} items/s", against, mine / plain, ">= 3 x", mine >= 3 * plain)
        if not PEERS.exists():
            yield Figure("training", f"{mine:,.0f} items/s", "RecTools and RecBole: make peers", None, ">= 4 x", None)
            return
        found = peers(training, num_items)
        mine = float(np.median([*rates["packed"], *(steps(packed, batches[-STEPS * (each + 1) :][:STEPS]) for each in range(ROUNDS))]))
        for name, rate in found.items():
            if isinstance(rate, str):
                yield Figure("training", f"{mine:,.0f} items/s", f"{name} does not run: {rate}", None, ">= 4 x", None)
            else:
                yield Figure("training", f"{mine:,.0f} items/s", f"{name}: {rate:,.0f}", mine / rate, ">= 4 x", mine >= 4 * rate)


if __name__ == "__main__":
    main(figures)
