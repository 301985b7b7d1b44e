import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert_ray.semantic_ids import CapacityError, resolve_collisions, resolve_given, to_tokens


def catalog(num_items, num_levels=3, size=4, seed=0, identical=0):
    """Latents, codebooks and the nearest codes of a made-up catalog."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(num_items, 2)).astype(np.float32)
    latents[:identical] = latents[0]
    codebooks = (rng.normal(size=(num_levels, size, 2)) / 2 ** np.arange(num_levels)[:, None, None]).astype(np.float32)
    residual, codes = latents.copy(), []
    for book in codebooks:
        code = np.square(residual[:, None] - book).sum(-1).argmin(1)
        codes.append(code)
        residual = residual - book[code]
    return np.stack(codes, axis=1), latents, codebooks


def slow(codes, latents, codebooks):
    """The rule said plainly: every free ID is looked at, in order of how high the change is and how near its codewords are."""
    num_levels, size, _ = codebooks.shape
    distance = np.square(latents - sum(codebooks[k][codes[:, k]] for k in range(num_levels))).sum(1)
    keeper = {}
    for item in sorted(range(len(codes)), key=lambda i: (distance[i], i)):
        keeper.setdefault(tuple(codes[item]), item)
    used, result = set(keeper), codes.copy()
    for item in sorted(set(range(len(codes))) - set(keeper.values()), key=lambda i: (distance[i], i)):
        for length in range(num_levels - 1, -1, -1):
            found = search(list(codes[item, :length]), latents[item], codebooks, used, size)
            if found:
                break
        used.add(found)
        result[item] = found
    return result


def search(prefix, latent, codebooks, used, size):
    if len(prefix) == len(codebooks):
        return tuple(prefix) if tuple(prefix) not in used else None
    residual = latent - sum((codebooks[k][code] for k, code in enumerate(prefix)), np.zeros_like(latent))
    for code in np.argsort(np.square(codebooks[len(prefix)] - residual).sum(1), kind="stable"):
        found = search([*prefix, code], latent, codebooks, used, size)
        if found:
            return found
    return None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 100))
def test_equals_the_plain_rule_and_is_unique(num_items, identical, seed):
    codes, latents, codebooks = catalog(num_items, seed=seed, identical=min(identical, num_items))
    resolved = resolve_collisions(codes, latents, codebooks)
    assert len(np.unique(resolved.codes, axis=0)) == num_items
    assert (resolved.codes == slow(codes, latents, codebooks)).all()
    assert (resolved.moved == (resolved.codes != codes).any(1)).all()


def test_resolving_again_changes_nothing():
    codes, latents, codebooks = catalog(50, identical=10)
    once = resolve_collisions(codes, latents, codebooks).codes
    again = resolve_collisions(once, latents, codebooks)
    assert (again.codes == once).all() and not again.moved.any()


def test_a_full_catalog_uses_every_id():
    codes, latents, codebooks = catalog(4**3, identical=40)
    assert len(np.unique(resolve_collisions(codes, latents, codebooks).codes, axis=0)) == 4**3


def test_more_items_than_ids_is_refused_with_what_to_raise():
    codes, latents, codebooks = catalog(4**3 + 1)
    with pytest.raises(CapacityError, match="65 items but only 4\\*\\*3 = 64 semantic IDs; raise rqvae.num_levels"):
        resolve_collisions(codes, latents, codebooks)


def test_given_codes_become_unique_and_those_that_are_stay():
    codes = np.array([[1, 1], [1, 1], [1, 2], [1, 1], [0, 3]])
    resolved = resolve_given(codes, 4)
    assert resolved.codes.tolist() == [[1, 1], [1, 3], [1, 2], [1, 0], [0, 3]]
    assert resolved.moved.tolist() == [False, True, False, True, False]


def test_one_item():
    codes, latents, codebooks = catalog(1)
    assert resolve_collisions(codes, latents, codebooks).codes.tolist() == codes.tolist()


def test_tokens_are_written_as_in_the_paper():
    assert to_tokens(np.array([[2, 3, 1, 6]])) == ["<a_2><b_3><c_1><d_6>"]
