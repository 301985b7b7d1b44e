"""A history without items gets what is popular, which a causal model cannot learn from histories."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qbert_ray.config.loading import with_values
from qbert_ray.config.schema import Finetune
from qbert_ray.ranking.loader import load_ranker
from qbert_ray.sequence import task
from qbert_ray.sequence.empty_history import query_of_popularity
from qbert_ray.sequence.item_table import ItemTable
from qbert_ray.sequence.model import Sequencer
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import run_config
from qbert_ray.training import Loop, publish
from tests.small_run import COLD, ITEMS, LEVELS, SIZE, make_run

COUNTS = torch.tensor([5, 1, 9, 3, 2])


def words(**changes):
    torch.manual_seed(0)
    arguments = {"width": 8, "num_layers": 1, "num_heads": 2, "ffn_width": 8, "tokens": "word", "causal": True}
    model = Sequencer(0, 4, item_embeddings={"shop": len(COUNTS)}, **arguments | changes).eval()
    torch.nn.init.normal_(model.item_embedding["in_shop"].weight)
    return model, ItemTable(torch.zeros(len(COUNTS), 0, dtype=torch.long), domain="shop")


def test_with_as_many_dimensions_as_items_the_softmax_is_their_shares():
    """Any scores can be had then, and the cross-entropy is smallest where the softmax equals the shares: 5, 1, 9, 3 and 2 of 20."""
    model, table = words()
    query = query_of_popularity(model, table, COUNTS)
    with torch.no_grad():
        share = model.scores(query[None], *model.catalog_vectors(table))[0].softmax(0)
    torch.testing.assert_close(share, COUNTS / 20, atol=2e-3, rtol=0)


def test_cosines_rank_what_is_popular_first():
    model, table = words(logits="cosine", temperature=0.1)
    query = query_of_popularity(model, table, COUNTS)
    with torch.no_grad():
        scores = model.scores(query[None], *model.catalog_vectors(table))[0]
    assert scores.argsort(descending=True).tolist() == [2, 0, 3, 4, 1]


def test_without_any_interaction_there_is_nothing_to_fit():
    model, table = words()
    assert query_of_popularity(model, table, torch.zeros(5)).isfinite().all()


@pytest.mark.parametrize("tokens", ["item", "word"])
def test_the_published_model_ranks_an_empty_history_by_popularity(tmp_path, tokens):
    run = make_run(tmp_path / "run")
    values = {"finetune.objective": "causal", "sequencer.start": "random", "sequencer.tokens": tokens, "sequencer.width": 64}
    config = with_values(run_config(run), values)
    run.write_json("semantic_ids/manifest.json", {"stage": "semantic_ids", "counts": {"codebook_size": SIZE, "num_levels": LEVELS}})
    task = SequencerTask(config, run, ["shop"], config.finetune)
    publish(Loop(task, torch.device("cpu")), run, "finetune/shop")
    counts = np.bincount(task.sequences["shop"].items, minlength=ITEMS)
    ranker = load_ranker(run, "shop", config.ranking.model_copy(update={"enabled": False}))
    scores = ranker.scores([np.zeros(0, np.int64)])["model"][0, : ITEMS - COLD]
    assert np.corrcoef(scores.exp().numpy(), counts[: ITEMS - COLD])[0, 1] > 0.9


def test_what_is_popular_is_counted_by_the_weights_of_interactions(monkeypatch):
    given = []
    monkeypatch.setattr(task, "query_of_popularity", lambda model, table, counts: given.append(counts) or torch.zeros(3))
    arrays = [np.array([0, 2, 3]), np.array([1, 0, 1]), np.full(2, -1), np.full(2, -1)]  # starts, items, no held-out items
    model = SimpleNamespace(empty_query=torch.zeros(3), repeats=None)
    for weights, expected in ((np.array([0.25, 1.0, 0.5], np.float32), [1.0, 0.75, 0.0]), (None, [1, 2, 0])):
        of_shop = columns.Sequences(["a", "b"], *arrays, None, None, weights)
        own = SimpleNamespace(settings=Finetune(), domains=["shop"], sequences={"shop": of_shop}, include="none")
        own._table_on = lambda *_: SimpleNamespace(codes=np.zeros((3, 1)))
        task.SequencerTask.complete(own, model, torch.device("cpu"))
        assert given.pop().tolist() == expected
