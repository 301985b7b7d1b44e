"""The kind tabular against values worked out by hand: quantiles, hashed signs, missing cells, and what is kept for appended items."""

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from qbert_ray.config.features_section import Features, Tabular
from qbert_ray.config.schema import Domain
from qbert_ray.features.kinds import tabular
from qbert_ray.features.kinds.tabular import Encoder, category_vectors, number_vectors, quantile_of, sign_vectors
from qbert_ray.features.modality import Source
from qbert_ray.inputs.input_columns import as_values
from qbert_ray.storage.directory import RunDir

PINNED = [1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_quantiles_are_shares_of_the_catalog_and_ties_are_in_their_middle():
    """Quantiles 1, 2, 2, 2, 10 stand at 0, .25, .5, .75, 1: 2 lies at their middle, 6 halfway from .75 to 1."""
    found = quantile_of(np.array([1.0, 1.5, 2.0, 6.0, 10.0, -5.0, 99.0]), [1.0, 2.0, 2.0, 2.0, 10.0])
    assert found == pytest.approx([0, 0.125, 0.5, 0.875, 1, 0, 1])


def test_a_skewed_column_is_spread_evenly():
    encoder = Encoder(Features(), "tabular")
    prices = [[str(2.0**power)] for power in range(101)]
    quantiles = encoder.fit("price", prices)["quantiles"]
    assert quantile_of(np.array([2.0**power for power in range(101)]), quantiles) == pytest.approx(np.arange(101) / 100)


def test_vectors_of_numbers_are_close_where_their_quantiles_are():
    """The cosine of two of them is the mean of cos(pi k (u - v)) for k = 1 to 4: for .1 apart (.951 + .809 + .588 + .309) / 4."""
    vectors = number_vectors("price", np.array([0.3, 0.4, 0.9]), 64)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-6)
    assert vectors[0] @ vectors[1] == pytest.approx(0.66427, abs=1e-4)
    assert vectors[0] @ vectors[2] == pytest.approx(np.mean([np.cos(np.pi * k * 0.6) for k in range(1, 5)]), abs=1e-5)


def test_signs_are_the_bits_of_a_hash(monkeypatch):
    """A hash of 0b1011 gives + + - + and then minuses; the second 64 come from another salt."""
    monkeypatch.setattr(tabular, "stable_hash", lambda texts: np.array([0b1011] * len(texts), np.uint64))
    monkeypatch.setattr(tabular, "mix", lambda hashed, salt: hashed + np.uint64(salt))
    signs = sign_vectors(["red"], 68)[0] * 68**0.5
    assert signs[:5].tolist() == pytest.approx([1, 1, -1, 1, -1]) and signs[5:64].max() < 0
    assert signs[64:].tolist() == pytest.approx([-1, -1, 1, 1])  # 0b1100


def test_hashed_categories_never_change():
    """Published semantic IDs rest on them, so these bits must be those of every version."""
    assert (sign_vectors(["brand\x1eacme"], 16)[0] > 0).astype(int).tolist() == PINNED


def test_categories_are_equal_or_nearly_orthogonal_and_levels_are_averaged():
    cells = [["Music > Guitars"], ["music", "drums"], [], ["Kitchen"], ["Music"]]
    vectors, there = category_vectors("category", cells, 4096)
    assert there.tolist() == [True, True, False, True, True] and not vectors[2].any()
    assert vectors[0] @ vectors[1] == pytest.approx(0.5, abs=0.05)  # one of two levels is shared
    assert vectors[0] @ vectors[4] == pytest.approx(0.5**0.5, abs=0.05) and abs(vectors[0] @ vectors[3]) < 0.05
    other, _ = category_vectors("tags", [["Music"]], 4096)
    assert abs(other[0] @ vectors[4]) < 0.05, "the same text of another column is something else"


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", 12), ("-3.5", -3.5), ("$1,299.00", 1299), ("1.299,00", 1299), ("9,99 €", 9.99), ("1e3", 1000), ("", None), ("a", None), ("inf", None), ("nan", None),
     ("393,91 €", 393.91), ("12 EUR", 12), ("1 234,50 €", 1234.5), ("CHF 1'234.50", 1234.5), ("15 %", 15), ("3 x 4", None), ("1,2,3", None)],
)  # fmt: skip
def test_numbers_as_shops_write_them(text, number):
    encoder = Encoder(Features(tabular=Tabular(dim=8)), "tabular")
    fitted = encoder.fit("price", [[text]])
    assert fitted is None if number is None else fitted["quantiles"][0] == pytest.approx(number)


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [(["61,5", "1.234", "1.234,5"], [61.5, 1234, 1234.5]), (["61.5", "1,234", "1.234"], [61.5, 1234, 1.234]), (["1,234", "5"], [1234, 5]),
     (["1.234.567", "12.500", "7"], [1234567, 12500, 7]), (["1,234,567", "12,500"], [1234567, 12500])],
)  # fmt: skip
def test_a_column_shows_whether_commas_are_decimal(texts, numbers):
    fitted = Encoder(Features(tabular=Tabular(dim=8)), "tabular").fit("price", [[text] for text in texts])
    assert fitted["quantiles"][::50] == pytest.approx(np.quantile(numbers, [0, 0.5, 1]))


def test_new_cells_are_read_as_the_column_was_fitted():
    encoder = Encoder(Features(tabular=Tabular(dim=32)), "tabular")
    commas, points = [["0,5"], ["1,250"], ["2,375"], ["9,99"]], [["0.5"], ["1.250"], ["2.375"], ["9.99"]]
    for known, new in ((commas, points), (points, commas)):
        fitted = encoder.fit("price", known)
        alone, _ = encoder.encode("price", known, fitted)
        assert np.array_equal(encoder.encode("price", known + new, fitted)[0][:4], alone)
    assert encoder.fit("price", commas)["quantiles"] == encoder.fit("price", points)["quantiles"]


def test_a_column_is_of_numbers_where_nearly_all_cells_are():
    encoder = Encoder(Features(tabular=Tabular(categories=["brand"])), "tabular")
    assert encoder.fit("price", [["1"]] * 19 + [["?"]]) is not None
    assert encoder.fit("price", [["1"]] * 18 + [["?"]] * 2) is None
    assert encoder.fit("price", [["1", "2"]]) is None and encoder.fit("price", [[], []]) is None
    assert encoder.fit("brand", [["1"]] * 20) is None


def test_cells_of_any_type_become_lists_of_texts():
    frame = pl.DataFrame(
        {
            "price": [1.0, None, 2.5],
            "tags": [["a, b", "c"], [], None],
            "nested": [[["Music", "Guitars"]], [["Kitchen"]], None],
            "text": ['["x", ["y"], null]', " plain ", "[broken"],
        }
    )
    found = frame.select(as_values(pl.col(name), kind).alias(name) for name, kind in frame.schema.items())
    lists = {name: [json.loads(cell) if cell else None for cell in found[name]] for name in found.columns}
    assert lists["price"] == [["1"], None, ["2.5"]] and lists["tags"] == [["a, b", "c"], None, None]
    assert lists["nested"] == [["Music", "Guitars"], ["Kitchen"], None]
    assert lists["text"] == [["x", "y"], ["plain"], ["[broken"]]


def write(run, part, prices, cold):
    count = len(prices)
    table = {
        "domain": ["shop"] * count,
        "item_id": [f"{part}{n}" for n in range(count)],
        "item_index": pa.array(range(count), pa.int32()),
        "cold": [cold] * count,
        "value.price": [None if price is None else json.dumps([price]) for price in prices],
        "value.brand": ['["acme"]'] * count,
    }
    run.write_part("ingest/items", f"shop-{part:05d}.parquet", pa.table(table))


def test_quantiles_are_those_of_the_items_that_training_may_see_and_stay_when_items_are_appended(tmp_path):
    run = RunDir(str(tmp_path))
    source = Source("tabular", "shop", Domain(inputs={"tabular": {"values": ["price", "brand"]}}), "")
    write(run, 0, ["1", "2", None, "3"], cold=False)
    write(run, 1, ["1000"], cold=True)
    features = Features(tabular=Tabular(dim=32))
    encoder = Encoder(features, "tabular")
    assert encoder.vectors_of(features, source) == 2
    first = encoder(run, source, 3)
    assert first.present.tolist() == [[True, True, False]] * 2 + [[False, True, False]] + [[True, True, False]] * 2
    assert not first.vectors[2, 0].any() and not first.vectors[:, 2].any()
    assert first.vectors[4, 0] == pytest.approx(first.vectors[3, 0]), "a number beyond the largest one is as the largest one"
    write(run, 2, ["500", "2"], cold=True)
    second = encoder(run, source, 3)
    assert np.array_equal(second.vectors[:5], first.vectors) and second.vectors[6] == pytest.approx(first.vectors[1])
