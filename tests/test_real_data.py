"""The stages on real data, where it is there (QBERT_REAL_DATA)."""

import numpy as np
import pytest
import torch

from qbert_ray.config.loading import load_config
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.features.structure import co_occurrence
from qbert_ray.metrics import hit_rate, ndcg
from qbert_ray.pipeline import run_stage
from qbert_ray.ranking.item_item import co_occurrence_scores
from qbert_ray.storage import columns
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.stages import STAGES
from qbert_ray.top_k import hide
from tests.shop import ROOT

pytestmark = pytest.mark.real_data
QUICK = [
    "data.domains.movielens.text_fields=[title]",
    "data.domains.movielens.attributes=[categories]",
    "features.modalities=[text, structure]",
    "fusion.epochs=10",
]


def stages_of(name, data, run_dir, count, overrides=()):
    config = load_config([ROOT / "configs" / f"{name}.yaml"], [f"data.root={data / name}", f"run.dir={run_dir}", *overrides])
    run = RunDir(config.run.dir)
    for stage in STAGES[:count]:
        run_stage(stage, config, run, RayExecutor(), Quiet())
    return run


def check_codes(run):
    counts = Manifest.load(run, "semantic_ids").counts
    assert min(counts["codebook_usage"]) >= 0.95, counts["codebook_usage"]
    assert len(set(run.read("semantic_ids")["semantic_id"].to_pylist())) == counts["items"]
    assert counts["moved"] <= 0.03 * counts["items"]


@pytest.mark.slow
def test_movielens_uses_the_codebooks(real_data, ray_session, tmp_path):
    check_codes(stages_of("movielens", real_data, tmp_path, 5, QUICK))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_movielens_uses_the_codebooks_with_every_modality(real_data, ray_session, tmp_path):
    run = stages_of("movielens", real_data, tmp_path, 5)
    check_codes(run)
    depths = {name: count for name, count in Manifest.load(run, "fusion").counts.items() if name.startswith("depth_")}
    assert len(depths) >= 3, depths


def test_co_occurrence_on_instruments_gives_the_published_reference(real_data, ray_session, tmp_path):
    """The whole path of the evaluation against independent figures (ties at their mean rank): .1091 / .0874 and .1141 / .0933."""
    run = stages_of("instruments", real_data, tmp_path, 1)
    sequences = columns.to_sequences(run.read("ingest/sequences"))
    counts = co_occurrence(sequences.indptr, sequences.items, run.read("ingest/items").num_rows)
    users = np.arange(len(sequences.user_ids))
    found = {"all": [], "unseen": []}
    for batch in np.array_split(users, 20):
        histories = [sequences.history(user, "test") for user in batch]
        scores = co_occurrence_scores(counts, histories, 20)
        hidden = hide(torch.from_numpy(scores), histories).numpy()
        for name, matrix in (("all", scores), ("unseen", hidden)):
            own = scores[np.arange(len(batch)), sequences.test[batch]][:, None]
            found[name].append((matrix > own).sum(1) + ((matrix == own).sum(1) + 1) / 2)
    for name, expected in (("all", (0.1091, 0.0874)), ("unseen", (0.1141, 0.0933))):
        rank = np.concatenate(found[name])
        assert (hit_rate(rank, 10).mean(), ndcg(rank, 10).mean()) == pytest.approx(expected, abs=6e-4)
