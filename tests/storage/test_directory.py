import os
import pickle
import shutil
import subprocess

import pyarrow as pa
import pytest
import torch

from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(str(tmp_path / "run"))


def test_parts_of_a_table_are_read_in_order_and_by_domain(run):
    for name, value in (("b-00001.parquet", 2), ("b-00000.parquet", 1), ("a-b-00000.parquet", 3)):
        run.write_part("table", name, pa.table({"x": [value]}))
    assert run.read("table", "b")["x"].to_pylist() == [1, 2]
    assert run.read("table", "a-b")["x"].to_pylist() == [3]
    with pytest.raises(ArtifactError, match="no table table for c"):
        run.read("table", "c")


def test_a_write_that_fails_leaves_nothing(run):
    run.write_bytes("folder/x", b"old")
    with pytest.raises(RuntimeError):
        run._publish("folder/x", _fail_half_way)
    assert run.read_bytes("folder/x") == b"old"
    assert run.names("folder") == ["x"]


def _fail_half_way(path):
    with open(path, "wb") as file:
        file.write(b"ne")
    raise RuntimeError("disk full")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a tmpfs")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("no tmpfs may be mounted here")
    try:
        run, rows = RunDir(str(tmp_path / "run")), pa.table({"x": torch.randn(20_000).numpy()})
        with pytest.raises(OSError, match="No space left"):
            run.write_part("table", "a-00000.parquet", rows)
        with pytest.raises(OSError, match="No space left"):
            run.save_model("model", {"x": torch.randn(20_000)}, {})
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
        run.write_part("table", "a-00000.parquet", rows)
        assert run.read("table").equals(rows)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_lines_that_were_cut_are_refused_with_the_name_of_their_file(run):
    assert run.read_lines("a/metrics.jsonl") == []
    run.write_bytes("a/metrics.jsonl", b'{"epoch": 0}\n\n{"epoch": 1}\n')
    assert run.read_lines("a/metrics.jsonl") == [{"epoch": 0}, {"epoch": 1}]
    run.write_bytes("a/metrics.jsonl", b'{"epoch": 0}\n{"epo')
    with pytest.raises(ArtifactError, match=r"a/metrics.jsonl cannot be read as JSON lines: .*qbert-ray a --redo"):
        run.read_lines("a/metrics.jsonl")


def test_models_come_back_as_they_were(run):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(3)}  # not contiguous
    run.save_model("model", tensors, {"width": 4})
    loaded, description = run.load_model("model")
    assert description == {"width": 4}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with pytest.raises(ArtifactError, match="no model"):
        run.load_model("other")


def test_a_run_directory_travels_to_workers(run):
    run.write_json("x.json", [1])
    assert pickle.loads(pickle.dumps(run)).read_json("x.json") == [1]


def test_a_relative_run_directory_means_the_same_place_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir("runs/x")
    run.write_json("x.json", [1])
    sent = pickle.dumps(run)
    monkeypatch.chdir("/")
    assert pickle.loads(sent).read_json("x.json") == [1]


@pytest.mark.parametrize(
    ("uri", "below"), [("/runs/why?", "/runs/why?/x"), ("s3://bucket/runs?region=us-east-1", "s3://bucket/runs/x?region=us-east-1")]
)
def test_a_question_mark_begins_the_query_of_a_uri_and_is_part_of_a_local_name(uri, below):
    assert RunDir(uri).inside("x").uri == below


def test_a_fingerprint_follows_config_and_inputs_not_time():
    a = Manifest("stage", {"x": 1}, {"before": "f"}, "0.1", seconds=1)
    assert a.fingerprint == Manifest("stage", {"x": 1}, {"before": "f"}, "0.1", seconds=2, counts={"rows": 1}).fingerprint
    assert a.fingerprint != Manifest("stage", {"x": 2}, {"before": "f"}, "0.1").fingerprint
    assert a.fingerprint != Manifest("stage", {"x": 1}, {"before": "g"}, "0.1").fingerprint


def test_manifests_come_back(run):
    assert Manifest.load(run, "stage") is None
    manifest = Manifest("stage", {"x": 1}, {}, "0.1", counts={"rows": 3})
    manifest.save(run, "stage")
    assert Manifest.load(run, "stage") == manifest


def test_unknown_schemes_are_refused_with_what_is_valid():
    with pytest.raises(ArtifactError, match="use a local path, s3:// or gs://"):
        RunDir("nowhere://bucket/run").exists("x")


def test_fixed_lists_and_arrays_convert_both_ways():
    array = torch.randn(5, 3, 2).numpy()
    column = columns.to_fixed_lists(array)
    assert (columns.to_numpy(column) == array).all()
    assert (columns.to_numpy(pa.chunked_array([column[:2], column[2:]])) == array).all()
    assert (columns.to_numpy(column.slice(1, 2)) == array[1:3]).all()
