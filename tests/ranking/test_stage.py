"""The blend is kept where cross-fitting shows that it helps, and otherwise ranks as the sequence model does."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from qbert_ray.config.schema import Ranking
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.ranking import stage
from qbert_ray.ranking.blend import SHRINKAGES, fit_blend, join_candidates, no_candidates, sequence_alone
from qbert_ray.ranking.loader import ITEM_ITEM_TEXT, RERANKER, load_ranker
from qbert_ray.ranking.reranker import Reranker
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import run_config
from tests.ranking.test_blend import by, only, sample
from tests.small_run import COLD, ITEMS, make_run

TRAINED, USERS = ITEMS - COLD, 120


def fitted(folder, histories):
    """A run whose users have these histories, with its ranking fitted; and the counts of the manifest."""
    run = make_run(folder)
    arrays = [
        pa.array(["shop"] * len(histories)),
        pa.array([f"user-{number}" for number in range(len(histories))]),
        pa.array([history[:-2] for history in histories], pa.list_(pa.int32())),
        pa.array([history[-2] for history in histories], pa.int32()),
        pa.array([history[-1] for history in histories], pa.int32()),
    ]
    run.write_part("ingest/sequences", "shop-00000.parquet", pa.table(arrays, schema=columns.SEQUENCES))
    run.delete("ranking")
    config = run_config(run).model_copy(update={"ranking": Ranking(rerank=0, regularisation=1.0)})
    return run, stage.fit_ranking(config, run, LocalExecutor(), Quiet())["shop"]


def test_a_blend_that_helps_is_kept(tmp_path):
    """Every item is followed by the next one, which item-item weights know and a random sequence model does not."""
    rng = np.random.default_rng(0)
    run, counts = fitted(tmp_path, [[int(item) for item in (start + np.arange(6)) % TRAINED] for start in rng.integers(0, TRAINED, USERS)])
    gain = counts["blending"]
    assert gain["kept"] and gain["blended"] > gain["alone"] + gain["error"] > gain["alone"]
    assert counts["model_ndcg@10"] == gain["blended"] and counts["sequencer_ndcg@10"] == gain["alone"]
    assert counts["fitted_on"] > 0.9 * USERS


def test_a_blend_that_does_not_help_is_left_out(tmp_path):
    """Histories are random, so that nothing predicts the targets."""
    rng = np.random.default_rng(0)
    run, counts = fitted(tmp_path, [[int(item) for item in rng.integers(0, TRAINED, 6)] for _ in range(USERS)])
    gain = counts["blending"]
    assert not gain["kept"] and gain["blended"] <= gain["alone"]
    assert counts["model_ndcg@10"] == gain["alone"]
    ranker = load_ranker(run, "shop", Ranking(rerank=0, new_item_bonus=0.0))
    scores = ranker.scores([np.array([1, 2, 3]), np.array([], dtype=np.int64)])
    torch.testing.assert_close(scores["model"], scores["sequencer"])
    assert ranker.blend.used() == ["sequencer"]


def test_a_reranker_reads_the_same_whatever_is_loaded_next_to_it(tmp_path):
    """`evaluate` loads the blend of a baseline too, which reads content; `score` and `Recommender` do not."""
    rng = np.random.default_rng(0)
    run, counts = fitted(tmp_path, [[int(item) for item in rng.integers(0, TRAINED, 6)] for _ in range(USERS)])
    assert not counts["blending"]["kept"]
    torch.manual_seed(0)
    reranker = Reranker(num_features=load_ranker(run, "shop", Ranking(rerank=0)).num_features)
    torch.nn.init.normal_(reranker.layers[-1].weight)
    run.save_model(f"{RERANKER}/shop", reranker.state_dict(), {"num_features": reranker.num_features})
    of_content = sequence_alone()
    of_content.weights[0, 3] = 1.0
    run.save_model(f"{ITEM_ITEM_TEXT}/shop", of_content._asdict(), {})
    histories = [np.array([1, 2, 3]), np.array([4])]
    alone, next_to_it = (load_ranker(run, "shop", Ranking(rerank=9), baselines=each).scores(histories) for each in (False, True))
    assert "item_item_text" in next_to_it and not torch.equal(alone["model"], alone["sequencer"])
    assert torch.equal(alone["model"], next_to_it["model"])


class Recorder:
    """Stands for a ranker: its scores follow from the blend that it was given last."""

    num_items, num_features = 4, 7

    def __init__(self):
        self.used = []

    def use(self, blend, item_item_text=None):
        self.used.append((blend, item_item_text))

    def repeats(self, name):
        assert name == "sequencer"
        return -5.0

    def scores(self, histories):
        better = torch.tensor([[0.0, 3.0, 2.0, 1.0]]) if len(self.used) == 1 else torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        return {"model": better.repeat(len(histories), 1), "sequencer": torch.tensor([[0.0, 2.0, 3.0, 1.0]]).repeat(len(histories), 1)}


def test_each_half_is_ranked_by_the_blend_of_the_other(monkeypatch):
    monkeypatch.setattr(stage, "fit_blend", lambda found, shrinkage: found)
    halves = [
        stage.ValidationUsers([np.array([0]), np.array([0])], torch.tensor([1, 3])),
        stage.ValidationUsers([np.array([3])], torch.tensor([3])),  # had its target before
    ]
    ranker = Recorder()
    ndcg = stage._cross_fitted(ranker, halves, [("first", None), ("second", "baseline")], SHRINKAGES[:2])
    gain = stage._blend_gain(ndcg, Ranking())
    assert ranker.used == [("second", "baseline"), ("first", None)]
    third = 1 / np.log2(4)  # targets 1 and 3 are first and third by the first blend, 3 is first by the second; alone second, third, fourth
    blended, alone = np.array([1, third, 1]), np.array([1 / np.log2(3), third, 1 / np.log2(5)])
    assert gain["blended"] == pytest.approx(blended.mean()) and gain["alone"] == pytest.approx(alone.mean())
    assert gain["error"] == pytest.approx((blended - alone).std(ddof=1) / 3**0.5)


@pytest.mark.parametrize(("blended", "kept"), [([0.5, 0.4], True), ([0.5, 0.2], False), ([0.3, 0.3], False), ([], True)])
def test_a_blend_is_kept_where_its_mean_is_larger(blended, kept):
    """However small the gain is next to its error: the blend of all users is fitted on twice as many as either half's."""
    ndcg = {"model": np.array(blended), stage.ALONE: np.array([0.4, 0.4][: len(blended)])}
    assert stage._blend_gain(ndcg, Ranking())["kept"] == kept
    assert stage._blend_gain(ndcg, Ranking(sequence_scores=False))["kept"]


def test_candidates_of_both_halves_fit_the_blend_of_all():
    found = sample(np.random.default_rng(3), by("ridge"))
    half = [only(found, 150), type(found)(*(each[150:] for each in found))]
    assert torch.equal(fit_blend(join_candidates(half)).weights, fit_blend(found).weights)
    assert join_candidates([no_candidates(), half[0]]).target.shape == (150,)
    assert join_candidates([no_candidates(), no_candidates()]).features.shape == no_candidates().features.shape


def test_the_sequence_model_alone_is_a_blend():
    weights = sequence_alone().weights_for(torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]]))
    count = (weights.shape[1] - 1) // 2
    assert weights[:, [0, count]].eq(1).all() and weights.sum() == 4
