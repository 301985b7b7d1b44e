"""The generated shop of any size: the same tables from the same seed, the laws of its purchases, bounded memory, a config that reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from qbert_ray.config.loading import load_config
from qbert_ray.execution.executor import open_executor
from qbert_ray.inputs import scaled_shop as shop
from qbert_ray.inputs import validation

ITEMS, USERS = 20_000, 30_000
FILES = ("items.parquet", "vectors.parquet", "interactions.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    assert shop.generate(folder, ITEMS, USERS, width=16, seed=5)["items"] == ITEMS
    return folder


@pytest.fixture(scope="module")
def purchases(folder: Path) -> pl.DataFrame:
    """Interactions in file order with the attributes of their items and whether the row before is of the same user."""
    items = pl.read_parquet(folder / "items.parquet").with_row_index("row")
    joined = pl.read_parquet(folder / "interactions.parquet").join(items, on="item_id", how="left", maintain_order="left")
    return joined.with_columns((pl.col("user_id") == pl.col("user_id").shift(1)).fill_null(False).alias("follows"))


def test_the_same_seed_gives_the_same_files_and_another_seed_others(folder, tmp_path):
    for name, seed in (("again", 5), ("other", 6)):
        shop.generate(tmp_path / name, ITEMS, USERS, width=16, seed=seed)
    for file in FILES:
        first, again, other = (pl.read_parquet(place / file) for place in (folder, tmp_path / "again", tmp_path / "other"))
        assert first.equals(again)
        assert not first.equals(other)


def test_pieces_of_items_change_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shop, "ROWS", 7_001)
    shop.generate(tmp_path, ITEMS, 10, width=16, seed=5)
    assert pl.read_parquet(tmp_path / "items.parquet").equals(pl.read_parquet(folder / "items.parquet"))


def test_every_purchase_is_of_an_item_and_later_than_the_one_before(folder, purchases):
    vectors = pl.read_parquet(folder / "vectors.parquet")
    assert set(vectors["item_id"]) == set(pl.read_parquet(folder / "items.parquet")["item_id"])
    assert vectors["item_id"].n_unique() == ITEMS
    assert purchases["row"].null_count() == 0
    lengths = purchases.group_by("user_id").len()["len"]
    assert lengths.len() == USERS
    assert lengths.min() == shop.LEAST
    assert lengths.max() <= shop.MOST
    assert lengths.mean() == pytest.approx(10, rel=0.03)
    later = purchases["timestamp"].diff() >= 0
    assert later.filter(purchases["follows"]).all()


def test_popularity_is_a_power_law(purchases):
    counts = purchases.group_by("item_id").len()["len"].sort(descending=True).to_numpy()
    rank = np.arange(1, len(counts) + 1)
    between = (rank >= 10) & (rank <= ITEMS // 10)
    slope, start = np.polyfit(np.log(rank[between]), np.log(counts[between]), 1)
    assert -0.9 < slope < -0.35
    fitted = slope * np.log(rank[between]) + start
    assert np.abs(np.log(counts[between]) - fitted).max() < 0.4
    assert counts[: ITEMS // 100].sum() > 0.08 * counts.sum()  # the best hundredth; equal popularity would give .01


def test_so_many_purchases_complement_the_one_before_and_never_the_other_way_round(purchases):
    before = purchases.select(pl.col("department", "kind", "style").shift(1)).rename(lambda name: f"last_{name}")
    pairs = pl.concat([purchases, before], how="horizontal").filter("follows")
    following = pairs.group_by("last_kind", "kind").len().sort("len", descending=True)
    complements = following.head(shop.KINDS)  # found by counting, not told by the generator
    assert complements["last_kind"].n_unique() == complements["kind"].n_unique() == shop.KINDS
    found = pairs.join(complements, on=["last_kind", "kind"]).filter(pl.col("department") == pl.col("last_department"))
    near = ((pl.col("style") - pl.col("last_style")).abs() % 1).alias("distance")
    found = found.with_columns(pl.min_horizontal(near, 1 - near)).filter(pl.col("distance") < 0.25)
    assert len(found) / len(pairs) == pytest.approx(shop.COMPLEMENT, abs=0.04)
    reverse = pairs.join(complements.rename({"kind": "last_kind", "last_kind": "kind"}), on=["last_kind", "kind"])
    assert len(reverse) / len(pairs) < 0.1


def test_tastes_drift(purchases):
    places = purchases.with_columns(pl.int_range(pl.len()).over("user_id").alias("place"))
    firsts = places.filter(pl.col("place") == 0).select("user_id", pl.col("department").alias("first"))
    same = places.join(firsts, on="user_id").with_columns((pl.col("department") == pl.col("first")).alias("same"))
    share = same.group_by("place").agg(pl.col("same").mean()).sort("place")["same"].to_numpy()
    assert share[1] > share[5] + 0.1 > share[15] + 0.15


def test_vectors_tell_kind_department_and_style(folder):
    items = pl.read_parquet(folder / "items.parquet")
    vectors = np.stack(pl.read_parquet(folder / "vectors.parquet")["vector"].to_numpy())
    for name in ("department", "kind"):
        labels = items[name].to_numpy()
        means = np.stack([vectors[labels == each].mean(0) for each in np.unique(labels)])
        nearest = np.unique(labels)[np.argmin(((vectors[:500, None] - means) ** 2).sum(2), axis=1)]
        assert (nearest == labels[:500]).mean() > 0.6


def test_memory_does_not_grow_with_the_users(tmp_path):
    code = (
        "import resource, sys; from qbert_ray.inputs import scaled_shop as s; s.USERS = 20_000; "
        "s.generate(sys.argv[1], 20_000, int(sys.argv[2]), width=8); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    small, large = (int(subprocess.run([*command, str(users)], capture_output=True, check=True).stdout) for users in (20_000, 200_000))
    assert large < 1.3 * small


def test_the_shipped_config_reads_it(folder):
    config = load_config(["configs/scale.yaml"], [f"data.root={folder}", "compute.executor=local"])
    with open_executor(config) as executor:
        report = validation.validate(config, executor, validation.open_sources(config))
    assert not report["shop"]["errors"] and not report["shop"]["warnings"]
    assert report["shop"]["counts"]["items"] == ITEMS and report["shop"]["counts"]["users_evaluated"] == USERS


@pytest.mark.parametrize("wrong", [{"num_items": 100}, {"num_users": 0}, {"per_user": 3.0}, {"per_user": 40.0}, {"width": 0}])
def test_what_cannot_be_made_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="a shop at scale needs"):
        shop.generate(tmp_path, **({"num_items": ITEMS, "num_users": USERS} | wrong))
