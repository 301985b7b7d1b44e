"""Two `ray start` nodes, real drivers and jobs, real kills: the outputs of an undisturbed run, or a clear reason."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qbert_ray.storage import columns
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.training import Loop
from tests.execution import slow_parts, slow_training
from tests.execution.test_kill import compare
from tests.nodes import RAY, ROOT, Nodes, clean_environment
from tests.shop import SMALL, make_shop
from tests.store import BUCKET, KEY, SECRET, Store

WAIT = 900  # seconds; a limit for what hangs
TEXT = ["features.modalities=[text]", "data.rows_per_part=2", "compute.features={min_size: 2, max_size: 2}"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return make_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def nodes():
    """One CPU each, so that two actors have to be on both."""
    nodes = Nodes(1, 1, dashboard=True, RAY_health_check_period_ms="1000", RAY_health_check_failure_threshold="3")
    yield nodes
    nodes.stop()


def overrides(shop: Path | str, run: Path | str, *more: str) -> list[str]:
    return ["-c", str(ROOT / "configs" / "demo.yaml"), f"data.root={shop}", f"run.dir={run}", *SMALL, *more]


def start(command: str, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "qbert_ray.cli.main", command, *arguments]
    return subprocess.Popen(program, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    said, _ = process.communicate(timeout=WAIT)
    assert process.returncode == status, said
    return said


def wait_for(process: subprocess.Popen[str], there) -> None:
    until = time.monotonic() + WAIT
    while not there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def submit(nodes: Nodes, *command: str) -> subprocess.CompletedProcess[str]:
    program = [*RAY, "job", "submit", "--address", nodes.jobs, "--working-dir", ".", "--", *command]
    return subprocess.run(program, env=nodes.environment, cwd=ROOT, capture_output=True, text=True, timeout=1500)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["finetune.epoch=1"], "did you mean finetune.epochs?"),
        (["run.dir={tmp}/run", "data.root={tmp}", "compute.features.min_size=3"], "compute.features asks for 3 actors of 1 CPU and 0 GPU"),
    ],
)
def test_a_job_that_cannot_succeed_ends_with_the_reason(nodes, tmp_path, given, said):
    job = submit(nodes, "python", "-m", "jobs.run_pipeline", "-c", "configs/demo.yaml", *(text.format(tmp=tmp_path) for text in given))
    assert job.returncode == 1
    last = "\n".join(job.stdout.strip().splitlines()[-3:])
    assert said in last and "error:" in last, job.stdout
    assert "exit code 2" in job.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_survives_the_process_that_leads_it(nodes, shop, tmp_path):
    """Ray Train restarts workers by itself, but nothing restarts its controller."""
    environment, run, epochs = nodes.environment | {"RAY_ADDRESS": nodes.address}, RunDir(str(tmp_path / "run")), 60
    more = ("features.modalities=[structure]", "compute.checkpoint_seconds=0", f"fusion.epochs={epochs}")
    arguments = overrides(shop, run.uri, *more)
    for stage in ("ingest", "features"):
        finish(start(stage, arguments, environment))
    process = start("fusion", arguments, environment)
    wait_for(process, lambda: any((tmp_path / "run" / "fusion" / "checkpoints").glob("*/*.json")))
    killed = [pid for node in (0, 1) for pid in nodes.pids(node, "ray::TrainController")]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    finish(process)
    assert len(killed) == 1 and Manifest.load(run, "fusion") is not None
    assert [json.loads(line)["epoch"] for line in run.read_bytes("fusion/metrics.jsonl").splitlines()] == list(range(epochs))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_that_joins_during_a_pass_is_used(tmp_path):
    nodes, parts = Nodes(1), 120
    try:
        command = [sys.executable, "-m", "tests.execution.slow_parts", nodes.address, str(tmp_path), str(parts)]
        process = subprocess.Popen(command, env=nodes.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(process, lambda: RunDir(str(tmp_path)).names(f"{slow_parts.TABLE}/.counts"))
        nodes.add(1)
        finish(process)
    finally:
        nodes.stop()
    places = RunDir(str(tmp_path)).read(slow_parts.TABLE)[slow_parts.NODE].to_pylist()
    assert len(places) == parts and len(set(places)) == 2
    assert min(map(places.count, set(places))) > parts / 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_whose_nodes_join_and_leave_gives_the_model_of_one_worker(tmp_path):
    nodes, run = Nodes(1, RAY_health_check_period_ms="1000", RAY_health_check_failure_threshold="3"), RunDir(str(tmp_path))
    starts = tmp_path / "starts.jsonl"

    def sizes() -> list[int]:
        return [json.loads(line)[1] for line in starts.read_text().splitlines()] if starts.exists() else []

    try:
        command = [sys.executable, "-m", "tests.execution.slow_training", nodes.address, str(tmp_path)]
        process = subprocess.Popen(command, env=nodes.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(process, lambda: sizes() == [1])
        nodes.add(1)
        wait_for(process, lambda: sizes()[-1:] == [2])
        for pid in nodes.pids(1, "raylet/raylet"):
            os.kill(pid, signal.SIGKILL)
        wait_for(process, lambda: sizes()[-1:] == [1])
        (tmp_path / "hurry").touch()
        finish(process)
    finally:
        nodes.stop()
    assert len(sizes()) >= 3
    alone = Loop(slow_training.Slow(tmp_path), torch.device("cpu"))  # it finds the file that lets it hurry
    while not alone.finished:
        alone.run_epoch()
    trained = run.load_model(f"{slow_training.FOLDER}/model")[0]
    assert all(torch.allclose(trained[name], weight, atol=1e-6) for name, weight in alone.weights().items())
    epochs = [json.loads(line)["epoch"] for line in run.read_bytes(f"{slow_training.FOLDER}/metrics.jsonl").splitlines()]
    assert epochs == list(range(slow_training.EPOCHS))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_object_store_too_small_for_the_interactions_spills_them(tmp_path):
    """400,000 interactions of 10,000 users pass through a store of 80 MB, in many blocks that are larger together."""
    random = np.random.default_rng(0)
    count = 400_000
    rows = {
        "user_id": [f"user-{number:030}" for number in random.integers(0, 10_000, count)],
        "item_id": [f"item-{number:030}" for number in random.integers(0, 2_000, count)],
        "timestamp": random.integers(0, 10**9, count),
    }
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "data" / "interactions.parquet", row_group_size=40_000)
    pq.write_table(pa.table({"item_id": sorted(set(rows["item_id"]))}), tmp_path / "data" / "items.parquet")
    (tmp_path / "shop.yaml").write_text(
        "data: {domains: {shop: {items: items.parquet, interactions: interactions.parquet, text_fields: []}}}"
    )
    config = ["-c", str(tmp_path / "shop.yaml"), f"data.root={tmp_path / 'data'}"]
    nodes = Nodes(2, object_store=80_000_000)
    try:
        process = start("ingest", [*config, f"run.dir={tmp_path / 'small'}"], nodes.environment | {"RAY_ADDRESS": nodes.address})
        spilled = False  # the folder is always there, its files only while their objects live
        while process.poll() is None:
            spilled = spilled or any(nodes.folder.glob("session_2*/ray_spilled_objects*/*"))
            time.sleep(0.05)
        finish(process)
    finally:
        nodes.stop()
    assert spilled
    finish(start("ingest", [*config, f"run.dir={tmp_path / 'large'}"], clean_environment()))
    small, large = RunDir(str(tmp_path / "small")), RunDir(str(tmp_path / "large"))
    for table in ("ingest/items", "ingest/interactions", "ingest/sequences", "ingest/rejected"):
        assert small.read(table).equals(large.read(table))
    assert small.read("ingest/interactions").num_rows > count / 2


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_stopped_and_killed_in_every_way_the_vectors_are_those_of_one_process(nodes, shop, tmp_path):
    """SIGTERM and kill -9 of the driver, kill -9 of an actor, kill -9 of a node: one stage, one try after the other."""
    environment = nodes.environment | {"RAY_ADDRESS": nodes.address}
    run = RunDir(str(tmp_path / "run"))
    arguments = overrides(shop, run.uri, *TEXT)
    finish(start("ingest", arguments, environment))

    def parts() -> int:
        return len(run.names("features/text/.counts"))

    process = start("features", arguments, environment)
    wait_for(process, lambda: parts() > 0)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 143).endswith("stopped; run the same command again to resume\n")

    done = parts()
    process = start("features", arguments, environment)
    wait_for(process, lambda: parts() > done)
    process.kill()
    process.wait()

    done = parts()
    assert 2 <= done < len(run.parts("ingest/items"))
    process = start("features", arguments, environment)
    wait_for(process, lambda: parts() > done and nodes.pids(0, "_Publisher"))
    for pid in nodes.pids(0, "_Publisher"):
        os.kill(pid, signal.SIGKILL)
    for pid in nodes.pids(1, "raylet/raylet"):
        os.kill(pid, signal.SIGKILL)
    finish(process)
    assert Manifest.load(run, "features") is not None
    assert_vectors_are_those_of_one_process(run, shop, tmp_path)


def assert_vectors_are_those_of_one_process(run: RunDir, shop: Path, tmp_path: Path) -> None:
    from qbert_ray.config.loading import load_config
    from qbert_ray.features.stage import EncodePart

    config = load_config([ROOT / "configs" / "demo.yaml"], [f"data.root={shop}", *SMALL])
    alone = RunDir(str(tmp_path / "alone"))
    for part in run.parts("ingest/items"):
        alone.write_part("ingest/items", part, run.read_part("ingest/items", part))
    demo = config.data.domains["demo"]
    work = EncodePart(alone, config, "text", num_vectors=len(demo.text_fields) + len(demo.attributes))
    for part in alone.parts("ingest/items"):
        work(part)
    assert run.parts("features/text") == alone.parts("features/text")
    a, b = run.read("features/text"), alone.read("features/text")
    assert a["item_id"].equals(b["item_id"])
    assert np.allclose(columns.to_numpy(a["vectors"]), columns.to_numpy(b["vectors"]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_submitted_as_a_job_and_one_that_was_stopped_give_the_same(shop, tmp_path):
    """The default sizes, on two nodes of one CPU each."""
    sizes = [f"compute.{key}.max_size=null" for key in ("features", "semantic_ids", "ranking", "evaluate", "score")]
    sizes += [f"compute.{key}.cpus_per_worker=null" for key in ("fusion", "rqvae", "pretrain", "finetune")]
    nodes = Nodes(1, 1, dashboard=True)
    try:
        job = submit(nodes, "python", "-m", "jobs.run_pipeline", *overrides(shop, tmp_path / "job", *sizes))
        assert job.returncode == 0, job.stdout + job.stderr
        assert re.search(r'"metrics": "\S+/job/evaluate/metrics.json"', job.stdout) and "succeeded" in job.stdout
        environment = nodes.environment | {"RAY_ADDRESS": nodes.address}
        arguments = overrides(shop, tmp_path / "stopped", *sizes, "compute.checkpoint_seconds=0")
        for folder in ("fusion", "finetune/demo"):
            process = start("run", arguments, environment)
            wait_for(process, lambda folder=folder: any((tmp_path / "stopped" / folder / "checkpoints").glob("*/*.json")))
            process.send_signal(signal.SIGTERM)
            assert "stopped; run the same command again to resume" in finish(process, 143)
        finish(start("run", arguments, environment))
    finally:
        nodes.stop()
    compare(RunDir(str(tmp_path / "job")), RunDir(str(tmp_path / "stopped")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_on_s3_with_a_store_that_fails_for_a_while(shop, tmp_path, monkeypatch):
    """All of it on the store, nothing left on this machine, credentials nowhere; the same command again does nothing."""
    store, scratch = Store().start(), Path(tempfile.mkdtemp(prefix="qs", dir="/tmp"))  # short, since Ray puts sockets there
    try:
        store.upload(shop, "data")
        environment = clean_environment(**store.environment, TMPDIR=str(scratch))
        arguments = overrides(f"s3://{BUCKET}/data", f"s3://{BUCKET}/run", "compute.checkpoint_seconds=0")
        process = start("run", arguments, environment)
        for table in ("run/features/text/", "run/fusion/checkpoints/", "run/evaluate/"):
            wait_for(process, lambda table=table: store.answers and store.objects(table))
            store.fail(8)
        said = finish(process)
        assert store.refused > 3
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        run = RunDir(f"s3://{BUCKET}/run")
        made = store.objects("run/")
        assert not [key for key in made if "checkpoints" in key or "started.json" in key or "reachable" in key]
        assert not [key for key, content in made.items() if KEY.encode() in content or SECRET.encode() in content]
        served = {key for key in made if key.endswith("manifest.json")}
        again = finish(start("run", arguments, environment))
        assert again.count("done before") == len(served) and store.objects("run/").keys() == made.keys()
        assert KEY not in said + again and SECRET not in said + again
        left = [path for path in scratch.rglob("*") if path.is_file() and not path.is_relative_to(scratch / "ray")]
        assert left == []
        finish(start("run", overrides(f"s3://{BUCKET}/data", tmp_path / "local"), environment))
        compare(RunDir(str(tmp_path / "local")), run)
    finally:
        store.stop()
        shutil.rmtree(scratch, ignore_errors=True)
