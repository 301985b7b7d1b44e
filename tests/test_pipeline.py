"""The whole run on a small shop: what it leaves, what a rerun does, and what it refuses."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from qbert_ray.config.loading import load_config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.pipeline import redo_from, run_stage, status
from qbert_ray.ranking.loader import ITEM_ITEM_TEXT, load_ranker
from qbert_ray.ranking.weights import WeightsPart
from qbert_ray.semantic_ids.task import QuantizerTask
from qbert_ray.sequence.item_table import ColdItems
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.stages import BY_NAME, STAGES
from tests.shop import SOURCE, small_config


def test_every_stage_leaves_its_manifest_and_no_scraps(finished):
    config, run = finished
    for stage in STAGES:
        assert (Manifest.load(run, stage.name) is None) == (stage.name == "refit"), "nothing asks for that one"
        assert not run.exists(f"{stage.name}/started.json")
        assert not run.exists(f"{stage.name}/checkpoints")
    assert run.exists("config.yaml")
    assert not run.exists("semantic_ids/.encoded")


@pytest.mark.parametrize(
    ("table", "schema"),
    [
        ("ingest/interactions", columns.INTERACTIONS),
        ("ingest/sequences", columns.SEQUENCES),
        ("semantic_ids", columns.SEMANTIC_IDS.append(pa.field(columns.EXTRA_CODES, pa.list_(pa.int32())))),
        ("ranking/weights", columns.ITEM_ITEM),
        ("evaluate/ranks", columns.RANKS),
        ("evaluate/cold", columns.COLD_RANKS),
        ("score", columns.RECOMMENDATIONS),
    ],
)
def test_tables_have_the_documented_columns(finished, table, schema):
    assert finished[1].read(table).schema.equals(schema)


def test_every_item_has_its_own_semantic_id(finished):
    _, run = finished
    for domain in ("demo", "other"):
        table = run.read("semantic_ids", domain)
        items = run.read("ingest/items", domain, [columns.ITEM_ID])
        assert table[columns.ITEM_ID].equals(items[columns.ITEM_ID])
        assert len(set(table["semantic_id"].to_pylist())) == table.num_rows
    first = table.slice(0, 1).to_pylist()[0]
    assert first["semantic_id"] == "".join(f"<{letter}_{code}>" for letter, code in zip("abc", first["codes"], strict=True))


def test_metrics_are_those_of_the_ranks(finished):
    _, run = finished
    report = run.read_json("evaluate/metrics.json")["demo"]
    ranks = run.read("evaluate/ranks")
    model = np.array(ranks["model"].to_pylist())
    assert set(model) == {"model", "sequencer", "ridge", "transitions", "item_item_text", "popularity", "co_occurrence"}
    assert report["users"] == int((model == "model").sum()) == run.read("ingest/sequences", "demo").num_rows
    for name in set(model):
        rank = ranks["rank_unseen"].to_numpy()[model == name]
        assert report["protocols"]["unseen"][name]["hr@5"]["value"] == pytest.approx((rank <= 5).mean())
        assert (rank <= ranks["rank_all"].to_numpy()[model == name]).all()


def test_the_baseline_of_item_item_weights_and_texts_is_fitted_without_a_network(finished):
    config, run = finished
    weights, described = run.load_model(f"{ITEM_ITEM_TEXT}/demo")
    places = [number for number, name in enumerate(described["score_features"]) if name in ("content", "image")]
    count = len(described["score_features"])
    assert not weights["weights"][:, places].any() and not weights["weights"][:, [place + count for place in places]].any()
    found = run.read_json("ranking/manifest.json")["counts"]["demo"]
    assert {"model", "sequencer", "ridge", "transitions", "item_item_text"} == {name[: -len("_ndcg@10")] for name in found if "@" in name}


def test_without_a_blend_the_model_is_the_sequencer(finished, shop, tmp_path):
    config, run = finished
    ranker = load_ranker(run, "demo", small_config(shop, run.uri, SOURCE, "ranking.enabled=false").ranking)
    histories = [np.array([1, 2, 3]), np.array([4])]
    alone = load_ranker(run, "demo", config.ranking).scores(histories)["sequencer"]
    assert torch.equal(ranker.scores(histories)["model"], alone)


def test_cold_items_have_the_item_item_features_of_their_nearest_trained_items(finished):
    config, run = finished
    ranker = load_ranker(run, "demo", config.ranking)
    rows, items, weights = ranker.items.cold
    known = ranker.trained
    assert rows.tolist() == list(range(known, ranker.num_items))
    assert known == int((~run.read("ingest/items", "demo")["cold"].to_numpy()).sum()) and items.max() < known
    _, features, _ = ranker.score_features([np.array([1, 2, 3]), np.array([4])])
    without = ranker.item_item.with_cold_items(ColdItems(*(each[:0] for each in ranker.items.cold)))
    plain = without.features([np.array([1, 2, 3]), np.array([4])], ranker.blend.used()).dense()
    assert not plain[:2, :, known:].any() and features[:2, :, known:].any()
    assert torch.equal(features[:, :, :known], plain[:, :, :known]) and torch.equal(features[2:], plain[2:])
    expected = (plain[0, 0, items[0]] * weights[0]).sum()
    assert features[0, 0, known] == pytest.approx(float(expected), abs=1e-5)


def test_cold_metrics_are_those_of_the_ranks(finished):
    _, run = finished
    report = run.read_json("evaluate/metrics.json")["demo"]["cold"]
    rows, targets = run.read("evaluate/cold").to_pylist(), run.read("ingest/cold").to_pylist()
    cold = run.read("ingest/items", "demo").filter(pc.field("cold"))["item_id"].to_pylist()
    assert report["users"] == len(targets) > 0
    for name in ("model", "text_mean", "text_nearest"):
        mine = [row for row in rows if row["model"] == name]
        assert {row["user_id"] for row in mine} == {row["user_id"] for row in targets}
        for protocol in ("unseen", "cold"):
            ranks = np.array([row[f"rank_{protocol}"] for row in mine])
            assert report["protocols"][protocol][name]["hr@5"]["value"] == pytest.approx((ranks <= 5).mean())
    assert all(row["target"] in cold and row["rank_cold"] <= row["rank_unseen"] for row in rows)
    assert report["protocols"]["cold"]["random"]["hr@5"]["value"] == pytest.approx(5 / len(cold))


def test_no_training_sees_a_cold_item(finished):
    """No ID vector, no structure, no place among the candidates of the loss, and codes nonetheless."""
    config, run = finished
    cold = run.read("ingest/items", "demo")["cold"].to_numpy()
    warm = run.read("ingest/items", "other").num_rows + int((~cold).sum())
    assert cold.any() and run.load_model("fusion/model")[1]["num_items"] == warm
    assert not columns.to_numpy(run.read("features/structure", "demo")["present"])[cold].any()
    assert len(SequencerTask(config, run, ["demo"], config.finetune).tables["demo"].codes) == int((~cold).sum())
    assert len(QuantizerTask(config, run).embeddings) == warm
    assert run.read("semantic_ids", "demo").num_rows == len(cold)


def test_popularity_ranks_equal_a_plain_count(finished):
    _, run = finished
    counts = {}
    rows = run.read("ingest/interactions", "demo").to_pylist()
    for row in rows:
        if row["split"] == "train":
            counts[row["item_id"]] = counts.get(row["item_id"], 0) + 1
    index = {row["item_id"]: row["item_index"] for row in run.read("ingest/items", "demo", ["item_id", "item_index"]).to_pylist()}
    order = sorted(index, key=lambda item: (-counts.get(item, 0), index[item]))
    for row in run.read("evaluate/ranks").to_pylist():
        if row["model"] == "popularity":
            assert row["rank_all"] == order.index(row["target"]) + 1


def test_recommendations_are_unseen_ranked_and_one_list_per_user(finished):
    config, run = finished
    seen, cold = {}, 0
    for row in run.read("ingest/interactions", "demo").to_pylist():  # those with cold items too, which are in no sequence
        seen.setdefault(row["user_id"], set()).add(row["item_id"])
        cold += row["split"] == "cold"
    assert cold
    lists = {}
    for row in run.read("score").to_pylist():
        lists.setdefault(row["user_id"], []).append(row)
    assert set(lists) == set(seen)
    for user, rows in lists.items():
        assert [row["rank"] for row in rows] == list(range(1, config.score.top_k + 1))
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        assert not seen[user] & {row["item_id"] for row in rows}
        assert len({row["item_id"] for row in rows}) == len(rows)


def test_nothing_of_validation_or_test_reaches_training(ray_session, shop, tmp_path):
    """Other held-out items, same training items: all that training reads is the same."""
    table = pq.read_table(shop / "interactions.parquet").to_pandas().sort_values(["user_id", "timestamp"], kind="stable")
    table["timestamp"] = table.groupby("user_id").cumcount()  # no ties, which would be ordered by a hash of the item
    last = table.groupby("user_id").cumcount(ascending=False)
    swapped = table.copy()
    for mine, theirs in ((0, 1), (1, 0)):
        items = table.loc[last == theirs].set_index("user_id")["item_id"]
        swapped.loc[last == mine, "item_id"] = table.loc[last == mine, "user_id"].map(items).to_numpy()
    assert not swapped["item_id"].equals(table["item_id"])
    outputs = []
    for name, interactions in (("as_is", table), ("swapped", swapped)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "items.parquet").write_bytes((shop / "items.parquet").read_bytes())
        interactions.to_parquet(folder / "interactions.parquet")
        config = small_config(
            folder, tmp_path / f"run_{name}", "features.modalities=[structure]", "data.min_interactions=0", "data.cold_share=0"
        )
        run = RunDir(config.run.dir)
        for stage in ("ingest", "features"):
            run_stage(BY_NAME[stage], config, run, RayExecutor(), Quiet())
        weights = WeightsPart(run, "demo", config.ranking)
        for part in run.parts("ingest/items"):
            weights(part)
        outputs.append((run.read("ingest/sequences"), run.read("features/structure"), run.read("ranking/weights")))
    (ours, *models), (theirs, *others) = outputs
    assert ours["train"].equals(theirs["train"]) and ours["test"].equals(theirs["valid"]) and not ours["test"].equals(theirs["test"])
    assert all(model.equals(other) for model, other in zip(models, others, strict=True))


def test_a_finished_stage_is_skipped(finished, monkeypatch):
    config, run = finished
    before = Manifest.load(run, "fusion")
    assert run_stage(BY_NAME["fusion"], config, run, RayExecutor(), Quiet()) == before


def test_a_changed_config_is_refused_with_the_key_that_changed(finished, shop):
    config, run = finished
    changed = small_config(shop, run.uri, SOURCE, "quantizer.commitment_weight=0.5")
    with pytest.raises(ArtifactError, match="quantizer.commitment_weight: made with 0.25, now 0.5"):
        status(BY_NAME["quantizer"], changed, run)
    more_machines = small_config(shop, run.uri, SOURCE, "compute.features.max_size=1", "compute.quantizer.num_workers=2")
    for stage in STAGES:
        assert (status(stage, more_machines, run) is None) == (stage.name == "refit")


def test_a_model_that_was_pre_trained_is_not_that_of_a_config_without(tmp_path):
    run, stage = RunDir(str(tmp_path)), BY_NAME["finetune"]
    config = load_config([], ["data.domains={shop: {}}", "finetune.objective=causal"])  # one domain, so nothing to pre-train on
    Manifest("finetune", stage.depends_on(config), {"semantic_ids": "a fingerprint"}, "0").save(run, "finetune")
    assert status(stage, config, run) is not None
    Manifest("finetune", stage.depends_on(config), {"semantic_ids": "a fingerprint", "pretrain": "another"}, "0").save(run, "finetune")
    with pytest.raises(ArtifactError, match="was made with pretrain, which is left out now; redo it with --from finetune"):
        status(stage, config, run)


def test_given_ids_leave_the_settings_of_structure_to_the_sequence_model():
    paths = [f"features.structure.{name}" for name in ("dim", "window")]
    for stage in (BY_NAME["pretrain"], BY_NAME["finetune"]):
        given, own = (stage.depends_on(load_config([], [f"data.semantic_ids={file}"])) for file in ("ids.parquet", "null"))
        assert set(paths) <= given.keys() and not set(paths) & own.keys()


def test_a_stage_without_its_input_names_the_command(shop, tmp_path):
    config = small_config(shop, tmp_path)
    with pytest.raises(ArtifactError, match="evaluate needs finetune, which is not done.*qbert-ray finetune"):
        run_stage(BY_NAME["evaluate"], config, RunDir(config.run.dir), RayExecutor(), Quiet())


def test_redo_forgets_a_stage_and_what_follows(finished, shop, tmp_path):
    _, run = finished
    copy = RunDir(str(tmp_path / "copy"))
    for stage in STAGES:
        name = "score" if stage.name == "refit" else stage.name
        copy.write_json(f"{stage.name}/manifest.json", run.read_json(f"{name}/manifest.json"))
    copy.write_json("score_histories/manifest.json", run.read_json("score/manifest.json"))
    redo_from("finetune", copy)
    assert not copy.exists("score_histories/manifest.json"), "its lists are of the models before"
    left = [stage.name for stage in STAGES if Manifest.load(copy, stage.name)]
    assert left == ["ingest", "features", "fusion", "quantizer", "semantic_ids", "pretrain"]


@pytest.mark.parametrize("content", [b"run: {seed: 3}", b"a: [" * 3000], ids=["yaml", "none"])
@pytest.mark.parametrize("there", ["features/text.parquet", "score/main.py", "config.yaml"])
def test_nothing_of_others_is_deleted_or_replaced(shop, tmp_path, there, content):
    """`run.dir` may be a folder of the user's own, by mistake or by a variable that is not set."""
    config, run = small_config(shop, tmp_path), RunDir(str(tmp_path))
    run.write_bytes(there, content)
    named = there.partition("/")[0] + "/" * ("/" in there)
    for begin in (lambda: run_stage(BY_NAME["ingest"], config, run, LocalExecutor(), Quiet()), lambda: redo_from("ingest", run)):
        with pytest.raises(ArtifactError, match=f"is not the directory of a run, and a run would replace {named} there; choose another"):
            begin()
        assert run.read_bytes(there) == content and run.folders("") == [named.rstrip("/")] * ("/" in there)


def test_a_run_that_was_cut_before_its_first_stage_goes_on(shop, tmp_path):
    config, run = small_config(shop, tmp_path), RunDir(str(tmp_path))
    run.write_json("ingest/started.json", {"fingerprint": ""})
    run.write_bytes("notes/mine.txt", b"")
    run_stage(BY_NAME["ingest"], config, run, LocalExecutor(), Quiet())
    assert Manifest.load(run, "ingest") and run.exists("notes/mine.txt")
    run.delete("ingest/manifest.json")  # as a deletion that was cut leaves it
    run_stage(BY_NAME["ingest"], config, run, LocalExecutor(), Quiet())
    with pytest.raises(ValueError, match=r"run\.dir"):
        small_config(shop, tmp_path, "run.dir=")


def test_rows_in_are_rows_out_and_rejected(finished, shop):
    _, run = finished
    counts = Manifest.load(run, "ingest").counts["demo"]
    for table in ("items", "interactions"):
        assert counts[f"{table}_read"] == pq.read_metadata(shop / f"{table}.parquet").num_rows
        assert counts[f"{table}_read"] == counts[table] + sum(counts[f"{table}_rejected"].values())
    rejected = run.read("ingest/rejected", "demo")["table"].to_pylist() if run.parts("ingest/rejected", "demo") else []
    assert rejected.count("interactions") == sum(counts["interactions_rejected"].values())


def test_pre_training_reads_the_source_domain_and_fine_tuning_the_target(finished):
    _, run = finished
    assert Manifest.load(run, "pretrain").counts["domains"] == ["other"]
    assert list(Manifest.load(run, "finetune").counts["metrics"]) == ["demo"]
    assert run.parts("score", "other") == []


def test_models_rebuild_from_their_json_alone(finished):
    from qbert_ray.fusion.model import DynamicFusion
    from qbert_ray.semantic_ids.rqvae import RQVAE
    from qbert_ray.sequence.model import Sequencer

    _, run = finished
    for folder, model in (("fusion", DynamicFusion), ("quantizer", RQVAE), ("pretrain", Sequencer), ("finetune/demo", Sequencer)):
        tensors, description = run.load_model(f"{folder}/model")
        model(**description).load_state_dict(tensors)
        lines = [json.loads(line) for line in run.read_bytes(f"{folder}/metrics.jsonl").splitlines()]
        assert [line["epoch"] for line in lines] == list(range(len(lines)))


def test_semantic_ids_made_elsewhere_replace_stages_one_and_two(finished, shop, tmp_path):
    _, run = finished
    given = run.read("semantic_ids").select(["domain", "item_id", "codes"])
    pq.write_table(given, tmp_path / "ids.parquet")
    config = small_config(shop, tmp_path / "run", SOURCE, f"data.semantic_ids={tmp_path / 'ids.parquet'}")
    other = RunDir(config.run.dir)
    done = [run_stage(stage, config, other, RayExecutor(), Quiet()) for stage in STAGES[:5]]
    assert [manifest is None for manifest in done] == [False, True, True, True, False]
    assert other.read("semantic_ids")["codes"].equals(run.read("semantic_ids")["codes"])
    pq.write_table(given.slice(1), tmp_path / "ids.parquet")
    config = small_config(shop, tmp_path / "short", SOURCE, f"data.semantic_ids={tmp_path / 'ids.parquet'}")
    run_stage(STAGES[0], config, RunDir(config.run.dir), RayExecutor(), Quiet())
    with pytest.raises(ArtifactError, match="no codes for 1 of"):
        run_stage(BY_NAME["semantic_ids"], config, RunDir(config.run.dir), RayExecutor(), Quiet())
