"""Sweeps on real Ray Tune: trials are ordinary trainings, resume after an interruption, and say why they failed."""

import json
import shutil
import signal

import polars as pl
import pytest
import torch

from qbert_ray.config.loading import load_config, with_values
from qbert_ray.config.search import Sweep
from qbert_ray.execution.progress import Quiet
from qbert_ray.storage.directory import ArtifactError, RunDir
from qbert_ray.sweeps import trials, tuning
from qbert_ray.sweeps.tables import Table
from qbert_ray.sweeps.trials import Plan, trial_metrics
from tests.shop import small_config

RATE = "finetune.learning_rate"
INTERRUPT = signal.getsignal(signal.SIGINT)


@pytest.fixture(scope="module")
def swept(finished, tmp_path_factory):
    """A sweep over the finished run's own learning rate and one that cannot work."""
    config, run = finished
    folder = tmp_path_factory.mktemp("swept") / "run"
    shutil.copytree(run.path(), folder)
    space = {"space": {RATE: [config.finetune.learning_rate, 1e9]}, "max_failures": 0}
    plan = Plan(with_values(config, {"run.dir": str(folder), "sweep": space}))
    best = tuning.search(plan, Quiet())
    return plan, best


def other(plan: Plan, sweep: dict, values: dict | None = None) -> Plan:
    """Another sweep over the same run."""
    alone = plan.config.model_copy(update={"sweep": Sweep()})
    return Plan(with_values(alone, {"sweep": sweep} | (values or {})))


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return run.load_model("finetune/demo/model")[0]


def test_a_trial_is_the_ordinary_training_on_shared_outputs(swept, finished):
    plan, best = swept
    good, _ = plan.trials
    run = plan.trial_run(good)
    assert plan.shared(good) == ["ingest", "features", "fusion", "quantizer", "semantic_ids", "pretrain"]
    assert not (plan.folder.exists(f"trials/{good.name}/features") or plan.folder.exists(f"trials/{good.name}/pretrain"))
    expected = weights(finished[1])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())
    assert best["values"] == {RATE: plan.config.finetune.learning_rate}
    assert signal.getsignal(signal.SIGINT) is INTERRUPT  # what ends a process still does


def test_tables_hold_every_trial_and_the_overlay_loads(swept):
    plan, best = swept
    trials = pl.read_parquet(plan.folder.path("trials.parquet"))
    curves = pl.read_parquet(plan.folder.path("curves.parquet"))
    assert dict(trials.select("trial_id", "status").iter_rows()) == {plan.trials[0].name: "done", plan.trials[1].name: "failed"}
    done, failed = (trials.row(by_predicate=pl.col("status") == status, named=True) for status in ("done", "failed"))
    assert "gradient is not finite" in failed["error"] and failed["ndcg@10"] is None
    curve = curves.filter(pl.col("trial_id") == done["trial_id"])
    assert curve["epoch"].to_list() == list(range(done["epochs"])) and curve["ndcg@10"].max() == done["ndcg@10"] == best["mean"]
    assert load_config([plan.folder.path("best.yaml")]).finetune.learning_rate == best["values"][RATE]
    assert plan.folder.folders("") == ["trials"]  # nothing of Tune's own stays


@pytest.mark.slow
def test_a_cut_sweep_repeats_only_what_is_missing(swept):
    plan, _ = swept
    before = pl.read_parquet(plan.folder.path("trials.parquet"))
    good = plan.trials[0]
    written = plan.folder.filesystem.get_file_info(plan.trial_run(good).path("result.json")).mtime
    plan.folder.delete(f"trials/{plan.trials[1].name}")
    assert tuning.unfinished(plan) == 1
    tuning.search(Plan(plan.config), Quiet())
    after = pl.read_parquet(plan.folder.path("trials.parquet"))
    assert after.drop("seconds").equals(before.drop("seconds"))
    assert plan.folder.filesystem.get_file_info(plan.trial_run(good).path("result.json")).mtime == written


def test_a_sweep_on_another_config_is_refused(swept):
    plan, _ = swept
    tuning.check_base(plan)
    with pytest.raises(ArtifactError, match="finetune.epochs: swept on 3, now 4"):
        tuning.check_base(Plan(with_values(plan.config, {"finetune.epochs": 4})))


def test_seeds_stand_on_runs_of_their_own_that_share_what_no_seed_changes(swept):
    plan, _ = swept
    seeds = Plan(with_values(plan.config, {"sweep": {"space": {RATE: [1e-3]}, "seeds": [0, 7]}}))
    own, other = seeds.trials
    assert seeds.seed_run(0) == seeds.run
    assert seeds.trial_run(own).path("features/text") == seeds.trial_run(other).path("features/text") == seeds.run.path("features/text")
    assert seeds.trial_run(other).path("pretrain") == seeds.folder.path("seeds/7/pretrain")
    assert seeds.to_prepare(7)[-1] == "pretrain" and own.name != other.name


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"space": {"sequencer.num_layer": [1]}}, "did you mean sequencer.num_layers"),
        ({"space": {"sequencer.dropout": [0.1, 2]}}, "sequencer.dropout"),
        ({"space": {"compute.address": ["x"]}}, "a sweep varies"),
        ({"space": {"ranking.decay": [0.5]}}, "set sweep.stage to a later one"),
        ({"space": {RATE: [1.0]}, "scheduler": "asha", "stage": "quantizer"}, "no stage up to quantizer|compares the epochs"),
        ({"space": {RATE: [1.0]}, "scheduler": "asha", "objectives": {"ms_per_user": "min"}}, "epochs, which have no ms_per_user"),
        ({"space": {RATE: {"uniform": [0.1, 1.0]}}, "search": "optuna", "seeds": [0, 1]}, "give one seed"),
        ({"space": {RATE: [1.0]}, "seeds": [0, 1, 0]}, "names a seed twice"),
        ({"space": {RATE: [1.0]}, "seeds": []}, "sweep.seeds"),
    ],
)
def test_what_cannot_be_swept_is_refused_at_once(shop, tmp_path, sweep, said):
    with pytest.raises(ValueError, match=said):
        Plan(with_values(small_config(shop, tmp_path), {"sweep": sweep}))


def test_a_trial_shares_the_trainings_that_ignore_what_it_changes(shop, tmp_path):
    plan = Plan(with_values(small_config(shop, tmp_path), {"sweep": {"space": {"sequencer.beam": [30]}, "stage": "evaluate"}}))
    assert plan.shared(plan.trials[0])[-2:] == ["finetune", "ranking"]
    with pytest.raises(ValueError, match="no stage up to finetune depends on sequencer.beam"):
        Plan(with_values(small_config(shop, tmp_path), {"sweep": {"space": {"sequencer.beam": [30]}, "stage": "finetune"}}))


def test_figures_of_several_targets_are_means_over_those_that_have_them():
    assert trials._mean([{"loss": 1.0}, {"loss": 3.0, "hr@10": 0.5}]) == {"loss": 2.0, "hr@10": 0.5}
    assert trials._mean([{"loss": 3.0, "hr@10": 0.5}, {"loss": 1.0}, {}]) == {"loss": 2.0, "hr@10": 0.5}


def test_the_figures_of_a_trial_are_those_of_its_stages_folders(shop, tmp_path):
    space = {"quantizer.num_levels": [2]}
    plan = Plan(
        with_values(small_config(shop, tmp_path), {"sweep": {"space": space, "stage": "quantizer", "objectives": {"error": "min"}}})
    )
    for stage, error in (("fusion", 9.0), ("quantizer", 0.5)):
        plan.run.write_bytes(f"{stage}/metrics.jsonl", json.dumps({"epoch": 0, "error": error}).encode() + b"\n")
    assert trial_metrics(plan, plan.config, plan.run) == {"error": 0.5}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_optuna_and_asha_on_many_trials(swept):
    plan, _ = swept
    space = {RATE: {"loguniform": [1e-6, 1e-2]}}
    drawn = {"name": "drawn", "space": space, "search": "optuna", "num_trials": 3, "objectives": {"ndcg@10": "max", "ms_per_user": "min"}}
    optuna = other(plan, drawn)
    tuning.search(optuna, Quiet())
    assert tuning.unfinished(optuna) == 0
    assert all(row["ms_per_user"] > 0 and row["status"] == "done" for row in tuning.trial_rows(optuna))
    more = other(plan, drawn | {"num_trials": 4})
    tuning.search(more, Quiet())  # resumes
    assert len({row[RATE] for row in tuning.trial_rows(more)}) == 4
    halving = {"name": "halving", "space": {RATE: [3e-3, 1e-3, 1e-7, 1e-8]}, "scheduler": "asha", "grace_epochs": 1, "max_concurrent": 1}
    asha = other(plan, halving, {"finetune.epochs": 4})
    tuning.search(asha, Quiet())
    rows = {row[RATE]: row for row in tuning.trial_rows(asha)}
    assert "stopped" in {rows[1e-7]["status"], rows[1e-8]["status"]} and rows[3e-3]["status"] == "done"


def test_a_table_ranks_every_user_by_every_variant(swept, finished):
    plan, _ = swept
    variants = {"whole": {}, "no blend": {"ranking": {"enabled": False}}}
    table = Table(title="T", reference="whole", variants=variants, rankings=["ridge"], seeds=[0])
    plan = other(plan, {"name": "table", "stage": "evaluate", "search": "variants", "variants": variants, "seeds": [0]})
    assert tuning.search(plan, Quiet())["values"] in ({}, {"ranking.enabled": False})
    assert [row["variant"] for row in tuning.trial_rows(plan)] == ["whole", "no blend"]
    ranks = tuning.ranks(plan, table)
    expected = (
        pl.DataFrame(finished[1].read("evaluate/ranks")).filter(pl.col("model").is_in(["model", "sequencer"])).sort("model", "user_id")
    )
    found = ranks.filter(pl.col("row") != "ridge").sort(pl.col("row") == "no blend", "user_id")
    assert found["rank_all"].equals(expected["rank_all"]) and found["rank_unseen"].equals(expected["rank_unseen"])
    assert ranks["row"].unique().sort().to_list() == ["no blend", "ridge", "whole"]
    seconds = dict(ranks.group_by("row").agg(pl.col("training_seconds").first()).iter_rows())
    assert seconds["ridge"] is None and 0 < seconds["no blend"] <= seconds["whole"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "space", "values"),
    [
        ("quantizer", {"quantizer.num_levels": [2]}, {"quantizer.kind": "kmeans"}),
        ("fusion", {"features.text.max_tokens": [8]}, {}),
        ("ranking", {"ranking.decay": [0.5]}, {}),
    ],
)
def test_trials_of_every_kind_of_stage_find_resources(swept, stage, space, values):
    """Their tasks run in addition to the trial, whose own placement group holds no CPU."""
    plan = other(swept[0], {"name": stage, "stage": stage, "space": space}, values)
    tuning.search(plan, Quiet())
    assert [(row["status"], row["error"]) for row in tuning.trial_rows(plan)] == [("done", None)]
