import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert_ray.metrics import entropy, gini
from qbert_ray.semantic_ids.id_report import typical_value
from qbert_ray.semantic_ids.quality import NEIGHBOURS, NeighbourRecall, decode, prefix_agreement, prefix_figures, prefixes, typical


def catalog(num_items=60, seed=0):
    """IDs that quantize the embeddings themselves."""
    rng = np.random.default_rng(seed)
    codebooks = rng.normal(size=(3, 4, 2)) / 4 ** np.arange(3)[:, None, None]
    codes = rng.permutation(np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), axis=1))[:num_items]
    return codes, codebooks, decode(codes, codebooks)


def recall(codes, codebooks, embedding, queries, pieces):
    found = NeighbourRecall(queries, embedding[queries], codes[queries], codebooks)
    for rows in np.array_split(np.arange(len(codes)), pieces):
        found.add(embedding[rows], codes[rows])
    return found.result()


def plain_recall(codes, codebooks, embedding, queries):
    sums = decode(codes, codebooks)
    hits = {"codewords": 0, "prefix": 0}
    for query in queries:
        others = [item for item in range(len(codes)) if item != query]
        true = np.square(embedding - embedding[query]).sum(1)
        far = np.square(sums - sums[query]).sum(1)
        shared = [next((k for k, same in enumerate(row == codes[query]) if not same), codes.shape[1]) for row in codes]
        longest = list(zip(np.negative(shared).tolist(), far, strict=True))
        for name, key in {"codewords": far, "prefix": longest}.items():
            hits[name] += len(set(nearest(others, true)) & set(nearest(others, key)))
    return {name: count / NEIGHBOURS / len(queries) for name, count in hits.items()}


def nearest(items, key):
    return sorted(items, key=key.__getitem__)[:NEIGHBOURS]


@settings(max_examples=20, deadline=None)
@given(st.integers(11, 64), st.integers(1, 7), st.integers(0, 99))
def test_recall_equals_plain_loops_however_the_catalog_is_cut(num_items, pieces, seed):
    codes, codebooks, _ = catalog(num_items, seed)
    rng = np.random.default_rng(seed)
    embedding, queries = rng.normal(size=(num_items, 3)), rng.permutation(num_items)[:9]
    found = recall(codes, codebooks, embedding, queries, pieces)
    assert found.pop("random") == NEIGHBOURS / (num_items - 1)
    assert found == pytest.approx(plain_recall(codes, codebooks, embedding, queries))


def test_ids_that_keep_everything_have_full_recall():
    codes, codebooks, embedding = catalog()
    found = recall(codes, codebooks, embedding, np.arange(60), 2)
    assert found["codewords"] == 1 > found["prefix"] > found["random"]  # the border between two prefixes parts neighbours


def test_prefixes_are_numbered_from_0():
    assert [prefix.tolist() for prefix in prefixes(np.array([[7, 1], [2, 1], [7, 0]]))] == [[1, 0, 1], [2, 0, 1]]


def test_prefixes_that_follow_an_attribute_are_pure_and_shuffled_ones_are_not():
    values = np.arange(400) % 8
    codes = np.stack([values, np.random.default_rng(0).integers(5, size=400)], axis=1)
    first, second = prefix_figures(codes, values)
    assert first["purity"] == 1 and first["nmi"] == pytest.approx(1) and first["prefixes"] == 8 and first["items"] == 400
    assert first["purity_shuffled"] < 0.3 and first["nmi_shuffled"] < 0.1
    assert second["purity"] == 1 and second["nmi"] < 1  # finer than the attribute


def test_unrelated_attributes_agree_as_shuffled_ones_do():
    rng = np.random.default_rng(0)
    for figures in prefix_figures(rng.integers(4, size=(2000, 2)), rng.integers(3, size=2000)):
        assert figures["purity"] == pytest.approx(figures["purity_shuffled"], abs=0.03)
        assert figures["nmi"] == pytest.approx(figures["nmi_shuffled"], abs=0.005)


def test_purity_counts_items_with_siblings_only():
    (figures,) = prefix_figures(np.array([[0], [0], [0], [1], [2]]), np.array([1, 1, 0, 1, 0]))
    assert figures["items"] == 3 and figures["prefixes"] == 3 and figures["purity"] == pytest.approx(2 / 3)
    (alone,) = prefix_figures(np.array([[0], [1]]), np.array([0, 1]))
    assert alone["items"] == 0 and alone["purity"] == 0


def test_pairs_that_share_a_prefix_by_hand():
    """Items 0 and 1 share <0>, items 2 and 3 <1, 0>; of the pairs (0, 1), (2, 3), (0, 3) two share the first code and one both."""
    codes, first, second = np.array([[0, 0], [0, 1], [1, 0], [1, 0]]), np.array([0, 2, 0]), np.array([1, 3, 3])
    one, both = prefix_agreement(codes, first, second)
    assert one == {"same": pytest.approx(2 / 3), "chance": pytest.approx(2 / 3 * 1 / 3 + 1 / 3 * 2 / 3)}
    assert both == {"same": pytest.approx(1 / 3), "chance": pytest.approx(1 / 3 * 2 / 3)}
    either_way = prefix_agreement(codes[:3], np.array([0, 1, 0]), np.array([1, 0, 2]))  # half of 0 and 1 meet themselves by chance
    assert either_way[0] == {"same": pytest.approx(2 / 3), "chance": pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))}
    assert either_way[1] == {"same": 0, "chance": 0}


def test_the_typical_value_is_more_common_here_than_elsewhere():
    assert typical(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1])) == {"value": 1, "share": 1 / 2, "overall": 1 / 3}
    assert typical(np.array([0]), np.array([], dtype=int)) is None
    assert typical(np.array([0, 1, 2]), np.array([1])) is None
    assert typical(np.array([0] * 9 + [1]), np.array([0, 0, 1])) is None, "the value of two is rarer here than overall"


def test_spread_of_codes():
    equal, one, half = (np.array(codes)[:, None] for codes in ([0, 1, 2, 3], [2, 2], [0, 0, 1, 1]))
    assert [entropy(codes)[0] for codes in (equal, one, half)] == [2, 0, 1]
    assert [gini(codes, 4)[0] for codes in (equal, one, half)] == [0, 3 / 4, 1 / 2]


def test_an_attribute_that_no_item_has_has_no_typical_value():
    assert typical_value(pl.Series("brand", [None, None], dtype=pl.String), np.array([0])) is None
    found = typical_value(pl.Series("brand", ["a", "b", None, "b", "a", "b", "b"]), np.array([0, 2, 4]))
    assert found == {"value": "a", "share": 1.0, "overall": pytest.approx(1 / 3)}
