"""Sequences with held-out items among the training items: by hand, and that no history changes its order."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError

SCHEMA = pa.schema(
    [
        *columns.TEMPORAL_SEQUENCES,
        (columns.TRAIN_WEIGHTS, pa.list_(pa.float32())),
        (columns.LATER_WEIGHTS, pa.list_(pa.float32())),
    ]
)
USERS = {  # train, valid, test, between, after, weights of the training items, weights of all after them
    "a": ([1, 2], 3, 5, [4], [6, 7], [1.0, 2.0], [3.0, 4.0, 5.0, 6.0, 7.0]),
    "b": ([8], None, 9, [], [], [8.0], [9.0]),
    "c": ([], None, None, [1, 1], [], [], [0.5, 0.25]),
    "d": ([2, 3], 4, None, [], [], [2.0, 3.0], [4.0]),
}


def sequences(users=USERS, drop=()):
    names = ("train", "valid", "test", "between", "after", columns.TRAIN_WEIGHTS, columns.LATER_WEIGHTS)
    values = dict(zip(names, map(list, zip(*users.values(), strict=True)), strict=True))
    return columns.to_sequences(
        pa.table({"domain": ["shop"] * len(users), "user_id": list(users), **values}, schema=SCHEMA).drop_columns(list(drop))
    )


def trained(found):
    return [found.items[begin:end].tolist() for begin, end in zip(found.indptr, found.indptr[1:], strict=False)]


def weighed(found):
    return [found.weights[begin:end].tolist() for begin, end in zip(found.indptr, found.indptr[1:], strict=False)]


def test_without_held_out_items_nothing_changes():
    before = sequences()
    assert before.training_on("none") is before


def test_validation_adds_what_comes_before_the_test_period():
    found = sequences().training_on("validation")
    assert trained(found) == [[1, 2, 3, 4], [8], [1, 1], [2, 3, 4]]
    assert weighed(found) == [[1, 2, 3, 4], [8], [0.5, 0.25], [2, 3, 4]]
    assert found.valid.tolist() == [-1] * 4 and found.test.tolist() == [5, 9, -1, -1] and found.between is None
    assert [found.after.of(user).tolist() for user in range(4)] == [[6, 7], [], [], []]


def test_all_adds_everything():
    found = sequences().training_on("all")
    assert trained(found) == [[1, 2, 3, 4, 5, 6, 7], [8, 9], [1, 1], [2, 3, 4]]
    assert weighed(found) == [[1, 2, 3, 4, 5, 6, 7], [8, 9], [0.5, 0.25], [2, 3, 4]]
    assert found.valid.tolist() == found.test.tolist() == [-1] * 4 and found.after is found.between is None


def test_leave_one_out_has_no_further_items_and_weights_of_1_are_none():
    found = sequences(drop=("between", "after", columns.TRAIN_WEIGHTS, columns.LATER_WEIGHTS)).training_on("all")
    assert trained(found) == [[1, 2, 3, 5], [8, 9], [], [2, 3, 4]] and found.weights is None


def test_weights_of_held_out_items_that_were_not_written_are_not_guessed():
    before = sequences(drop=(columns.LATER_WEIGHTS,))
    assert before.training_on("none").weights.tolist() == [1, 2, 8, 2, 3]
    with pytest.raises(ArtifactError, match="weights of held-out interactions; redo it: --from ingest"):
        before.training_on("validation")


items = st.lists(st.integers(0, 9), max_size=4)
users = st.tuples(items, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9), items, items)


@given(st.lists(users, min_size=1, max_size=6), st.sampled_from(["validation", "all"]))
def test_histories_stay_as_they_are(rows, include):
    given_users = {
        str(number): (*row, [1.0] * len(row[0]), np.arange(len(row[3]) + len(row[4]) + sum(each is not None for each in row[1:3])).tolist())
        for number, row in enumerate(rows)
    }
    before = sequences(given_users)
    found = before.training_on(include)
    for user in range(len(rows)):
        for upto in ("test", "end"):
            if upto == "end" or include == "validation":
                assert found.history(user, upto).tolist() == before.history(user, upto).tolist()
    upto = {"validation": "test", "all": "end"}[include]
    assert trained(found) == [before.history(user, upto).tolist() for user in range(len(rows))]
    assert len(found.weights) == len(found.items)
    later = [np.arange(len(before.history(user, upto)) - len(rows[user][0])).tolist() for user in range(len(rows))]
    assert weighed(found) == [[1.0] * len(row[0]) + each for row, each in zip(rows, later, strict=True)]
