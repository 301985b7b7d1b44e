"""Embeddings of which a step updates the rows that it reads: by hand, averaged, on several workers, and resumed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qbert_ray.training import Loop
from tests.test_training import DEFAULTS, run_together

ROWS, WIDTH = 50, 3
BETAS, EPSILON = (0.9, 0.999), 1e-8


class Rows:
    """The loss of sample s is the squared distance of row s % 7 times a shared weight from a target."""

    criterion, seed = None, 5

    def __init__(self, **changes):
        self.settings = SimpleNamespace(**DEFAULTS | {"epochs": 4} | changes)

    def build(self):
        model = nn.Module()
        model.rows, model.weight = nn.Embedding(ROWS, WIDTH, sparse=True), nn.Parameter(torch.ones(WIDTH))
        own = torch.Generator().manual_seed(self.seed)  # workers are threads here, and share torch's own
        nn.init.normal_(model.rows.weight, generator=own)
        return model

    def description(self):
        return {}

    def complete(self, model, device):
        pass

    def adjust(self, model, epoch):
        pass

    def batches(self, epoch):
        return [np.arange(3) + epoch + start for start in (0, 2, 9)]

    def loss(self, model, samples, epoch, device):
        chosen = torch.from_numpy(samples % 7)
        found = model.rows(chosen) * model.weight
        return ((found - torch.from_numpy(samples)[:, None]) ** 2).sum(), float(len(samples))

    def evaluate(self, model, device):
        return {"sum": float(model.rows.weight.sum())}


def run(loop):
    while not loop.finished:
        loop.run_epoch()
    return loop


def by_hand(task, steps):
    """Rows and their average after some steps, every row looked at in every step."""
    model, settings = task.build(), task.settings
    rows, weight = model.rows.weight.detach().clone(), model.weight.detach().clone()
    average, other = rows.clone(), nn.Parameter(weight)
    optimizer = torch.optim.AdamW([other], settings.learning_rate, weight_decay=0.0)
    first, second, step = torch.zeros_like(rows), torch.zeros_like(rows), 0
    for epoch in range(settings.epochs):
        for samples in task.batches(epoch):
            table = rows.clone().requires_grad_()
            chosen = torch.from_numpy(samples % 7)
            loss = ((table[chosen] * other - torch.from_numpy(samples)[:, None]) ** 2).sum() / len(samples)
            gradient, optimizer.param_groups[0]["params"][0].grad = torch.autograd.grad(loss, [table, other])
            norm = torch.sqrt(gradient.square().sum() + other.grad.square().sum())
            scale = min(1.0, settings.gradient_clip / (float(norm) + 1e-6))
            gradient, other.grad = gradient * scale, other.grad * scale
            step += 1
            for row in set(chosen.tolist()):  # moments of the other rows do not decay
                first[row] += (1 - BETAS[0]) * (gradient[row] - first[row])
                second[row] += (1 - BETAS[1]) * (gradient[row] ** 2 - second[row])
                corrected = settings.learning_rate * (1 - BETAS[1] ** step) ** 0.5 / (1 - BETAS[0] ** step)
                rows[row] -= corrected * first[row] / (second[row].sqrt() + EPSILON)
            optimizer.step()
            decay = min(settings.averaging, step / (step + 10))
            average = decay * average + (1 - decay) * rows
            if step == steps:
                return rows, average
    return rows, average


@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_rows_are_those_of_adam_on_the_rows_that_are_read_and_their_average_that_of_every_step(clip):
    task = Rows(averaging=0.9, gradient_clip=clip)
    loop = run(Loop(task, torch.device("cpu")))
    rows, average = by_hand(task, 12)
    assert loop.step == 12
    torch.testing.assert_close(loop.model.rows.weight.detach(), rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loop.average["rows.weight"], average, rtol=1e-5, atol=1e-6)
    unread = loop.model.rows.weight[7:]
    assert torch.equal(unread, loop.average["rows.weight"][7:]) and not torch.equal(rows[:7], average[:7])


@pytest.mark.parametrize(("size", "microbatches"), [(2, 4), (3, 3), (2, 1)])
def test_any_number_of_workers_gives_the_rows_of_one(size, microbatches, monkeypatch):
    def task():
        return Rows(averaging=0.9, microbatches=microbatches)

    alone = run(Loop(task(), torch.device("cpu")))
    for loop in run_together(task, size, monkeypatch):
        for name in ("rows.weight", "weight"):
            torch.testing.assert_close(loop.model.state_dict()[name], alone.model.state_dict()[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(loop.average[name], alone.average[name], rtol=1e-5, atol=1e-6)


def test_a_restored_training_ends_like_an_uninterrupted_one(tmp_path):
    whole = run(Loop(Rows(averaging=0.9), torch.device("cpu")))
    first = Loop(Rows(averaging=0.9), torch.device("cpu"))
    first.run_epoch()
    first.run_epoch()
    first.save(tmp_path)
    later = Loop(Rows(averaging=0.9), torch.device("cpu"))
    later.restore(tmp_path)
    run(later)
    assert later.log == whole.log
    for name, tensor in whole.weights().items():
        assert torch.equal(later.weights()[name], tensor)


def test_a_batch_that_reads_no_row_changes_none():
    class Without(Rows):
        def loss(self, model, samples, epoch, device):
            return (model.weight**2).sum() * len(samples), float(len(samples))

    loop = Loop(Without(), torch.device("cpu"))
    before = loop.model.rows.weight.detach().clone()
    run(loop)
    assert torch.equal(loop.model.rows.weight, before) and not torch.equal(loop.model.weight, torch.ones(WIDTH))
