"""Trials of a sweep that need no cluster."""

from __future__ import annotations

from qbert_ray.config.loading import with_values
from qbert_ray.storage.catalog import run_config
from qbert_ray.sweeps.trials import DONE, Plan, run_trial
from tests.small_run import make_run


def test_a_trial_that_leaves_out_all_of_its_own_stages_is_still_a_run(tmp_path):
    run = make_run(tmp_path / "run")
    run.write_bytes("finetune/shop/metrics.jsonl", b'{"epoch": 0, "hr@10": 0.2, "ndcg@10": 0.1}\n')
    sweep = {"stage": "ranking", "space": {"ranking.enabled": [False]}, "objectives": {"ms_per_user": "min"}}
    plan = Plan(with_values(run_config(run), {"data.semantic_ids": "ids.parquet", "sweep": sweep}))
    metrics = run_trial(plan, plan.trials[0], lambda line: None)
    assert metrics["ndcg@10"] == 0.1 and metrics["ms_per_user"] > 0
    assert plan.result(plan.trials[0])["status"] == DONE
    assert not run_config(plan.trial_run(plan.trials[0])).ranking.enabled
