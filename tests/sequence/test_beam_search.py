"""The laws of constrained decoding, and a plain loop over one history that says what a beam search should find."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

from qbert_ray.sequence.beam_search import AnyCodes, Beams, Trie, _widened, beam_search, search
from qbert_ray.sequence.decoder import Generator
from tests.sequence.t5 import t5_of
from tests.sequence.test_decoder import CODES, HISTORIES, ITEMS, LEVELS, SIZE, build, encode

CATALOG = torch.from_numpy(CODES)
TRIE = Trie.build(CATALOG)
SEEN = [np.unique(np.concatenate([history, np.arange(number, ITEMS, 3)])) for number, history in enumerate(HISTORIES)]


def plain_search(model, history, beam, items):
    """(score, codes) of the best prefixes, level by level, with dictionaries and without a cache."""
    memory, beams = encode(model, [history]), [(0.0, ())]
    for level in range(LEVELS):
        prefixes = torch.tensor([[*codes, *[0] * (LEVELS - level)] for _, codes in beams])
        logp = model(memory, prefixes[None])[0, :, level].log_softmax(-1)
        going = {tuple(CODES[item, : level + 1]) for item in items}
        grown = [
            (score + logp[row, code].item(), (*codes, code))
            for row, (score, codes) in enumerate(beams)
            for code in range(SIZE)
            if (*codes, code) in going
        ]
        beams = sorted(grown, key=lambda pair: -pair[0])[:beam]
    return beams


@pytest.mark.parametrize("beam", [1, 4, 20])
def test_it_finds_what_a_plain_loop_finds(beam):
    model = build()
    found = beam_search(model, encode(model, HISTORIES), TRIE, beam)
    for history, scores, codes in zip(HISTORIES, found.scores, found.codes.tolist(), strict=True):
        expected = plain_search(model, history, beam, range(ITEMS))
        assert [tuple(each) for each in codes] == [codes for _, codes in expected]
        assert torch.allclose(scores, torch.tensor([score for score, _ in expected]), atol=1e-5)


def test_a_beam_as_wide_as_the_catalog_is_exhaustive():
    model = build()
    memory = encode(model, HISTORIES)
    found, scores = beam_search(model, memory, TRIE, ITEMS), model.score_all(memory, CATALOG)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.allclose(found.scores, expected.values, atol=1e-5)
    assert torch.equal(found.items, expected.indices)


@pytest.mark.parametrize("beam", [1, 3, 20, 60])
def test_every_beam_is_an_item_and_none_comes_twice(beam):
    model = build()
    found = beam_search(model, encode(model, HISTORIES), TRIE, beam)
    assert found.items.shape == (len(HISTORIES), min(beam, ITEMS))
    assert torch.equal(CATALOG[found.items], found.codes)
    assert all(len(set(row)) == len(row) for row in found.items.tolist())


@pytest.mark.parametrize("beam", [1, 3, 20, 60])
def test_removed_items_never_appear_and_the_others_still_do(beam):
    model = build()
    found = beam_search(model, encode(model, HISTORIES), TRIE, beam, SEEN)
    for row, seen in zip(found.items.tolist(), SEEN, strict=True):
        items = [item for item in row if item >= 0]
        assert not set(items) & set(seen.tolist())
        assert len(set(items)) == min(beam, ITEMS - len(seen))


@pytest.mark.parametrize("beam", [4, 20])
def test_removing_items_is_searching_a_smaller_catalog(beam):
    model = build()
    found = beam_search(model, encode(model, HISTORIES), TRIE, beam, SEEN)
    for history, seen, scores, codes in zip(HISTORIES, SEEN, found.scores, found.codes.tolist(), strict=True):
        expected = plain_search(model, history, beam, set(range(ITEMS)) - set(seen.tolist()))
        assert [tuple(each) for each in codes] == [codes for _, codes in expected]
        assert torch.allclose(scores, torch.tensor([score for score, _ in expected]), atol=1e-5)


def test_a_history_that_has_seen_everything_gets_nothing():
    model = build()
    seen = [np.arange(ITEMS), np.zeros(0, int)]
    found = beam_search(model, encode(model, HISTORIES[:2]), TRIE, 5, seen)
    assert (found.items[0] == -1).all() and (found.scores[0] == -torch.inf).all()
    assert (found.items[1] >= 0).all()
    alone = beam_search(model, encode(model, HISTORIES[:1]), TRIE, 5, seen[:1])
    assert (alone.items == -1).all() and (alone.scores == -torch.inf).all() and alone.codes.shape == (*alone.items.shape, LEVELS)


def test_items_that_are_not_allowed_are_not_in_the_trie():
    model, allowed = build(), torch.arange(ITEMS) % 2 == 0
    memory = encode(model, HISTORIES)
    found = beam_search(model, memory, Trie.build(CATALOG, allowed), ITEMS)
    assert found.items.shape[1] == ITEMS // 2 and (found.items % 2 == 0).all()
    scores = model.score_all(memory, CATALOG).masked_fill(~allowed, -torch.inf)
    assert torch.equal(found.items, scores.topk(ITEMS // 2).indices)
    seen = [np.array([1, 2, 3])] * len(HISTORIES)  # 1 and 3 are not allowed anyway
    found = beam_search(model, memory, Trie.build(CATALOG, allowed), ITEMS, seen)
    assert (found.items >= 0).sum(1).tolist() == [ITEMS // 2 - 1] * len(HISTORIES)


@pytest.mark.parametrize("removing", [False, True])
def test_a_batch_never_changes_a_result(removing):
    model = build()
    together = beam_search(model, encode(model, HISTORIES), TRIE, 7, SEEN if removing else None)
    for row, history in enumerate(HISTORIES):
        alone = beam_search(model, encode(model, [history]), TRIE, 7, [SEEN[row]] if removing else None)
        count = alone.items.shape[1]  # alone there may be fewer columns
        assert torch.equal(alone.items[0], together.items[row, :count])
        assert torch.allclose(alone.scores[0], together.scores[row, :count], atol=1e-5)
        assert (together.items[row, count:] == -1).all()


def test_ids_of_one_level_are_scored_by_their_code_alone():
    torch.manual_seed(0)
    model = Generator(1, 8, width=16, num_layers=1, num_heads=2, head_width=8, ffn_width=16).eval()
    codes = torch.tensor([[3], [0], [5], [7]])
    memory = encode(model, [np.array([0, 2]), np.array([1])], codes.numpy())
    scores, found = model.score_all(memory, codes), beam_search(model, memory, Trie.build(codes), 4)
    assert torch.equal(found.items, scores.sort(dim=1, descending=True).indices)
    assert (scores.exp().sum(1) < 1).all(), "four of the eight codes are an item's"


def test_items_with_one_id_share_a_score_and_come_in_order():
    model = build()
    codes = torch.cat([CATALOG, CATALOG[:10]])
    memory = encode(model, HISTORIES)
    found, scores = beam_search(model, memory, Trie.build(codes), len(codes)), model.score_all(memory, codes)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.items, expected.indices)
    found = beam_search(model, memory, Trie.build(codes), 20, [np.array([0])] * len(HISTORIES))
    assert not (found.items == 0).any() and (found.items == ITEMS).any()


def test_t5_with_the_same_weights_finds_the_same_beams():
    model, beam = build(), 6
    with torch.no_grad():
        model.position_embedding.weight.zero_()
    found = beam_search(model, encode(model, HISTORIES), TRIE, beam)
    twin, paths = t5_of(model), {tuple(codes) for item in CODES for codes in [item[:level] for level in range(1, LEVELS + 1)]}

    def allowed(_, tokens):
        prefix = tuple((tokens[1:] - torch.arange(len(tokens) - 1) * SIZE).tolist())
        return [code + len(prefix) * SIZE for code in range(SIZE) if (*prefix, code) in paths]

    for row, history in enumerate(HISTORIES):
        flat = (CODES[history[-6:]] + np.arange(LEVELS) * SIZE).ravel().tolist() + [model.start + 1]
        made = twin.generate(
            torch.tensor([flat]),
            num_beams=beam,
            num_return_sequences=beam,
            max_new_tokens=LEVELS,
            logits_processor=LogitsProcessorList([PrefixConstrainedLogitsProcessor(allowed, beam)]),
            eos_token_id=None,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert torch.equal(made.sequences[:, 1:] - torch.arange(LEVELS) * SIZE, found.codes[row])
        assert torch.allclose(made.sequences_scores, found.scores[row], atol=1e-5)


def test_unconstrained_decoding_ranks_all_codes():
    model = build()
    memory = encode(model, HISTORIES)
    found = beam_search(model, memory, AnyCodes(SIZE), SIZE**LEVELS)
    every = torch.cartesian_prod(*[torch.arange(SIZE)] * LEVELS)
    expected = model.score_all(memory, every).sort(dim=1, descending=True)
    assert torch.allclose(found.scores, expected.values, atol=1e-5)
    items = TRIE.lookup(found.codes.flatten(0, 1)).view(len(HISTORIES), -1)
    assert ((items >= 0).sum(1) == ITEMS).all()  # so the others are invalid
    assert torch.equal(CATALOG[items[items >= 0]], found.codes[items >= 0])


def test_codes_without_an_item_fall_back_to_the_nearest():
    codewords = torch.from_numpy(np.random.default_rng(1).standard_normal((LEVELS, SIZE, 4))).float()
    every = torch.cartesian_prod(*[torch.arange(SIZE)] * LEVELS)
    latent = codewords[torch.arange(LEVELS), CATALOG].sum(1)
    for codes, item in zip(every, TRIE.nearest(every, codewords).tolist(), strict=True):
        common = (codes == CATALOG).long().cumprod(1).sum(1)
        distance = (codewords[torch.arange(LEVELS), codes].sum(0) - latent).square().sum(1)
        among = (common == common.max()).nonzero()[:, 0]
        assert item == among[distance[among].argmin()]
    assert TRIE.nearest(CATALOG, codewords).tolist() == list(range(ITEMS))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 50), st.integers(0, 2**31))
def test_a_trie_holds_every_id_and_nothing_else(levels, size, count, seed):
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, size, (count, levels)))
    trie = Trie.build(codes)
    node, known = torch.zeros(1, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)
    for level in range(levels):
        first, children = trie.children(level, node)
        assert first.tolist() == (children.cumsum(0) - children).tolist()
        known = torch.cat([known.repeat_interleave(children, 0), trie.code(level, torch.arange(int(children.sum())))[:, None]], dim=1)
        node = torch.arange(int(children.sum()))
    assert torch.equal(known, codes[trie.item(node)])
    assert sorted(trie.items.tolist()) == list(range(count))
    every = torch.cartesian_prod(*[torch.arange(size)] * levels).view(-1, levels)
    expected = [next((item for item in range(count) if torch.equal(codes[item], each)), -1) for each in every]
    assert trie.lookup(every).tolist() == expected


@pytest.mark.parametrize("seen", [None, SEEN], ids=["all", "unseen"])
def test_a_search_in_groups_of_histories_is_that_of_all_at_once(seen, monkeypatch):
    """Groups whose histories have fewer items left are filled up with empty beams."""
    model = build()
    seen = None if seen is None else [np.arange(ITEMS - 2), *seen[1:]]
    whole = beam_search(model, encode(model, [history[-6:] for history in HISTORIES]), TRIE, 5, seen)
    monkeypatch.setattr("qbert_ray.sequence.beam_search.SEARCHED_AT_ONCE", 1)
    found = search(model, CODES, TRIE, HISTORIES, 5, seen)
    assert torch.equal(found.items, whole.items)
    there = whole.items >= 0
    assert torch.allclose(found.scores, whole.scores, atol=1e-5) and torch.equal(found.codes[there], whole.codes[there])
    assert there.all() == (seen is None)


def test_the_nearest_item_is_found_among_many_in_pieces(monkeypatch):
    codewords = torch.from_numpy(np.random.default_rng(2).standard_normal((LEVELS, SIZE, 4))).float()
    every = torch.cartesian_prod(*[torch.arange(SIZE)] * LEVELS)
    whole = TRIE.nearest(every, codewords)
    monkeypatch.setattr("qbert_ray.sequence.beam_search.MOST_DISTANCES", 4 * 2)  # two items at a time
    assert torch.equal(TRIE.nearest(every, codewords), whole)


def test_a_small_trie_by_hand():
    """Items 0: 0 1, 1: 1 0, 2: 0 0, 3: 1 0; the third item may not be generated in the second trie."""
    codes = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 0]])
    trie = Trie.build(codes)
    assert trie.items.tolist() == [2, 0, 1, 3] and trie.leaf.tolist() == [1, 2, 0, 3]
    assert [each.tolist() for each in trie.first] == [[0, 4], [0, 2, 4]]
    assert [each.tolist() for each in trie.begin] == [[0, 2], [0, 2, 4]]
    assert [each.tolist() for each in trie.codes] == [[0, 1], [0, 1, 0, 0]]
    assert [trie.node(level, torch.arange(4)).tolist() for level in (0, 1, 2)] == [[0] * 4, [0, 0, 1, 1], [0, 1, 2, 3]]
    assert [each.tolist() for each in trie.prefix(torch.tensor([[0, 1], [1, 1], [2, 0], [1, 0]]))] == [[1, 1, 0, 2], [2, 1, 0, 2]]
    assert trie.lookup(torch.tensor([[0, 1], [1, 1], [2, 0], [1, 0]])).tolist() == [0, -1, -1, 1]
    fewer = Trie.build(codes, torch.tensor([True, True, False, True]))
    assert fewer.items.tolist() == [0, 1, 3] and fewer.leaf.tolist() == [0, 1, -1, 2]
    assert fewer.lookup(torch.tensor([[0, 0], [0, 1]])).tolist() == [-1, 0]
    emptied = trie.emptied([np.array([1, 3, 2]), np.array([0])])
    assert [[each.tolist() for each in pair] for pair in emptied] == [[[0], [1]], [[0, 0, 0, 1], [2, 0, 3, 1]]]
    assert trie.emptied([np.array([], int)]) == []


def test_beams_are_widened_with_empty_ones():
    beams = Beams(torch.tensor([[-1.0]]), torch.tensor([[7]]), torch.tensor([[[1, 2, 3]]]))
    wider = _widened(beams, 3)
    assert wider.scores.tolist() == [[-1, -torch.inf, -torch.inf]] and wider.items.tolist() == [[7, -1, -1]]
    assert wider.codes.tolist() == [[[1, 2, 3], [0, 0, 0], [0, 0, 0]]]


def test_items_are_removed_from_a_trie_alone():
    model = build()
    with pytest.raises(AssertionError, match="from a trie alone"):
        beam_search(model, encode(model, HISTORIES[:1]), AnyCodes(SIZE), 2, [np.array([1])])
