import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert_ray.random_streams import uniform
from qbert_ray.sequence.masking import STRATEGIES, draw_lengths, draw_masks, mask_by

RATIOS = {"span": 0.3, "tail": 0.1, "multi_region": 0.15, "random": 0.3}


def masks_of(strategy, lengths, epoch=0, seed=0):
    lengths = np.asarray(lengths)
    return draw_masks(lengths, np.arange(len(lengths)), seed, epoch, {strategy: 1.0}, RATIOS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.sampled_from(STRATEGIES), st.integers(0, 5))
def test_masks_stay_inside_the_sequence_hide_something_and_leave_something(lengths, strategy, epoch):
    mask = masks_of(strategy, lengths, epoch)
    lengths = np.array(lengths)
    assert not mask[np.arange(mask.shape[1]) >= lengths[:, None]].any()
    assert (mask.sum(1) >= 1).all()
    assert (mask.sum(1)[lengths > 1] < lengths[lengths > 1]).all()


def runs(row):
    return int((np.diff(np.pad(row.astype(int), 1)) == 1).sum())


def test_a_span_is_one_run_of_its_ratio():
    mask = masks_of("span", [20] * 200)
    assert {runs(row) for row in mask} == {1}
    assert set(mask.sum(1)) == {6}
    assert len({row.argmax() for row in mask}) > 10  # at many places


def test_a_tail_is_the_last_items():
    mask = masks_of("tail", [20, 5])
    assert np.flatnonzero(mask[0]).tolist() == [18, 19]
    assert np.flatnonzero(mask[1]).tolist() == [4]


def test_regions_do_not_touch():
    mask = masks_of("multi_region", [20] * 200)
    assert min(runs(row) for row in mask) >= 2


def test_last_item_share_masks_the_last_alone():
    lengths = np.full(2000, 10)
    mask = draw_masks(lengths, np.arange(2000), 0, 0, {"span": 1.0}, RATIOS, last_item_share=0.25)
    only_last = (mask.sum(1) == 1) & mask[:, 9]
    assert 0.2 < only_last.mean() < 0.3


def test_sequences_that_mask_their_last_item_end_anywhere_and_the_others_stay_whole():
    lengths, samples = np.full(4000, 10), np.arange(4000)
    cut = draw_lengths(lengths, samples, 5, 2, last_item_share=0.4, prefix_share=1.0)
    masks_last = (draw_masks(lengths, samples, 5, 2, {"random": 1.0}, {"random": 1.0}, 0.4).sum(1)) == 1  # the others mask nine
    assert (cut[~masks_last] == 10).all()
    assert np.bincount(cut[masks_last], minlength=11)[2:].min() > 0.09 * masks_last.sum()  # each of nine lengths about as often
    assert cut.min() == 2
    assert (draw_lengths(lengths, samples, 5, 2, 0.4, 0.0) == 10).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_a_prefix_is_no_longer_than_its_sequence_and_keeps_two_items_of_it(lengths, last, share):
    lengths = np.array(lengths)
    cut = draw_lengths(lengths, np.arange(len(lengths)), 1, 0, last, share)
    assert (cut <= lengths).all()
    assert (cut >= np.minimum(lengths, 2)).all()


def test_a_sample_draws_the_same_mask_in_any_batch():
    weights = {"span": 1.0, "tail": 1.0, "multi_region": 1.0, "random": 1.0}
    lengths, samples = np.array([7, 30, 12, 2]), np.array([4, 9, 2**40 + 1, 7])
    together = draw_masks(lengths, samples, 3, 1, weights, RATIOS, 0.2)
    for row in range(4):
        alone = draw_masks(lengths[[row]], samples[[row]], 3, 1, weights, RATIOS, 0.2)
        assert (together[row, : lengths[row]] == alone[0]).all()


def test_epochs_and_seeds_draw_other_masks():
    a = masks_of("random", [30] * 50)
    assert (a != masks_of("random", [30] * 50, epoch=1)).any()
    assert (a != masks_of("random", [30] * 50, seed=1)).any()


def test_draws_are_uniform():
    draws = uniform(1, 2, np.arange(2000), 50)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.06


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="unknown mask strategy 'middle'"):
        masks_of("middle", [5])


def places_of(mask):
    return [np.flatnonzero(row).tolist() for row in mask]


def by_hand(strategy, lengths, ratio, places=0.0, noise=None, longest=None):
    """Masked places of each row, for draws that are given."""
    lengths = np.array(lengths)
    longest = longest or int(lengths.max())
    places = np.broadcast_to(np.array(places, dtype=float), (len(lengths), 3))
    noise = np.full((len(lengths), longest), 0.5) if noise is None else np.array(noise)
    return places_of(mask_by(strategy, lengths, ratio, places, noise, longest))


def test_a_span_starts_where_its_draw_says_from_the_first_place_to_the_last_that_fits():
    assert by_hand("span", [10], 0.3, places=0.0) == [[0, 1, 2]]
    assert by_hand("span", [10], 0.3, places=0.5) == [[4, 5, 6]]
    assert by_hand("span", [10], 0.3, places=0.999) == [[7, 8, 9]]  # a span may be the tail
    assert by_hand("span", [10, 4], 0.5, places=0.999, longest=12) == [[5, 6, 7, 8, 9], [2, 3]]


def test_spans_are_at_every_place_about_as_often():
    starts = masks_of("span", [10] * 8000).argmax(1)
    assert np.bincount(starts, minlength=10).tolist() == pytest.approx([1000] * 8 + [0] * 2, abs=130)


@pytest.mark.parametrize("strategy", ["span", "tail"])
def test_a_ratio_is_rounded_and_leaves_an_item(strategy):
    sizes = {length: len(by_hand(strategy, [length], 0.3)[0]) for length in (1, 2, 3, 4, 5, 6, 8, 10)}
    assert sizes == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 8: 2, 10: 3}  # 1.5 rounds to the even 2
    assert len(by_hand(strategy, [6], 1.0)[0]) == 5
    assert len(by_hand(strategy, [6], 0.0)[0]) == 1


def test_the_last_item_alone_is_masked_whatever_the_ratio():
    assert by_hand("last", [10, 3, 1], 0.5) == [[9], [2], [0]]


@pytest.mark.parametrize(
    ("length", "ratio", "draw", "expected"),
    [
        (12, 0.25, 0.0, [0, 4, 8]),  # three zones of four, an item of each
        (12, 0.25, 0.999, [2, 6, 10]),  # each zone ends with an item that stays
        (12, 0.25, 0.4, [1, 5, 9]),
        (12, 0.5, 0.0, [0, 1, 4, 5, 8, 9]),
        (12, 5 / 12, 0.0, [0, 1, 4, 5, 8]),  # two items more go to the first zones
        (12, 1.0, 0.0, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        (12, 0.01, 0.0, [0, 6]),  # at least two regions
        (12, 2 / 12, 0.0, [0, 6]),  # no more regions than items to mask
        (10, 0.3, 0.0, [0, 3, 6]),  # zones of 3, 3 and 4
        (10, 0.3, 0.999, [1, 4, 8]),
        (4, 0.5, 0.0, [0, 2]),
        (3, 0.5, 0.0, [0, 1]),  # too short for two regions
        (2, 0.5, 0.999, [0]),
        (1, 0.5, 0.999, [0]),
    ],
)
def test_regions_lie_in_zones_of_their_own(length, ratio, draw, expected):
    assert by_hand("multi_region", [length], ratio, places=draw, longest=14) == [expected]


def test_regions_start_by_draws_of_their_own():
    assert by_hand("multi_region", [12], 0.25, places=[[0.999, 0.0, 0.4]]) == [[2, 4, 9]]


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.45])
def test_multi_region_masks_the_share_that_is_asked_for(ratio):
    ratios = {"multi_region": ratio}
    mask = draw_masks(np.full(500, 20), np.arange(500), 0, 0, {"multi_region": 1.0}, ratios)
    assert set(mask.sum(1)) == {round(ratio * 20)}


def test_random_masks_items_whose_draw_is_below_the_ratio():
    noise = [[0.29, 0.3, 0.31, 0.1, 0.2, 0.0], [0.9, 0.8, 0.7, 0.1, 0.1, 0.1], [0.1, 0.05, 0.2, 0.9, 0.9, 0.9]]
    assert by_hand("random", [5, 3, 3], 0.3, noise=noise, longest=6) == [[0, 3, 4], [2], [0, 1]]  # the lowest draw, and all but the highest
    assert by_hand("random", [1], 0.3, noise=[[0.1]]) == [[0]] == by_hand("random", [1], 0.3, noise=[[0.9]])


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.6])
def test_random_masks_the_share_that_is_asked_for(ratio):
    mask = draw_masks(np.full(2000, 30), np.arange(2000), 0, 0, {"random": 1.0}, {"random": ratio})
    assert mask.mean() == pytest.approx(ratio, abs=0.01)


def test_strategies_are_drawn_by_their_weights():
    ratios = {"tail": 0.2, "random": 0.9}
    weights = {"tail": 3.0, "random": 1.0, "last": 0.0}
    mask = draw_masks(np.full(4000, 10), np.arange(4000), 0, 0, weights, ratios)
    tails = (mask.sum(1) == 2) & mask[:, 8] & mask[:, 9]
    assert tails.mean() == pytest.approx(0.75, abs=0.03)
    assert (mask.sum(1) == 1).mean() < 0.01  # a strategy of weight 0


def test_a_strategy_without_a_ratio_masks_one_item():
    assert set(draw_masks(np.full(50, 9), np.arange(50), 0, 0, {"span": 1.0}, {}).sum(1)) == {1}


def test_a_prefix_ends_at_its_draw():
    """Of five items two, three, four or five are read, each a quarter of the time."""
    lengths, samples = np.full(4000, 5), np.arange(4000)
    cut = draw_lengths(lengths, samples, 3, 1, last_item_share=1.0, prefix_share=1.0)
    assert np.bincount(cut, minlength=6).tolist() == pytest.approx([0, 0, 1000, 1000, 1000, 1000], abs=130)
    half = draw_lengths(lengths, samples, 3, 1, last_item_share=1.0, prefix_share=0.5)
    assert (half < 5).mean() == pytest.approx(0.5 * 0.75, abs=0.03)
    assert (draw_lengths(np.ones(9, int), np.arange(9), 3, 1, 1.0, 1.0) == 1).all()


@pytest.mark.parametrize(("length", "share"), [(4, 1 / 2), (6, 1 / 3), (8, 1 / 4), (20, 0.15)])
def test_two_regions_at_least_mask_more_of_a_short_sequence(length, share):
    rng, lengths = np.random.default_rng(0), np.full(500, length)
    mask = mask_by("multi_region", lengths, 0.15, rng.random((500, 3)), rng.random((500, length)), length)
    assert mask.sum() / lengths.sum() == pytest.approx(share)
