import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qbert_ray.semantic_ids import collisions as semantic_ids
from qbert_ray.semantic_ids.collisions import CapacityError, resolve_collisions, resolve_given, to_tokens
from tests.benchmarks.plain_rule import plain_rule, plain_rule_given


def catalog(num_items, num_levels=3, size=4, seed=0, identical=0, block=False):
    """Latents, codebooks and the nearest codes of a made-up catalog; block: each level has dimensions of its own."""
    rng = np.random.default_rng(seed)
    width = 2 * num_levels if block else 2
    latents = rng.normal(size=(num_items, width)).round(1).astype(np.float32)  # a coarse grid, so that distances tie
    latents[: identical + 1] = latents[:1]
    codebooks = (rng.normal(size=(num_levels, size, width)) / 2 ** np.arange(num_levels)[:, None, None]).round(1).astype(np.float32)
    if block:
        codebooks *= np.repeat(np.eye(num_levels), 2, axis=1)[:, None].astype(np.float32)
    residual, codes = latents.copy(), []
    for book in codebooks:
        code = np.square(residual[:, None] - book).sum(-1).argmin(1)
        codes.append(code)
        residual = residual - book[code]
    return np.stack(codes, axis=1).astype(np.int32), latents, codebooks


def split(codes, published, seed):
    """Some of the distinct codes, and unrelated ones, as published IDs."""
    rng = np.random.default_rng(seed)
    size = codes.max(initial=0) + 1
    pool = np.unique(np.concatenate([codes, rng.integers(size, size=codes.shape)]), axis=0)
    return pool[rng.permutation(len(pool))[:published]]


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4)).map(lambda shape: {"num_levels": shape[0], "size": shape[1]})


@st.composite
def catalogs(draw):
    """A catalog up to the last free ID, with identical items, and IDs that are published already."""
    shape = draw(shapes)
    room = shape["size"] ** shape["num_levels"]
    num_items = draw(st.integers(0, room))
    made = catalog(num_items, **shape, seed=draw(st.integers(0, 99)), identical=draw(st.integers(0, num_items)), block=draw(st.booleans()))
    return *made, split(made[0], draw(st.integers(0, room - num_items)), draw(st.integers(0, 9)))


@settings(max_examples=200, deadline=None)
@given(catalogs(), st.sampled_from([1, 20, 2**19]))
@example((*catalog(64, identical=40), np.zeros((0, 3), int)), 2**19)
@example((*catalog(56, identical=50), split(catalog(56)[0], 8, 0)), 8)
def test_equals_the_rule_in_plain_loops(made, cells):
    codes, latents, codebooks, taken = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic_ids, "CELLS", cells)  # how many movers are looked at together changes nothing
        resolved = resolve_collisions(codes, latents, codebooks, taken)
    assert resolved.codes.tolist() == plain_rule(codes, latents, codebooks, taken)
    assert (resolved.moved == (resolved.codes != codes).any(1)).all()
    distinct(taken, resolved.codes)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9**2), st.integers(0, 20), st.integers(0, 99))
def test_given_codes_equal_the_rule_in_plain_loops(num_items, published, seed):
    codes = np.random.default_rng(seed).integers(9, size=(num_items, 2)) ** 2 // 9  # small numbers are more common
    taken = split(codes, min(published, 9**2 - num_items), seed)
    resolved = resolve_given(codes, 9, taken)
    assert resolved.codes.tolist() == plain_rule_given(codes, 9, taken)
    assert (resolved.moved == (resolved.codes != codes).any(1)).all()
    distinct(taken, resolved.codes)


def distinct(*codes):
    together = np.concatenate(codes)
    assert len(np.unique(together, axis=0)) == len(together)


@settings(max_examples=50, deadline=None)
@given(catalogs())
def test_resolving_again_changes_nothing(made):
    codes, latents, codebooks, taken = made
    once = resolve_collisions(codes, latents, codebooks, taken).codes
    for again in (resolve_collisions(once, latents, codebooks, taken), resolve_given(once, codebooks.shape[1], taken)):
        assert (again.codes == once).all() and not again.moved.any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.integers(0, 99))
def test_the_order_of_rows_does_not_matter(num_items, seed):
    codes, _, codebooks = catalog(num_items, seed=seed)
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(num_items, 2))  # no ties, which item_index would break
    rows = rng.permutation(num_items)
    assert (
        resolve_collisions(codes[rows], latents[rows], codebooks).codes == resolve_collisions(codes, latents, codebooks).codes[rows]
    ).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.integers(0, 64), st.lists(st.integers(1, 20), max_size=6), st.integers(0, 99))
def test_appending_in_steps_never_collides(num_items, identical, steps, seed):
    codes, latents, codebooks = catalog(num_items, seed=seed, identical=min(identical, num_items))
    published = np.zeros((0, 3), dtype=np.int32)
    for rows in np.split(np.arange(num_items), np.cumsum(steps).clip(max=num_items)):
        new = resolve_collisions(codes[rows], latents[rows], codebooks, published).codes
        published = np.concatenate([published, new])
    distinct(published)


def test_a_full_catalog_uses_every_id():
    codes, latents, codebooks = catalog(4**3, identical=40)
    assert len(np.unique(resolve_collisions(codes, latents, codebooks).codes, axis=0)) == 4**3


def test_thousands_of_identical_items_fill_the_nearest_prefixes():
    latents = np.zeros((5000, 2), dtype=np.float32)
    codebooks = np.random.default_rng(0).normal(size=(3, 64, 2)).astype(np.float32)
    nearest = np.square(codebooks[0]).sum(1).argmin()
    codes = resolve_collisions(np.tile(np.int16([[nearest, 0, 0]]), (5000, 1)), latents, codebooks).codes
    distinct(codes)
    assert (np.bincount(codes[:, 0], minlength=64)[nearest] == 64**2) and len(np.unique(codes[:, 0])) == 2


def test_more_items_than_ids_is_refused_with_what_to_raise():
    codes, latents, codebooks = catalog(4**3 + 1)
    with pytest.raises(CapacityError, match="65 items but only 4\\*\\*3 = 64 semantic IDs; raise quantizer.num_levels"):
        resolve_collisions(codes, latents, codebooks)
    with pytest.raises(CapacityError, match="60 items in addition to 5 published ones but only 4\\*\\*3 = 64"):
        resolve_collisions(codes[:60], latents[:60], codebooks, split(codes, 5, 0))


@pytest.mark.parametrize(("levels", "size"), [(21, 8), (27, 2), (32, 4)])
def test_ids_that_do_not_fit_a_number_or_the_alphabet_are_refused(levels, size):
    """8 ** 21 is 2 ** 63: the number after the last ID would not fit."""
    with pytest.raises(ValueError, match=f"{levels} levels of {size} codewords do not fit a token"):
        resolve_given(np.zeros((1, levels), int), size)
    assert resolve_given(np.zeros((2, 20), int), 8).codes[:, -1].tolist() == [0, 1]


def test_the_nearest_keeps_its_codes_and_the_next_takes_the_nearest_free_ones():
    codebooks = np.array([[[0.0], [10]], [[0], [1]]])
    latents = np.array([[0.2], [0.1], [0.3], [0.1]])
    resolved = resolve_collisions(np.zeros((4, 2), int), latents, codebooks)
    assert resolved.codes.tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]  # compared with 10 both distances are near to 0, not to 1
    assert resolved.moved.tolist() == [True, False, True, True]


def test_given_codes_become_unique_and_those_that_are_stay():
    codes = np.array([[1, 1], [1, 1], [1, 2], [1, 1], [0, 3]])
    resolved = resolve_given(codes, 4)
    assert resolved.codes.tolist() == [[1, 1], [1, 3], [1, 2], [1, 0], [0, 3]]
    assert resolved.moved.tolist() == [False, True, False, True, False]
    assert resolve_given(codes, 4, np.array([[1, 1], [0, 0]])).codes.tolist() == [[1, 3], [1, 0], [1, 2], [2, 1], [0, 3]]


def test_tokens_are_written_as_in_the_paper():
    assert to_tokens(np.array([[2, 3, 1, 6]])) == ["<a_2><b_3><c_1><d_6>"]


def test_rounding_of_the_matrix_product_decides_nothing():
    """Latents far from the origin and codewords that repeat: differences of distances drown in the product's rounding."""
    rng = np.random.default_rng(0)
    books = np.repeat(rng.normal(size=(2, 4, 7)), 2, axis=1)[:, rng.permutation(8)].astype(np.float32)
    latents = (np.repeat(rng.normal(size=(10, 7)), 6, axis=0) + 1e5).astype(np.float32)
    codes = np.zeros((60, 2), dtype=np.int64)
    expected = plain_rule(codes, latents, books, codes[:0])
    assert resolve_collisions(codes, latents, books).codes.tolist() == expected


def test_equally_near_codewords_are_taken_in_their_order_under_every_prefix():
    """Differences are exact here, but squares of the numbers need more digits than there are: products alone would choose by chance."""
    near = 2.0**27 + 0.375
    words = near + np.array([[64.0], [0.5], [-0.25], [0.25], [-0.5], [1.0], [-2.0], [-1.0]])
    prefixes = 2.0**30 * np.arange(8)[:, None]
    codes = np.repeat(np.stack([np.arange(8), np.zeros(8, int)], axis=1), 5, axis=0)
    found = resolve_collisions(codes, prefixes[codes[:, 0]] + near, np.stack([prefixes, words])).codes
    assert found[:, 1].reshape(8, 5).tolist() == [[0, 2, 3, 1, 4]] * 8
