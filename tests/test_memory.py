import numpy as np
import pytest
import torch

from qbert_ray.memory import (
    SIGNALS,
    START,
    Memory,
    RidgeRegression,
    candidates,
    co_occurrence,
    co_occurrence_scores,
    describe,
    fit_mix,
    following,
    popularity,
)

INDPTR, ITEMS = np.array([0, 3, 5, 6]), np.array([0, 1, 2, 1, 2, 1])


def ragged(*histories):
    return np.cumsum([0, *map(len, histories)]), np.array([item for history in histories for item in history], dtype=np.int64)


def random_histories(rng, users, num_items, length):
    return ragged(*(rng.choice(num_items, length, replace=False) for _ in range(users)))


def test_counts_are_of_users():
    assert popularity(INDPTR, ITEMS, 4).tolist() == [1, 3, 2, 0]
    counts = co_occurrence(INDPTR, ITEMS, 4).toarray()
    assert counts.tolist() == [[0, 1, 1, 0], [1, 0, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0]]


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


def test_an_item_nobody_bought_has_no_weights():
    ridge = RidgeRegression(*ragged([0, 1], [0, 1]), num_items=3, regularisation=1.0, neighbours=5)
    assert ridge.rows(np.arange(3)).toarray()[2].tolist() == [0, 0, 0]
    assert ridge.rows(np.array([], dtype=int)).shape == (0, 3)


def test_following_counts_what_comes_after_within_a_user():
    settings = {"window": 2, "decay": 0.5, "shrinkage": 0.0, "neighbours": 9}
    shares = following(*ragged([0, 1, 2], [1, 0]), num_items=3, **settings).toarray()
    # after 0: 1 once, 2 at two steps; after 1: 2 and 0 once; after 2: nothing
    assert shares == pytest.approx(np.array([[0, 0.5, 0], [2 / 3, 0, 0], [1 / 3, 0.5, 0]]))
    assert following(*ragged([0], [1]), num_items=2, **settings).nnz == 0  # never from one user into the next
    assert following(*ragged([0, 1, 2], [1, 0]), num_items=3, **settings | {"neighbours": 1}).getnnz(1).tolist() == [1, 1, 1]


def make_memory(rng, num_items=40):
    indptr, items = random_histories(rng, 300, num_items, 5)
    ridge = RidgeRegression(indptr, items, num_items, 5.0, 20).rows(np.arange(num_items))
    content = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((num_items, 8))).float(), dim=-1)
    return Memory(ridge, following(indptr, items, num_items, 3, 0.5, 1.0, 20), (0.8, 0.5), 0.01, latest=10, content=content)


def test_signals_are_those_of_a_plain_loop():
    rng = np.random.default_rng(2)
    memory = make_memory(rng)
    histories = [rng.choice(40, size, replace=False) for size in (1, 4, 12)]
    signals = memory.signals(histories)
    for row, history in enumerate(histories):
        for number, decay in enumerate((0.8, 0.5)):
            told = sum(decay**age * memory.weights[number][[item]].toarray()[0] for age, item in enumerate(history[-10:][::-1]))
            assert signals[row, :, number].numpy() == pytest.approx(np.log1p(np.maximum(told, 0) / 0.01), abs=1e-5)
        cosines = (memory.content @ memory.content.T)[:, history[-10:]]
        assert torch.allclose(signals[row, :, 2], cosines.max(1).values, atol=1e-6)
        assert signals[row, :, 3].nonzero()[:, 0].tolist() == sorted(history)
    assert (memory.signals([np.zeros(0, dtype=np.int64)]) == 0).all()
    memory.content = None
    assert (memory.signals(histories)[:, :, 2] == 0).all()


def sample(rng, follows, users=400, num_items=40):
    """Histories whose target `follows(scores, signals)` names, as the fit sees them."""
    memory = make_memory(rng, num_items)
    histories = [rng.choice(num_items, 5, replace=False) for _ in range(users)]
    signals, scores = memory.signals(histories), torch.from_numpy(rng.standard_normal((users, num_items))).float()
    target = follows(scores, signals)
    found, place, there = candidates(scores, signals, target, 20)
    return found[there], describe(signals, torch.full((users,), 5))[there], place[there]


def test_the_mix_trusts_what_predicts():
    told = sample(np.random.default_rng(3), lambda scores, signals: (signals[:, :, 0] - 100 * signals[:, :, 3]).argmax(1))
    drawn = sample(np.random.default_rng(3), lambda scores, signals: scores.argmax(1))
    ridge, sequencer = SIGNALS.index("ridge"), SIGNALS.index("sequencer")
    assert fit_mix(*told).weights[0, ridge] > 3 * fit_mix(*drawn).weights[0, ridge]
    assert fit_mix(*drawn).weights[0, sequencer] > 3 * fit_mix(*told).weights[0, sequencer]
    assert fit_mix(*told).weights[0, SIGNALS.index("seen")] < -1  # nobody took an item twice


def test_the_mix_of_a_batch_is_that_of_each_history():
    rng = np.random.default_rng(4)
    mix = fit_mix(*sample(rng, lambda scores, signals: signals[:, :, 0].argmax(1)))
    signals, scores, lengths = torch.rand(6, 9, 4), torch.randn(6, 9), torch.randint(1, 50, (6,))
    together = mix.scores(scores, signals, lengths)
    for row in range(6):
        assert torch.allclose(together[row], mix.scores(scores[row : row + 1], signals[row : row + 1], lengths[row : row + 1])[0])
    shifted = mix.scores(scores + 5, signals, lengths)
    assert torch.equal(together.argsort(1), shifted.argsort(1))


@pytest.mark.parametrize("users", [0, 1])
def test_without_data_the_mix_is_the_start(users):
    found, description, place = sample(np.random.default_rng(5), lambda scores, signals: scores.argmax(1))
    mix = fit_mix(found[:users], description[:users], place[:users])
    assert torch.isfinite(mix.weights).all()
    if not users:
        assert mix.trust(description).unique(dim=0).tolist() == [pytest.approx(START)]


def test_an_item_that_is_a_candidate_twice_counts_once():
    scores, signals = torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(1, 3, 4)
    found, place, there = candidates(scores, signals, torch.tensor([1]), 3)
    assert found.shape == (1, 12, 5) and there.tolist() == [True]
    assert found[0, :, 0].isneginf().sum() == 9
    assert not found[0, place[0], 0].isneginf()
