"""A finished run does not answer from files that are missing, doubled, foreign or damaged: it names the file and the command."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from qbert_ray.append import append_ids
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.pipeline import redo_from, run_stage
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.report.page import write as write_report
from qbert_ray.semantic_ids.lookup import show
from qbert_ray.storage.checksums import write_parquet
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.seals import seal
from qbert_ray.storage.stages import BY_NAME, STAGES
from tests.shop import make_shop, small_config

QUICK = ["pretrain.enabled=false", "finetune.epochs=1", "fusion.epochs=1", "compute.executor=local", "data.cold_share=0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of a small shop, made in this process."""
    folder = tmp_path_factory.mktemp("made")
    config = small_config(make_shop(folder / "shop"), folder / "run", *QUICK)
    run = RunDir(config.run.dir)
    for stage in STAGES:
        run_stage(stage, config, run, LocalExecutor(), Quiet())
    return config, run


@pytest.fixture
def copied(made, tmp_path):
    config, run = made
    shutil.copytree(run.uri, tmp_path / "run")
    return config, RunDir(str(tmp_path / "run"))


def file(run: RunDir, name: str) -> Path:
    return Path(run.uri) / name


def test_a_manifest_names_every_file_of_its_stage(made):
    _, run = made
    for stage in STAGES:
        manifest = Manifest.load(run, stage.name)
        if manifest is None:
            continue
        there = {str(path.relative_to(run.uri)) for path in Path(run.uri, stage.name).rglob("*") if path.is_file()}
        there = {name for name in there if "/." not in name and "tensorboard" not in name and not name.endswith("manifest.json")}
        assert set(manifest.files) == there != set()
        for name, record in manifest.files.items():
            assert record["bytes"] == file(run, name).stat().st_size
    assert Manifest.load(run, "ingest").files["ingest/sequences/demo-00000.parquet"]["rows"] == 40


OPENERS = {
    "recommender": lambda config, run: Recommender.load(run.uri).recommend([[]]),
    "evaluate": lambda config, run: (redo_from("evaluate", run), run_stage(BY_NAME["evaluate"], config, run, LocalExecutor(), Quiet())),
    "score": lambda config, run: (redo_from("score", run), run_stage(BY_NAME["score"], config, run, LocalExecutor(), Quiet())),
    "ids": lambda config, run: show(run.uri, run.read("ingest/items")["item_id"][0].as_py(), None),
}
READ_BY = [
    ("recommender", "ranking/weights/demo-00001.parquet", "ranking"),
    ("recommender", "fusion/embeddings/demo-00001.parquet", "fusion"),
    ("recommender", "ingest/items/demo-00001.parquet", "ingest"),
    ("recommender", "semantic_ids/demo-00001.parquet", "semantic-ids"),
    ("recommender", "finetune/demo/model/model.safetensors", "finetune"),
    ("recommender", "ranking/blend/demo/model.safetensors", "ranking"),
    ("evaluate", "ingest/sequences/demo-00001.parquet", "ingest"),
    ("evaluate", "finetune/demo/model/model.json", "finetune"),
    ("score", "ingest/sequences/demo-00000.parquet", "ingest"),
    ("ids", "semantic_ids/demo-00000.parquet", "semantic-ids"),
]


@pytest.mark.parametrize(("opener", "name", "command"), READ_BY)
@pytest.mark.parametrize("damage", ["missing", "foreign", "garbage", "cut"])
def test_readers_refuse_what_the_stage_did_not_write(copied, opener, name, command, damage):
    config, run = copied
    path = file(run, name)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":  # whole, of another run, under the same name
        whole = write_parquet(name, run.read_part(*name.rsplit("/", 1)).slice(1)) if name.endswith("parquet") else bytes(content[::-1])
        path.write_bytes(whole)
    elif damage == "garbage":
        content[4 : len(content) // 2] = b"\xa5" * (len(content) // 2 - 4)  # columns that nothing reads may be damaged
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises((ArtifactError, FileNotFoundError) if name.endswith("model.json") else ArtifactError) as raised:
        OPENERS[opener](config, run)
    if not name.endswith("model.json") or damage != "missing":
        assert name in str(raised.value) and f"qbert-ray {command} --redo" in str(raised.value)


def test_a_part_that_was_copied_under_another_name_is_refused(copied):
    _, run = copied
    for other in ("demo-00000.parquet", "demo-00099.parquet"):
        before = file(run, f"ranking/weights/{other}").read_bytes() if other == "demo-00000.parquet" else None
        shutil.copy(file(run, "ranking/weights/demo-00001.parquet"), file(run, f"ranking/weights/{other}"))
        with pytest.raises(ArtifactError, match=rf"ranking/weights/{other}.*qbert-ray ranking --redo"):
            Recommender.load(run.uri)
        file(run, f"ranking/weights/{other}").unlink() if before is None else file(run, f"ranking/weights/{other}").write_bytes(before)


def test_the_report_says_which_table_it_could_not_open(copied):
    _, run = copied
    file(run, "ingest/sequences/demo-00001.parquet").unlink()
    _, problems = write_report(run.uri)
    assert any("ingest/sequences/demo-00001.parquet is missing" in problem for problem in problems)


@pytest.mark.parametrize("name", ["fusion/manifest.json", "evaluate/metrics.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000, b"[1]"])
def test_json_that_cannot_be_read_is_named(copied, name, content):
    _, run = copied
    file(run, name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} .*qbert-ray {name.split('/')[0]} --redo"):
        Manifest.load(run, "fusion") if name.startswith("fusion") else run.read_json(name)


def test_a_manifest_that_was_edited_is_refused(copied):
    _, run = copied
    content = json.loads(file(run, "semantic_ids/manifest.json").read_text())
    content["counts"]["items"] += 1
    file(run, "semantic_ids/manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="semantic_ids/manifest.json was changed"):
        Manifest.load(run, "semantic_ids")


def test_every_flipped_bit_of_a_part_is_refused_or_changes_nothing(tmp_path):
    run = RunDir(str(tmp_path))
    table = pa.table({"id": [f"item-{n}" for n in range(20)], "x": list(range(20)), "codes": [[n, n] for n in range(20)]})
    run.write_part("stage", "a-00000.parquet", table)
    Manifest("stage", {}, {}, "0", files=seal(run, "stage")).save(run, "stage")
    path = file(run, "stage/a-00000.parquet")
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert run.read_part("stage", "a-00000.parquet").equals(table)
        except ArtifactError as error:
            assert "stage/a-00000.parquet" in str(error)
            refused += 1
    assert refused > 0.9 * len(content)


def test_a_stage_that_is_redone_is_read_as_it_is_now(copied):
    """What a process remembers of a manifest does not outlive the manifest."""
    config, run = copied
    Recommender.load(run.uri)
    redo_from("ranking", run)
    run.write_part("ranking/weights", "demo-00000.parquet", pa.table({"x": [1]}))
    assert run.read("ranking/weights")["x"].to_pylist() == [1]  # in progress: read without a check
    redo_from("ranking", run)
    run_stage(
        BY_NAME["ranking"],
        config.model_copy(update={"ranking": config.ranking.model_copy(update={"decay": 0.5})}),
        run,
        LocalExecutor(),
        Quiet(),
    )
    assert Recommender.load(run.uri).recommend([[]])


def test_a_part_that_an_earlier_try_wrote_and_that_is_gone_is_made_again(copied):
    config, run = copied
    redo_from("score", run)
    before = None
    for _ in range(2):
        run_stage(BY_NAME["score"], config, run, LocalExecutor(), Quiet())
        assert before is None or run.read("score").equals(before)
        before = run.read("score")
        marker = {"fingerprint": Manifest.load(run, "score").fingerprint}
        file(run, "score/manifest.json").unlink()
        run.write_json("score/started.json", marker)
        file(run, "score/demo-00000.parquet").unlink()


def test_parts_that_were_appended_are_checked_too(copied):
    config, run = copied
    items = Path(config.data.root) / "items.parquet"
    content = items.read_bytes()
    table = pa.parquet.read_table(items)
    more = table.slice(0, 3).set_column(table.column_names.index("item_id"), "item_id", pa.array(["new-1", "new-2", "new-3"]))
    try:
        pa.parquet.write_table(pa.concat_tables([table, more]), items)
        assert append_ids(config, run, LocalExecutor(), Quiet())["added"] >= 3
    finally:
        items.write_bytes(content)
    last = run.parts("semantic_ids")[-1]
    assert f"semantic_ids/{last}" in Manifest.load(run, "semantic_ids").files and not run.exists("ingest/appending.json")
    assert Recommender.load(run.uri).recommend([["new-1"]])
    for table_name, command in (("ingest/items", "ingest"), ("features/text", "features"), ("semantic_ids", "semantic-ids")):
        whole = file(run, f"{table_name}/{last}").read_bytes()
        file(run, f"{table_name}/{last}").unlink()
        with pytest.raises(ArtifactError, match=rf"{table_name}/{last} is missing.*qbert-ray {command} --redo"):
            run.read(table_name)
        file(run, f"{table_name}/{last}").write_bytes(whole)
