"""How trials are compared and resumed, without a cluster."""

from types import SimpleNamespace

import pyarrow as pa
import pytest

from qbert_ray.storage.columns import SEQUENCES
from qbert_ray.storage.directory import ArtifactError
from qbert_ray.sweeps import tuning
from qbert_ray.sweeps.trials import BEGUN, DONE, Trial, TrialProgress
from tests.sweeps.test_trials import plan_of

EPOCHS = 4
SIZES = {"finetune.batch_size": [64, 128]}


def reported(plan, monkeypatch):
    """What Tune gets from a trial whose epochs have a metric, and its end the number of parameters too."""

    def run_trial(plan, trial, report):
        for epoch in range(EPOCHS):
            report({"ndcg@10": 0.1, "epoch": epoch + 1})
        return {"ndcg@10": 0.1, "parameters": 5.0}

    lines = []
    monkeypatch.setattr(tuning, "run_trial", run_trial)
    monkeypatch.setattr(tuning.tune, "report", lines.append)
    tuning._trainable({"number": 0} if plan.trials else {"finetune.batch_size": 64}, plan=plan)
    return lines


def test_asha_sees_every_epoch_also_with_an_objective_that_only_the_end_has(tmp_path, monkeypatch):
    both = {"objectives": {"ndcg@10": "max", "parameters": "min"}, "space": SIZES}
    assert len(reported(plan_of(tmp_path, both | {"scheduler": "asha"}), monkeypatch)) == EPOCHS + 1
    assert len(reported(plan_of(tmp_path, both | {"search": "optuna"}), monkeypatch)) == 1  # Optuna takes all objectives or none
    with pytest.raises(ValueError, match="have no parameters; with optuna, name none but ndcg@10"):
        plan_of(tmp_path, both | {"search": "optuna", "scheduler": "asha"})


def test_asha_lets_the_longest_trial_run_to_its_end(tmp_path):
    scheduler = tuning._scheduler(plan_of(tmp_path, {"space": {"finetune.epochs": [10, 40]}, "scheduler": "asha"}))
    trial = SimpleNamespace(trial_id="longest")
    scheduler.on_trial_add(None, trial)
    said = {scheduler.on_trial_result(None, trial, {"epoch": epoch, "ndcg@10": epoch / 100}) for epoch in range(1, 41)}
    assert said == {"CONTINUE"}


def test_finished_trials_that_lack_a_new_objective_are_named_before_anything_runs(tmp_path):
    plan = plan_of(tmp_path, {"space": SIZES})
    for trial in plan.trials:
        plan.conclude(trial, DONE, 1.0, {"ndcg@10": 0.1, "hr@10": 0.2})
    tuning.check_base(plan_of(tmp_path, {"space": SIZES, "objectives": {"hr@10": "max"}}))
    with pytest.raises(
        ValueError, match="names ms_per_user; a trial up to finetune has hr@10, ndcg@10; these are finished: choose another"
    ):
        tuning.check_base(plan_of(tmp_path, {"space": SIZES, "objectives": {"ms_per_user": "min"}}))


def test_a_sweep_on_other_data_is_refused_and_one_whose_files_are_gone_is_not(tmp_path):
    (tmp_path / "items.csv").write_text("item_id\ni1\n")
    plan = plan_of(tmp_path / "run", {"space": SIZES}, **{"data.root": str(tmp_path)})
    plan.folder.write_json(tuning.SWEEP, tuning._description(plan))
    tuning.check_base(plan)
    (tmp_path / "items.csv").write_text("item_id\ni2\n")
    with pytest.raises(ArtifactError, match="holds a sweep on another config:\n  content of data.domains.shop.items"):
        tuning.check_base(plan)
    (tmp_path / "items.csv").unlink()
    tuning.check_base(plan)


def test_optuna_counts_the_trials_of_its_own_seed(tmp_path):
    first, second = (plan_of(tmp_path, {"space": SIZES, "search": "optuna", "num_trials": 2, "seeds": [seed]}) for seed in (0, 1))
    for size in (64, 128):
        trial = Trial({"finetune.batch_size": size}, 0)
        first.folder.write_json(f"trials/{trial.name}/{BEGUN}", {"values": trial.values, "seed": 0})
        first.conclude(trial, DONE, 1.0, {"ndcg@10": 0.1})
    assert (tuning.unfinished(first), tuning.unfinished(second)) == (0, 2)
    assert len(tuning.trial_rows(first)) == 2 and not tuning.trial_rows(second)


def test_the_budget_counts_training_items_of_the_domains_that_are_read(tmp_path):
    """Of users with one interaction too, which are not held out."""
    for stage, read in (("finetune", (5 + 3) / 2), ("pretrain", 7)):
        values = {"data.domains": {name: {"role": role} for name, role in (("a", "target"), ("b", "target"), ("c", "source"))}}
        plan = plan_of(tmp_path / stage, {"space": {f"{stage}.batch_size": [64, 128]}, "max_tokens": 100, "stage": stage}, **values)
        for name, train in (("a", [[1, 2], [3], [1, 0]]), ("b", [[0, 1, 2]]), ("c", [[1] * 7])):
            rows = {"domain": [name] * len(train), "user_id": [str(user) for user in range(len(train))], "train": train}
            table = pa.table(rows | {split: [None] * len(train) for split in ("valid", "test")}, schema=SEQUENCES)
            plan.run.write_part("ingest/sequences", f"{name}-00000.parquet", table)
        budget = tuning._Budget(plan)
        assert budget.epoch == read and not budget.stop_all(), stage
        for _ in range(25):
            budget("trial", {"ndcg@10": 0.1})
        assert budget.stop_all(), stage


def test_the_curve_of_several_targets_holds_the_epochs_of_each(tmp_path):
    plan = plan_of(tmp_path, {"space": SIZES})
    trial, said = plan.trials[0], []
    for begun in range(2):  # a trial that resumes writes an epoch again
        progress = TrialProgress(plan.trial_run(trial), plan.curve(trial), said.append)
        for domain, epochs in (("a", (0, 1)), ("b", (0,))):
            progress.note(domain)
            for epoch in epochs:
                progress.epoch({"epoch": epoch, "ndcg@10": epoch + len(domain) + begun / 8})
    found = [(line["domain"], line["epoch"], line["ndcg@10"]) for line in plan.curve(trial)]
    assert found == [("a", 0, 1.125), ("a", 1, 2.125), ("b", 0, 1.125)] and len(said) == 6


def test_the_best_setting_holds_a_value_that_was_written_in_two_ways(tmp_path):
    plan = plan_of(tmp_path, {"space": {"finetune.learning_rate": ["1e-3", "2e-3"], "finetune.batch_size": [128, 256]}})
    for trial in plan.trials:
        plan.conclude(trial, DONE, 1.0, {"ndcg@10": 0.9 if trial.values == plan.as_is else 0.1})
    best = tuning.write_tables(plan)
    assert best is not None and (best["values"], best["mean"]) == (plan.as_is, 0.9)
