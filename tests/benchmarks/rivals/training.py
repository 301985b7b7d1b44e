"""What the rivals share: batches, the training loop, the choice between settings, and ranks for a table of `qbert-ray reproduce`.

Every rival reads the sequences of a run whose stage `ingest` is done and trains on training items alone. After each epoch its ndcg@10
of the validation items among all items is taken; the epoch with the best is kept. Of several settings the one with the best such epoch
is chosen, and only that one ranks the test items. With `--and-validation` it is then trained again, from the start, on training and
validation items, for as many epochs as it took before, and gets a second row: what has seen as much as a blend that is fitted on
validation items.

Shapes: B histories, T items of the longest of them, N items of the catalog, D width.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import product
from tests.benchmarks.peers_table import Split, ndcg, ranks, write

Settings = dict[str, Any]
Scores = Callable[[list[list[int]]], Tensor]  # [B, N] of histories
LAST_RATE = 0.05  # of the cosine schedule, as a share of the learning rate
OF_FIT = ("epoch_samples", "schedule", "warmup_steps")  # settings that `fit` reads of any model


class Trained(NamedTuple):
    """A model after its best epoch."""

    scores: Scores
    epoch: int
    value: float  # validation ndcg@10
    seconds: float  # of CPU time, which does not depend on what else the machine does, with all that goes before


Fit = Callable[[Split, Settings, argparse.Namespace, int], Trained]  # (split, settings, command line, seed)


class Encoder(nn.Module, ABC):
    """A sequence model that compares the state after a history with vectors of all items."""

    longest: int  # most items of a history that are read, the latest ones
    temperature: float | None = None  # of cosine logits; None: plain products

    @abstractmethod
    def catalog(self) -> Tensor:
        """[N, D] vectors of the items, which the first layer reads and the last state is compared with."""

    @abstractmethod
    def forward(self, items: Tensor, catalog: Tensor) -> Tensor:
        """[B, T, D] states after each item of left-padded histories [B, T]; padding is N."""

    def start_epoch(self, epoch: int) -> None:  # noqa: B027 - most have nothing to do
        """Called before each epoch of the training."""

    def logits(self, states: Tensor, catalog: Tensor) -> Tensor:
        """[S, N] of states [S, D]."""
        if self.temperature is None:
            return product(states, catalog)
        return product(F.normalize(states, dim=-1) / self.temperature, F.normalize(catalog, dim=-1))

    @torch.no_grad()
    def scorer(self) -> Scores:
        """Scores of histories by the present weights."""
        self.eval()
        catalog = self.catalog()

        def scores(histories: list[list[int]]) -> Tensor:
            x = padded(histories, self.longest, len(catalog))
            return self.logits(self(x, catalog)[:, -1], catalog)

        return scores


def padded(histories: Sequence[Sequence[int]], longest: int, padding: int) -> Tensor:
    """[B, T] the latest items of histories, right-aligned."""
    cut = [history[-longest:] for history in histories]
    x = torch.full((len(cut), max(1, *map(len, cut))), padding, dtype=torch.long)
    for row, history in enumerate(cut):
        if len(history):
            x[row, -len(history) :] = torch.tensor(history)
    return x


def by_length(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of samples of about equal lengths, in random order, so that little padding is computed."""
    random = np.random.default_rng([seed, epoch])
    order = np.lexsort([random.random(len(lengths)), lengths])
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return [batches[number] for number in random.permutation(len(batches))]


def fit_encoder(model: Encoder, split: Split, settings: Settings, given: argparse.Namespace, seed: int, prefixes: bool = False) -> Trained:
    """Train by cross-entropy over the whole catalog.

    Args:
        settings: `epoch_samples` is the most samples of an epoch, drawn for each.
        prefixes: each prefix of a history is a sample of its own, for models that are not causal; else all places of a window of a
            history are trained at once. Batches are of histories of about one length, so every target counts the same, not every batch:
            for a causal model that is the loss of the prefixes at a fraction of its cost.
    """
    longest, padding = model.longest, split.num_items
    if prefixes:
        samples = [items[max(0, end - longest) : end + 1] for items in split.every for end in range(1, len(items))]
    else:
        samples = [items[max(0, end - longest - 1) : end] for items in split.every for end in range(len(items), 1, -longest)]
    lengths = np.array([len(sample) for sample in samples])
    targets = 1.0 if prefixes else float(lengths.mean()) - 1  # of a sample

    def loss(rows: np.ndarray) -> Tensor:
        read = padded([samples[row][:-1] for row in rows], longest, padding)
        target = padded([samples[row][1:] for row in rows], longest, padding)
        catalog = model.catalog()
        states = model(read, catalog)
        chosen = torch.zeros_like(read, dtype=torch.bool)
        chosen[:, -1] = True
        if not prefixes:
            chosen = target < padding
        total = F.cross_entropy(model.logits(states[chosen], catalog), target[chosen], reduction="sum")
        return total / (settings["batch_size"] * targets)

    def batches(epoch: int) -> list[np.ndarray]:
        model.start_epoch(epoch)
        most = min(len(samples), settings.get("epoch_samples") or len(samples))
        drawn = np.random.default_rng([seed, epoch, 1]).permutation(len(samples))[:most] if most < len(samples) else np.arange(most)
        return [drawn[rows] for rows in by_length(lengths[drawn], settings["batch_size"], seed, epoch)]

    return fit(model, batches, loss, lambda: validation(model, split), model.scorer, settings, given)


def validation(model: Encoder, split: Split) -> float:
    """ndcg@10 of the validation items among all items."""
    order = sorted(range(len(split.train)), key=lambda user: len(split.train[user]))  # users of about equal histories together
    return ndcg(ranks(model.scorer(), [split.train[user] for user in order], [split.valid[user] for user in order], 1)[0])


def fit(
    model: nn.Module,
    batches: Callable[[int], list[np.ndarray]],
    loss: Callable[[np.ndarray], Tensor],
    evaluate: Callable[[], float],
    scorer: Callable[[], Scores],
    settings: Settings,
    given: argparse.Namespace,
) -> Trained:
    """Train until validation does not improve for `given.patience` epochs, `given.epochs` are done or `given.minutes` are over.

    With `given.last` train to the end of that epoch, and keep its weights whatever validation says.
    """
    begin = getattr(given, "begun", time.process_time())
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"], fused=True)
    best, weights = (0, -1.0), copy.deepcopy(model.state_dict())
    for epoch in range(given.epochs):
        model.train()
        samples, total = batches(epoch), 0.0
        for number, rows in enumerate(samples):
            if settings.get("schedule") == "cosine":
                done = (epoch + number / len(samples)) / given.epochs
                warm = min(1.0, (epoch * len(samples) + number + 1) / settings.get("warmup_steps", 1))
                falling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
                optimizer.param_groups[0]["lr"] = settings["learning_rate"] * warm * falling
            optimizer.zero_grad(set_to_none=True)
            value = loss(rows)
            if not torch.isfinite(value):
                raise SystemExit(f"the loss of epoch {epoch} is {value.item()}: choose other settings")
            value.backward()
            optimizer.step()
            total += value.item()
        model.eval()
        found = evaluate()
        if (found > best[1]) if given.last is None else (epoch == given.last):
            best, weights = (epoch, found), copy.deepcopy(model.state_dict())
        seconds = time.process_time() - begin
        print(
            f"epoch {epoch}: loss {total / len(samples):.4f}, validation ndcg@10 {found:.4f}, best {best[1]:.4f}, {seconds:.0f} s",
            flush=True,
        )
        over = epoch == given.last
        if given.last is None:
            over = epoch - best[0] >= given.patience or (given.minutes and seconds > 60 * given.minutes)
        if over:
            break
    model.load_state_dict(weights)
    model.eval()
    return Trained(scorer(), *best, time.process_time() - begin)


def parser(about: str) -> argparse.ArgumentParser:
    """The command line of every rival."""
    result = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("run", help="run directory whose stages ingest, and features where texts are read, are done")
    result.add_argument("domain")
    result.add_argument("out", type=Path, help="Parquet of ranks, to which rows are added")
    result.add_argument("--set", action="append", type=json.loads, dest="settings", help="settings to try, as JSON; may be repeated")
    result.add_argument("--seeds", type=int, nargs="+", default=[0], help="settings are compared with the first")
    result.add_argument("--epochs", type=int, default=100)
    result.add_argument("--patience", type=int, default=10)
    result.add_argument("--minutes", type=float, help="most minutes of CPU time of a training; the epoch that is running is completed")
    result.add_argument("--and-validation", action="store_true", help="train the chosen setting on validation items too, as a further row")
    result.set_defaults(last=None)
    return result


def compare(given: argparse.Namespace, model: str, defaults: Settings, train: Fit) -> None:
    """Train with each of the settings, choose by validation, and write the test ranks of the chosen one, for every seed.

    Raises:
        ValueError: a setting that the model does not have; it would be written down as tried.
    """
    if unknown := {name for more in given.settings or [] for name in more} - set(defaults) - set(OF_FIT):
        raise ValueError(f"{model} has no setting {', '.join(sorted(unknown))}; its settings are {', '.join(sorted({*defaults, *OF_FIT}))}")
    split = Split(given.run, given.domain)
    tried = [defaults | more for more in given.settings or [{}]]
    first = [_announced(train, split, settings, given, given.seeds[0]) for settings in tried]
    chosen = max(range(len(tried)), key=lambda number: first[number].value)
    for seed in given.seeds:
        trained = first[chosen] if seed == given.seeds[0] else _announced(train, split, tried[chosen], given, seed)
        _written(model, split, tried[chosen], given, seed, trained)
        if given.and_validation:
            until = argparse.Namespace(**vars(given) | {"last": trained.epoch})
            again = _announced(train, split.with_validation(), tried[chosen], until, seed)
            _written(f"{model}, validation items too", split, tried[chosen], given, seed, again)


def _written(model: str, split: Split, settings: Settings, given: argparse.Namespace, seed: int, trained: Trained) -> None:
    """Rank the test items and add the ranks to the table's file."""
    told = vars(given) | {"model": model, "settings": settings, "seed": seed, "started": time.monotonic() - trained.seconds}
    write(argparse.Namespace(**told), "here", split, split.test_ranks(trained.scores), (trained.epoch, trained.value))


def _announced(train: Fit, split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    torch.manual_seed(seed)
    given = argparse.Namespace(**vars(given) | {"begun": time.process_time()})  # pre-training and clusters count too
    trained = train(split, settings, given, seed)
    print(
        f"{json.dumps(settings)}, seed {seed}: epoch {trained.epoch}, validation ndcg@10 {trained.value:.4f}, {trained.seconds:.0f} s",
        flush=True,
    )
    return trained
