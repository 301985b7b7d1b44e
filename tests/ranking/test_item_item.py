import numpy as np
import pytest
import torch

from qbert_ray.features.structure import co_occurrence
from qbert_ray.ranking import item_item, score_features
from qbert_ray.ranking.item_item import (
    ItemItem,
    RidgeRegression,
    Transitions,
    averaging_matrix,
    co_occurrence_scores,
    popularity,
    recency,
)
from qbert_ray.ranking.score_features import SCORE_FEATURES
from qbert_ray.sequence.item_table import ColdItems

INDPTR, ITEMS = np.array([0, 3, 5, 6]), np.array([0, 1, 2, 1, 2, 1])


def ragged(*histories):
    return np.cumsum([0, *map(len, histories)]), np.array([item for history in histories for item in history], dtype=np.int64)


def random_histories(rng, users, num_items, length):
    return ragged(*(rng.choice(num_items, length, replace=False) for _ in range(users)))


def test_counts_are_of_users():
    assert popularity(INDPTR, ITEMS, 4).tolist() == [1, 3, 2, 0]
    counts = co_occurrence(INDPTR, ITEMS, 4).toarray()
    assert counts.tolist() == [[0, 1, 1, 0], [1, 0, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0]]
    assert popularity(INDPTR, ITEMS, 4).dtype == np.float32


def test_scores_sum_over_the_latest_items():
    counts = co_occurrence(INDPTR, ITEMS, 4)
    both = co_occurrence_scores(counts, [np.array([0, 1]), np.array([2])], latest=2)
    assert both.tolist() == [[1, 1, 3, 0], [1, 2, 0, 0]]
    assert co_occurrence_scores(counts, [np.array([0, 1])], latest=1).tolist() == [[1, 0, 2, 0]]


def test_with_all_neighbours_the_regression_is_ease():
    """Against the closed form with one dense inverse, on data in which all items occur together."""
    num_items, penalty = 12, 3.0
    indptr, items = random_histories(np.random.default_rng(0), 200, num_items, 6)
    has = np.zeros((200, num_items))
    has[np.repeat(np.arange(200), 6), items] = 1
    inverse = np.linalg.inv(has.T @ has + penalty * np.eye(num_items))
    ease = -inverse / np.diag(inverse)
    np.fill_diagonal(ease, 0)
    rows = RidgeRegression(indptr, items, num_items, penalty, neighbours=num_items).rows(np.arange(num_items))
    assert rows.toarray() == pytest.approx(ease.T, abs=1e-5)


def test_neighbours_are_limited_and_parts_of_the_catalog_do_not_matter():
    indptr, items = random_histories(np.random.default_rng(1), 100, 30, 5)
    ridge = RidgeRegression(indptr, items, 30, 1.0, neighbours=7)
    whole = ridge.rows(np.arange(30))
    assert np.diff(whole.indptr).max() == 7
    assert whole.diagonal().tolist() == [0] * 30
    pieces = np.concatenate([ridge.rows(piece).toarray() for piece in np.array_split(np.arange(30), 4)])
    assert (whole.toarray() == pieces).all()


def test_an_item_without_interactions_has_no_weights():
    ridge = RidgeRegression(*ragged([0, 1], [0, 1]), num_items=3, regularisation=1.0, neighbours=5)
    assert ridge.rows(np.arange(3)).toarray()[2].tolist() == [0, 0, 0]
    assert ridge.rows(np.array([], dtype=int)).shape == (0, 3)


@pytest.mark.parametrize("weight", [1.0, 2e4, 1e6])
def test_items_that_the_same_users_have_share_a_target(weight):
    """(G + P) w = c with G and c full of 50 weight^2: equal weights of 50 weight^2 / (100 weight^2 + P)."""
    indptr, items = ragged(*[[0, 1, 2]] * 50)
    ridge = RidgeRegression(indptr, items, 3, 100.0, 9, np.full(len(items), weight))
    expected = 50 * weight**2 / (100 * weight**2 + 100)
    assert ridge.rows(np.array([2])).toarray()[0] == pytest.approx(np.array([expected, expected, 0]), rel=1e-4)


def test_neighbours_are_those_of_the_largest_cosine():
    """Item 0 occurs twice with 1, twice with 2 and once with 3, of which there are 2, 8 and 1: 2 / sqrt(2), 2 / sqrt(8), 1."""
    indptr, items = ragged([0, 1], [0, 1], [0, 2], [0, 2], [0, 3], *[[2]] * 6)
    for neighbours, expected in ((1, [0, 2 / 2.5, 0, 0]), (2, [0, 2 / 2.5, 0, 1 / 1.5]), (3, [0, 2 / 2.5, 2 / 8.5, 1 / 1.5])):
        weights = RidgeRegression(indptr, items, 4, 0.5, neighbours).rows(np.array([0]))
        assert weights.toarray()[0] == pytest.approx(np.array(expected)), neighbours
    assert weights.dtype == np.float32 and weights.indices.dtype == np.int32  # as they are stored


def test_of_equally_strong_neighbours_the_first_stay():
    indptr, items = ragged([0, 2], [0, 1], [0, 3])
    weights = RidgeRegression(indptr, items, 4, 1.0, 2).rows(np.array([0]))
    assert weights.indices.tolist() == [1, 2]
    backwards = RidgeRegression(*ragged([3, 0], [1, 0], [2, 0]), 4, 1.0, 2).rows(np.array([0]))
    assert (weights != backwards).nnz == 0


def following(indptr, items, num_items, **settings):
    return Transitions(indptr, items, num_items, **settings).rows(np.arange(num_items))


def test_transitions_count_what_comes_after_within_a_user():
    settings = {"window": 2, "decay": 0.5, "shrinkage": 0.0, "neighbours": 9}
    shares = following(*ragged([0, 1, 2], [1, 0]), num_items=3, **settings).toarray()
    # after 0: 1 once, 2 at two steps; after 1: 2 and 0 once; after 2: nothing
    assert shares == pytest.approx(np.array([[0, 0.5, 0], [2 / 3, 0, 0], [1 / 3, 0.5, 0]]))
    assert following(*ragged([0], [1]), num_items=2, **settings).nnz == 0  # never from one user into the next
    assert following(*ragged([0, 1, 2], [1, 0]), num_items=3, **settings | {"neighbours": 1}).getnnz(1).tolist() == [1, 1, 1]


def test_transitions_are_shares_of_what_follows_shrunk_for_rare_items():
    """After 0 come 1 twice and 2 once, and 3 at three steps; a shrinkage of 2 is as two more that come after it."""
    histories = ragged([0, 1], [0, 2, 1, 3])
    shares = following(*histories, num_items=4, window=3, decay=0.5, shrinkage=2.0, neighbours=9).toarray()
    after_0 = [0, 1 + 0.5, 1, 0.25]
    assert shares[:, 0] == pytest.approx(np.array(after_0) / (sum(after_0) + 2))
    assert shares[:, 2] == pytest.approx(np.array([0, 1, 0, 0.5]) / (1.5 + 2))
    assert not shares[:, 3].any()
    shorter = following(*histories, num_items=4, window=1, decay=0.5, shrinkage=2.0, neighbours=9)
    assert shorter.toarray()[:, 0] == pytest.approx(np.array([0, 1, 1, 0]) / 4) and shorter.dtype == np.float32


def test_the_strongest_transitions_of_an_item_are_kept_and_the_first_of_equal_ones():
    """3 comes after 0 alone and after 1 and 2 among others; 4 after 1 and 2 as often."""
    histories = ragged([0, 3], [1, 3], [1, 4], [2, 3], [2, 4])
    settings = {"num_items": 5, "window": 1, "decay": 1.0, "shrinkage": 0.0}
    assert following(*histories, **settings, neighbours=2)[[3]].toarray()[0].tolist() == [1, 0.5, 0, 0, 0]
    assert following(*histories, **settings, neighbours=1)[[3, 4]].toarray().tolist() == [[1, 0, 0, 0, 0], [0, 0.5, 0, 0, 0]]


def test_of_many_equal_transitions_those_of_the_first_items_are_kept():
    """60 is all that comes after the even items, and half of what comes after the odd ones: 30 and the first 10 of these."""
    histories = ragged(*([item, after] for item in range(60) for after in ((60, 61) if item % 2 else (60,))))
    kept = following(*histories, num_items=62, window=1, decay=1.0, shrinkage=0.0, neighbours=40)[[60]]
    assert sorted(kept.indices.tolist()) == sorted([*range(0, 60, 2), *range(1, 21, 2)])
    assert sorted(set(kept.data.tolist())) == [0.5, 1]


def test_an_item_never_follows_itself():
    shares = following(*ragged([0, 0, 1]), num_items=2, window=2, decay=1.0, shrinkage=0.0, neighbours=9)
    assert shares.toarray().tolist() == [[0, 0], [1, 0]] and shares.nnz == 1


def test_the_weight_of_an_item_decays_with_the_steps_after_it():
    weights = recency([np.array([3, 1, 0]), np.array([], int), np.array([2])], 0.5, 2, 4)
    assert weights.toarray().tolist() == [[1, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]] and weights.dtype == np.float32
    assert recency([np.array([3, 1, 3])], 0.5, 9, 4).toarray().tolist() == [[0, 0.5, 0, 1.25]]
    assert recency([], 0.5, 9, 4).shape == (0, 4)


def test_a_cold_items_column_averages_those_of_its_neighbours():
    cold = ColdItems(torch.tensor([1, 3]), torch.tensor([[0, 2], [2, 4]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    expected = [[1, 0.25, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0.75, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    matrix = averaging_matrix(cold, 5)
    assert matrix.toarray().tolist() == expected and matrix.dtype == np.float32


def make_item_item(rng, num_items=40, cold=None):
    indptr, items = random_histories(rng, 300, num_items, 5)
    ridge = RidgeRegression(indptr, items, num_items, 5.0, 20).rows(np.arange(num_items))
    content = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((num_items, 8))).float(), dim=-1)
    transitions = Transitions(indptr, items, num_items, 3, 0.5, 1.0, 20).rows(np.arange(num_items))
    return ItemItem(ridge, transitions, (0.8, 0.5), 0.01, latest=10, contents={"text": content}, cold=cold)


def test_features_are_those_of_a_plain_loop():
    rng = np.random.default_rng(2)
    model = make_item_item(rng)
    histories = [rng.choice(40, size, replace=False) for size in (1, 4, 12)]
    features = model.features(histories).dense()
    for row, history in enumerate(histories):
        for number, decay in enumerate((0.8, 0.5)):
            expected = sum(decay**age * model.weights[number][[item]].toarray()[0] for age, item in enumerate(history[-10:][::-1]))
            assert features[number, row].numpy() == pytest.approx(np.log1p(np.maximum(expected, 0) / 0.01), abs=1e-5)
        cosines = (model.contents["text"] @ model.contents["text"].T)[:, history[-20:]]
        assert torch.allclose(features[SCORE_FEATURES.index("text") - 1, row], cosines.max(1).values, atol=1e-6)
        assert features[-1, row].nonzero()[:, 0].tolist() == sorted(history)
    assert (model.features([np.zeros(0, dtype=np.int64)]).dense() == 0).all()
    assert model.available == [0, 1, 2, SCORE_FEATURES.index("text")]
    unused = model.features(histories, ["sequencer", "ridge"]).dense()[SCORE_FEATURES.index("text") - 1]
    assert (unused == 0).all()


@pytest.mark.parametrize("kept", [True, False], ids=["kept products", "products"])
@pytest.mark.parametrize("scratch", [1, 100, 2**22])
def test_features_of_some_items_are_those_of_the_whole_catalog(kept, scratch, monkeypatch):
    monkeypatch.setattr(item_item, "MOST_PAIRS", 40**2 if kept else 0)
    monkeypatch.setattr(score_features, "SCRATCH", scratch)
    rng = np.random.default_rng(8)
    histories = [rng.choice(40, size) for size in (1, 0, 25, 5)]
    items = torch.from_numpy(rng.integers(0, 40, (4, 6)))
    features = make_item_item(rng).features(histories)
    found = features.at(items)
    for number, dense in enumerate(features.dense()):
        torch.testing.assert_close(found[..., number], dense.gather(1, items), atol=1e-6, rtol=0)
    assert (make_item_item(rng).features([np.zeros(0, dtype=np.int64)]).at(items[:1]) == 0).all()


@pytest.mark.parametrize("cold", [False, True])
def test_features_of_the_last_items_come_with_those_of_the_whole_histories(cold):
    rng = np.random.default_rng(9)
    model = make_item_item(rng, cold=means_of_two(30) if cold else None)
    histories = [rng.choice(40, size) for size in (3, 0, 1, 12)]
    assert [each.dense().shape[1:] for each in model.features_and_last([np.array([], int)])] == [(1, 40)] * 2
    whole, last = model.features_and_last(histories)
    alone = model.features([history[-1:] for history in histories])
    for found, expected in ((whole, model.features(histories)), (last, alone)):
        assert torch.equal(found.dense(), expected.dense()) and torch.equal(found.strongest, expected.strongest)
        assert torch.equal(found.lengths, expected.lengths)
        assert all((own != other).nnz == 0 for own, other in zip(found.sums, expected.sums, strict=True))


def means_of_two(trained, num_items=40):
    """Each cold item is the mean of two trained ones."""
    rows = torch.arange(trained, num_items)
    return ColdItems(rows, torch.stack([rows - trained, rows - trained + 1], dim=1), torch.full((len(rows), 2), 0.5))


def test_cold_items_have_the_mean_features_of_their_nearest_trained_items():
    model = make_item_item(np.random.default_rng(7))
    histories = [np.random.default_rng(7).choice(30, 5, replace=False) for _ in range(3)]
    plain, averaged = (each.features(histories).dense() for each in (model, model.with_cold_items(means_of_two(30))))
    assert torch.equal(plain[:2, :, :30], averaged[:2, :, :30]) and torch.equal(plain[2:], averaged[2:])
    assert torch.allclose(averaged[:2, :, 30:], (plain[:2, :, :10] + plain[:2, :, 1:11]) / 2)


def test_content_is_compared_with_the_latest_twenty_items():
    """Item 1 is like item 0, which counts as long as at most 19 others come after it."""
    content = torch.eye(40)
    content[1] = content[0]
    model = make_item_item(np.random.default_rng(1))
    model.contents = {"image": content}
    place = SCORE_FEATURES.index("image") - 1
    for others, nearest in ((19, 1), (20, 0)):
        features = model.features([np.array([0, *range(2, 2 + others)])])
        assert features.dense()[place, 0, 1] == features.at(torch.tensor([[1]]))[0, 0, place] == nearest


def test_no_histories_have_no_features():
    features = make_item_item(np.random.default_rng(1)).features([])
    assert features.dense().shape == (len(SCORE_FEATURES) - 1, 0, 40) and features.strongest.shape == (0,)
    assert features.lengths.dtype == torch.int64 and features.at(torch.zeros(0, 3, dtype=torch.int64)).shape == (
        0,
        3,
        len(SCORE_FEATURES) - 1,
    )


def test_features_are_in_the_order_in_which_models_on_disk_have_them():
    assert SCORE_FEATURES == ("sequencer", "ridge", "following", "content", "text", "image", "seen")
    model = make_item_item(np.random.default_rng(2))
    kinds = {
        name: torch.nn.functional.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(n)), dim=1)
        for n, name in enumerate(("content", "text", "image"))
    }
    model.contents = kinds
    dense = model.features([np.array([7, 7])]).dense()
    for name, vectors in kinds.items():
        torch.testing.assert_close(dense[SCORE_FEATURES.index(name) - 1, 0], vectors @ vectors[7])
    assert dense[-1, 0].tolist() == [float(item == 7) for item in range(40)]  # once, though it is there twice
    assert model.available == [0, 1, 2, 3, 4, 5]


def test_the_largest_ridge_feature_is_that_of_any_item():
    rng = np.random.default_rng(5)
    features = make_item_item(rng).features([rng.choice(40, 4), np.array([], int), rng.choice(40, 9)])
    assert features.strongest.tolist() == pytest.approx(features.dense()[0].amax(1).tolist()) and features.strongest[1] == 0


def test_interactions_count_with_their_weights():
    """After 0 come 1, with weights 2 and 3, and 2, with weights 1 and 4."""
    indptr, items = ragged([0, 1], [0, 2])
    weights = np.array([2.0, 3.0, 1.0, 4.0])
    assert popularity(indptr, items, 4, weights).tolist() == [3, 3, 4, 0] and popularity(indptr, items, 4, weights).dtype == np.float32
    settings = {"num_items": 3, "decay": 0.5, "neighbours": 9}
    shares = following(indptr, items, window=1, shrinkage=0.0, weights=weights, **settings).toarray()
    assert shares[:, 0].tolist() == pytest.approx([0, 0.6, 0.4])
    # 0 and 1 with 2 * 3, of 1 with itself 3 ** 2: 6 / (9 + 1)
    ridge = RidgeRegression(indptr, items, 3, 1.0, 9, weights).rows(np.array([0])).toarray()
    assert ridge[0].tolist() == pytest.approx([0, 6 / 10, 4 / 17])
    # two steps apart, 0 and 2 count half: weights 2 * 3 for the first step, 2 * 5 / 2 for the second
    longer = following(*ragged([0, 1, 2]), window=2, shrinkage=0.0, weights=np.array([2.0, 3, 5]), **settings).toarray()
    assert longer[:, 0].tolist() == pytest.approx([0, 6 / 11, 5 / 11])


def test_an_item_item_model_of_which_nothing_is_said_has_no_contents_and_no_popularity():
    model = make_item_item(np.random.default_rng(1))
    plain = ItemItem(model.weights[0].T.tocsr(), model.weights[1].T.tocsr(), (0.8, 0.5), 0.01, latest=10)
    assert plain.popularity.tolist() == [0] * 40 and plain.contents == {} and plain.available == [0, 1, 2]
    assert plain.names == SCORE_FEATURES and plain.num_items == 40
    given = ItemItem(*(each.T.tocsr() for each in model.weights), (0.8, 0.5), 0.01, 10, popularity=torch.arange(40.0))
    assert given.popularity.tolist() == list(range(40))


def test_products_of_content_vectors_are_kept_for_small_catalogs_alone(monkeypatch):
    model = make_item_item(np.random.default_rng(1))
    monkeypatch.setattr(item_item, "MOST_PAIRS", 40**2 - 1)
    assert model._kept("text") is None
    monkeypatch.setattr(item_item, "MOST_PAIRS", 40**2)
    kept = model._kept("text")
    assert np.allclose(kept, model.contents["text"] @ model.contents["text"].T) and model._kept("text") is kept


def test_a_copy_with_cold_items_leaves_the_model_as_it_was():
    model = make_item_item(np.random.default_rng(7))
    history = [np.array([1, 2, 3])]
    before = model.features(history).dense()
    other = model.with_cold_items(means_of_two(30))
    assert torch.equal(model.features(history).dense(), before) and not torch.equal(other.features(history).dense(), before)
    again = other.with_cold_items(means_of_two(35))
    assert torch.equal(again.features(history).dense()[:, :, :35], before[:, :, :35])  # those from 30 on are no longer cold
