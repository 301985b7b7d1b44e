"""The generated shop: the same files from the same seed, and what it promises about texts, images and purchases."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from qbert_ray.features.sound import LogMel
from qbert_ray.inputs import demo_shop as demo
from qbert_ray.inputs import demo_users as users
from qbert_ray.inputs.demo_media import RATE, TUNES, TURNS, draw_clip, draw_sound, with_tunes_and_turns

NUM_ITEMS, NUM_USERS = 120, 80


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("shop")
    return folder, demo.generate(folder, seed=3, num_items=NUM_ITEMS, num_users=NUM_USERS)


@pytest.fixture(scope="module")
def catalog() -> demo.Catalog:
    """The catalog of the default size."""
    return demo.build_catalog(np.random.default_rng(0), 1200)


def test_the_same_seed_gives_the_same_files(shop, tmp_path):
    folder, counts = shop
    assert demo.generate(tmp_path, seed=3, num_items=NUM_ITEMS, num_users=NUM_USERS) == counts
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_another_seed_gives_another_shop(shop, tmp_path):
    folder, _ = shop
    demo.generate(tmp_path, seed=4, num_items=NUM_ITEMS, num_users=NUM_USERS)
    for table in ("items.parquet", "interactions.parquet"):
        assert not pq.read_table(folder / table).equals(pq.read_table(tmp_path / table))


def test_counts_are_those_of_the_files(shop):
    folder, counts = shop
    items, interactions = pq.read_table(folder / "items.parquet"), pq.read_table(folder / "interactions.parquet")
    assert counts["items"] == items.num_rows == NUM_ITEMS
    assert counts["interactions"] == interactions.num_rows
    assert counts["users"] == len(interactions["user_id"].unique()) == NUM_USERS
    assert counts["without_image"] == items["image"].null_count > 0
    assert counts["without_description"] == items["description"].null_count > 0
    assert len(list((folder / "images").iterdir())) == NUM_ITEMS - counts["without_image"]


def test_default_catalog_spans_categories_and_brands(catalog):
    category, brand, style, colour = catalog.attributes.T
    assert len(set(category)) == len(demo.CATEGORIES) == len(demo.SHAPES) >= 8
    assert len(set(brand)) == len(demo.BRANDS) >= 40
    assert len(set(style)) == len(demo.STYLES) == len(demo._patterns())
    assert len(set(colour)) == len(demo.COLOURS)
    departments = {(one, kind // demo.DEPARTMENT_SIZE) for one, kind in zip(brand, category, strict=True)}
    assert len(departments) == len(demo.BRANDS)  # a brand keeps to one


def test_items_have_texts_that_fit_their_attributes(catalog):
    items = demo.describe(catalog, np.random.default_rng(0)).to_pylist()
    for item in items:
        assert item["brand"] in item["title"]
        assert all(item[name] for name in ("title", "category", "brand", "style", "colour"))
        assert item["price"] > 0
        text = f"{item['title']}. {item['description'] or ''}"
        assert not re.search(r"[{}|]|  |\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text
    assert 0.02 < sum(item["description"] is None for item in items) / len(items) < 0.06
    assert 0.4 < sum(item["colour"] in item["title"] for item in items) / len(items) < 0.6  # the others show it in the image only
    assert len({item["description"] for item in items}) > 0.7 * len(items)


def test_histories_repeat_no_item_and_are_long_enough(catalog):
    histories = users.simulate_histories(catalog, np.random.default_rng(0), 400)
    lengths = (histories >= 0).sum(axis=1)
    assert all(len(set(row[:length])) == length for row, length in zip(histories, lengths, strict=True))
    assert lengths.min() >= 5
    assert np.mean((lengths >= 6) & (lengths <= 25)) > 0.9


def test_complements_follow_purchases_and_share_their_look(catalog):
    histories = users.simulate_histories(catalog, np.random.default_rng(0), 400)
    before, after = histories[:, :-1][histories[:, 1:] >= 0], histories[:, 1:][histories[:, 1:] >= 0]
    complements = users.complement_weights(catalog) > 0
    forward, backward, chance = complements[before, after].mean(), complements[after, before].mean(), complements.mean()
    assert forward > 5 * chance
    assert forward > 5 * backward  # one way, so that order matters
    pairs = complements[before, after]
    for column in (2, 3):
        values = catalog.attributes[:, column]
        assert np.mean(values[before[pairs]] == values[after[pairs]]) > 0.4  # one in eight styles and one in ten colours by chance


def test_new_items_are_hardly_bought(catalog):
    histories = users.simulate_histories(catalog, np.random.default_rng(0), 400)
    counts, new = np.bincount(histories[histories >= 0], minlength=1200), catalog.availability < 1
    assert new.sum() == 10
    assert counts[new].mean() < 0.3 * counts[~new].mean()


def test_timestamps_are_sorted_integers_with_some_ties(shop):
    interactions = pq.read_table(shop[0] / "interactions.parquet").to_pandas()
    assert interactions["timestamp"].dtype == np.int64
    assert interactions["timestamp"].is_monotonic_increasing
    assert 0 < interactions.duplicated(["user_id", "timestamp"]).sum() < 0.1 * len(interactions)


def test_broken_images_do_not_decode_and_missing_ones_are_null(shop):
    folder, counts = shop
    broken = 0
    for path in filter(None, pq.read_table(folder / "items.parquet")["image"].to_pylist()):
        try:
            with Image.open(folder / path) as image:
                image.load()
                assert image.size == (demo.SIZE, demo.SIZE)
        except (UnidentifiedImageError, OSError):
            broken += 1
    assert broken == counts["broken_images"] >= 3


def test_images_look_alike_where_items_are_alike():
    rng = np.random.default_rng(0)

    def distance(one: tuple[int, ...], other: tuple[int, ...]) -> float:
        pixels = [[np.asarray(demo.draw_image(np.array(item), rng).reduce(8), float) for _ in range(4)] for item in (one, other)]
        return float(np.mean([np.abs(a - b).mean() for a, b in zip(*pixels, strict=True)]))

    for category in range(len(demo.CATEGORIES)):
        item = (category, 5, 2, 1)
        same = distance(item, item)
        assert same < distance(item, ((category + 1) % len(demo.CATEGORIES), 5, 2, 1))
        assert same < distance(item, (category, 6, 2, 1))  # another brand
        assert same < distance(item, (category, 5, 2, 2))  # another colour


def test_an_unfinished_folder_has_no_interactions(tmp_path, monkeypatch):
    demo.generate(tmp_path, num_items=24, num_users=3)
    monkeypatch.setattr(demo, "draw_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.generate(tmp_path, num_items=24, num_users=3)
    assert not (tmp_path / "interactions.parquet").exists()


def test_too_small_a_shop_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 24 items"):
        demo.generate(tmp_path, num_items=10)


# sounds and clips


@pytest.fixture(scope="module")
def loud_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loud")
    demo.generate(folder, seed=3, num_items=NUM_ITEMS, num_users=NUM_USERS, media=True)
    return folder


def test_the_shop_with_media_has_the_texts_and_images_of_the_one_without(shop, loud_shop):
    plain, loud = (pq.read_table(folder / "items.parquet") for folder in (shop[0], loud_shop))
    assert loud.select([name for name in plain.column_names if name != "image"]).equals(plain.drop_columns("image"))
    assert loud.column_names == [*plain.column_names, "sound", "clip"]
    for name in ("sound", "clip"):
        files = [file for file in loud[name].to_pylist() if file]
        assert 0.5 < len(files) / NUM_ITEMS < 0.9 and len({Path(file).suffix for file in files}) >= 3
        assert all((loud_shop / file).stat().st_size > 500 for file in files)


def test_sounds_of_one_tune_are_more_alike_than_of_others_and_clips_move_as_they_say():
    rng, encoder = np.random.default_rng(0), LogMel(RATE, 32)
    alike, other = [], []
    for tune in range(len(TUNES)):
        same = [encoder(draw_sound(3, 2, tune, rng)[None])[0] for _ in range(2)]
        different = encoder(draw_sound(3, 2, (tune + 1) % len(TUNES), rng)[None])[0]
        alike.append(np.linalg.norm(same[0] - same[1]))
        other.append(np.linalg.norm(same[0] - different))
    assert np.mean(alike) < 0.7 * np.mean(other)
    image = demo.draw_image(np.array([2, 3, 4, 5]), rng)
    moves = {
        turn: np.std([np.asarray(frame, float) for frame in draw_clip(image, number)], axis=0).mean() for number, turn in enumerate(TURNS)
    }
    assert moves.pop("still") == 0 and min(moves.values()) > 3


def test_purchases_depend_on_tunes_and_turns():
    catalog = with_tunes_and_turns(demo.build_catalog(np.random.default_rng(0), 1200), np.random.default_rng(1))
    histories = users.simulate_histories(catalog, np.random.default_rng(0), 300)
    pairs = np.concatenate([histories[:, :-1].ravel()[:, None], histories[:, 1:].ravel()[:, None]], axis=1)
    pairs = pairs[(pairs >= 0).all(1)]
    for attribute in (4, 5):
        values = catalog.attributes[:, attribute]
        assert (values[pairs[:, 0]] == values[pairs[:, 1]]).mean() > 2 / 6, "twice what chance gives"
