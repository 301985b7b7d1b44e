"""What a run says of a domain's items, against arrays written by hand."""

import numpy as np
import pyarrow as pa
import pytest

from qbert_ray.features.vectors import features_table
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import catalog_codes, content_vectors, item_ids, modality_vectors, warm_items
from qbert_ray.storage.directory import RunDir

# Four items, the last of them cold; all vectors share a large part that says nothing.
VECTORS = np.array([[[9.0, 1, 0], [9, 3, 0]], [[9, 0, 1], [5, 5, 5]], [[7, 7, 7], [7, 7, 7]], [[9, -1, -1], [9, -1, -1]]], np.float32)
PRESENT = np.array([[True, True], [True, False], [False, False], [True, True]])


@pytest.fixture
def run(tmp_path):
    made = RunDir(str(tmp_path))
    keys = [pa.array(["shop"] * 4), pa.array(list("abcd")), pa.array(range(4), pa.int32())]
    items = [*keys, pa.nulls(4, pa.string()), pa.nulls(4, pa.binary()), pa.array([False, False, False, True])]
    made.write_part("ingest/items", "shop-00000.parquet", pa.table(items, schema=columns.ITEMS))
    made.write_part("features/text", "shop-00000.parquet", features_table(pa.table(keys, names=columns.KEYS), VECTORS, PRESENT))
    embedding = np.array([[2.0, 0], [0, 2], [4, 4], [9, 1]], np.float32)
    fused = [*keys, columns.to_fixed_lists(embedding), pa.array([1] * 4, pa.int32())]
    made.write_part("fusion/embeddings", "shop-00000.parquet", pa.table(fused, schema=columns.embeddings_schema(2)))
    return made


def unit(rows):
    return np.array([np.array(row) / np.linalg.norm(row) for row in rows])


def test_vectors_of_a_modality_are_means_centred_on_what_training_may_see(run):
    """Means (9, 2, 0) and (9, 0, 1) of the items that have any; their own mean is (9, 1, .5), and the cold item has no part in it."""
    found = modality_vectors(run, "shop", "text").numpy()
    assert found[[0, 1, 3]] == pytest.approx(unit([[0, 1, -0.5], [0, -1, 0.5], [0, -2, -1.5]]), abs=1e-6)
    assert found[2].tolist() == [0, 0, 0]
    assert found[0] @ found[1] == pytest.approx(-1, abs=1e-6)  # uncentred, their cosine would be .97
    assert modality_vectors(run, "shop", "image") is None


def test_a_modality_that_no_trained_item_has_says_nothing(run, tmp_path):
    other = RunDir(str(tmp_path / "other"))
    for name in ("ingest/items", "features/text"):
        table = run.read(name)
        if name == "features/text":
            table = features_table(table.select(columns.KEYS), VECTORS, PRESENT & (np.arange(4) == 3)[:, None])
        other.write_part(name, "shop-00000.parquet", table)
    assert modality_vectors(other, "shop", "text") is None


def test_content_is_centred_on_what_training_may_see_and_of_length_sqrt_d(run):
    """The mean of the first three is (2, 2)."""
    expected = unit([[0, -2], [-2, 0], [2, 2], [7, -1]]) * 2**0.5
    assert content_vectors(run, "shop").numpy() == pytest.approx(expected, abs=1e-6)
    assert warm_items(run, "shop") == 3 and item_ids(run, "shop").to_pylist() == list("abcd")


def test_codes_are_in_the_order_of_item_index(tmp_path):
    run = RunDir(str(tmp_path))
    keys = [pa.array(["shop"] * 3), pa.array(list("abc")), pa.array([2, 0, 1], pa.int32())]
    nested = [pa.array(values, pa.list_(pa.int32())) for values in ([[5, 6], [1, 2], [3, 4]], [[9], [7], [8]])]
    run.write_part(
        "semantic_ids",
        "shop-00000.parquet",
        pa.table([*keys, nested[0], nested[1]], names=[*columns.KEYS, "codes", columns.EXTRA_CODES]),
    )
    assert catalog_codes(run, "shop").tolist() == [[1, 2, 7], [3, 4, 8], [5, 6, 9]]
