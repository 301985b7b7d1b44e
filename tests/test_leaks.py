"""Nothing sees a validation or test item before it should, and ranks are those of plain loops over the model's scores.

The shop has more users than a reranker needs, and fine-tuning has several epochs to choose from. Labels are permuted among users:
what must not know them comes out equal, down to the metrics of every epoch.
"""

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.inputs.demo_shop import generate
from qbert_ray.ranking import stage as ranking_stage
from qbert_ray.ranking.loader import BLEND, RERANKER, load_ranker
from qbert_ray.ranking.ranker import Ranker
from qbert_ray.ranking.reranker import FEWEST
from qbert_ray.semantic_ids.quantizers import EXTRA
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.seals import seal
from tests.benchmarks.without_ray import run_stages
from tests.shop import small_config

USERS, EPOCHS = 340, 4
SETTINGS = [
    "features.modalities=[structure]",  # no encoder to load
    "quantizer.kind=kmeans",
    "quantizer.extra_quantizers=[opq]",
    "pretrain.epochs=1",  # nothing to choose, so the start of fine-tuning knows no validation item
    f"finetune.epochs={EPOCHS}",
    "finetune.patience=null",
    "data.cold_share=0",
    "pretrain.domains=[demo]",
]
BEFORE_LABELS = ["fusion/model", "quantizer/model", "pretrain/model"]
CHOSEN_BY_VALIDATION = ["finetune/demo/model", f"{BLEND}/demo"]
TABLES = ["features/structure", "fusion/embeddings", "semantic_ids", "ranking/weights"]
LOGS = ["fusion", "quantizer", "pretrain", "finetune/demo"]


def permute_labels(run, columns):
    """Give labels to other users, in the sequences and in the interactions."""
    rng = np.random.default_rng(0)
    for name in run.parts("ingest/sequences"):
        table = run.read_part("ingest/sequences", name)
        for column in columns:
            values = table[column].to_numpy(zero_copy_only=False)
            place = table.column_names.index(column)
            table = table.set_column(place, table.schema.field(column), pa.array(rng.permutation(values), pa.int32(), from_pandas=True))
        run.write_part("ingest/sequences", name, table)
    for name in run.parts("ingest/interactions"):
        table = run.read_part("ingest/interactions", name)
        rows = np.flatnonzero(np.isin(table["split"].to_pylist(), columns))
        items = np.array(table["item_id"].to_pylist(), dtype=object)
        items[rows] = rng.permutation(items[rows])
        place = table.column_names.index("item_id")
        run.write_part("ingest/interactions", name, table.set_column(place, table.schema.field("item_id"), pa.array(items, pa.string())))
    sealed_again(run)


def rename_items(run):
    """Give every item another ID, so that the order of the new ones is the old one reversed."""
    old = sorted(run.read("ingest/items")["item_id"].to_pylist())
    names = {item: f"x{len(old) - place:05d}" for place, item in enumerate(old)}
    for folder in ("ingest/items", "ingest/interactions"):
        for name in run.parts(folder):
            table = run.read_part(folder, name)
            place = table.column_names.index("item_id")
            renamed = pa.array([names[item] for item in table["item_id"].to_pylist()], pa.string())
            run.write_part(folder, name, table.set_column(place, table.schema.field("item_id"), renamed))
    sealed_again(run)
    return names


def sealed_again(run):
    """These are the stage's own parts now."""
    manifest = Manifest.load(run, "ingest")
    manifest.files = seal(run, "ingest")
    manifest.save(run, "ingest")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    generate(folder / "shop", seed=0, num_items=120, num_users=USERS)
    config = small_config(folder / "shop", folder / "run", *SETTINGS)
    run_stages(config, threads=1)
    return config, RunDir(config.run.dir)


@pytest.fixture(scope="module", params=[("test",), ("valid", "test")], ids=["test", "both"])
def permuted(request, honest, tmp_path_factory):
    """The labels that were permuted, and the run on them."""
    config, run = honest
    folder = tmp_path_factory.mktemp("permuted")
    shutil.copytree(f"{run.uri}/ingest", folder / "run" / "ingest")
    other = RunDir(str(folder / "run"))
    permute_labels(other, list(request.param))
    run_stages(small_config(config.data.root, folder / "run", *SETTINGS), threads=1)
    return request.param, other


def test_no_model_reads_item_ids(honest, tmp_path):
    """With other IDs, in the reverse order, every rank and recommendation is the same; `ingest` orders items by a hash of theirs."""
    config, run = honest
    shutil.copytree(f"{run.uri}/ingest", tmp_path / "run" / "ingest")
    other = RunDir(str(tmp_path / "run"))
    names = rename_items(other)
    run_stages(small_config(config.data.root, tmp_path / "run", *SETTINGS), threads=1)
    for table, ids in (("evaluate/ranks", "target"), ("score", "item_id")):
        before, after = (each.read(table) for each in (run, other))
        assert [names[item] for item in before[ids].to_pylist()] == after[ids].to_pylist()
        assert before.drop_columns(ids).equals(after.drop_columns(ids))
    items = run.read("ingest/items")
    order = np.argsort(np.argsort(items["item_id"].to_pylist()))
    assert abs(np.corrcoef(items["item_index"].to_numpy(), order)[0, 1]) < 0.3  # a chance of one in a thousand for a hash of 120 items


def log(run, folder):
    return [json.loads(line) for line in run.read_bytes(f"{folder}/metrics.jsonl").splitlines()]


def ranking_counts(run):
    return run.read_json("ranking/manifest.json")["counts"]["demo"]


def assert_same_model(one, other, name):
    a, b = one.load_model(name)[0], other.load_model(name)[0]
    assert a and a.keys() == b.keys()
    for key in a:
        assert np.array_equal(a[key].numpy(), b[key].numpy(), equal_nan=True), (name, key)


def test_the_shop_is_large_enough_for_what_is_compared(honest):
    _, run = honest
    counts = ranking_counts(run)
    assert counts["users"] >= 300 > FEWEST
    assert counts["reranking"].keys() == {"kept", "blended", "reranked", "error"}
    assert len(log(run, "finetune/demo")) == EPOCHS
    assert len({line["ndcg@10"] for line in log(run, "finetune/demo")}) > 1  # there is something to choose
    assert run.folders(EXTRA)


def test_what_comes_before_labels_knows_none(honest, permuted):
    _, run = honest
    _, other = permuted
    for name in [*BEFORE_LABELS, *(f"{EXTRA}/{number}/model" for number in run.folders(EXTRA))]:
        assert_same_model(run, other, name)
    for name in TABLES:
        assert run.parts(name) and run.read(name).equals(other.read(name)), name
    losses = [[line["train_loss"] for line in log(each, "finetune/demo")] for each in (run, other)]
    assert len(losses[0]) == EPOCHS and losses[0] == losses[1]


def test_what_validation_items_choose_knows_no_test_item(honest, permuted):
    """The epoch that is kept, the blend, and whether a reranker is, with every figure that they were chosen by."""
    _, run = honest
    labels, other = permuted
    if labels == ("test",):
        for name in CHOSEN_BY_VALIDATION:
            assert_same_model(run, other, name)
        assert run.folders(RERANKER) == other.folders(RERANKER)
        for domain in run.folders(RERANKER):
            assert_same_model(run, other, f"{RERANKER}/{domain}")
        assert ranking_counts(run) == ranking_counts(other)
        for folder in LOGS:
            assert log(run, folder) == log(other, folder), folder
    else:  # other validation items choose otherwise, or the comparison would say nothing
        assert ranking_counts(run)["reranking"] != ranking_counts(other)["reranking"]
        assert [line["ndcg@10"] for line in log(run, "finetune/demo")] != [line["ndcg@10"] for line in log(other, "finetune/demo")]
    assert not run.read("evaluate/ranks")["rank_all"].equals(other.read("evaluate/ranks")["rank_all"])


def histories_of(run):
    """user_id -> item_index of the training items, the validation item and the test item, from the interactions alone."""
    items = run.read("ingest/items", "demo")
    index = dict(zip(items["item_id"].to_pylist(), items["item_index"].to_pylist(), strict=True))
    rows = run.read("ingest/interactions", "demo").select(["user_id", "item_id", "split"]).to_pylist()
    found = {row["user_id"]: ([], [], []) for row in rows}
    for row in rows:
        found[row["user_id"]][("train", "valid", "test").index(row["split"])].append(index[row["item_id"]])
    return {user: (train, *valid, *test) for user, (train, valid, test) in found.items() if test}


def plain_rank(scores, target, left_out=()):
    """1 + the items before the target: of larger scores, or of equal ones and a smaller index."""
    own, left_out = scores[target], set(left_out) - {target}
    return 1 + sum(score > own or (score == own and item < target) for item, score in enumerate(scores) if item not in left_out)


def test_ranks_are_those_of_plain_loops_over_scores_of_everything_before_the_test_item(honest):
    config, run = honest
    ranker, histories, expected = load_ranker(run, "demo", config.ranking), histories_of(run), Counter()
    for part in run.parts("ingest/sequences", "demo"):
        users = [user for user in run.read_part("ingest/sequences", part)["user_id"].to_pylist() if user in histories]
        before = [[*histories[user][0], histories[user][1]] for user in users]
        with torch.inference_mode():
            scores = ranker.scores([np.array(each) for each in before])["model"].tolist()
        for user, history, row in zip(users, before, scores, strict=True):
            target = histories[user][2]
            expected[user, plain_rank(row, target), plain_rank(row, target, history)] += 1
    table = [row for row in run.read("evaluate/ranks", "demo").to_pylist() if row["model"] == "model"]
    assert Counter((row["user_id"], row["rank_all"], row["rank_unseen"]) for row in table) == expected
    assert len(table) == len(histories) >= 300 and any(row["rank_all"] != row["rank_unseen"] for row in table)
    report = run.read_json("evaluate/metrics.json")["demo"]["protocols"]
    for protocol, place in (("all", 1), ("unseen", 2)):
        hits = sum(found[place] <= 10 for found in expected)
        gains = sum(1 / np.log2(found[place] + 1) for found in expected if found[place] <= 10)
        assert report[protocol]["model"]["hr@10"]["value"] == pytest.approx(hits / len(expected))
        assert report[protocol]["model"]["ndcg@10"]["value"] == pytest.approx(gains / len(expected))


def test_popularity_counts_training_items_alone(honest):
    _, run = honest
    histories = histories_of(run)
    trained = run.read("ingest/sequences", "demo")["train"].to_pylist()
    counts = np.bincount([item for items in trained for item in items], minlength=len(run.read("ingest/items", "demo"))).tolist()
    found = {row["user_id"]: row for row in run.read("evaluate/ranks", "demo").to_pylist() if row["model"] == "popularity"}
    for user, (train, valid, test) in histories.items():
        assert found[user]["rank_all"] == plain_rank(counts, test)
        assert found[user]["rank_unseen"] == plain_rank(counts, test, [*train, valid])


def test_the_kept_epoch_is_the_best_by_validation_items_after_training_items(honest):
    """The saved model's ndcg@10 in plain loops is the largest of the log, so neither labels nor histories were others."""
    config, run = honest
    model = run.load_module(Sequencer, "finetune/demo/model")
    items = SequencerTask(config, run, ["demo"], config.finetune).tables["demo"]
    histories = histories_of(run).values()
    with torch.inference_mode():
        queries = next_item_queries(model, [np.array(train) for train, _, _ in histories], items)
        scores = model.scores(queries, *model.catalog_vectors(items)).tolist()
    ranks = [plain_rank(row, valid, train) for row, (train, valid, _) in zip(scores, histories, strict=True)]
    best = max(line["ndcg@10"] for line in log(run, "finetune/demo"))
    assert sum(1 / np.log2(rank + 1) for rank in ranks if rank <= 10) / len(ranks) == pytest.approx(best, abs=2e-3)


def test_blend_and_reranker_are_fitted_on_validation_items_after_training_items(honest, tmp_path, monkeypatch):
    config, run = honest
    shutil.copytree(run.uri, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ranking")
    asked: dict[str, list] = {"features": [], "lists": []}
    targets: dict[str, list] = {"features": [], "lists": []}
    features, lists, candidates = Ranker.score_features, Ranker.candidate_lists, ranking_stage.candidates

    def score_features(self, histories):
        asked["features"] += map(tuple, histories)
        return features(self, histories)

    def drawn(sequence, known, lengths, target, *rest):
        targets["features"] += target.tolist()
        return candidates(sequence, known, lengths, target, *rest)

    def candidate_lists(self, histories, target):
        asked["lists"] += map(tuple, histories)
        targets["lists"] += target.tolist()
        return lists(self, histories, target)

    monkeypatch.setattr(Ranker, "score_features", score_features)
    monkeypatch.setattr(Ranker, "candidate_lists", candidate_lists)
    monkeypatch.setattr(ranking_stage, "candidates", drawn)
    ranking_stage.fit_ranking(config, RunDir(str(tmp_path / "run")), LocalExecutor(), Quiet())
    expected = Counter((tuple(train), valid) for train, valid, _ in histories_of(run).values())
    assert sum(expected.values()) >= 300
    for name in asked:
        assert Counter(zip(asked[name], targets[name], strict=True)) == expected, name
