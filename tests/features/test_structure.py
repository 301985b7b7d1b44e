import math

import numpy as np
import pytest
from scipy import sparse

from qbert_ray.features import structure
from qbert_ray.features.structure import co_occurrence, collaborative_vectors, gram


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


COUNTS = np.array([[0.0, 4, 1, 0], [4, 0, 1, 1], [1, 1, 0, 2], [0, 1, 2, 0]])


def positive_information(counts):
    """max(0, log p(i, j) / (p(i) p(j))), pair by pair."""
    total, rows = counts.sum(), counts.sum(1)
    result = np.zeros_like(counts)
    for i in range(len(counts)):
        for j in range(len(counts)):
            if counts[i, j]:
                result[i, j] = max(0.0, math.log((counts[i, j] / total) / (rows[i] / total * rows[j] / total)))
    return result


def test_the_products_of_vectors_are_the_positive_information_of_pairs():
    """With as many dimensions as positive eigenvalues, vectors are those of the best positive approximation; by hand from NumPy."""
    expected = positive_information(COUNTS)
    raw = math.log((1 / 18) / (6 / 18 * 4 / 18))
    assert raw < 0 and expected[1, 2] == 0  # a pair that is rarer than by chance counts as no pair
    values, axes = np.linalg.eigh(expected)
    factors = axes[:, values > 1e-9] * np.sqrt(values[values > 1e-9])
    unit = factors / np.linalg.norm(factors, axis=1, keepdims=True)
    vectors = collaborative_vectors(sparse.csr_matrix(COUNTS), dim=4, seed=0)
    assert vectors @ vectors.T == pytest.approx(unit @ unit.T, abs=1e-5)
    assert structure._positive_mutual_information(sparse.csr_matrix(COUNTS)).toarray() == pytest.approx(expected)


def test_the_largest_eigenvalues_come_first_and_their_sign_is_fixed():
    matrix = sparse.csr_matrix(np.diag([2.0, 5.0, -7.0, 1e-12, 3.0]))
    values, vectors = structure._top_eigenvectors(matrix, 4, seed=0)
    assert values.tolist() == [5, 3, 2]
    assert np.abs(vectors).argmax(0).tolist() == [1, 4, 0] and (vectors.max(0) == pytest.approx(1))
    assert structure._top_eigenvectors(matrix, 2, seed=0)[0].tolist() == [5, 3]


def test_iterated_eigenvectors_are_repeatable_and_start_from_the_seed(monkeypatch):
    monkeypatch.setattr(structure, "SMALL", 0)
    pairs = together(*[np.random.default_rng(user).permutation(40)[:6] for user in range(200)], num_items=40)
    first, again = (collaborative_vectors(pairs, dim=4, seed=3) for _ in range(2))
    assert np.array_equal(first, again)


def test_counts_hold_the_users_of_an_item_on_their_diagonal():
    counts = gram(*ragged([0, 1, 0], [1], [2, 1]), num_items=4)
    assert counts.toarray().tolist() == [[1, 1, 0, 0], [1, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert counts.has_sorted_indices and counts.shape == (4, 4) and counts.dtype == np.float32
    assert co_occurrence(*ragged([0, 1], [2]), num_items=3).nnz == 2  # the diagonal is not even stored


def test_a_window_counts_the_latest_items_of_each_user():
    histories = [0, 1, 2], [3], [4, 5, 0, 1]
    assert co_occurrence(*ragged(*histories), 6, window=3).toarray()[4].tolist() == [0] * 6
    assert co_occurrence(*ragged(*histories), 6, window=3).toarray()[0].tolist() == [0, 2, 1, 0, 0, 1]
    assert co_occurrence(*ragged(*histories), 6, window=1).nnz == 0
    assert (co_occurrence(*ragged(*histories), 6, window=4) != co_occurrence(*ragged(*histories), 6)).nnz == 0


def test_rows_have_length_one_and_rows_of_zeros_stay_so():
    found = structure._unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]]))
    assert found.tolist() == [pytest.approx([0.6, 0.8]), [0, 0], [0, -1]]


def test_large_catalogs_have_the_same_vectors_in_single_precision(monkeypatch):
    counts = sparse.random(600, 600, 0.05, "csr", random_state=0)
    exact = collaborative_vectors(counts + counts.T, 8, seed=0)
    monkeypatch.setattr(structure, "LARGE", 1)
    close = collaborative_vectors(counts + counts.T, 8, seed=0)
    assert not np.array_equal(close, exact)
    assert np.abs(close @ close.T - exact @ exact.T).mean() < 0.02
