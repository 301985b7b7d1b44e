"""The stage `refit`: it trains what a run without held-out interactions would, and who ranks by it."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

import qbert_ray
from qbert_ray.cli.main import main
from qbert_ray.config.loading import with_values
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.features.structure import co_occurrence
from qbert_ray.inputs.demo_shop import generate
from qbert_ray.pipeline import run_stage, status
from qbert_ray.ranking.filters import Filter
from qbert_ray.ranking.item_item import co_occurrence_scores, popularity
from qbert_ray.ranking.loader import BLEND, REFIT, REFIT_WEIGHTS, RERANKER, RIDGE, WEIGHTS, load_ranker
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.ranking.weights import WeightsPart
from qbert_ray.sequence.stage import epochs_kept, sequence_task
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import run_config
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.seals import seal
from qbert_ray.storage.stages import BY_NAME, STAGES, training_section
from qbert_ray.sweeps.trials import Plan
from tests.benchmarks.without_ray import run_stages
from tests.shop import small_config

SETTINGS = [
    "features.modalities=[structure]",  # no encoder to load
    "quantizer={kind: kmeans, extra_quantizers: []}",
    "finetune={epochs: 3, patience: 1, batch_size: 64}",
    "data.cold_share=0.1",
    "ranking.regularisation=auto",
]
INCLUDED = ["validation", "all"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without the stage."""
    folder = tmp_path_factory.mktemp("plain")
    generate(folder / "shop", seed=0, num_items=80, num_users=120)
    config = small_config(folder / "shop", folder / "run", *SETTINGS)
    run_stages(config, threads=1)
    assert not RunDir(config.run.dir).folders("refit")
    return config


def copy_of(config, folder, include):
    """A copy of the run whose config trains again."""
    shutil.copytree(config.run.dir, folder / "run")
    return with_values(config, {"run.dir": str(folder / "run"), "refit.include": include, "compute.executor": "local"})


@pytest.fixture(scope="module", params=INCLUDED)
def refitted(request, plain, tmp_path_factory):
    config = copy_of(plain, tmp_path_factory.mktemp(request.param), request.param)
    run = RunDir(config.run.dir)
    for name in ("evaluate", "score"):
        run.delete(name)
    run_stages(config, threads=1)
    return config, run


def trained_on_all_before(run, folder, include):
    """The same run with sequences whose held-out items are training items."""
    shutil.copytree(run.uri, folder / "run")
    other = RunDir(str(folder / "run"))
    for part in run.parts("ingest/sequences"):
        table = run.read_part("ingest/sequences", part)
        rows = table.to_pylist()
        later = {"validation": ["valid"], "all": ["valid", "test"]}[include]
        train = [row["train"] + [row[name] for name in later if row[name] is not None] for row in rows]
        table = table.set_column(table.column_names.index("train"), table.schema.field("train"), pa.array(train, pa.list_(pa.int32())))
        for name in later:
            table = table.set_column(table.column_names.index(name), table.schema.field(name), pa.nulls(len(rows), pa.int32()))
        other.write_part("ingest/sequences", part, table)
    manifest = Manifest.load(other, "ingest")
    manifest.files = seal(other, "ingest")
    manifest.save(other, "ingest")
    return other


def test_training_again_is_training_on_such_sequences(refitted, tmp_path):
    config, run = refitted
    other = trained_on_all_before(run, tmp_path, config.refit.include)
    log = run.read_lines("finetune/demo/metrics.jsonl")
    epochs = max(range(len(log)), key=lambda epoch: log[epoch]["ndcg@10"]) + 1
    settings = config.finetune.model_copy(update={"epochs": epochs, "patience": None})
    arguments = {"domains": ["demo"], "settings": settings, "start": None}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    LocalExecutor().fit(sequence_task(config), config, other, "again", config.compute.finetune, Quiet(), **arguments)
    torch.set_num_threads(threads)
    wanted, found = (each.load_model(folder)[0] for each, folder in ((other, "again/model"), (run, "refit/sequencer/demo/model")))
    assert found["repeats"] == run.load_model("finetune/demo/model")[0]["repeats"] != wanted["repeats"] == 0
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted if name != "repeats")
    assert [set(line) for line in run.read_lines("refit/sequencer/demo/metrics.jsonl")] == [{"epoch", "train_loss"}] * epochs

    chosen = config.ranking.model_copy(update={"regularisation": run.read_json(f"{RIDGE}/demo.json")["regularisation"]})
    for part in run.parts("ingest/items"):
        WeightsPart(other, "demo", chosen, "again/weights")(part)
    assert run.read(REFIT_WEIGHTS).equals(other.read("again/weights")) and not run.read(REFIT_WEIGHTS).equals(run.read(WEIGHTS))


def test_what_was_chosen_stays(refitted, plain):
    config, run = refitted
    before = RunDir(plain.run.dir)
    for stage in ("ingest", "semantic_ids", "finetune", "ranking"):
        assert run.read_bytes(f"{stage}/manifest.json") == before.read_bytes(f"{stage}/manifest.json")
    counts = Manifest.load(run, "refit").counts["demo"]
    rows = run.read("ingest/interactions")["split"].to_pylist()
    held_out = rows.count("valid") + (rows.count("test") if config.refit.include == "all" else 0)
    assert counts["held_out"] == held_out > 0 and counts["interactions"] == rows.count("train") + held_out
    assert counts["weights"] == sum(
        len(each) for name in ("ridge", "following") for each in run.read(REFIT_WEIGHTS)[f"{name}_items"].to_pylist()
    )


def test_test_items_are_ranked_by_models_that_did_not_see_them(refitted, plain):
    config, run = refitted
    table, before = run.read("evaluate/ranks"), RunDir(plain.run.dir).read("evaluate/ranks")
    report = run.read_json("evaluate/metrics.json")["demo"]
    if config.refit.include == "all":
        assert table.equals(before) and "trained_on" not in report
        return
    assert report["trained_on"] == report["cold"]["trained_on"] == "validation" and not table.equals(before)
    sequences = columns.to_sequences(run.read("ingest/sequences"))
    users = np.flatnonzero(sequences.test >= 0)
    histories = [sequences.history(user, "test") for user in users]
    with torch.inference_mode():
        scores = load_ranker(run, "demo", config.ranking, refit=True, baselines=True).scores(histories)
    trained, size = sequences.training_on("validation"), len(run.read("ingest/items"))
    scores["popularity"] = torch.tensor(popularity(trained.indptr, trained.items, size)).expand(len(users), -1)
    together = co_occurrence(trained.indptr, trained.items, size)
    scores["co_occurrence"] = torch.from_numpy(co_occurrence_scores(together, histories, config.evaluate.co_occurrence_history))
    found = {(row["user_id"], row["model"]): row["rank_all"] for row in table.to_pylist()}
    assert {model for _, model in found} == set(scores)
    for row, user in enumerate(users):
        for model in ("ridge", "transitions", "popularity", "co_occurrence"):  # the others add a number to scores of seen items
            own, target = scores[model][row], int(sequences.test[user])
            expected = 1 + int(((own > own[target]) | ((own == own[target]) & (torch.arange(size) < target))).sum())
            assert found[sequences.user_ids[user], model] == expected, model


def test_recommendations_are_those_of_the_models_trained_again(refitted, plain):
    config, run = refitted
    users, histories = columns.to_histories(run.read("ingest/sequences"))
    ranker = load_ranker(run, "demo", config.ranking, refit=True)
    ids = run.read("ingest/items")["item_id"].to_pylist()
    place, had = {item: number for number, item in enumerate(ids)}, {user: [] for user in users}
    for row in run.read("ingest/interactions").to_pylist():
        had[row["user_id"]].append(place[row["item_id"]])  # also cold items, which are in no sequence
    with torch.inference_mode():
        best, unseen = (
            [[ids[item] for item in row] for row in ranker.best(histories, 10, only=only)[1].tolist()]
            for only in (Filter(), Filter(excluded=[np.array(had[user]) for user in users]))
        )
    written = {user: [] for user in users}
    for row in run.read("score").to_pylist():
        written[row["user_id"]].append(row["item_id"])
    assert [written[user] for user in users] == unseen
    recommender = Recommender.load(run.uri)
    given = [[ids[item] for item in history] for history in histories]
    assert [[each.item_id for each in row] for row in recommender.recommend(given, 10)] == best
    assert not run.read("score").equals(RunDir(plain.run.dir).read("score"))


def test_a_finished_run_is_taken_further(plain, tmp_path):
    config = copy_of(plain, tmp_path, "all")
    run, measured = RunDir(config.run.dir), with_values(config, {"refit.include": "validation"})
    assert BY_NAME["refit"].skipped(plain) == "refit.include is none" and BY_NAME["refit"].skipped(config) is None
    assert status(BY_NAME["evaluate"], config, run) is not None  # it does not read the stage
    for stage, settings in (("evaluate", measured), ("score", measured), ("score", config)):
        with pytest.raises(ArtifactError, match=f"{stage} was made without refit; redo it with --from {stage}"):
            status(BY_NAME[stage], settings, run)
    run.delete("score")
    with pytest.raises(ArtifactError, match="score needs refit, which is not done in .*; run it first: qbert-ray refit"):
        run_stage(BY_NAME["score"], config, run, LocalExecutor(), Quiet())


def lists(recommender, histories):
    return [[each.item_id for each in row] for row in recommender.recommend(histories, 10)]


def test_until_it_is_done_the_chosen_models_recommend(refitted, plain, tmp_path):
    """Also where parts of its weights are there already."""
    config, run = refitted
    shutil.copytree(run.uri, tmp_path / "run")
    unfinished, histories = RunDir(str(tmp_path / "run")), [[item] for item in run.read("ingest/items")["item_id"].to_pylist()[:20]]
    before, after = (lists(Recommender.load(each), histories) for each in (plain.run.dir, run.uri))
    assert before != after == lists(Recommender.load(unfinished.uri), histories)
    unfinished.delete("refit/manifest.json")
    unfinished.delete(f"{REFIT_WEIGHTS}/{unfinished.parts(REFIT_WEIGHTS)[0]}")
    assert lists(Recommender.load(unfinished.uri), histories) == before


def test_a_run_that_is_done_already_keeps_the_config_that_was_asked_for_last(plain, tmp_path):
    config = copy_of(plain, tmp_path, "all")
    run = RunDir(config.run.dir)
    run_stage(BY_NAME["refit"], config, run, LocalExecutor(), Quiet())
    assert run_config(run).refit.include == "all"
    qbert_ray.run(with_values(config, {"refit.include": "none"}))
    assert run_config(run).refit.include == "none"


def test_redoing_a_stage_that_is_left_out_deletes_nothing(plain, tmp_path):
    config = copy_of(plain, tmp_path, "none")
    with pytest.raises(SystemExit) as end:
        main(["refit", "--redo", "-c", f"{config.run.dir}/config.yaml", f"run.dir={config.run.dir}", "compute.executor=local"])
    assert end.value.code == 0
    run = RunDir(config.run.dir)
    assert all(Manifest.load(run, name) is not None for name in ("evaluate", "score"))


def test_settings_and_names_of_a_training():
    assert [training_section(folder) for folder in ("fusion", "finetune/shop", f"{REFIT}/shop")] == ["fusion", "finetune", "finetune"]


def test_sweeps_train_again_where_it_says_something_about_their_figures_alone(plain):
    def plan(include, **sweep):
        return Plan(with_values(plain, {"refit.include": include, "sweep": {"name": "s", "stage": "evaluate"} | sweep}))

    names = [stage.name for stage in STAGES]
    for include, given in (("none", False), ("all", False), ("validation", True)):
        made = plan(include, space={"finetune.learning_rate": {"choice": [1e-3, 2e-3]}})
        assert [stage.name for stage in made.stages] == [name for name in names[: names.index("evaluate") + 1] if given or name != "refit"]
        assert ("refit.include" in made.base()) == given
    variants = {"search": "variants", "variants": {"as it is": {}, "again": {"refit": {"include": "validation"}}}}
    assert "refit" in [stage.name for stage in plan("none", **variants).stages]
    with pytest.raises(ValueError, match="refit.include=all trains for score and serve"):
        plan("none", space={"refit.include": {"choice": ["none", "all"]}})


def test_ranks_of_other_models_are_refused(refitted, plain):
    config, run = refitted
    other = with_values(config, {"refit.include": INCLUDED[1 - INCLUDED.index(config.refit.include)]})
    with pytest.raises(ArtifactError, match="refit.include: made with"):
        status(BY_NAME["refit"], other, run)
    if config.refit.include == "validation":
        for changed in (other, with_values(config, {"refit.include": "none"})):
            with pytest.raises(ArtifactError, match="evaluate was made with refit, which is left out now"):
                status(BY_NAME["evaluate"], changed, run)
    with pytest.raises(ArtifactError, match="score was made with refit, which is left out now; redo it with --from score"):
        status(BY_NAME["score"], with_values(config, {"refit.include": "none"}), run)


def test_the_generative_model_is_trained_again(plain, tmp_path):
    config = copy_of(plain, tmp_path, "validation")
    config = with_values(config, {"sequencer.kind": "generative", "finetune.epochs": 1, "sequencer.beam": 10})
    run = RunDir(config.run.dir)
    for name in ("finetune", "ranking", "evaluate", "score"):
        run.delete(name)
    run_stages(config, threads=1)
    assert not run.folders(REFIT_WEIGHTS) and "weights" not in Manifest.load(run, "refit").counts["demo"]
    before, after = (run.load_model(folder)[0] for folder in ("finetune/demo/model", "refit/sequencer/demo/model"))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)
    assert run.read_json("evaluate/metrics.json")["demo"]["trained_on"] == "validation"


@pytest.mark.parametrize(
    "values, epochs", [([0.1, 0.3, 0.3, 0.2], 2), ([0.3], 1), ([0.1, 0.2], 2), ([0.0, 0.0], 1), ([None, None, None], 3)]
)
def test_as_many_epochs_as_were_kept(values, epochs):
    """The first of equal ones, as the loop keeps it; the last without validation items."""
    assert epochs_kept([{"train_loss": 1.0} | ({} if value is None else {"ndcg@10": value}) for value in values]) == epochs


def test_a_log_that_is_gone_is_named(plain, tmp_path):
    config = copy_of(plain, tmp_path, "all")
    run = RunDir(config.run.dir)
    run.delete("finetune/demo/metrics.jsonl")
    with pytest.raises(ArtifactError, match="finetune/demo/metrics.jsonl, which says how many epochs were kept, is missing"):
        run_stage(BY_NAME["refit"], config, run, LocalExecutor(), Quiet())


def test_blend_and_reranker_are_not_fitted_again(refitted):
    _, run = refitted
    assert run.folders("refit") == ["sequencer", "weights"]
    assert run.folders(BLEND) == ["demo"] and not run.folders(f"refit/{RERANKER}")
