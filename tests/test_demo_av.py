"""The demo shop with sounds and clips through every stage: no stage after the features names a modality, and appended items have them all."""

import json

import numpy as np
import polars as pl
import pytest

from qbert_ray.append import append_ids
from qbert_ray.config.loading import load_config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.inputs.demo_shop import generate
from qbert_ray.pipeline import run_stage
from qbert_ray.ranking.loader import load_ranker
from qbert_ray.report.page import gather
from qbert_ray.storage.catalog import content_modalities, modalities_there
from qbert_ray.storage.columns import to_numpy
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.stages import STAGES
from tests import ROOT
from tests.shop import SMALL

NAMES = ["text", "image", "structure", "tabular", "audio", "video"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("av")
    generate(root, seed=0, num_items=120, num_users=100, media=True)
    own = [
        f"data.root={root}",
        f"run.dir={root}/run",
        f"features.modalities=[{', '.join(NAMES)}]",
        "features.image={image_size: 64, grid: 1}",
        "features.video={max_frames: 2}",
        "data.domains.demo.inputs.tabular={values: [price, brand, category]}",
        "compute.executor=local",
    ]
    config = load_config([ROOT / "configs" / "demo-av.yaml"], [*SMALL, *own])
    run, executor = RunDir(config.run.dir), LocalExecutor()
    for stage in STAGES:
        run_stage(stage, config, run, executor, Quiet())
    return config, run, root


def test_every_stage_reads_every_modality(finished):
    config, run, _ = finished
    assert modalities_there(run) == config.modalities == NAMES
    content = [name for name in NAMES if name != "structure"]
    assert content_modalities(run, "demo", config) == content
    _, model = run.load_model("fusion/model")
    assert list(model["feature_widths"].items()) == [
        ("text", 384),
        ("image", 1280),
        ("structure", 16),
        ("tabular", 64),
        ("audio", 192),
        ("video", 1280),
    ]
    ranker = load_ranker(run, "demo", config.ranking)
    assert ranker.item_item.names == ("sequencer", "ridge", "following", "content", *content, "seen")
    assert ranker.model.content.weight.shape[1] == 384 + 1280 + 64 + 192 + 1280
    weights = Manifest.load(run, "ranking").counts["demo"]["blend_weights"]
    assert list(weights) == list(ranker.item_item.names)
    cold = run.read_json("evaluate/metrics.json")["demo"]["cold"]["protocols"]["cold"]
    assert {f"{name}_nearest" for name in content} <= set(cold)


def test_counts_say_what_was_given_missing_and_rejected(finished):
    counts = Manifest.load(finished[1], "features").counts
    items = counts["audio"]["items"]
    for name, unit in (("image", "images"), ("audio", "sounds"), ("video", "clips")):
        found = counts[name]
        assert found[unit] + found[f"{unit}_missing"] + found[f"{unit}_rejected"] == items
    assert 0.6 < counts["audio"]["sounds"] / items < 0.95 and counts["tabular"]["tabular_vectors"] == 3 * items


def test_the_report_shows_the_views_and_plays_sounds_and_clips(finished):
    page = gather(finished[1])
    assert page["problems"] == []
    views = {name for row in page["fusion"]["domains"][0]["agreement"] for name in (row["a"], row["b"])}
    assert views == {"fused", *NAMES}
    played = {(made["modality"], made["element"]) for made in sum(page["players"].values(), [])}
    assert {("audio", "audio"), ("video", "video"), ("video", "img")} <= played


def test_appended_items_have_the_vectors_of_equal_ones(finished):
    """New items with everything of published ones, but their ID, have the same vectors in every modality that is not of interactions."""
    config, run, root = finished
    rows = pl.read_parquet(root / "items.parquet")
    copied = rows.filter(pl.col("sound").is_not_null() & pl.col("clip").is_not_null()).head(5)
    pl.concat([rows, copied.with_columns(pl.concat_str(pl.lit("new-"), "item_id").alias("item_id"))]).write_parquet(root / "items.parquet")
    version = append_ids(config, run, LocalExecutor(), Quiet())
    assert version["added"] == 5
    for name in NAMES:
        table = run.read(f"features/{name}")
        place = {item: row for row, item in enumerate(table["item_id"].to_pylist())}
        vectors, present = to_numpy(table["vectors"]), to_numpy(table["present"])
        for item in copied["item_id"]:
            new = place[f"new-{item}"]
            if name == "structure":
                assert not present[new].any()
            elif item in place:
                assert np.array_equal(present[new], present[place[item]]), (name, item)
                assert vectors[new] == pytest.approx(vectors[place[item]], abs=1e-4), (name, item)
    fitted = json.loads(run.read_bytes("features/tabular/.fitted/demo.json"))
    assert set(fitted) == {"price", "brand", "category"} and fitted["brand"] is None and len(fitted["price"]["quantiles"]) == 101
