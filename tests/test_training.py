"""The training loop on a task whose updates can be worked out by hand."""

import json
from threading import Barrier, Thread, local
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qbert_ray import training
from qbert_ray.storage.directory import RunDir
from qbert_ray.training import Loop, shuffled_batches

ADAMW = torch.optim.AdamW

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
        self.metrics, self.adjusted, self.seen, self.given = list(metrics), [], [], []

    def build(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        return model

    def description(self):
        return {}

    def complete(self, model, device):
        pass

    def adjust(self, model, epoch):
        assert model.weight.requires_grad
        self.adjusted.append(epoch)

    def batches(self, epoch):
        return [np.arange(6) + epoch]

    def loss(self, model, samples, epoch, device):
        counted = [sample for sample in samples.tolist() if sample % 3]
        self.seen.append(torch.rand(()).item())
        self.given.append((epoch, device.type))
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
        assert fused  # one kernel for all parameters
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
    task = Line(microbatches=2)
    run(task)
    assert task.adjusted == [0, 1, 2, 3]
    assert task.given == [(epoch, "cpu") for epoch in (0, 0, 1, 1, 2, 2)]


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


def test_a_restored_training_continues_the_moments_of_its_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", ADAMW)

    def task():
        return Line(weight_decay=0.1, warmup_steps=2)

    whole, cut = run(task()), run(task(), epochs=2)
    cut.save(tmp_path)
    loop = Loop(task(), torch.device("cpu"))
    loop.restore(tmp_path)
    assert loop.average is None and not loop.best and loop.epoch == 2
    loop.run_epoch()
    assert loop.log == whole.log
    state, expected = (each.optimizer.state_dict()["state"][0] for each in (loop, whole))
    assert state.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_weights_decay_as_the_settings_say():
    loop = run(Line(weight_decay=0.5), epochs=1)
    assert loop.log[0]["weight"] == pytest.approx(2 - 0.1 * (gradient(2.0, 0) + 0.5 * 2.0), rel=1e-5)


class Together:
    """Takes the place of torch.distributed for loops in threads of one process."""

    def __init__(self, size):
        self.barrier, self.slots, self.own = Barrier(size, timeout=30), [None] * size, local()

    def _exchange(self, tensor):
        self.slots[self.own.rank] = tensor.clone()
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def all_reduce(self, tensor):
        tensor.copy_(sum(self._exchange(tensor)))

    def broadcast(self, tensor, source):
        tensor.copy_(self._exchange(tensor)[source])

    def get_backend(self):
        return "gloo"


def run_together(make_task, size, monkeypatch, epochs=100, checkpoint=None):
    """Loops of `size` workers that train up to `epochs` epochs, from a checkpoint if there is one."""
    together, loops = Together(size), [None] * size
    monkeypatch.setattr(training, "dist", together)

    def work(rank):
        together.own.rank = rank
        loop = loops[rank] = Loop(make_task(), torch.device("cpu"), rank, size)
        with torch.no_grad():
            loop.model.weight.add_(rank)  # the first worker's weights count
        if checkpoint is not None and (checkpoint / training.STATE[-1]).exists():
            loop.restore(checkpoint)
        while not loop.finished and loop.epoch < epochs:
            loop.run_epoch()

    threads = [Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return loops


@pytest.mark.parametrize(("size", "microbatches"), [(2, 4), (3, 3), (2, 1)])
def test_any_number_of_workers_gives_the_model_of_one(size, microbatches, monkeypatch):
    """A worker without a microbatch counts too. Only the first measures, and all stop when it has waited long enough."""

    def task():
        made = Line([5, 6, 1, 2, 9, 9], epochs=6, patience=2, microbatches=microbatches)
        made.criterion = ("score", 1.0)
        return made

    alone, loops = run(task()), run_together(task, size, monkeypatch)
    for rank, loop in enumerate(loops):
        assert loop.epoch == alone.epoch == 4 and loop.step == alone.step
        assert loop.model.weight.item() == pytest.approx(alone.model.weight.item(), rel=1e-6)
        for line, expected in zip(loop.log, alone.log, strict=True):
            assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
            assert line.keys() == (expected.keys() if rank == 0 else {"epoch", "train_loss"})
        assert loop.task.adjusted == ([0, 1, 2, 3] if rank == 0 else [])
    assert sum(len(loop.task.given) for loop in loops) == len(alone.task.given)  # no microbatch is computed twice
    assert loops[0].best_value == 6 and not loops[1].best


@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 1, 4), (4, 3, 2)])
def test_a_group_that_is_resized_in_the_middle_gives_the_model_of_one(sizes, monkeypatch, tmp_path):
    """As Ray Train does it: the group ends, and one of another size resumes from the checkpoint."""

    def task():
        return Line(epochs=6, microbatches=4, averaging=0.3, weight_decay=0.1, schedule="cosine")

    monkeypatch.setattr(torch.optim, "AdamW", ADAMW)
    alone = run(task())
    for epochs, size in zip((2, 4, 6), sizes, strict=True):
        loops = run_together(task, size, monkeypatch, epochs, tmp_path)
        loops[0].save(tmp_path)
    assert loops[0].step == alone.step and [line["epoch"] for line in loops[0].log] == list(range(6))
    for line, expected in zip(loops[0].log, alone.log, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    assert loops[0].weights()["weight"].item() == pytest.approx(alone.weights()["weight"].item(), rel=1e-6)


@pytest.mark.parametrize("unit", [0.01, 100.0])
def test_weights_of_samples_that_are_all_scaled_give_the_same_steps(unit):
    class Scaled(Line):
        def loss(self, model, samples, epoch, device):
            loss, weight = super().loss(model, samples, epoch, device)
            return unit * loss, unit * weight

    plain, scaled = run(Line()), run(Scaled())
    for line, expected in zip(scaled.log, plain.log, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


class Unused(Line):
    """A second parameter that no loss reads."""

    def build(self):
        model = super().build()
        model.other = nn.Parameter(torch.ones(3))
        return model


def test_a_parameter_that_is_not_used_has_a_gradient_of_zeros():
    loop = run(Unused(), epochs=1)
    assert loop.model.other.grad.tolist() == [0, 0, 0] and loop.model.other.tolist() == [1, 1, 1]


def test_a_batch_in_which_nothing_counts_changes_nothing():
    task = Line()
    task.batches = lambda epoch: [np.array([0, 3, 6])]
    loop = run(task, epochs=1)
    assert loop.log[0] == {"epoch": 0, "train_loss": 0.0, "weight": 2.0} and loop.step == 1


def published(run_dir, folder):
    lines = run_dir.read_bytes(f"{folder}/metrics.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines], *run_dir.load_model(f"{folder}/model")


def test_a_published_training_has_its_best_weights_its_description_and_a_line_for_each_epoch(tmp_path):
    run_dir = RunDir(str(tmp_path))
    task = Line([5, 6, 1])
    task.criterion, task.description = ("score", 1.0), lambda: {"width": 1}
    loop = run(task)
    assert not training.trained(run_dir, "some/folder")
    training.publish(loop, run_dir, "some/folder")
    log, weights, description = published(run_dir, "some/folder")
    assert log == loop.log and len(log) == 3 and training.last_metrics(run_dir, "some/folder") == loop.log[-1]
    assert weights["weight"].item() == pytest.approx(loop.log[1]["weight"]) and description["width"] == 1
    assert training.trained(run_dir, "some/folder") and not training.trained(run_dir, "some")
    last = run(Line([9, 1, 1], averaging=0.5))
    training.publish(last, run_dir, "other")
    assert published(run_dir, "other")[1]["weight"].item() == pytest.approx(last.log[-1]["weight"])  # the averaged ones


def test_a_model_that_needs_no_training_is_measured_and_published(tmp_path):
    run_dir = RunDir(str(tmp_path))
    training.build(lambda: Line(epochs=7), run_dir, "folder")
    log, weights, _ = published(run_dir, "folder")
    assert log == [{"epoch": 0, "weight": 2.0}] and weights["weight"].item() == 2


@pytest.mark.parametrize(("size", "batch_size", "sizes"), [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (3, 4, [3]), (0, 4, [0])])
def test_batches_hold_every_sample_once_in_an_order_of_seed_and_epoch(size, batch_size, sizes):
    batches = shuffled_batches(size, batch_size, 1, 2)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))


def test_epochs_and_seeds_shuffle_differently():
    first, *others = (np.concatenate(shuffled_batches(50, 8, *key)).tolist() for key in ((1, 2), (1, 2), (1, 3), (2, 2)))
    assert [other == first for other in others] == [True, False, False]
