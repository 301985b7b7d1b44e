"""Trials of a sweep that need no cluster."""

from __future__ import annotations

import pytest

from qbert_ray.config.loading import load_config, with_values
from qbert_ray.config.yaml_files import read_yaml
from qbert_ray.storage.catalog import run_config
from qbert_ray.sweeps.trials import DONE, Plan, run_trial
from tests.small_run import make_run

FILES = {"items": "items.csv", "interactions": "interactions.csv"}
SWITCHED_OFF = {"pretrain.enabled": False, "finetune.objective": "masked"}


def plan_of(folder, sweep, **values):
    """A plan over a shop that is never read; `values` are dotted paths of the config."""
    return Plan(with_values(load_config(), {"run.dir": str(folder), "data.domains": {"shop": FILES}} | values | {"sweep": sweep}))


def test_a_trial_that_leaves_out_all_of_its_own_stages_is_still_a_run(tmp_path):
    run = make_run(tmp_path / "run")
    run.write_bytes("finetune/shop/metrics.jsonl", b'{"epoch": 0, "hr@10": 0.2, "ndcg@10": 0.1}\n')
    sweep = {"stage": "ranking", "space": {"ranking.enabled": [False]}, "objectives": {"ms_per_user": "min"}}
    plan = Plan(with_values(run_config(run), {"data.semantic_ids": "ids.parquet", "sweep": sweep}))
    metrics = run_trial(plan, plan.trials[0], lambda line: None)
    assert metrics["ndcg@10"] == 0.1 and metrics["ms_per_user"] > 0
    assert plan.result(plan.trials[0])["status"] == DONE
    assert not run_config(plan.trial_run(plan.trials[0])).ranking.enabled


@pytest.mark.parametrize("search", ["each", "grid"])
def test_a_value_that_is_written_in_two_ways_is_one_setting(search, tmp_path):
    """YAML reads 1e-3 as text; the learning rate is .001 anyway."""
    space = read_yaml("finetune: {learning_rate: [1e-3, 0.001, 2e-3], batch_size: [128, 256]}")
    plan = plan_of(tmp_path, {"space": space, "search": search, "seeds": [0, 1]})
    found = [(trial.seed, *trial.values.values()) for trial in plan.trials]
    settings = [(0.001, 128), (0.002, 128), (0.001, 256)] + [(0.002, 256)] * (search == "grid")
    assert sorted(found) == sorted((seed, *each) for seed in (0, 1) for each in settings)


@pytest.mark.parametrize("name", ["finetune", "score_histories", "a/b", "", ".hidden", ".."])
def test_a_sweep_is_no_folder_of_a_stage(name, tmp_path):
    with pytest.raises(ValueError, match="becomes a folder of the run"):
        plan_of(tmp_path, {"name": name, "space": {"finetune.batch_size": [64]}})


def test_variants_that_set_the_same_are_refused_by_name(tmp_path):
    variants = read_yaml("{fast: {finetune: {learning_rate: 1e-2}}, faster: {finetune: {learning_rate: 0.01}}, slow: {}}")
    with pytest.raises(ValueError, match="sweep.variants: 'fast' and 'faster' set the same values"):
        plan_of(tmp_path, {"search": "variants", "variants": variants})


@pytest.mark.parametrize(
    ("values", "sweep", "said"),
    [
        ({}, {"space": {"pretrain.last_item_share": [0.1, 0.5]}}, "pretrain.last_item_share: pretrain is skipped: fine-tuning reads every"),
        ({}, {"space": {"pretrain.enabled": [True, False]}}, "pretrain.enabled: pretrain is skipped"),
        (
            {},
            {"space": {"sequencer.width": [32]}, "stage": "pretrain"},
            "sweep.stage=pretrain: no trial runs that stage, since fine-tuning",
        ),
        ({}, {"space": {"finetune.mask_ratio.random": [0.1, 0.5]}}, "mask_ratio.random: nothing is masked with finetune.objective=causal"),
        (SWITCHED_OFF, {"space": {"pretrain.epochs": {"randint": [1, 5]}}, "search": "optuna"}, "pretrain.enabled is false"),
        ({"sequencer.kind": "generative"}, {"space": {"finetune.masks": [{"span": 1.0}]}}, "a generative model has no masks"),
        ({"data.semantic_ids": "ids.parquet"}, {"space": {"quantizer.num_levels": [2]}}, "quantizer is skipped: semantic IDs are given"),
        (
            {},
            {"variants": {"as it is": {}, "mlm": {"pretrain": {"epochs": 2}}}, "search": "variants"},
            "'mlm' would be the config as it is",
        ),
    ],
)
def test_what_no_trial_reads_is_refused(values, sweep, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        plan_of(tmp_path, sweep, **values)


@pytest.mark.parametrize(
    ("values", "sweep"),
    [
        ({}, {"space": {"pretrain.epochs": [1, 5], "finetune.objective": ["causal", "masked"]}, "search": "grid"}),
        ({}, {"space": {"finetune.masks": [{"span": 1.0}], "finetune.objective": ["masked"]}, "search": "grid"}),
        (SWITCHED_OFF, {"space": {"pretrain.epochs": {"randint": [1, 5]}, "pretrain.enabled": [True, False]}, "search": "optuna"}),
        ({"data.semantic_ids": "ids.parquet"}, {"space": {"features.structure.dim": [16]}}),
        ({}, {"variants": {"file": {"pretrain": {"epochs": 2}, "sequencer": {"width": 32}}}, "search": "variants"}),
    ],
)
def test_a_sweep_may_vary_what_makes_a_field_count(values, sweep, tmp_path):
    assert plan_of(tmp_path, sweep, **values).paths


def test_asha_compares_a_pre_training_also_where_there_are_several_targets(tmp_path):
    domains = {"data.domains": {"shop": FILES, "books": FILES, "films": FILES | {"role": "source"}}}
    sweep = {"space": {"sequencer.dropout": [0.1, 0.5]}, "scheduler": "asha", "stage": "pretrain"}
    assert len(plan_of(tmp_path, sweep, **domains).trials) == 2
    with pytest.raises(ValueError, match="pretrain, or finetune of one target"):
        plan_of(tmp_path, sweep | {"stage": "finetune"}, **domains)


@pytest.mark.parametrize(
    ("space", "search", "most"),
    [
        ({"finetune.epochs": [10, 40]}, "each", 40),
        ({"finetune.epochs": [2]}, "grid", 2),
        ({"finetune.epochs": {"randint": [5, 60]}}, "optuna", 60),
        ({"finetune.batch_size": [32, 64]}, "each", 10),
        ({"finetune.batch_size": [32, 64]}, "optuna", 10),
    ],
)
def test_the_most_epochs_are_those_of_the_longest_trial(space, search, most, tmp_path):
    assert plan_of(tmp_path, {"space": space, "search": search, "scheduler": "asha"}).most_epochs() == most
