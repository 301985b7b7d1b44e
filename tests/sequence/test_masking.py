import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert_ray.random_streams import uniform
from qbert_ray.sequence.masking import STRATEGIES, draw_lengths, draw_masks

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
