"""Event types and weights: what counts, how much, and where it does."""

import numpy as np
import polars as pl
import pytest
import torch

from qbert_ray.config.loading import ConfigError, load_config
from qbert_ray.config.schema import Config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.features.structure import co_occurrence, gram
from qbert_ray.inputs.sources import SourceError
from qbert_ray.inputs.stage import ingest
from qbert_ray.ranking.item_item import RidgeRegression, Transitions, popularity
from qbert_ray.sequence.catalog_softmax import catalog_cross_entropy
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir

WEIGHTS = {"purchase": 1.0, "view": 0.25}


def ingested(folder, rows, names=("user_id", "item_id", "timestamp", "event_type", "interaction_weight"), **domain):
    """The run and the counts of an ingest of some interactions."""
    pl.DataFrame({"item_id": list("abcdef"), "title": "T"}).write_parquet(folder / "items.parquet")
    pl.DataFrame(rows, schema=list(names), orient="row", strict=False).write_csv(folder / "interactions.csv")
    shop = {"interactions": "interactions.csv"} | domain
    data = {"root": str(folder), "domains": {"shop": shop}, "min_interactions": 1, "min_item_interactions": 0}
    run = RunDir(str(folder / "run"))
    return run, ingest(Config.model_validate({"data": data}), run, LocalExecutor(), Quiet())["shop"]


def kept(run):
    table = pl.DataFrame(run.read("ingest/interactions")).sort("user_id", "timestamp")
    return table.select("user_id", "item_id", "weight").rows()


def test_types_have_weights_and_others_are_left_out_and_counted(tmp_path):
    rows = [
        ("u", "a", 1, "view", None),
        ("u", "b", 2, "purchase", None),
        ("u", "c", 3, "wish", None),
        ("u", "d", 4, None, None),
        ("u", "e", 5, "purchase", 3.0),
        ("u", "f", 6, "view", 2.0),
    ]
    run, counts = ingested(tmp_path, rows, event_weights=WEIGHTS)
    assert kept(run) == [("u", "a", 0.25), ("u", "b", 1.0), ("u", "e", 3.0), ("u", "f", 0.5)]
    assert counts["interactions_rejected"] == {"event_type left out": 1, "missing event_type": 1}
    sequences = columns.to_sequences(run.read("ingest/sequences"))
    assert sequences.weights.tolist() == [0.25, 1.0] and len(sequences.items) == 2  # the last two are held out


def test_weights_must_be_numbers_above_zero(tmp_path):
    rows = [
        ("u", "a", 1, "x", "much"),
        ("u", "b", 2, "x", "-1"),
        ("u", "c", 3, "x", "0"),
        ("u", "d", 4, "x", "2,5"),
        ("u", "e", 5, "x", ""),
    ]
    run, counts = ingested(tmp_path, rows)
    assert kept(run) == [("u", "d", 2.5), ("u", "e", 1.0)]  # without event_weights the types are not read
    assert counts["interactions_rejected"] == {"bad interaction_weight": 2, "interaction_weight is 0": 1}


def test_of_several_events_at_one_time_the_one_of_the_largest_weight_is_kept(tmp_path):
    rows = [("u", "a", 1, "view", None), ("u", "a", 1, "purchase", None), ("u", "a", 1, "view", None), ("u", "a", 2, "view", None)]
    run, counts = ingested(tmp_path, rows, event_weights=WEIGHTS)
    assert kept(run) == [("u", "a", 1.0), ("u", "a", 0.25)] and counts["interactions_rejected"] == {"duplicate interaction": 2}


def test_without_types_and_weights_the_tables_are_as_before(tmp_path):
    run, _ = ingested(tmp_path, [("u", item, place) for place, item in enumerate("abcd")], ("user_id", "item_id", "timestamp"))
    assert run.read("ingest/interactions").schema.equals(columns.INTERACTIONS)
    assert run.read("ingest/sequences").schema.equals(columns.SEQUENCES)
    assert columns.to_sequences(run.read("ingest/sequences")).weights is None


def test_a_missing_column_of_types_is_named(tmp_path):
    with pytest.raises(SourceError, match="has no column event_type.*interaction_columns.event_type=<column>"):
        ingested(tmp_path, [("u", "a", 1)], ("user_id", "item_id", "timestamp"), event_weights=WEIGHTS)
    rows = [("u", "a", 1, "view"), ("u", "b", 2, "purchase")]
    run, _ = ingested(
        tmp_path, rows, ("user_id", "item_id", "timestamp", "kind"), event_weights=WEIGHTS, interaction_columns={"event_type": "kind"}
    )
    assert [weight for *_, weight in kept(run)] == [0.25, 1.0]
    with pytest.raises(ConfigError, match="event_weights.view"):
        load_config([], ["data.domains.shop.event_weights={view: 0}"])


# where weights count

INDPTR, ITEMS = np.array([0, 3, 6, 8]), np.array([0, 1, 0, 1, 2, 0, 2, 2])
GIVEN = np.array([0.5, 2.0, 1.0, 1.0, 3.0, 1.0, 0.5, 4.0], np.float32)


def test_a_user_counts_by_the_largest_weight_of_each_item():
    has = np.array([[1.0, 2.0, 0.0], [1.0, 1.0, 3.0], [0.0, 0.0, 4.0]])  # by hand
    np.testing.assert_allclose(gram(INDPTR, ITEMS, 3, GIVEN).toarray(), has.T @ has)
    assert np.array_equal(co_occurrence(INDPTR, ITEMS, 3, window=1, weights=GIVEN).toarray(), np.zeros((3, 3)))
    assert popularity(INDPTR, ITEMS, 3, GIVEN).tolist() == [2.5, 3.0, 7.5]


def test_weights_of_one_change_nothing():
    ones = np.ones(len(ITEMS), np.float32)
    settings = dict(regularisation=1.0, neighbours=5)
    for weights in (None, ones):
        rows = RidgeRegression(INDPTR, ITEMS, 3, **settings, weights=weights).rows(np.arange(3)).toarray()
        steps = Transitions(INDPTR, ITEMS, 3, 2, 0.5, 1.0, 5, weights).rows(np.arange(3)).toarray()
        together = co_occurrence(INDPTR, ITEMS, 3, weights=weights).toarray()
        if weights is None:
            expected = (rows, steps, together)
        else:
            for found, wanted in zip((rows, steps, together), expected, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_transition_counts_as_the_product_of_its_weights():
    steps = Transitions(np.array([0, 3]), np.array([0, 1, 2]), 3, 2, 0.5, 0.0, 5, np.array([2.0, 3.0, 5.0], np.float32)).rows(np.arange(3))
    # after item 0 come item 1 (2 * 3) and, two steps later, item 2 (2 * 5 / 2), as shares of all that comes after it
    np.testing.assert_allclose(steps.toarray(), [[0, 0, 0], [6 / 11, 0, 0], [5 / 11, 1, 0]], rtol=1e-6)


def test_the_weighted_loss_is_that_of_repeated_targets():
    torch.manual_seed(0)
    query, vectors, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (6, 4), (6,)))
    target, weight = torch.tensor([1, 5, 2]), torch.tensor([2.0, 1.0, 3.0])
    repeated = torch.tensor([0, 0, 1, 2, 2, 2])
    found = catalog_cross_entropy(query, vectors, bias, target, weight=weight)
    expected = catalog_cross_entropy(query[repeated], vectors, bias, target[repeated])
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, (query, vectors, bias)), torch.autograd.grad(expected, (query, vectors, bias)), strict=True
    ):
        torch.testing.assert_close(one, other)
