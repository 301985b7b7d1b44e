"""Where epochs go while a training runs."""

import io
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from qbert_ray.config.loading import load_config
from qbert_ray.execution import ray_board, ray_metrics, tracking
from qbert_ray.execution.progress import Quiet
from qbert_ray.storage.directory import RunDir


@pytest.fixture
def shown(monkeypatch):
    """Values of the gauge by domain, stage and name."""
    values = {}

    class Gauge:
        def set(self, value, tags):
            assert tags.keys() == {*ray_metrics.LABELS, "stage", "name"} and tags["run"] and tags["job_id"] == "7"
            values[tags["domain"], tags["stage"], tags["name"]] = value

    monkeypatch.setattr(ray_metrics, "_job_id", lambda: "7")
    monkeypatch.setattr(ray_metrics, "_gauge", Gauge)
    return values


class Told(Quiet):
    """Notes of a training."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def gauge(run, stage, domain=""):
    """As a training on Ray adds it."""
    return {"Ray's metrics": lambda epoch, metrics: ray_metrics.measure(run, stage, metrics, domain=domain)}


def train(config, run):
    with tracking.trackers(config, run, "finetune/shop", Quiet(), gauge(run, "finetune", "shop")) as track:
        for epoch in range(2):
            track(epoch, {"train_loss": 2.0 - epoch, "hr@10": 0.25})


def events(content: bytes) -> list[tuple[int, str, float]]:
    found, place = [], 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        place += 16 + length
    return found


def test_epochs_reach_tensorboard_and_the_gauge(tmp_path, shown):
    run = RunDir(str(tmp_path))
    train(load_config(), run)
    (name,) = run.names("finetune/shop/tensorboard")
    expected = [(0, "train_loss", 2.0), (0, "hr_10", 0.25), (1, "train_loss", 1.0), (1, "hr_10", 0.25)]  # TensorBoard knows no @
    assert events(run.read_bytes(f"finetune/shop/tensorboard/{name}")) == expected
    assert shown == {("shop", "finetune", "train_loss"): 1.0, ("shop", "finetune", "hr@10"): 0.25}


def test_without_tensorboard_there_is_no_file(tmp_path, shown):
    train(load_config([], ["run.tensorboard=false"]), RunDir(str(tmp_path)))
    assert not list(tmp_path.iterdir()) and shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_ends_the_figures_and_not_the_training(tmp_path, shown, monkeypatch):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: io.BufferedWriter(io.FileIO("/dev/full", "w")))
    told = Told()
    run = RunDir(str(tmp_path))
    with tracking.trackers(load_config(), run, "quantizer", told, gauge(run, "quantizer")) as track:
        for epoch in range(3):
            track(epoch, {f"codebook_usage.{level}": 1.0 for level in range(50)})  # more than any queue of events holds
    assert len(told.notes) == 1 and "TensorBoard" in told.notes[0] and "No space left" in told.notes[0]
    assert shown["", "quantizer", "codebook_usage.49"] == 1.0


def test_epochs_reach_mlflow(tmp_path, shown, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a store without a server or a database
    uri = f"file://{tmp_path}/mlflow"
    train(load_config([], [f"run.mlflow={uri}", "run.dir=runs/x"]), RunDir(str(tmp_path / "run")))
    client = mlflow.tracking.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id])
    assert [point.value for point in client.get_metric_history(found.info.run_id, "train_loss")] == [2.0, 1.0]
    assert found.data.params["finetune.epochs"] == "10" and found.data.metrics["hr_at_10"] == 0.25


def test_mlflow_that_is_not_there_is_said(tmp_path, shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match="pip install mlflow-skinny"):
        train(load_config([], ["run.mlflow=http://127.0.0.1:5000"]), RunDir(str(tmp_path)))


def test_figures_of_a_stage_are_the_numbers_among_its_counts(shown):
    counts = {"metrics": {"codebook_usage": [1.0, 0.5], "items": 3}, "warnings": ["x"], "done": True, "none": None}
    ray_metrics.measure(RunDir("runs/a"), "quantizer", counts)
    assert shown == {
        ("", "quantizer", "metrics.codebook_usage.0"): 1.0,
        ("", "quantizer", "metrics.codebook_usage.1"): 0.5,
        ("", "quantizer", "metrics.items"): 3.0,
    }


def test_figures_below_the_name_of_a_domain_are_labelled_with_it(shown):
    """Counts of evaluate and of fine-tuning; a domain of several runs draws one line in each."""
    ray_metrics.measure(RunDir("runs/a"), "evaluate", {"shop": {"users": 3}, "toys": {"users": 4}, "seconds": 5}, ["shop", "toys"])
    ray_metrics.measure(RunDir("runs/a"), "finetune", {"metrics": {"shop": {"hr@10": 0.25}}, "shop": 1}, ["shop"])
    assert shown == {
        ("shop", "evaluate", "users"): 3.0,
        ("toys", "evaluate", "users"): 4.0,
        ("", "evaluate", "seconds"): 5.0,
        ("shop", "finetune", "metrics.hr@10"): 0.25,
        ("", "finetune", "shop"): 1.0,
    }


def test_items_are_counted_with_the_domain_of_their_part(monkeypatch):
    counted = []

    class Counter:
        def inc(self, items, tags):
            counted.append((items, tags))

    monkeypatch.setattr(ray_metrics, "_job_id", lambda: "7")
    monkeypatch.setattr(ray_metrics, "_counter", Counter)
    ray_metrics.count_items(RunDir("runs/a"), "features/text", "my-shop-00002.parquet", 5)
    ray_metrics.count_items(RunDir("runs/a"), "features/text", "my-shop-00003.parquet", 0)
    assert counted == [(5, {"run": RunDir("runs/a").uri, "job_id": "7", "domain": "my-shop", "table": "features/text"})]


def test_a_restarted_training_is_reported_and_a_resumed_one_is_not(monkeypatch):
    """A first start with epochs done resumes an earlier run; a second one of the same training follows a loss."""
    board = ray_board.Board.__ray_metadata__.modified_class("finetune/shop")
    remote = SimpleNamespace(read=SimpleNamespace(remote=board.read))
    told = []
    progress = Quiet()
    progress.restarted = lambda epoch, workers: told.append((epoch, workers))
    monkeypatch.setattr(ray_board.ray, "get", lambda value: value)
    monkeypatch.setattr(ray_board.ray, "kill", lambda board: None)
    board.begin(3, 2)
    with ray_board.Watch(remote, progress, lambda metrics: None):
        pass
    assert told == []
    board.begin(4, 1)
    board.begin(5, 2)
    with ray_board.Watch(remote, progress, lambda metrics: None):
        pass
    assert told == [(4, 1), (5, 2)] and repr(board) == "Board(finetune/shop)"
