import numpy as np

from qbert_ray.memory import co_occurrence, co_occurrence_scores, popularity

INDPTR, ITEMS = np.array([0, 3, 5, 6]), np.array([0, 1, 2, 1, 2, 1])


def test_counts_are_of_users():
    assert popularity(INDPTR, ITEMS, 4).tolist() == [1, 3, 2, 0]
    counts = co_occurrence(INDPTR, ITEMS, 4).toarray()
    assert counts.tolist() == [[0, 1, 1, 0], [1, 0, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0]]


def test_scores_sum_over_the_latest_items():
    counts = co_occurrence(INDPTR, ITEMS, 4)
    both = co_occurrence_scores(counts, [np.array([0, 1]), np.array([2])], latest=2)
    assert both.tolist() == [[1, 1, 3, 0], [1, 2, 0, 0]]
    assert co_occurrence_scores(counts, [np.array([0, 1])], latest=1).tolist() == [[1, 0, 2, 0]]
