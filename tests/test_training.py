"""The training loop on a task whose updates can be worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qbert_ray.training import Loop, shuffled_batches

DEFAULTS = {
    "epochs": 3,
    "batch_size": 4,
    "microbatches": 1,
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "schedule": "constant",
    "gradient_clip": 1e9,
    "averaging": 0.0,
    "patience": None,
}


class Line:
    """One weight w; the loss of sample s is (w - s)^2, and a third of the samples count for nothing."""

    criterion = None
    seed = 5

    def __init__(self, metrics=(), **changes):
        self.settings = SimpleNamespace(**DEFAULTS | changes)
        self.metrics, self.adjusted, self.seen = list(metrics), [], []

    def build(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        return model

    def description(self):
        return {}

    def adjust(self, model, epoch):
        self.adjusted.append(epoch)

    def batches(self, epoch):
        return [np.arange(6) + epoch]

    def loss(self, model, samples, epoch, device):
        counted = [sample for sample in samples.tolist() if sample % 3]
        self.seen.append(torch.rand(()).item())
        return sum(((model.weight[0, 0] - sample) ** 2 for sample in counted), torch.zeros(())), float(len(counted))

    def evaluate(self, model, device):
        return {"weight": model.weight.item()} | ({"score": self.metrics.pop(0)} if self.metrics else {})


def gradient(weight, epoch):
    counted = [sample for sample in range(epoch, epoch + 6) if sample % 3]
    return sum(2 * (weight - sample) for sample in counted) / len(counted)


def run(task, epochs=None):
    loop = Loop(task, torch.device("cpu"))
    while not loop.finished and (epochs is None or loop.epoch < epochs):
        loop.run_epoch()
    return loop


class Descent(torch.optim.SGD):
    """Plain gradient descent in AdamW's place, so that a step shows its gradient."""

    def __init__(self, parameters, lr, weight_decay, fused):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)


@pytest.fixture(autouse=True)
def plain_descent(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", Descent)


@pytest.mark.parametrize("microbatches", [1, 2, 4, 9])
def test_a_step_takes_the_gradient_of_the_mean_over_what_counts(microbatches):
    loop = run(Line(microbatches=microbatches))
    weight = 2.0
    for epoch in range(3):
        loss = sum((weight - sample) ** 2 for sample in range(epoch, epoch + 6) if sample % 3) / 4
        assert loop.log[epoch]["train_loss"] == pytest.approx(loss, rel=1e-5)
        weight -= 0.1 * gradient(weight, epoch)
        assert loop.log[epoch]["weight"] == pytest.approx(weight, rel=1e-5)
    assert [line["epoch"] for line in loop.log] == [0, 1, 2] and loop.step == 3


def test_the_learning_rate_rises_over_the_warm_up_steps():
    loop = run(Line(warmup_steps=2))
    weight = 2.0
    for epoch, share in enumerate((0.5, 1.0, 1.0)):
        weight -= 0.1 * share * gradient(weight, epoch)
        assert loop.log[epoch]["weight"] == pytest.approx(weight, rel=1e-5)


def test_a_cosine_lets_the_learning_rate_fall_to_a_twentieth():
    """By the share of the epochs that is done: 0, 1/3 and 2/3."""
    loop = run(Line(schedule="cosine"))
    weight = 2.0
    for epoch, cosine in enumerate((1.0, 0.5, -0.5)):
        weight -= 0.1 * (0.05 + 0.95 * (1 + cosine) / 2) * gradient(weight, epoch)
        assert loop.log[epoch]["weight"] == pytest.approx(weight, rel=1e-5)


def test_gradients_are_clipped_to_a_norm():
    loop = run(Line(gradient_clip=0.25), epochs=1)
    assert loop.log[0]["weight"] == pytest.approx(2 - 0.1 * 0.25 * np.sign(gradient(2.0, 0)), rel=1e-4)


def test_averaged_weights_are_what_is_measured_and_kept():
    """The decay of step n is at most n / (n + 10): 1 / 11, 2 / 12, then the setting."""
    loop = run(Line(averaging=0.2))
    weight = average = 2.0
    for epoch, decay in enumerate((1 / 11, 2 / 12, 0.2)):
        weight -= 0.1 * gradient(weight, epoch)
        average = decay * average + (1 - decay) * weight
        assert loop.log[epoch]["weight"] == pytest.approx(average, rel=1e-5)
    assert loop.weights()["weight"].item() == pytest.approx(average, rel=1e-5)
    assert loop.model.weight.item() == pytest.approx(weight, rel=1e-5)  # training continues from its own weights


@pytest.mark.parametrize(("sign", "scores", "best"), [(1.0, [3, 5, 5, 4], 1), (-1.0, [3, 1, 1, 2], 1), (1.0, [1, 2, 3, 4], 3)])
def test_the_first_of_the_best_epochs_is_kept(sign, scores, best):
    task = Line(scores, epochs=4)
    task.criterion = ("score", sign)
    loop = run(task)
    assert loop.best["weight"].item() == pytest.approx(loop.log[best]["weight"])
    assert loop.best_value == scores[best]


def test_without_a_criterion_the_last_epoch_is_kept():
    loop = run(Line([9, 1, 1]))
    assert not loop.best and loop.weights()["weight"].item() == pytest.approx(loop.log[-1]["weight"])


def test_patience_ends_a_training_after_so_many_epochs_without_a_better_one():
    task = Line([5, 6, 1, 2, 9, 9], epochs=6, patience=2)
    task.criterion = ("score", 1.0)
    assert len(run(task).log) == 4
    task = Line([5, 1, 6, 1, 7, 1], epochs=6, patience=2)
    task.criterion = ("score", 1.0)
    assert len(run(task).log) == 6


def test_weights_are_adjusted_before_each_epoch_and_after_the_last():
    task = Line()
    run(task)
    assert task.adjusted == [0, 1, 2, 3]


def test_every_microbatch_has_a_random_state_of_its_own():
    task = Line(microbatches=2)
    run(task)
    assert len(set(task.seen)) == 6
    again = Line(microbatches=2)
    run(again)
    assert again.seen == task.seen


def test_a_gradient_that_is_no_number_is_refused():
    task = Line(learning_rate=float("inf"))
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        run(task)


def test_a_restored_training_ends_where_an_uninterrupted_one_does(tmp_path):
    def task():
        made = Line([5, 6, 1], averaging=0.3, patience=3)
        made.criterion = ("score", 1.0)
        return made

    whole, cut = run(task()), run(task(), epochs=2)
    cut.save(tmp_path)
    later = task()
    later.metrics = [1]
    loop = Loop(later, torch.device("cpu"))
    loop.restore(tmp_path)
    while not loop.finished:
        loop.run_epoch()
    assert loop.log == whole.log and loop.step == whole.step and loop.waited == whole.waited
    assert torch.equal(loop.best["weight"], whole.best["weight"]) and loop.best_value == 6
    assert torch.equal(loop.weights()["weight"], whole.weights()["weight"])


@pytest.mark.parametrize(("size", "batch_size", "sizes"), [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (3, 4, [3]), (0, 4, [0])])
def test_batches_hold_every_sample_once_in_an_order_of_seed_and_epoch(size, batch_size, sizes):
    batches = shuffled_batches(size, batch_size, 1, 2)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))


def test_epochs_and_seeds_shuffle_differently():
    first, *others = (np.concatenate(shuffled_batches(50, 8, *key)).tolist() for key in ((1, 2), (1, 2), (1, 3), (2, 2)))
    assert [other == first for other in others] == [True, False, False]
