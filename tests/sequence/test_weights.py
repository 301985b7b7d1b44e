"""Weights of interactions count in the loss of every kind of sequence model, as targets."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from qbert_ray.config.loading import with_values
from qbert_ray.sequence.decoder_task import GenerativeTask
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import run_config
from tests.small_run import LEVELS, SIZE, make_run

KINDS = {
    "causal": {"finetune.objective": "causal"},
    "masked": {"finetune.objective": "masked"},
    "flat": {"finetune.objective": "masked", "sequencer.tokens": "flat", "sequencer.content": "none", "sequencer.loss": "tokens"},
    "sampled": {"finetune.objective": "causal", "finetune.sampled_items": 1},
    "generative": {"sequencer.kind": "generative", "evaluate.cutoffs": [10]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    run.write_json("semantic_ids/manifest.json", {"stage": "semantic_ids", "counts": {"codebook_size": SIZE, "num_levels": LEVELS}})
    return run


def losses(run, kind, weights):
    """Loss and size of the first batch under some weights of the training items."""
    table = run.read("ingest/sequences", "shop")
    if columns.TRAIN_WEIGHTS in table.column_names:
        table = table.drop_columns([columns.TRAIN_WEIGHTS])
    lists = [[float(weights(place)) for place in range(len(items))] for items in table["train"].to_pylist()]
    run.write_part(
        "ingest/sequences", "shop-00000.parquet", table.append_column(columns.TRAIN_WEIGHTS, pa.array(lists, pa.list_(pa.float32())))
    )
    config = with_values(run_config(run), KINDS[kind])
    task = (GenerativeTask if kind == "generative" else SequencerTask)(config, run, ["shop"], config.finetune)
    torch.manual_seed(0)
    model = task.build() if kind == "generative" else _sequencer(task)
    torch.manual_seed(0)  # of sampled items
    loss, size = task.loss(model.eval(), task.batches(0)[0], 0, torch.device("cpu"))
    return float(loss), size


def _sequencer(task):
    from qbert_ray.sequence.model import Sequencer

    return Sequencer(**task.description())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_scale_the_loss_and_what_it_is_divided_by(run, kind):
    one, two = losses(run, kind, lambda place: 1.0), losses(run, kind, lambda place: 2.0)
    assert two == (pytest.approx(2 * one[0], rel=1e-4), pytest.approx(2 * one[1]))
    early, late = losses(run, kind, lambda place: place < 3), losses(run, kind, lambda place: place >= 3)
    assert early[0] + late[0] == pytest.approx(one[0], rel=1e-4) and early[1] + late[1] == pytest.approx(one[1])
    assert 0 < early[1] < one[1] and early[0] != pytest.approx(one[0], rel=1e-2)
    assert np.isfinite(early[0])
