"""A training that lasts until a file is there, so that nodes can join and leave: `python -m tests.execution.slow_training ADDRESS RUN`."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from qbert_ray.config.loading import load_config
from qbert_ray.config.schema import Workers
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_session import session
from qbert_ray.execution.ray_train import fit
from qbert_ray.storage.directory import RunDir

FOLDER, EPOCHS, HURRY = "fusion/slow", 600, 300  # epochs; those that do not wait for the file


class Slow:
    """A small network with dropout, whose epochs take half a second before the file `hurry` is there."""

    seed, criterion = 3, None
    settings = SimpleNamespace(
        epochs=EPOCHS, microbatches=4, learning_rate=0.01, weight_decay=0.01, warmup_steps=5, schedule="cosine", patience=None,
        averaging=0.0, gradient_clip=1.0,
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def description(self) -> dict[str, str]:
        return {}

    def batches(self, epoch: int) -> list[np.ndarray]:
        return [np.arange(16)]

    def loss(self, model: nn.Module, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[torch.Tensor, float]:
        inputs = torch.sin(torch.from_numpy(samples)[:, None] * torch.arange(1, 5)).float()
        return (model(inputs)[:, 0] - inputs.sum(1)).square().sum(), float(len(samples))

    def complete(self, model: nn.Module, device: torch.device) -> None:
        pass

    def adjust(self, model: nn.Module, epoch: int) -> None:
        while epoch == EPOCHS - HURRY and not (self.folder / "hurry").exists():  # rank 0, so the others wait, too
            time.sleep(0.1)
        if not (self.folder / "hurry").exists():
            time.sleep(0.5)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return {}


class Starts(Quiet):
    """Notes epoch and number of workers of each start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, total: int, done: int = 0) -> None:
        self.restarted(done, 1)

    def restarted(self, epoch: int, workers: int) -> None:
        with (self.folder / "starts.jsonl").open("a") as file:
            print(json.dumps([epoch, workers]), file=file, flush=True)
            os.fsync(file.fileno())


def make_task(config: object, run: RunDir, place: Path) -> Slow:
    return Slow(place)


if __name__ == "__main__":
    address, place = sys.argv[1:]
    config = load_config([], ["compute.checkpoint_seconds=1", "run.tensorboard=false"])
    with session(address):
        fit(
            make_task,
            config,
            RunDir(place),
            FOLDER,
            Workers(num_workers=(1, 2), cpus_per_worker=1),
            Starts(Path(place)),
            place=Path(place),
        )
