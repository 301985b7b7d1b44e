from pathlib import Path

import numpy as np
import pytest
import torch

from qbert_ray.config.schema import Ranking
from qbert_ray.ranking import blocks
from qbert_ray.ranking import score as scoring
from qbert_ray.ranking.blend import START, fit_blend, no_candidates
from qbert_ray.ranking.loader import WEIGHTS, load_ranker
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError
from qbert_ray.top_k import hide, top_k
from tests.small_run import COLD, ITEMS, USERS, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender.load(run.uri)


def histories_of(run, recommender):
    sequences = columns.to_sequences(run.read("ingest/sequences", "shop"))
    return [[recommender.ids[item] for item in sequences.history(user, "end")] for user in range(len(sequences.user_ids))]


@pytest.mark.parametrize("remove_seen", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_it_ranks_as_the_scoring_stage_does(run, recommender, monkeypatch, remove_seen, enabled):
    monkeypatch.setattr(scoring, "own_device", lambda: "cpu")  # which asks Ray otherwise
    settings = Ranking(enabled=enabled)
    scoring.ScorePart(run, "shop", settings, 7, remove_seen)("shop-00000.parquet")
    stored = run.read("score").to_pylist()
    if not enabled:
        recommender = Recommender(load_ranker(run, "shop", settings), recommender.ids)
    found = recommender.recommend(histories_of(run, recommender), 7, remove_seen)
    flat = [(f"user-{user}", rank, item, score) for user, best in enumerate(found) for rank, (item, score) in enumerate(best, 1)]
    assert len(found) == USERS
    assert flat == [(row["user_id"], row["rank"], row["item_id"], row["score"]) for row in stored]


@pytest.mark.parametrize("enabled", [True, False])
def test_block_by_block_ranks_as_the_whole_matrix_does(run, recommender, monkeypatch, enabled):
    histories = [np.array([recommender.index[item] for item in history]) for history in histories_of(run, recommender)]
    whole = load_ranker(run, "shop", Ranking(enabled=enabled, rerank=0))
    scores = whole.scores(histories)["model"]
    monkeypatch.setattr(blocks, "BLOCK", 7)
    blocked = load_ranker(run, "shop", Ranking(enabled=enabled, rerank=0))
    torch.testing.assert_close(blocked.scores(histories)["model"], scores, atol=1e-5, rtol=1e-5)
    for hidden in (True, False):
        values, items = top_k(hide(scores, histories) if hidden else scores, 9)
        found, places = blocked.best(histories, 9, hidden)
        assert torch.equal(places, items)
        torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [7, 8192])
def test_the_best_change_places_and_the_others_stay_where_they_are(run, recommender, monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    histories = [np.array([recommender.index[item] for item in history]) for history in histories_of(run, recommender)]
    blended, corrected = (load_ranker(run, "shop", Ranking(rerank=size)) for size in (0, 5))
    before, after = (each.scores(histories)["model"].argsort(dim=1, descending=True) for each in (blended, corrected))
    assert torch.equal(before[:, :5].sort(1).values, after[:, :5].sort(1).values)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, :5], after[:, :5])
    for k in (3, 5, 9, ITEMS):
        values, items = corrected.best(histories, k, remove_seen=False)
        assert torch.equal(items, after[:, :k])
        torch.testing.assert_close(values, corrected.scores(histories)["model"].gather(1, items), atol=1e-5, rtol=1e-5)
    whole = load_ranker(run, "shop", Ranking())  # seen items leave their places to others, which cold items do not take
    trained = [
        [item for item in row if item < ITEMS - COLD] for row in hide(whole.scores(histories)["model"], histories).argsort(1, True).tolist()
    ]
    for found, expected in zip(whole.best(histories, ITEMS)[1].tolist(), trained, strict=True):
        found = [item for item in found if 0 <= item < ITEMS - COLD]
        assert found == expected[: len(found)]
    assert set(blended.scores(histories)) == set(corrected.scores(histories))
    assert torch.equal(blended.scores(histories)["sequencer"], corrected.scores(histories)["sequencer"])


def test_cold_items_keep_their_places(run):
    histories = [np.array([0, 3, 5])]
    lists = load_ranker(run, "shop", Ranking()).candidate_lists(histories, torch.tensor([2]))
    blended, reordered = (load_ranker(run, "shop", Ranking(rerank=size)).scores(histories)["model"][0] for size in (0, 64))
    assert torch.equal(blended[-COLD:], reordered[-COLD:]) and not torch.equal(blended, reordered)
    assert torch.equal(blended.sort().values, reordered.sort().values)
    assert lists.moved.sum() == ITEMS - COLD and lists.is_target.sum() == 1 and lists.seen.sum() == 3
    torch.testing.assert_close(lists.blended[0], blended.sort(descending=True).values)


def test_batch_mates_never_matter(run, recommender):
    histories = histories_of(run, recommender)
    together = recommender.recommend(histories, ITEMS)
    for history, best in zip(histories, together, strict=True):
        alone = recommender.recommend([history], ITEMS)[0]
        assert [item for item, _ in alone] == [item for item, _ in best]
        np.testing.assert_allclose([score for _, score in alone], [score for _, score in best], atol=1e-4)


def test_seen_items_are_left_out_and_cold_ones_are_not(recommender):
    seen = recommender.ids[:3]
    best = recommender.recommend([seen], k=ITEMS)[0]
    assert {item for item, _ in best} == set(recommender.ids) - set(seen)
    assert set(recommender.ids[-COLD:]) <= {item for item, _ in best}
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
    assert len(recommender.recommend([seen], k=ITEMS, remove_seen=False)[0]) == ITEMS


def test_nothing_and_everything_as_history(recommender):
    nothing, everything = recommender.recommend([[], recommender.ids], k=5)
    assert len(nothing) == 5 and everything == []
    assert recommender.recommend([]) == []


def test_unknown_items_are_counted_or_refused(recommender):
    known = recommender.ids[5]
    assert known in recommender and "x" not in recommender
    with pytest.warns(UserWarning, match="2 of 3 items of the histories are not in the catalog, such as 'x'"):
        best = recommender.recommend([["x", known], ["y"]])
    assert best == recommender.recommend([[known], []])
    with pytest.raises(ValueError, match="1 of 1 items"):
        recommender.recommend([["x"]], unknown="error")


def test_mistakes_are_explained(run, recommender, tmp_path):
    with pytest.raises(ValueError, match="write \\[history\\]"):
        recommender.recommend(["shop-item-1"])
    with pytest.raises(ValueError, match="at least 1"):
        recommender.recommend([[]], k=0)
    with pytest.raises(ArtifactError, match="no run in"):
        Recommender.load(str(tmp_path))
    with pytest.raises(ArtifactError, match="has no target domain 'toys'; it has shop"):
        Recommender.load(run.uri, "toys")


def test_several_domains_want_a_name(tmp_path):
    run = make_run(tmp_path, ("shop", "toys"))
    with pytest.raises(ArtifactError, match="name one of shop, toys"):
        Recommender.load(run.uri)
    assert "toys-item-0" in Recommender.load(run.uri, "toys")


def test_given_ids_leave_no_content_and_ranking_works(tmp_path):
    run = make_run(tmp_path, content_width=0)
    run.delete("fusion")
    assert len(Recommender.load(run.uri).recommend([["shop-item-1"]], 5)[0]) == 5


def test_a_blend_of_other_features_is_refused_by_name(tmp_path):
    run = make_run(tmp_path)
    run.save_model("ranking/blend/shop", {"weights": torch.zeros(3, 5), "centre": torch.zeros(3), "spread": torch.ones(3)}, {})
    with pytest.raises(ArtifactError, match="other score features.*ranking --redo"):
        Recommender.load(run.uri)


def test_histories_may_be_iterators_and_the_run_a_path(run, recommender):
    history = recommender.ids[3:8]
    best = recommender.recommend([history], k=3)
    for given in ([map(str, history)], [(item for item in history)], iter([iter(history)]), [tuple(history)], [np.array(history)]):
        assert recommender.recommend(given, k=3) == best
    assert recommender.recommend([history], k=np.int64(3)) == best
    assert Recommender.load(Path(run.uri)).recommend([history], k=3) == best


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(histories=[None]), "history 0 is None"),
        (dict(histories=[["a"], 5]), "history 1 is 5"),
        (dict(histories=None), "histories is of type NoneType"),
        (dict(histories="a"), "histories is of type str"),
        (dict(histories={"u": ["a"]}), "histories is of type dict"),
        (dict(histories=[[1, 2]]), "item_ids are text: write '1'"),
        (dict(histories=[[np.array([1, 2])]]), "holds array"),
        (dict(histories=[["a", float("nan")]]), "holds nan of type float; item_ids are text: leave it out"),
        (dict(histories=[["a", None]]), "history 0 holds None"),
        (dict(histories=[[]], k=3.0), "k is 3.0"),
        (dict(histories=[[]], k="3"), "k is '3'"),
        (dict(histories=[[]], k=True), "k is True"),
        (dict(histories=[[]], unknown="raise"), "unknown is 'raise'; it must be 'ignore' or 'error'"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(recommender, arguments, said):
    with pytest.raises(ValueError, match=said):
        recommender.recommend(**arguments)


def test_the_baselines_are_plain_sums_and_read_no_sequence_model(run):
    ranker, histories = load_ranker(run, "shop", Ranking()), [np.array([3, 1, 4]), np.array([2, 7])]
    table = run.read(WEIGHTS, "shop")
    follows = np.zeros((ITEMS, ITEMS))
    for item, (others, weights) in enumerate(
        zip(table["following_items"].to_pylist(), table["following_weights"].to_pylist(), strict=True)
    ):
        follows[others, item] = weights
    start = fit_blend(no_candidates())
    ranker.use(ranker.blend, item_item_text=start)
    scores = ranker.scores(histories)
    expected = np.stack([sum(0.5**age * follows[item] for age, item in enumerate(history[::-1])) for history in histories])
    assert scores["transitions"].numpy() == pytest.approx(expected, abs=1e-6)
    _, features, _ = ranker.score_features(histories)
    by_hand = (features * torch.tensor(START[1:])[:, None, None]).sum(0)
    by_hand[:, ITEMS - COLD :] += Ranking().new_item_bonus
    torch.testing.assert_close(scores["item_item_text"], by_hand, atol=1e-5, rtol=1e-5)
    ranker.vectors = torch.randn_like(ranker.vectors)
    other = ranker.scores(histories)
    assert torch.equal(other["item_item_text"], scores["item_item_text"]) and not torch.equal(other["model"], scores["model"])


def test_without_the_sequence_models_scores_the_rest_ranks_alone(run, recommender):
    histories = [np.array([3, 1, 4]), np.array([2, 7])]
    without = load_ranker(run, "shop", Ranking(sequence_scores=False)).scores(histories)
    assert not without["sequencer"].any() and without["model"].std() > 0
    assert not torch.allclose(without["model"], load_ranker(run, "shop", Ranking()).scores(histories)["model"])
