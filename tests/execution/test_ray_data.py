"""Passes over parts by tasks, whose processes outlive them, and by actors."""

import pyarrow as pa
import pytest
import ray

from qbert_ray.config.schema import Actors, Workers
from qbert_ray.execution import ray_data as sharding
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.storage.directory import RunDir

PARTS = [f"shop-{number:05}.parquet" for number in range(4)]


class Loaded:
    """Writes what it found when it was made."""

    def __init__(self, run: RunDir, table: str, refuse: bool = False) -> None:
        if refuse:
            raise ValueError("a model that is not there")
        self.run, self.table, self.found = run, table, run.read_bytes("model").decode()

    def __call__(self, part: str) -> dict[str, int]:
        self.run.write_part(self.table, part, pa.table({"found": [self.found]}))
        return {"items": 1}


@pytest.mark.parametrize("few", [0, 16], ids=["actors", "tasks"])
def test_each_pass_loads_its_worker_and_every_part_is_done_once(few, tmp_path, monkeypatch, ray_session):
    monkeypatch.setattr(sharding, "FEW", few)
    run = RunDir(str(tmp_path))
    for table, model in (("made/a", "old"), ("made/b", "new")):
        run.write_bytes("model", model.encode())
        counts = sharding.map_parts(run, Loaded, {"run": run, "table": table}, PARTS, table, Actors(max_size=2), Quiet())
        assert counts == {"items": 4} and run.parts(table) == PARTS
        assert run.read(table)["found"].to_pylist() == [model] * 4
    with pytest.raises(ValueError, match="^a model that is not there$"):
        sharding.map_parts(run, Loaded, {"run": run, "table": "c", "refuse": True}, PARTS, "c", Actors(max_size=2), Quiet())
    assert run.parts("c") == []


@pytest.mark.parametrize("few", [0, 16], ids=["actors", "tasks"])
def test_actors_and_tasks_run_on_nodes_with_the_labels_that_are_asked_for(few, tmp_path, monkeypatch, ray_session):
    monkeypatch.setattr(sharding, "FEW", few)
    run, here = RunDir(str(tmp_path)), {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    run.write_bytes("model", b"new")
    given, passed = ray.data.Dataset.map_batches, []
    monkeypatch.setattr(ray.data.Dataset, "map_batches", lambda self, fn, **work: passed.append((fn, work)) or given(self, fn, **work))
    sharding.map_parts(run, Loaded, {"run": run, "table": "a"}, PARTS, "a", Actors(max_size=2, label_selector=here), Quiet())
    ((work, options),) = passed
    assert run.parts("a") == PARTS and options["label_selector"] == here
    assert work.__name__ == ("_publish" if few else "Loaded")  # what the dashboard calls them
    assert RayExecutor().get(RayExecutor().submit(len, "abc", workers=Workers(label_selector=here))) == 3
