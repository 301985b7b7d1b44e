"""Training with a sampled softmax: a step has gradients for the rows of the item embeddings that it reads, and for no others."""

import numpy as np
import pytest
import torch

from qbert_ray.config.loading import with_values
from qbert_ray.fusion import task as fusion_task
from qbert_ray.sequence.task import SequencerTask, repeated_share
from qbert_ray.storage.catalog import run_config
from qbert_ray.training import Loop
from tests.small_run import LEVELS, SIZE, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    run.write_json("semantic_ids/manifest.json", {"stage": "semantic_ids", "counts": {"codebook_size": SIZE, "num_levels": LEVELS}})
    return run


def make_loop(run, **settings):
    changes = {"finetune.objective": "causal", "finetune.epochs": 2, "sequencer.item_embedding": True}
    changes |= {"sequencer.item_start": "random", "sequencer.start": "random"}
    config = with_values(run_config(run), changes | {f"finetune.{name}": value for name, value in settings.items()})
    return Loop(SequencerTask(config, run, ["shop"], config.finetune), torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "sparse"),
    [({"sampled_items": 1}, True), ({"sampled_items": 16384}, False), ({"sampled_items": None}, False), ({"objective": "masked"}, False)],
)
def test_rows_are_updated_alone_where_the_softmax_is_sampled(run, settings, sparse):
    loop = make_loop(run, **settings)
    assert loop.model.item_embedding["in_shop"].sparse == sparse
    assert list(loop.rows.weights) == (["item_embedding.in_shop.weight"] if sparse else [])
    while not loop.finished:
        loop.run_epoch()
    assert loop.log[-1]["train_loss"] < loop.log[0]["train_loss"]


def test_a_step_changes_the_items_of_its_batch_and_sample(run):
    loop = make_loop(run, sampled_items=1)
    before = loop.model.item_embedding["in_shop"].weight.detach().clone()
    samples = loop.task.batches(0)[0][:1]
    loop.model.train()
    loop._step(samples, 1e-2)
    changed = (loop.model.item_embedding["in_shop"].weight.detach() != before).any(1).nonzero()[:, 0].tolist()
    read = set(loop.task.sequences["shop"].items[samples[0, 2] : samples[0, 3]].tolist())
    assert read <= set(changed) and len(set(changed) - read) <= 1 and len(changed) < len(before)


def test_id_embeddings_of_stage_1_are_too_where_the_catalog_is_large(monkeypatch):
    class Model(torch.nn.Module):
        def __init__(self, **_):
            super().__init__()
            self.id_embedding = torch.nn.Embedding(11, 2)

    monkeypatch.setattr(fusion_task, "DynamicFusion", Model)
    monkeypatch.setattr(fusion_task.FusionTask, "description", lambda self: {})
    task = object.__new__(fusion_task.FusionTask)
    task.num_items = 10
    for most, sparse in ((10, False), (9, True)):
        monkeypatch.setattr(fusion_task, "ROWS_ALONE", most)
        assert task.build().id_embedding.sparse == sparse


def test_repeats_are_items_that_their_user_has_had_before():
    """Users 1, 2, 1 and 4, 4 and none."""
    assert repeated_share(np.array([0, 3, 5, 5]), np.array([1, 2, 1, 4, 4])) == pytest.approx(2 / 5)
    assert repeated_share(np.array([0, 2, 4]), np.array([3, 0, 0, 3])) == 0
    assert repeated_share(np.array([0, 0]), np.array([], np.int64)) == 0


@pytest.mark.parametrize(
    ("given", "repeats", "left_out"), [(None, 0.04, True), (None, 0.06, False), (True, 0.5, True), (False, 0.0, False)]
)
@pytest.mark.parametrize("sampled", [1, None])
def test_own_items_leave_the_softmax_unless_items_are_bought_again(run, sampled, given, repeats, left_out, monkeypatch):
    loop = make_loop(run, exclude_own_items=given, sampled_items=sampled)
    loop.task.repeated["shop"] = repeats
    found = []
    monkeypatch.setattr(loop.model, "loss", lambda query, target, table, own, *_: found.append(own) or query.sum())
    loop.task.loss(loop.model, loop.task.batches(0)[0], 0, torch.device("cpu"))
    (own,) = found
    assert own is None if not left_out and sampled is None else own.left_out == left_out
