"""New items get IDs and published IDs never move, however often and wherever an append is cut."""

import os
import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path

import polars as pl
import pytest
import ray

from qbert_ray import append as appending
from qbert_ray.append import append_ids
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.features.kinds import text
from qbert_ray.features.stage import write_rejected
from qbert_ray.pipeline import redo_from, run_stage, status
from qbert_ray.storage.catalog import available_items, gone_items, run_config
from qbert_ray.storage.columns import GONE
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.lock import LockedError, locked
from qbert_ray.storage.seals import APPENDING, seal
from qbert_ray.storage.stages import BY_NAME, STAGES
from tests.shop import SOURCE, small_config
from tests.small_run import ITEMS, make_run


@pytest.fixture
def catalog(shop):
    """The shop's items; its file is put back as it was, time included."""
    file = shop / "items.parquet"
    content, state = file.read_bytes(), file.stat()
    yield pl.read_parquet(file)
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.fixture
def copied(finished, tmp_path):
    config, run = finished
    shutil.copytree(run.uri, tmp_path / "run")
    return config, RunDir(str(tmp_path / "run"))


@pytest.fixture
def in_process(monkeypatch):
    """Parts are worked on here, since starting actors would cost most of a small append."""

    def map_parts(self, run, worker, arguments, *rest):
        values = {name: self.get(value) if isinstance(value, ray.ObjectRef) else value for name, value in arguments.items()}
        return LocalExecutor.map_parts(self, run, worker, values, *rest)

    monkeypatch.setattr(RayExecutor, "map_parts", map_parts)
    monkeypatch.setattr(text, "TextEncoder", lru_cache(text.TextEncoder))


def more(catalog: pl.DataFrame, count: int, name: str) -> pl.DataFrame:
    """New items with the texts of others, so that they collide with each other at least."""
    return catalog.head(1).sample(count, with_replacement=True).with_columns(pl.Series("item_id", [f"{name}-{n}" for n in range(count)]))


def ids(run: RunDir) -> dict:
    rows = run.read("semantic_ids").to_pylist()
    assert len({(row["domain"], row["semantic_id"]) for row in rows}) == len(rows)
    for domain in ("demo", "other"):
        table = run.read("semantic_ids", domain)
        assert table["item_index"].to_pylist() == list(range(table.num_rows))
        for other in ("ingest/items", "features/text", "features/structure", "fusion/embeddings"):
            assert run.read(other, domain)["item_id"].equals(table["item_id"])
    return {(row["domain"], row["item_id"]): row["semantic_id"] for row in rows}


def files(run: RunDir) -> dict:
    return {str(path): path.read_bytes() for path in sorted(Path(run.uri).rglob("*")) if path.is_file()}


def test_new_items_get_ids_and_everything_else_stays(copied, catalog, shop, finished, in_process):
    config, run = copied
    before = ids(run)
    changed = catalog.with_columns(title=pl.when(pl.int_range(pl.len()) < 2).then(pl.lit("Another title")).otherwise("title"))
    pl.concat([more(catalog, 50, "new"), changed.slice(0, 110)]).write_parquet(shop / "items.parquet")
    kept = len(before) - run.read("semantic_ids", "other").num_rows
    with pytest.raises(ArtifactError, match="semantic-ids --append"):
        status(BY_NAME["ingest"], config, run)

    version = append_ids(config, run, RayExecutor(), Quiet())
    after = ids(run)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {("demo", f"new-{n}") for n in range(50)}  # what the k-core dropped stays out
    assert set(run.read("semantic_ids")["extra_codes"].combine_chunks().value_lengths().to_pylist()) == {6}
    assert version["added"] == len(after) - len(before)
    assert version["changed"] == 2 and version["changed"] + version["unchanged"] + version["gone"] == len(before)
    gone = {item for domain, item in before if domain == "demo"} - set(catalog["item_id"][:110])
    assert version["gone"] == len(gone) > 0
    assert set(run.read("ingest/gone", "demo")["item_id"].to_pylist()) == gone
    assert version["left_out"] == 110 - sum(("demo", item) in before for item in catalog["item_id"][:110]) + left_out_of_other(run)
    assert run.read("ingest/items", "demo")["cold"].to_pylist()[kept:] == [True] * version["added"]

    manifest = Manifest.load(run, "semantic_ids")
    first, last = manifest.counts["versions"]
    assert last == version and last["parent"] == first["fingerprint"] == Manifest.load(finished[1], "semantic_ids").fingerprint
    assert last["model"] == first["model"] == Manifest.load(run, "quantizer").fingerprint
    assert manifest.counts["items"] == last["items"] == len(after)
    for stage in STAGES:  # the run continues as before
        assert stage.skipped(config) or status(stage, config, run) is not None

    written = files(run)
    again = append_ids(config, run, RayExecutor(), Quiet())
    assert again["added"] == 0 and again["fingerprint"] == version["fingerprint"]
    assert files(run) == written

    redo_from("evaluate", run)
    for name in ("evaluate", "score"):
        run_stage(BY_NAME[name], config, run, RayExecutor(), Quiet())
    assert run.read("score").num_rows == finished[1].read("score").num_rows
    assert not gone & set(run.read("score", "demo")["item_id"].to_pylist())
    assert gone & set(finished[1].read("score", "demo")["item_id"].to_pylist())  # there was something to leave out
    status(BY_NAME["ingest"], config, run)  # its manifest names the list of what is gone


@pytest.fixture
def grown(tmp_path):
    """A run by hand whose own vectors named an item that its catalog lacked, after an append of that item, but for the manifests."""
    run, part = make_run(tmp_path), "shop-00002.parquet"
    write_rejected(run, "shop-own", "text", "vectors.text", [("unknown item", {"item_id": "new"})])
    for stage in appending.GROWN:
        Manifest(stage, {}, {"quantizer": ""}, "", counts={"items": ITEMS}, files=seal(run, stage)).save(run, stage)
    versions = appending._versions(run)
    run.write_json(APPENDING, {})
    run.write_part("semantic_ids", part, run.read_part("semantic_ids", "shop-00001.parquet"))
    write_rejected(run, "shop-own", "text", "vectors.text", [])
    return run, versions


def test_a_table_of_rejected_rows_of_which_none_is_left_is_not_missed(grown):
    run, versions = grown
    version = appending._publish(run_config(run), run, versions, Counter())
    run.delete(APPENDING)
    assert version["parts"] == ["shop-00002.parquet"] and run.parts("features/rejected") == []


def test_what_an_interrupted_stage_wrote_is_deleted_where_the_catalog_changed_alone(grown):
    run, versions = grown
    appending._publish(run_config(run), run, versions, Counter())
    run.write_bytes("score/shop-00000.parquet", b"so far")
    now = Manifest.load(run, "semantic_ids").counts["versions"]
    assert appending._publish(run_config(run), run, now, Counter())["added"] == 0
    assert run.exists("score/shop-00000.parquet")
    run.write_part("ingest/gone", "shop-00000.parquet", GONE.empty_table())
    appending._publish(run_config(run), run, now, Counter())
    assert not run.exists("score/shop-00000.parquet"), "of a catalog with items that are gone now, or are back"


def test_nothing_is_published_by_a_process_that_lost_the_lock(grown):
    run, versions = grown
    before = run.read_json("semantic_ids/manifest.json")
    with locked(run) as lock:
        lock.lost = "another process"
        with pytest.raises(LockedError, match="lost the lock to another process"):
            appending._publish(run_config(run), run, versions, Counter())
    assert run.read_json("semantic_ids/manifest.json") == before


def left_out_of_other(run: RunDir) -> int:
    rejected = run.read("ingest/rejected", "other").to_pylist()
    return sum(row["table"] == "items" and row["reason"] == "below min_item_interactions" for row in rejected)


def test_what_the_k_core_dropped_is_added_where_it_is_asked_for(copied, in_process):
    config, run = copied
    before = ids(run)
    version = append_ids(config, run, RayExecutor(), Quiet())
    assert version["added"] == 0 and version["left_out"] > 0 and ids(run) == before
    everything = append_ids(config, run, RayExecutor(), Quiet(), everything=True)
    assert everything["added"] == version["left_out"] and everything["left_out"] == 0
    after = ids(run)
    assert {key: after[key] for key in before} == before and len(after) == len(before) + everything["added"]


def test_an_item_that_comes_back_is_recommended_again(copied, catalog, shop, in_process):
    """Nothing is added here, and the lists of what is gone are in the manifest all the same."""
    config, run = copied
    catalog.slice(3).write_parquet(shop / "items.parquet")
    gone = set(catalog["item_id"][:3]) & set(run.read("ingest/items", "demo")["item_id"].to_pylist())
    assert gone and append_ids(config, run, RayExecutor(), Quiet())["gone"] == len(gone)
    assert set(gone_items(run, "demo")["item_id"].to_pylist()) == gone
    catalog.write_parquet(shop / "items.parquet")
    assert append_ids(config, run, RayExecutor(), Quiet())["gone"] == 0
    assert gone_items(run, "demo").num_rows == 0 and available_items(run, "demo") is None
    recorded = Manifest.load(run, "ingest").files
    assert [name for name in recorded if "/gone/" in name] == [f"ingest/gone/demo-{number:05d}.parquet" for number in range(2)]


def test_ten_steps_move_no_id(copied, catalog, shop, in_process):
    config, run = copied
    published = ids(run)
    for step in range(10):
        catalog = pl.concat([catalog, more(catalog, 3 + 5 * step, f"step{step}")])
        catalog.write_parquet(shop / "items.parquet")
        version = append_ids(config, run, RayExecutor(), Quiet())
        now = ids(run)
        assert {key: now[key] for key in published} == published
        assert version["version"] == step + 1 and version["added"] == len(now) - len(published) > 0
        published = now
    versions = Manifest.load(run, "semantic_ids").counts["versions"]
    assert [version["parent"] for version in versions] == [None, *(version["fingerprint"] for version in versions[:-1])]
    assert sorted(part for version in versions for part in version["parts"]) == run.parts("semantic_ids")


class CutError(Exception):
    pass


def cut_after(monkeypatch, name):
    work = getattr(appending, name)

    def cut(*arguments):
        work(*arguments)
        raise CutError

    monkeypatch.setattr(appending, name, cut)


def test_an_append_that_was_cut_resumes(copied, catalog, shop, in_process, monkeypatch):
    config, run = copied
    published = ids(run)
    pl.concat([catalog, more(catalog, 100, "new")]).write_parquet(shop / "items.parquet")
    for name in ("_append_items", "extend_features", "embed_catalog", "assign_parts", "_publish"):
        with monkeypatch.context() as patch, pytest.raises(CutError):
            cut_after(patch, name)
            append_ids(config, run, RayExecutor(), Quiet())
        if name == "_append_items":  # in the middle of it
            run.delete(f"ingest/items/{run.parts('ingest/items', 'demo')[-1]}")
        if name == "assign_parts":
            last = run.parts("semantic_ids", "demo")[-1]
            run.delete(f"semantic_ids/{last}")
            run.write_bytes("score_histories/recommendations/demo-00000.parquet", b"of the catalog before")
    version = append_ids(config, run, RayExecutor(), Quiet())
    assert not run.exists("score_histories/recommendations/demo-00000.parquet"), (
        "a resumed stage would leave some users without the new items"
    )
    now = ids(run)
    assert {key: now[key] for key in published} == published
    assert {("demo", f"new-{n}") for n in range(100)} <= set(now)
    assert len(Manifest.load(run, "semantic_ids").counts["versions"]) == 2
    assert version["items"] == len(now)
    status(BY_NAME["ingest"], config, run)


def test_an_append_needs_the_run_that_made_the_ids(copied, shop, tmp_path):
    _, run = copied
    with pytest.raises(ArtifactError, match="codebook_size"):
        append_ids(small_config(shop, tmp_path, SOURCE, "quantizer.codebook_size=8"), run, RayExecutor(), Quiet())
    with pytest.raises(ArtifactError, match="needs ingest"):
        append_ids(small_config(shop, tmp_path, SOURCE), RunDir(str(tmp_path / "none")), RayExecutor(), Quiet())
    with pytest.raises(ArtifactError, match="data.semantic_ids"):
        append_ids(small_config(shop, tmp_path, SOURCE, "data.semantic_ids=ids.parquet"), run, RayExecutor(), Quiet())
