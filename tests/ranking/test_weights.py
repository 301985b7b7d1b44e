"""The ridge regression's decay and penalty are chosen on validation items alone, and what was chosen ranks."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from qbert_ray import metrics
from qbert_ray.config.loading import ConfigError, load_config
from qbert_ray.config.schema import Ranking
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.ranking.item_item import RidgeRegression, recency
from qbert_ray.ranking.loader import RIDGE, load_ranker
from qbert_ray.ranking.weights import DECAYS, PENALTIES, SEARCHED, write_weights
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import run_config
from qbert_ray.top_k import ranks
from tests.small_run import ITEMS, make_run

PAIRS, USERS = 12, 60


def run_of_pairs(folder, seed=0):
    """Every item of the first 24 has a partner that follows it: only the last item of a history tells what is next."""
    run, rng = make_run(folder), np.random.default_rng(seed)
    rows = []
    for _ in range(USERS):
        chosen = rng.permutation(PAIRS)[:4]
        train = [item for pair in chosen[:3] for item in (2 * pair, 2 * pair + 1)]
        rows.append((train + [2 * chosen[3]], 2 * chosen[3] + 1, int(rng.integers(0, ITEMS))))
    rows += [([2 * pair, 2 * pair + 1], None, None) for pair in range(PAIRS) for _ in range(5)]
    train, valid, test = zip(*rows, strict=True)
    users = [f"user-{number}" for number in range(len(rows))]
    arrays = [
        pa.array(["shop"] * len(rows)),
        pa.array(users),
        pa.array(train, pa.list_(pa.int32())),
        *(pa.array(each, pa.int32()) for each in (valid, test)),
    ]
    run.write_part("ingest/sequences", "shop-00000.parquet", pa.table(arrays, schema=columns.SEQUENCES))
    return run


def weights_of(run, **settings):
    config = run_config(run)
    config = config.model_copy(update={"ranking": Ranking(**settings)})
    return config, write_weights(config, run, "shop", LocalExecutor(), Quiet())


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    run = run_of_pairs(tmp_path_factory.mktemp("pairs"))
    return run, *weights_of(run, decay="auto", regularisation="auto")


def test_the_choice_is_the_best_by_plain_ranks(chosen):
    run, _, counts = chosen
    sequences = columns.to_sequences(run.read("ingest/sequences", "shop"))
    users = np.flatnonzero(sequences.valid >= 0)
    histories, target = [sequences.history(int(user), "valid") for user in users], torch.from_numpy(sequences.valid[users])

    def value(decay, penalty):
        weights = RidgeRegression(sequences.indptr, sequences.items, ITEMS, penalty, Ranking().neighbours).rows(np.arange(ITEMS))
        scores = torch.from_numpy((recency(histories, decay, 50, ITEMS) @ weights.T.tocsr()).toarray())
        return metrics.ndcg(ranks(scores, target, histories).numpy(), 10).mean()

    found = counts["ridge"]
    by_decay = {decay: value(decay, 100.0) for decay in DECAYS}
    assert list(found["by_decay"].values()) == pytest.approx(list(by_decay.values()), abs=1e-6)
    assert found["decay"] == max(DECAYS, key=by_decay.__getitem__) and len(set(by_decay.values())) > 1
    by_penalty = {penalty: value(found["decay"], penalty) for penalty in PENALTIES}
    assert list(found["by_regularisation"].values()) == pytest.approx(list(by_penalty.values()), abs=1e-6)
    assert found["regularisation"] == max(PENALTIES, key=by_penalty.__getitem__)
    assert found["decay"] < 0.85  # only the last item counts here


def test_what_was_chosen_ranks_and_the_search_leaves_nothing(chosen, tmp_path):
    run, config, counts = chosen
    assert not run.parts(SEARCHED) and not run.exists(f"{SEARCHED}/0")
    assert run.read_json(f"{RIDGE}/shop.json") == counts["ridge"]
    ranker = load_ranker(run, "shop", config.ranking)
    history = [np.array([2, 3, 10])]
    found = ranker.scores(history)["ridge"]
    plain = run_of_pairs(tmp_path)
    fixed, others = weights_of(plain, decay=counts["ridge"]["decay"], regularisation=counts["ridge"]["regularisation"])
    assert torch.equal(load_ranker(plain, "shop", fixed.ranking).scores(history)["ridge"], found)
    assert "ridge" not in others and not plain.exists(f"{RIDGE}/shop.json") and others["weights"] == counts["weights"]


def test_test_items_choose_nothing(chosen, tmp_path):
    _, _, counts = chosen
    table = (other := run_of_pairs(tmp_path)).read("ingest/sequences", "shop")
    place = table.column_names.index("test")
    other.write_part(
        "ingest/sequences", "shop-00000.parquet", table.set_column(place, table.schema.field("test"), pa.nulls(len(table), pa.int32()))
    )
    assert weights_of(other, decay="auto", regularisation="auto")[1] == counts


def test_a_decay_alone_is_chosen_with_the_penalty_that_is_set(tmp_path):
    _, counts = weights_of(run_of_pairs(tmp_path), decay="auto", regularisation=30.0)
    assert counts["ridge"]["regularisation"] == 30.0 and list(counts["ridge"]["by_regularisation"]) == ["30"]


def test_without_validation_items_the_defaults_are_taken(tmp_path):
    run = run_of_pairs(tmp_path)
    table = run.read("ingest/sequences", "shop")
    place = table.schema.get_field_index("valid")
    run.write_part(
        "ingest/sequences", "shop-00000.parquet", table.set_column(place, table.schema.field("valid"), pa.nulls(len(table), pa.int32()))
    )
    _, counts = weights_of(run, decay="auto", regularisation="auto")
    assert (counts["ridge"]["decay"], counts["ridge"]["regularisation"]) == (Ranking().decay, Ranking().regularisation)


def test_auto_is_a_value_of_the_config():
    assert load_config([], ["ranking.decay=auto", "ranking.regularisation=auto"]).ranking.decay == "auto"
    with pytest.raises(ConfigError, match="ranking.decay: Input should be 'auto' "):
        load_config([], ["ranking.decay=best"])
