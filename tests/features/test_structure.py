import numpy as np
import pytest

from qbert_ray.features.structure import co_occurrence, collaborative_vectors


def ragged(*histories):
    offsets = np.cumsum([0, *map(len, histories)])
    return offsets, np.array([item for history in histories for item in history], dtype=np.int64)


def together(*histories, num_items, window=50):
    return co_occurrence(*ragged(*histories), num_items, window)


def two_groups(rng, users=200):
    """Users buy either among items 0-9 or among items 10-19; item 20 is never bought."""
    return [rng.permutation(10)[:5] + 10 * (user % 2) for user in range(users)]


def test_co_occurrence_counts_users_once_and_not_an_item_with_itself():
    counts = together([0, 1, 0], [0, 1], [2], [], num_items=4).toarray()
    assert counts.tolist() == [[0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_only_the_latest_items_of_a_user_count():
    counts = together([0, 1, 2, 3], [4, 0], num_items=5, window=2).toarray()
    assert sorted(zip(*map(list, counts.nonzero()), strict=True)) == [(0, 4), (2, 3), (3, 2), (4, 0)]


def test_items_bought_together_are_closer_than_others():
    vectors = collaborative_vectors(together(*two_groups(np.random.default_rng(0)), num_items=21), dim=4, seed=0)
    similarity = vectors @ vectors.T
    within = (similarity[:10, :10].sum() - 10) / 90
    assert within > 0.2 + abs(similarity[:10, 10:20].mean())


def test_items_that_occur_only_with_each_other_are_close():
    vectors = collaborative_vectors(together([0, 1], [0, 1], [2, 3], num_items=4), dim=4, seed=0)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] == pytest.approx(1) and similarity[2, 3] == pytest.approx(1) and abs(similarity[:2, 2:]).max() < 1e-6


def test_large_catalogs_are_factorised_like_small_ones(monkeypatch):
    histories = [np.random.default_rng(user).permutation(40)[:6] for user in range(300)]
    pairs = together(*histories, num_items=40)
    whole = collaborative_vectors(pairs, dim=4, seed=0)
    monkeypatch.setattr("qbert_ray.features.structure.SMALL", 0)
    assert collaborative_vectors(pairs, dim=4, seed=0) == pytest.approx(whole, abs=0.01)


def test_vectors_have_unit_length_or_are_zero():
    vectors = collaborative_vectors(together(*two_groups(np.random.default_rng(1)), num_items=21), dim=6, seed=0)
    assert np.linalg.norm(vectors[:20], axis=1) == pytest.approx(np.ones(20), abs=1e-5)
    assert not vectors[20].any()


def test_order_of_users_is_irrelevant():
    histories = two_groups(np.random.default_rng(2))
    given = collaborative_vectors(together(*histories, num_items=21), dim=8, seed=3)
    assert np.array_equal(given, collaborative_vectors(together(*histories[::-1], num_items=21), dim=8, seed=3))


@pytest.mark.parametrize("histories", [[], [[]], [[0], [1]]])
def test_without_pairs_everything_is_zero(histories):
    vectors = collaborative_vectors(together(*histories, num_items=3), dim=4, seed=0)
    assert vectors.shape == (3, 4) and not vectors.any()


def test_dim_beyond_the_catalog_is_padded_with_zeros():
    vectors = collaborative_vectors(together([0, 1], [1, 2], num_items=3), dim=8, seed=0)
    assert vectors.shape == (3, 8) and not vectors[:, 3:].any() and np.isfinite(vectors).all()
