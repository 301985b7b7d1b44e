"""The run directory on an object store: no rename, no folders, answers that fail for a while."""

import time

import cloudpickle
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qbert_ray.config.loading import ConfigError, load_config, refuse_credentials
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.sweeps.tables import MARKDOWN, RANKS, Table, collect
from tests.store import BUCKET, KEY, SECRET, Store


@pytest.fixture(scope="module")
def store():
    store = Store().start()
    yield store
    store.stop()


@pytest.fixture
def run(store, monkeypatch, request):
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return RunDir(f"s3://{BUCKET}/{request.node.name}")


def test_tables_models_and_manifests_come_back(run):
    for name, value in (("b-00001.parquet", 2), ("b-00000.parquet", 1), ("a-00000.parquet", 3)):
        run.write_part("table", name, pa.table({"x": [value]}))
    assert run.read("table", "b")["x"].to_pylist() == [1, 2]
    assert run.parts("table") == ["a-00000.parquet", "b-00000.parquet", "b-00001.parquet"]
    run.save_model("model", {"a": torch.arange(3)}, {"width": 4})
    assert run.load_model("model")[1] == {"width": 4}
    manifest = Manifest("stage", {"x": 1}, {}, "0.1", counts={"rows": 3})
    assert Manifest.load(run, "stage") is None
    manifest.save(run, "stage")
    assert Manifest.load(run, "stage") == manifest


def test_what_is_not_there_is_not_there(run):
    assert not run.exists("x") and run.names("folder") == run.parts("folder") == []
    run.delete("x")
    with pytest.raises(ArtifactError, match="no table"):
        run.read("table")


def test_files_are_replaced_and_folders_deleted_whole(run):
    run.write_bytes("folder/x", b"old")
    run.write_bytes("folder/x", b"new")
    run.write_bytes("folder/.counts/y", b"1")
    assert run.read_bytes("folder/x") == b"new" and run.names("folder") == ["x"]
    run.delete("folder")
    assert not run.exists("folder") and not run.exists("folder/.counts/y")


def test_an_address_of_another_store_in_the_uri(store, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, store.environment[name])
    query = f"?endpoint_override={store.endpoint.removeprefix('http://')}&scheme=http&region=us-east-1&allow_delayed_open=true"
    run = RunDir(f"s3://{BUCKET}/elsewhere{query}")
    run.write_json("x.json", [1])
    assert run.read_json("x.json") == [1]
    assert store.objects("elsewhere") == {"elsewhere/x.json": b"[\n  1\n]\n"}


def test_a_writer_that_fails_publishes_nothing(run, store, monkeypatch):
    def half_way(*_):
        raise MemoryError

    monkeypatch.setattr(pq.ParquetWriter, "write_table", half_way)
    with pytest.raises(MemoryError):
        run.write_part("table", "a-00000.parquet", pa.table({"x": [1]}))
    assert not run.exists("table/a-00000.parquet")


def test_a_store_that_fails_for_a_while_is_asked_again(run, store):
    elsewhere = cloudpickle.loads(cloudpickle.dumps(run.filesystem))  # as Ray Train's workers get it
    store.fail(9)  # Arrow by itself gives up after 6 seconds
    started, refused = time.monotonic(), store.refused
    with elsewhere.open_output_stream(run.path("x")) as file:
        file.write(b"1")
    assert run.read_bytes("x") == b"1"
    assert time.monotonic() - started > 8 and store.refused > refused


@pytest.mark.parametrize("key", ["run.dir", "data.root", "data.domains.items.items", "data.semantic_ids"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(key):
    with pytest.raises(ConfigError, match=f"{key} holds credentials") as error:
        load_config([], [f"{key}=s3://{KEY}:{SECRET}@bucket/path"])
    assert SECRET not in str(error.value) and KEY not in str(error.value)
    load_config([], [f"{key}=s3://bucket/a@b?endpoint_override=127.0.0.1:1"])


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ("abfs://account.dfs.core.windows.net/c/p?client_secret=hunter2", True),
        ("abfs://account.dfs.core.windows.net/c/p?sv=2024&sig=hunter2", True),
        ("s3://AKIAX:hunter2/abc@bucket/x", True),
        ("s3://AKIAX@bucket/x", True),
        ("postgresql+psycopg2://u:hunter2@db/mlflow", True),
        ("gs://bucket/p?access_token=hunter2", True),
        ("abfss://u:hunter2@account.dfs.core.windows.net/path", True),
        ("abfss://container@account.dfs.core.windows.net/path", False),
        ("s3://bucket/p?region=eu-west-1&scheme=http&endpoint_override=127.0.0.1:9000&allow_bucket_creation=true", False),
        ("http://127.0.0.1:5000/x@y", False),
        ("https://shop.example/{item_id}.jpg?design=2&tokenizer=x", False),
        ("runs/a:b@c", False),
    ],
)
def test_credentials_are_refused_wherever_a_uri_may_hold_them(value, refused):
    if not refused:
        assert refuse_credentials("run.dir", value) is None
        return
    with pytest.raises(ConfigError, match="run.dir holds credentials") as error:
        refuse_credentials("run.dir", value)
    assert "hunter2" not in str(error.value)


def test_a_table_of_comparisons_is_kept_there(run):
    table = Table(title="T", reference="base", variants={"base": {}, "better": {}}, seeds=[0], metrics=["hr@10"])
    for row in ("base", "better"):
        columns = {"domain": ["shop"] * 3, "row": [row] * 3, "seed": [0] * 3, "user_id": list("abc")}
        collect(run, pl.DataFrame(columns | {"rank_all": [1, 2, 3], "rank_unseen": [1, 2, 3]}), table)
    assert "| better | 1.0000" in run.read_bytes(MARKDOWN).decode()
    assert pl.read_parquet(run.read_bytes(RANKS))["row"].unique(maintain_order=True).to_list() == ["base", "better"]
