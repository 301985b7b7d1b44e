"""The training task of stage 1 on a small run: which items are in a batch, what is hidden of them, and its losses added up."""

import numpy as np
import pytest
import torch

from qbert_ray.config.schema import Config
from qbert_ray.features.vectors import features_table
from qbert_ray.fusion import task as tasks
from qbert_ray.fusion.model import alignment_loss, geometry_loss, view_distance
from qbert_ray.fusion.task import FusionTask
from qbert_ray.random_streams import ID_DROPOUT_STREAM, uniform
from tests.small_run import COLD, ITEMS, make_run

WIDTHS = {"text": (2, 6), "image": (1, 5), "structure": (1, 4)}  # J and F
SETTINGS = {"width": 8, "num_layers": 3, "num_heads": 2, "ffn_width": 12, "dropout": 0.0, "batch_size": 10, "id_dropout": 0.4}
WEIGHTS = {"contrast_temperature": 0.2, "consistency_weight": 0.3, "ponder_weight": 0.7, "ponder_target": 1.2, "geometry_weight": 5.0}
WARM = ITEMS - COLD
CPU = torch.device("cpu")


def make_features_run(folder):
    run, rng = make_run(folder), np.random.default_rng(4)
    for name in run.parts("ingest/items"):
        items = run.read_part("ingest/items", name)
        for modality, shape in WIDTHS.items():
            vectors = rng.standard_normal((items.num_rows, *shape)).astype(np.float32)
            present = rng.random((items.num_rows, shape[0])) < 0.4
            run.write_part(f"features/{modality}", name, features_table(items, vectors * present[..., None], present))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_features_run(tmp_path_factory.mktemp("run"))


def make_task(run, **changes):
    sections = {"run": {"dir": run.uri, "seed": 3}, "data": {"domains": {"shop": {}}}, "fusion": SETTINGS | WEIGHTS | changes}
    return FusionTask(Config.model_validate(sections), run)


def build(task):
    torch.manual_seed(0)
    return task.build()


def test_a_model_is_built_of_the_settings_for_the_items_that_training_may_see(run):
    task = make_task(run, dynamic=False, halt_threshold=0.6, temperature=0.3, dropout=0.1)
    widths = {name: shape[1] for name, shape in WIDTHS.items()}
    expected = {name: SETTINGS[name] for name in ("width", "num_layers", "num_heads", "ffn_width")} | {"dropout": 0.1}
    expected |= {"dynamic": False, "halt_threshold": 0.6, "temperature": 0.3}
    assert task.description() == {"num_items": WARM, "feature_widths": widths} | expected
    model = task.build()
    assert len(model.layers) == 3 and len(model.id_embedding.weight) == WARM + 1 and list(model.project) == list(WIDTHS)
    assert (model.dynamic, model.halt_threshold, model.temperature) == (False, 0.6, 0.3)


def test_the_last_epoch_is_kept_and_nothing_changes_without_gradients(run):
    task = make_task(run)
    assert task.criterion is None and task.seed == 3 and task.settings.epochs == 15
    model = build(task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task.adjust(model, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_every_item_that_training_may_see_is_in_one_batch_of_an_epoch(run):
    task = make_task(run)
    batches = [task.batches(epoch) for epoch in (0, 0, 1)]
    assert [len(batch) for batch in batches[0]] == [9] * 4
    orders = [np.concatenate(each).tolist() for each in batches]
    assert sorted(orders[0]) == list(range(WARM)) and orders[0] == orders[1] != orders[2]


def hidden_of(samples, epoch, rate=SETTINGS["id_dropout"], seed=3):
    return [bool(uniform(seed + ID_DROPOUT_STREAM, epoch, np.array([sample]), 1)[0, 0] < rate) for sample in samples]


def test_the_loss_is_that_of_eq_5_and_of_the_geometry_with_some_items_as_cold_ones(run):
    """An item whose ID is hidden has the shared query, and is fused without its structure if it has a text or an image."""
    task = make_task(run)
    model, samples, epoch = build(task).eval(), np.random.default_rng(1).permutation(WARM), 2
    hidden = hidden_of(samples, epoch)
    assert 0 < sum(hidden) < len(samples)
    with torch.no_grad():
        found, weight = task.loss(model, samples, epoch, CPU)
        item = torch.tensor([model.unknown if gone else sample for gone, sample in zip(hidden, samples.tolist(), strict=True)])
        features, present = task.features.batch(samples, CPU)
        content = [bool(present["text"][row].any() or present["image"][row].any()) for row in range(len(samples))]
        assert any(gone and not has for gone, has in zip(hidden, content, strict=True))
        unread = torch.tensor([gone and has for gone, has in zip(hidden, content, strict=True)])
        fused = model(item, features, present, unread={"structure": unread})
        expected = alignment_loss(fused, 0.2, 0.3, 0.7, 1.2)["loss"] + 5.0 * geometry_loss(fused, features, present)
    assert weight == WARM and float(found) == pytest.approx(WARM * float(expected), rel=1e-5)


def test_other_items_are_hidden_in_another_epoch_or_by_another_seed(run):
    task, samples = make_task(run), np.arange(WARM)
    losses = []
    for epoch, seed in ((0, 3), (0, 3), (1, 3), (0, 4)):
        task.seed = seed
        with torch.no_grad():
            losses.append(float(task.loss(build(task).eval(), samples, epoch, CPU)[0]))
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_without_a_weight_the_geometry_is_left_out(run, monkeypatch):
    task, samples = make_task(run, geometry_weight=0.0, id_dropout=0.0), np.arange(12)
    monkeypatch.setattr(tasks, "geometry_loss", None)  # not even computed
    model = build(task).eval()
    with torch.no_grad():
        fused = model(torch.from_numpy(samples), *task.features.batch(samples, CPU))
        expected = alignment_loss(fused, 0.2, 0.3, 0.7, 1.2)["loss"]
        assert float(task.loss(model, samples, 0, CPU)[0]) == pytest.approx(12 * float(expected), rel=1e-5)


def test_structure_is_hidden_where_there_is_something_else(run):
    task, samples = make_task(run), np.arange(WARM)
    hidden = samples % 2 == 0
    has = task.features.present["text"].any(1) | task.features.present["image"].any(1)
    assert task._unread(hidden, samples, CPU)["structure"].tolist() == (hidden & has).tolist()
    del task.features.present["image"], task.features.present["text"]
    assert task._unread(hidden, samples, CPU) == {}  # structure alone is what an item has
    task = make_task(run)
    del task.features.present["structure"]
    assert task._unread(hidden, samples, CPU) == {}


@torch.inference_mode()
def test_metrics_are_those_of_some_items_of_the_whole_catalog(run, monkeypatch):
    monkeypatch.setattr(tasks, "SAMPLE", 20)
    task = make_task(run)
    model = build(task).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.gate[3].weight[-1].mul_(8)  # so that depths differ
    found = task.evaluate(model, CPU)
    rows = np.arange(0, WARM, 2)
    assert task.num_items == WARM and len(rows) == 18
    fused = model(torch.from_numpy(rows), *task.features.batch(rows, CPU))
    depths = fused.depth.tolist()
    assert found["depth_histogram"] == [depths.count(depth) for depth in (1, 2, 3)] and sum(found["depth_histogram"]) == len(rows)
    assert found["mean_depth"] == pytest.approx(np.mean(depths)) and found["mean_gate"] == pytest.approx(float(fused.gate.mean()))
    assert found["view_distance"] == pytest.approx(float(view_distance(fused)))
    assert found.keys() == {"view_distance", "mean_depth", "mean_gate", "depth_histogram"}
    monkeypatch.setattr(tasks, "SAMPLE", 4096)
    assert sum(task.evaluate(model, CPU)["depth_histogram"]) == WARM
