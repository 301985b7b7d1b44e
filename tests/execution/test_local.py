"""The executor of one process: parts are done once, and trainings resume from their last checkpoint."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from qbert_ray.config.loading import load_config
from qbert_ray.config.schema import Actors, Workers
from qbert_ray.execution.executor import open_executor
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.storage.directory import RunDir

FOLDER = "finetune/shop"


class Doubled:
    """Writes a part whose numbers are twice those of the part that it reads."""

    loaded = 0

    def __init__(self, run):
        type(self).loaded += 1
        self.run = run

    def __call__(self, part):
        rows = self.run.read_part("in", part)["x"].to_numpy() * 2
        self.run.write_part("out", part, pa.table({"x": rows}))
        return {"items": len(rows), "largest": int(rows.max())}


def test_each_part_is_done_once_and_counts_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(Doubled, "loaded", 0)
    run, parts = RunDir(str(tmp_path)), ["a.parquet", "b.parquet"]
    for number, part in enumerate(parts):
        run.write_part("in", part, pa.table({"x": np.arange(3 + number)}))

    def map_parts():
        return LocalExecutor().map_parts(run, Doubled, {"run": run}, parts, "out", Actors(), Quiet())

    assert map_parts() == {"items": 7, "largest": 4 + 6} and run.read_part("out", "b.parquet")["x"].to_pylist() == [0, 2, 4, 6]
    written = {part: (tmp_path / "out" / part).stat().st_mtime_ns for part in parts}
    assert map_parts() == {"items": 7, "largest": 10} and Doubled.loaded == 1  # nothing to do: nothing is loaded
    run.delete("out/b.parquet")  # its counts stay, as after a crash between the two
    assert map_parts() == {"items": 7, "largest": 10} and Doubled.loaded == 2
    assert (tmp_path / "out" / "a.parquet").stat().st_mtime_ns == written["a.parquet"]


class Curve:
    """One weight that each epoch moves towards the epoch's number; fails before an epoch if told so."""

    criterion = ("score", 1.0)
    seed = 3
    fails_before = None
    begun: list[int] = []

    def __init__(self, config, run):
        defaults = {"batch_size": 4, "microbatches": 1, "weight_decay": 0.01, "warmup_steps": 1, "schedule": "constant"}
        self.settings = SimpleNamespace(epochs=4, learning_rate=0.1, gradient_clip=1.0, averaging=0.5, patience=None, **defaults)

    def build(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 1.0)
        return model

    def description(self):
        return {"in_features": 1, "out_features": 1, "bias": False}

    def complete(self, model, device):
        pass

    def adjust(self, model, epoch):
        if epoch == self.fails_before:
            raise KeyboardInterrupt

    def batches(self, epoch):
        self.begun.append(epoch)
        return [np.arange(4)]

    def loss(self, model, samples, epoch, device):
        return ((model.weight[0, 0] - 10 * epoch) ** 2) * len(samples), float(len(samples))

    def evaluate(self, model, device):
        return {"score": -abs(model.weight.item() - 1.1)}


def train(folder, **changes):
    run = RunDir(str(folder))
    config = load_config([], ["compute.executor=local", "compute.checkpoint_seconds=0"])
    task = type("Curve", (Curve,), {"begun": [], **changes})
    return run, task, lambda: LocalExecutor().fit(task, config, run, FOLDER, Workers(), Quiet())


def test_a_training_that_was_killed_resumes_from_its_last_whole_checkpoint(tmp_path):
    whole, _, fit = train(tmp_path / "whole")
    expected = fit()
    run, _, fit = train(tmp_path / "killed", fails_before=2)
    with pytest.raises(KeyboardInterrupt):
        fit()
    assert run.folders(f"{FOLDER}/checkpoints") == ["000002"]  # earlier ones are deleted
    (tmp_path / "killed" / FOLDER / "checkpoints" / "000003").mkdir()  # one that was not written to its end
    run.write_bytes(f"{FOLDER}/checkpoints/000003/state.safetensors", b"cut")
    _, again, fit = train(tmp_path / "killed")
    assert fit() == expected and again.begun == [2, 3]
    assert run.read_bytes(f"{FOLDER}/model/model.safetensors") == whole.read_bytes(f"{FOLDER}/model/model.safetensors")
    assert run.read_bytes(f"{FOLDER}/metrics.jsonl") == whole.read_bytes(f"{FOLDER}/metrics.jsonl")
    assert not run.exists(f"{FOLDER}/checkpoints/000002/state.json")


def test_a_training_that_is_done_is_not_repeated(tmp_path):
    _, _, fit = train(tmp_path)
    first = fit()
    _, again, fit = train(tmp_path)
    assert fit() == first and again.begun == []


def test_threads_are_those_of_the_config_until_the_run_ends():
    before = torch.get_num_threads()
    with open_executor(load_config([], ["compute.executor=local", f"compute.threads={before + 1}"])) as executor:
        assert torch.get_num_threads() == before + 1 and executor.name == "local" and executor.num_machines() == 1
    assert torch.get_num_threads() == before


def test_tables_that_are_read_stay_in_memory_in_order():
    tables = [pa.table({"x": [number] * number}) for number in range(4)]
    rows = LocalExecutor().read(lambda number: iter([tables[number], tables[0]]), 3)
    assert rows.count() == 3 and [table.num_rows for table in rows.blocks()] == [0, 0, 1, 0, 2, 0]
    assert rows.size_bytes() == 3 * 8


def test_a_handle_is_the_value_itself():
    executor = LocalExecutor()
    handle = executor.submit(divmod, 17, 5, num_returns=2)
    assert executor.get(handle) == (3, 2) and executor.put(handle) is handle and list(executor.as_completed([1, 2])) == [1, 2]
