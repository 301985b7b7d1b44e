"""What fits on a cluster, from the resources of its nodes alone."""

import pytest

from qbert_ray.config.loading import load_config
from qbert_ray.config.schema import Actors, Workers
from qbert_ray.execution import ray_capacity as capacity
from qbert_ray.execution import ray_train
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import STAGES

LAPTOP = [{"CPU": 2.0, "node:__internal_head__": 1.0}]
SMALL_PAIR = [{"CPU": 1.0}, {"CPU": 1.0}]
MIXED = [{"CPU": 32.0}, *[{"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}] * 2]
KEYS = sorted({key for stage in STAGES for key in stage.compute})


def bundle(there, **workers):
    found = capacity.worker_bundle(Workers(**workers), there)
    return found["CPU"], found["GPU"]


def refused(monkeypatch, there, *overrides):
    monkeypatch.setattr(capacity, "nodes", lambda: there)
    with pytest.raises(capacity.CapacityError) as error:
        capacity.check(load_config([], ["pretrain.microbatches=2", "finetune.microbatches=2", *overrides]), KEYS)
    return str(error.value)


def test_bundles_are_not_torn_between_nodes():
    assert capacity.count_fitting(SMALL_PAIR, {"CPU": 1}) == 2
    assert capacity.count_fitting(SMALL_PAIR, {"CPU": 2}) == 0
    assert capacity.count_fitting(MIXED, {"CPU": 4, "GPU": 0.5}) == 4
    assert capacity.count_fitting([{"CPU": 1.0}], {"CPU": 0.1, "GPU": 0}) == 10


def test_workers_share_what_there_is():
    assert bundle(LAPTOP) == (2, 0)
    assert bundle(LAPTOP, num_workers=2) == (1, 0)
    assert bundle(SMALL_PAIR, num_workers=2) == (1, 0)
    assert bundle([{"CPU": 8.0}] * 2, num_workers=3) == (4, 0)  # not 16 / 3: two of the three share a node
    assert bundle([{"CPU": 64.0}]) == (16, 0)


def test_workers_with_gpus_take_the_cpus_of_their_node():
    assert bundle(MIXED, num_workers=2) == (8, 1)
    assert bundle(MIXED, num_workers=3) == (10, 0)  # no GPU for the third, so none for any; all on the largest node
    assert bundle(MIXED, num_workers=1, use_gpu=False) == (16, 0)
    assert bundle(MIXED, num_workers=2, accelerator_type="L4", use_gpu=False) == (8, 0)


@pytest.mark.parametrize(
    ("there", "workers", "number"),
    [
        (LAPTOP, {"num_workers": "auto"}, 1),
        (SMALL_PAIR, {"num_workers": "auto"}, 2),
        (MIXED, {"num_workers": "auto"}, 2),  # one per GPU
        (MIXED, {"num_workers": "auto", "use_gpu": False}, 3),  # one per node
        (MIXED, {"num_workers": "auto", "placement_strategy": "STRICT_PACK"}, 1),
        (SMALL_PAIR, {"num_workers": "auto", "placement_strategy": "STRICT_PACK"}, 1),
        (SMALL_PAIR, {"num_workers": "auto", "cpus_per_worker": 2}, 1),  # none fits: refused by `check`
        ([{"CPU": 0.0}, *SMALL_PAIR], {"num_workers": "auto"}, 2),  # a head that runs no work
        ([{"CPU": 4.0}] * 9, {"num_workers": "auto"}, 8),  # as many as microbatches
        (LAPTOP, {"num_workers": [1, 4]}, 1),
        (LAPTOP, {"num_workers": [2, 4]}, 2),
        ([{"CPU": 4.0}] * 9, {"num_workers": [1, 4]}, 4),
        (LAPTOP, {"num_workers": 3}, 3),
    ],
)
def test_the_number_of_workers_follows_the_cluster(there, workers, number):
    assert capacity.sized(Workers(**workers), there, 8).num_workers == number


def test_workers_whose_number_follows_the_cluster_take_whole_nodes(monkeypatch):
    assert bundle([{"CPU": 8.0}] * 2, num_workers="auto") == bundle([{"CPU": 8.0}] * 2, num_workers=[1, 4]) == (8, 0)
    assert bundle(MIXED, num_workers="auto") == (8, 1)
    monkeypatch.setattr(capacity, "nodes", lambda: SMALL_PAIR)
    for number in ("auto", "[1, 8]", "[2, 8]"):
        capacity.check(load_config([], [f"compute.finetune.num_workers={number}", "finetune.microbatches=8"]), KEYS)
    assert "asks for 3 workers of" in refused(monkeypatch, SMALL_PAIR, "compute.finetune.num_workers=[3, 8]", "finetune.microbatches=8")
    assert "8 workers share 2 microbatches" in refused(monkeypatch, SMALL_PAIR, "compute.finetune.num_workers=[1, 8]")


def test_rays_scaling_config_is_elastic_for_a_pair(monkeypatch):
    monkeypatch.setattr(ray_train, "nodes", lambda: SMALL_PAIR)
    elastic, fixed = (ray_train.scaling_config(Workers(num_workers=number)) for number in ((1, 4), 2))
    assert elastic.elasticity_enabled and (elastic.min_workers, elastic.max_workers) == (1, 4)
    assert not fixed.elasticity_enabled and fixed.num_workers == 2
    assert elastic.resources_per_worker == fixed.resources_per_worker == {"CPU": 1}


@pytest.mark.parametrize("number", ["[4, 2]", "0", "[0, 2]", "many", "[1, 2, 3]"])
def test_a_number_of_workers_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="compute.finetune.num_workers"):
        load_config([], [f"compute.finetune.num_workers={number}"])


@pytest.mark.parametrize("there", [LAPTOP, SMALL_PAIR, MIXED, [{"CPU": 1.0}]])
def test_the_defaults_fit_everywhere(monkeypatch, there):
    monkeypatch.setattr(capacity, "nodes", lambda: there)
    capacity.check(load_config(), KEYS)
    fits = capacity.count_fitting(there, capacity.actor_bundle(Actors(), there))
    assert 1 <= fits < 100
    everything, one, few = (capacity.pool(Actors(max_size=size), tasks) for size, tasks in ((None, 100), (1, 100), (50, 1)))
    assert (everything["min_size"], everything["max_size"]) == (fits, 100)  # the rest when nodes are added
    assert (one["min_size"], one["max_size"]) == (few["min_size"], few["max_size"]) == (1, 1)


@pytest.mark.parametrize(
    ("there", "override", "said"),
    [
        (LAPTOP, "compute.features.min_size=3", "compute.features asks for 3 actors of 1 CPU and 0 GPU; the cluster has 1 node of 2 CPU and 0 GPU, room for 2"),
        (LAPTOP, "compute.score.num_gpus=1", "compute.score asks for 1 actor of 1 CPU and 1 GPU"),
        (SMALL_PAIR, "compute.quantizer={cpus_per_worker: 2}", "compute.quantizer asks for 1 worker of 2 CPU and 0 GPU; the cluster has 2 nodes of 1 CPU"),
        (MIXED, "compute.finetune={num_workers: 2, use_gpu: true, placement_strategy: STRICT_PACK}", "STRICT_PACK"),
        (MIXED, "compute.fusion.accelerator_type=A100", "of accelerator type A100; the cluster has 1 node of 32 CPU and 0 GPU, 2 nodes of 8 CPU and 1 GPU, room for 0"),
        (MIXED, "compute.score.label_selector={pool: rankers}", "1 actor of 1 CPU and 0 GPU, on nodes labelled pool: rankers; the cluster has"),
        (MIXED, "compute.finetune.label_selector={pool: rankers}", "on nodes labelled pool: rankers"),
        (MIXED, "compute.pretrain.num_workers=3", "3 workers share 2 microbatches of a batch; raise pretrain.microbatches"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_what_there_is(monkeypatch, there, override, said):
    assert said in refused(monkeypatch, there, override)


def test_labels_choose_the_nodes_that_count(monkeypatch):
    found = [{"Alive": True, "Resources": node, "Labels": {"pool": pool}} for node, pool in zip(MIXED, ("data", "gpu", "gpu"), strict=True)]
    monkeypatch.setattr(capacity.ray, "nodes", lambda: found)
    monkeypatch.setattr(capacity.state, "get_cluster_config", lambda: None)
    there = capacity.nodes()
    assert capacity.count_fitting(there, capacity.actor_bundle(Actors(label_selector={"pool": "data"}, num_gpus=0), there)) == 32
    assert capacity.count_fitting(there, capacity.actor_bundle(Actors(label_selector={"pool": "gpu"}, num_gpus=0), there)) == 16
    assert bundle(there, num_workers=2, label_selector={"pool": "data"}) == (16, 0)
    assert bundle(there, num_workers=2, label_selector={"pool": "gpu"}) == (8, 1)
    assert capacity.plain(capacity.worker_bundle(Workers(label_selector={"pool": "gpu"}), there)) == {"CPU": 8, "GPU": 1}
    for selector in ("!gpu", "in(gpu, data)"):  # Ray understands these, and what they leave is not counted
        capacity.check(load_config([], [f"compute.score.label_selector={{pool: '{selector}'}}"]), ["score"])


def test_all_that_does_not_fit_is_said_at_once(monkeypatch):
    said = refused(
        monkeypatch, LAPTOP, *(f"compute.{key}.num_cpus=4" for key in ("features", "semantic_ids", "ranking", "evaluate", "score"))
    )
    assert [line.split()[0] for line in said.splitlines()] == [
        f"compute.{key}" for key in ("evaluate", "features", "ranking", "score", "semantic_ids")
    ]


def test_a_cluster_that_grows_is_not_refused(monkeypatch, ray_session):
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    monkeypatch.setattr(capacity, "nodes", lambda: LAPTOP)
    capacity.check(load_config([], ["compute.autoscaling=true", "compute.features.min_size=9"]), KEYS)
    monkeypatch.undo()
    groups = [
        NodeGroupConfig(resources={"CPU": 8, "GPU": 1}, max_count=3, name="gpu"),
        NodeGroupConfig(resources={"CPU": 16}, max_count=2, name="data"),
    ]
    monkeypatch.setattr(capacity.state, "get_cluster_config", lambda: ClusterConfig(node_group_configs=groups))
    there = capacity.nodes()
    assert capacity.count_fitting(there, {"GPU": 1}) == 3 and capacity.count_fitting(there, {"CPU": 16}) == 2
    capacity.check(load_config([], ["compute.features={min_size: 3, num_gpus: 1, num_cpus: 8}"]), KEYS)
    with pytest.raises(capacity.CapacityError, match="room for 3"):
        capacity.check(load_config([], ["compute.features={min_size: 4, num_gpus: 1, num_cpus: 8}"]), KEYS)


def test_a_job_that_would_lose_its_results_is_refused(monkeypatch, tmp_path, ray_session):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://code.zip"}}')
    with pytest.raises(capacity.CapacityError, match="run.dir is runs/run, inside the copy of the code that ends with the job"):
        capacity.check_reachable(load_config(), RunDir("runs/run"))
    capacity.check_reachable(load_config([], [f"run.dir={tmp_path}"]), RunDir(str(tmp_path)))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    capacity.check_reachable(load_config(), RunDir("runs/run"))


def test_a_folder_that_a_node_does_not_see_is_named(monkeypatch, tmp_path, ray_session):
    """The second of two nodes; here the same one twice, with an input folder that is nowhere."""
    (node,) = ray_session.nodes()
    monkeypatch.setattr(capacity.ray, "nodes", lambda: [node, node])
    run = RunDir(str(tmp_path / "run"))
    capacity.check_reachable(load_config([], [f"data.root={tmp_path}"]), run)
    with pytest.raises(
        capacity.CapacityError, match=f"data.root is {tmp_path}/none, which the node .* does not see; give a folder that all"
    ):
        capacity.check_reachable(load_config([], [f"data.root={tmp_path}/none"]), run)
    assert list((tmp_path / "run").iterdir()) == []


def test_every_key_of_compute_belongs_to_a_stage():
    config = load_config().compute
    assert sorted(name for name in type(config).model_fields if isinstance(getattr(config, name), Actors | Workers)) == KEYS
