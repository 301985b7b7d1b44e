"""What is added to the scores of items that a history holds: as much as makes repeats as frequent as they are."""

import numpy as np
import pytest
import torch

from qbert_ray.config.loading import with_values
from qbert_ray.sequence.item_table import ItemTable
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.sequence.task import SequencerTask, calibrated_repeats, mean_metrics, repeat_odds, validation_items
from qbert_ray.storage.catalog import run_config
from qbert_ray.training import Loop, publish
from tests.small_run import LEVELS, SIZE, USERS, make_run


def test_odds_are_those_of_a_softmax_over_the_catalog():
    torch.manual_seed(0)
    model = Sequencer(2, 4, width=16, num_layers=1, num_heads=2, ffn_width=16, causal=True, repeats=True).eval()
    table = ItemTable(torch.randint(4, (9, 2)))
    histories, targets = [np.array([3, 1, 3]), np.array([0]), np.zeros(0, np.int64)], np.array([1, 5, 2])
    with torch.inference_mode():
        odds, repeated = repeat_odds(model, table, histories, targets, batch_size=2)
        chances = model.scores(next_item_queries(model, histories, table), *model.catalog_vectors(table)).softmax(1)
    seen = torch.stack([chances[0, [1, 3]].sum(), chances[1, 0]])
    torch.testing.assert_close(odds[:2].float(), (seen / (1 - seen)).log(), atol=1e-4, rtol=1e-4)
    assert odds[2] == -torch.inf and repeated.tolist() == [True, False, False]


def test_as_many_repeats_are_expected_as_there_are():
    odds, repeated = torch.tensor([0.0, 2.0, -1.0, 0.5]), torch.tensor([True, False, False, False])
    added = calibrated_repeats(odds, repeated)
    assert float(torch.sigmoid(odds + added).sum()) == pytest.approx(4 * 1.5 / 5, abs=1e-6)
    assert calibrated_repeats(torch.zeros(3), torch.zeros(3)) == pytest.approx(-np.log(7))  # odds of half a repeat in four


def test_without_histories_or_other_items_nothing_is_added():
    assert calibrated_repeats(torch.tensor([-torch.inf, torch.inf]), torch.tensor([False, True])) == 0


def test_without_validation_items_there_are_no_metrics_so_that_the_last_epoch_is_kept():
    assert mean_metrics([]) == {}
    assert mean_metrics([np.array([1, 11]), np.array([3])]) == {"hr@10": 0.75, "ndcg@10": pytest.approx((0.5 + 0.5) / 2)}


@pytest.mark.parametrize("repeats", [True, False])
def test_the_published_model_holds_what_its_validation_items_say(tmp_path, repeats):
    run = make_run(tmp_path / "run")
    config = with_values(run_config(run), {"finetune.objective": "causal", "sequencer.start": "random", "sequencer.repeats": repeats})
    run.write_json("semantic_ids/manifest.json", {"stage": "semantic_ids", "counts": {"codebook_size": SIZE, "num_levels": LEVELS}})
    task = SequencerTask(config, run, ["shop"], config.finetune)
    publish(Loop(task, torch.device("cpu")), run, "finetune/shop")
    model = run.load_module(Sequencer, "finetune/shop/model")
    assert (model.repeats is not None) == repeats
    if repeats:
        with torch.inference_mode():
            odds, repeated = repeat_odds(model, task.tables["shop"], *validation_items(task.sequences["shop"], USERS))
        expected = float(torch.sigmoid(odds + model.repeats).mean())
        assert 0 < repeated.sum() < USERS and expected == pytest.approx((int(repeated.sum()) + 0.5) / (USERS + 1), abs=1e-4)
