"""Each semantic ID as one word of the vocabulary: no codes in the model, embeddings that start from the codes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qbert_ray.config.loading import ConfigError, with_values
from qbert_ray.config.schema import Config
from qbert_ray.sequence.item_table import ItemTable
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage.catalog import catalog_codes, warm_items
from tests.small_run import make_run

WORDS = {"sequencer.tokens": "word", "sequencer.item_start": "random", "sequencer.content": "none", "sequencer.code_dropout": 0.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("words"))


def task(run, **values):
    config = Config.model_validate({"run": {"dir": run.uri}, "data": {"domains": {"shop": {}}}})
    config = with_values(config, WORDS | {"sequencer.start": "random"} | values)
    return SequencerTask(config, run, ["shop"], config.finetune)


def test_a_model_without_codes_composes_items_of_their_own_embeddings():
    torch.manual_seed(0)
    model = Sequencer(0, 8, width=16, num_layers=1, num_heads=2, ffn_width=16, dropout=0.0, item_embeddings={"shop": 5}).eval()
    table = ItemTable(torch.zeros(5, 0, dtype=torch.int64), domain="shop")
    own = model.item_embedding["in_shop"].weight
    assert torch.equal(model.compose(table), own) and torch.equal(model.compose(table, torch.tensor([3, 3])), own[[3, 3]])
    with torch.inference_mode():
        query = next_item_queries(model, [np.array([1, 2])], table)
        assert torch.allclose(model.scores(query, *model.catalog_vectors(table)), query @ own.T, atol=1e-6)


def test_words_start_near_where_their_codes_are(run):
    torch.manual_seed(0)
    made = task(run)
    model = made.build()
    assert made.description()["num_levels"] == 0 and model.code_embedding.weight.numel() == 0
    codes = torch.from_numpy(catalog_codes(run, "shop")[: warm_items(run, "shop")])
    own = F.normalize(model.item_embedding["in_shop"].weight.detach(), dim=1)
    shared = (codes[:, None] == codes[None]).sum(2)  # codes that two items have in common, of 3
    known = made.tables["shop"].known
    pairs = known[:, None] & known[None] & ~torch.eye(len(codes), dtype=torch.bool)
    cosines = own @ own.T
    two, none = cosines[pairs & (shared == 2)], cosines[pairs & (shared == 0)]
    assert len(two) and len(none) and two.mean() > 0.3 and none.mean().abs() < 0.15


def test_words_learn_and_have_no_levels_to_predict(run):
    made = task(run)
    torch.manual_seed(0)
    model = made.build()
    loss, count = made.loss(model, made.batches(0)[0], 0, torch.device("cpu"))
    loss.backward()
    assert count and model.item_embedding["in_shop"].weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="no levels"):
        task(run, **{"sequencer.loss": "tokens"})
