from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import sparse

from qbert_ray.features.structure import co_occurrence
from qbert_ray.ranking import item_item as memory
from qbert_ray.ranking import score_features as signals
from qbert_ray.ranking.item_item import (
    SIGNALS,
    START,
    Candidates,
    Memory,
    RidgeRegression,
    candidates,
    co_occurrence_scores,
    describe,
    fit_mix,
    following,
    nobody,
    popularity,
)
from qbert_ray.ranking.score_features import Mixture
from qbert_ray.top_k import hide

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
    return Memory(ridge, following(indptr, items, num_items, 3, 0.5, 1.0, 20), (0.8, 0.5), 0.01, latest=10, contents={"text": content})


def test_signals_are_those_of_a_plain_loop():
    rng = np.random.default_rng(2)
    asked = make_memory(rng)
    histories = [rng.choice(40, size, replace=False) for size in (1, 4, 12)]
    signals = asked.signals(histories)
    for row, history in enumerate(histories):
        for number, decay in enumerate((0.8, 0.5)):
            told = sum(decay**age * asked.weights[number][[item]].toarray()[0] for age, item in enumerate(history[-10:][::-1]))
            assert signals[number, row].numpy() == pytest.approx(np.log1p(np.maximum(told, 0) / 0.01), abs=1e-5)
        cosines = (asked.contents["text"] @ asked.contents["text"].T)[:, history[-20:]]
        assert torch.allclose(signals[SIGNALS.index("text") - 1, row], cosines.max(1).values, atol=1e-6)
        assert signals[-1, row].nonzero()[:, 0].tolist() == sorted(history)
    assert (asked.signals([np.zeros(0, dtype=np.int64)]) == 0).all()
    assert asked.known == [0, 1, 2, SIGNALS.index("text")]
    silent = asked.signals(histories, ["sequencer", "ridge"])[SIGNALS.index("text") - 1]
    assert (silent == 0).all()


@pytest.mark.parametrize("kept", [True, False], ids=["pairs", "products"])
@pytest.mark.parametrize("scratch", [1, 100, 2**22])
def test_signals_of_some_items_are_those_of_the_whole_catalog(kept, scratch, monkeypatch):
    monkeypatch.setattr(memory, "MOST_PAIRS", 40**2 if kept else 0)
    monkeypatch.setattr(signals, "SCRATCH", scratch)
    rng = np.random.default_rng(8)
    histories = [rng.choice(40, size) for size in (1, 0, 25, 5)]
    items = torch.from_numpy(rng.integers(0, 40, (4, 6)))
    said = make_memory(rng).asked(histories)
    found = said.at(items)
    for number, dense in enumerate(said.dense()):
        torch.testing.assert_close(found[..., number], dense.gather(1, items), atol=1e-6, rtol=0)
    assert (make_memory(rng).asked([np.zeros(0, dtype=np.int64)]).at(items[:1]) == 0).all()


def sample(rng, follows, users=400, num_items=40, new=0):
    """Histories whose target `follows(scores, signals)` names, as the fit sees them; the last `new` items play new ones."""
    asked = make_memory(rng, num_items)
    histories = [rng.choice(num_items, 5, replace=False) for _ in range(users)]
    signals, scores = asked.signals(histories), torch.from_numpy(rng.standard_normal((users, num_items))).float()
    target = follows(scores, signals)
    plays = torch.arange(num_items) >= num_items - new
    return candidates(scores, signals, torch.full((users,), 5), target, plays, asked.known, 20)


def only(found, users):
    return Candidates(*(each[:users] for each in found))


def by(name):
    return lambda scores, signals: (signals[SIGNALS.index(name) - 1] - 100 * signals[-1]).argmax(1)


def test_the_mix_trusts_what_predicts():
    drawn = fit_mix(sample(np.random.default_rng(3), lambda scores, signals: scores.argmax(1)))
    ridge, sequencer = SIGNALS.index("ridge"), SIGNALS.index("sequencer")
    told = fit_mix(sample(np.random.default_rng(3), by("ridge")))
    assert told.weights[0, ridge] > 3 * drawn.weights[0, ridge]
    assert drawn.weights[0, sequencer] > 3 * told.weights[0, sequencer]
    assert told.weights[0, SIGNALS.index("seen")] < -1  # nobody took an item twice
    read = fit_mix(sample(np.random.default_rng(3), by("text")))
    assert read.weights[0, SIGNALS.index("text")] > 3 > abs(told.weights[0, SIGNALS.index("text")])


def test_new_items_have_weights_of_their_own():
    """Targets are the trained item of the largest score or, for every other history, the new item with the nearest text."""

    def follows(scores, signals):
        trained, text = scores[:, :30].argmax(1), 30 + signals[SIGNALS.index("text") - 1, :, 30:].argmax(1)
        return torch.where(torch.arange(len(scores)) % 2 == 0, trained, text)

    mix = fit_mix(sample(np.random.default_rng(6), follows, users=1000, new=10))
    trained, new = mix.weights[0, : len(SIGNALS)], mix.weights[0, len(SIGNALS) : -1]
    sequencer, text = SIGNALS.index("sequencer"), SIGNALS.index("text")
    assert trained[sequencer] > 3 * new[sequencer] and new[text] > 3 * abs(trained[text])


def test_signals_that_are_not_there_cost_nothing():
    mix = fit_mix(sample(np.random.default_rng(3), by("text")))
    assert mix.wanted() == ["sequencer", "ridge", "following", "text", "seen"]


def plainly_mixed(mix, sequencer, signals, lengths, trained):
    """[B, N] scores by the definition: every signal as a dense array, its weights for each item and history."""
    trust = mix.trust(describe(signals[0].amax(1), lengths))
    new, count = torch.arange(signals.shape[2]) >= trained, len(SIGNALS)
    each = torch.cat([sequencer[None], signals])  # [F, B, N]
    weights = torch.where(new, trust[:, count : 2 * count, None], trust[:, :count, None]).transpose(0, 1)
    return (each * weights).sum(0) + new * trust[:, -1:]


def borrowing(num_items, trained):
    """Each new item is the mean of two trained ones."""
    matrix = np.eye(num_items, dtype=np.float32)
    for item in range(trained, num_items):
        matrix[:, item] = 0
        matrix[[item - trained, item - trained + 1], item] = 0.5
    return sparse.csr_matrix(matrix)


@pytest.mark.parametrize("kept", [True, False], ids=["pairs", "products"])
@pytest.mark.parametrize("blocks", [[40], [7, 30, 40], [30, 33, 40]], ids=str)
def test_the_mix_block_by_block_is_the_plain_one(blocks, kept, monkeypatch):
    """Sparse and blocked against dense and whole: within 1e-5 of scores of size 10."""
    monkeypatch.setattr(memory, "MOST_PAIRS", 40**2 if kept else 0)
    rng = np.random.default_rng(4)
    mix = fit_mix(sample(rng, by("text"), new=4))
    trained = 30 if len(blocks) > 1 else 40
    histories = [rng.choice(40, size) for size in (1, 0, 25, 5, 12)]  # with repetitions
    sequencer, lengths = torch.randn(5, 40), torch.tensor([len(history) for history in histories])
    said = make_memory(np.random.default_rng(4)).asked(histories, borrow=borrowing(40, trained) if trained < 40 else None)
    expected = plainly_mixed(mix, sequencer, said.dense(), lengths, trained)
    slices = [slice(begin, end) for begin, end in pairwise([0, *blocks])]
    for hidden in (False, True):
        mixture = Mixture(said, mix.trust(describe(said.strongest, lengths)), slices, trained, hidden)
        found = torch.cat([mixture.mixed(sequencer[:, block].clone(), block) for block in slices], dim=1)
        torch.testing.assert_close(found, hide(expected, histories) if hidden else expected, atol=1e-5, rtol=0)


def test_new_items_borrow_signals_of_trained_ones():
    rng = np.random.default_rng(7)
    asked, borrow = make_memory(rng), borrowing(40, 30)
    histories = [rng.choice(30, 5, replace=False) for _ in range(3)]
    plain, borrowed = (asked.asked(histories, borrow=each).dense() for each in (None, borrow))
    assert torch.equal(plain[:2, :, :30], borrowed[:2, :, :30]) and torch.equal(plain[2:], borrowed[2:])
    assert torch.allclose(borrowed[:2, :, 30:], (plain[:2, :, :10] + plain[:2, :, 1:11]) / 2)


def test_without_data_the_mix_is_the_start():
    found = sample(np.random.default_rng(5), lambda scores, signals: scores.argmax(1))
    assert torch.isfinite(fit_mix(only(found, 1)).weights).all()
    for none in (only(found, 0), nobody()):
        trust = fit_mix(none).trust(found.description)
        assert trust.unique(dim=0).tolist() == [pytest.approx([*START, *START, 0])]


def test_an_item_that_is_a_candidate_twice_counts_once():
    scores, signals = torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(len(SIGNALS) - 1, 1, 3)
    found = candidates(scores, signals, torch.tensor([1]), torch.tensor([1]), torch.tensor([False, False, True]), [0, 1, 2], 3)
    assert found.signals.shape == (1, 12, len(SIGNALS)) and len(found.place) == 1
    assert (~found.repeated).sum() == 3 and found.new[~found.repeated].sum() == 1
    assert not found.repeated[0, found.place[0]]
    nowhere = candidates(scores, signals, torch.tensor([1]), torch.tensor([2]), torch.zeros(3, dtype=torch.bool), [0], 2)
    assert len(nowhere.place) == 0  # its target is not among the two best
