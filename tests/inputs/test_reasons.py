"""What is said of rejected rows and of interactions that look wrong."""

import json

import pytest

from qbert_ray.inputs.reasons import nothing_left, rejected, suspicions, unknown_items


def rows(*contents: dict) -> list[str]:
    return [json.dumps(each) for each in contents]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            rows({"cells": 4, "columns": 3, "line": "a,b,c,"}, {"cells": 4, "columns": 3, "line": "d,e,f,\n"}),
            "comma at the end of each line?",
        ),
        (rows({"cells": 4, "columns": 3, "line": "a,b,c,d"}), "4 cells, the header has 3; quote texts that hold commas"),
        (rows({"cells": 5, "columns": 3, "line": "x"}, {"cells": 4, "columns": 3, "line": "y,"}), "4 or 5 cells, the header has 3; quote"),
    ],
)
def test_rows_of_another_width_say_what_is_there_and_why_it_may_be(lines, said):
    assert said in rejected("invalid CSV row", 2, lines)


def test_an_example_that_was_cut_or_is_no_object_is_shown_as_it_is():
    cut = '{"user_id": "u1", "text": "' + "x" * 500
    assert rejected("empty user_id", 1200, [cut]).startswith("1,200 empty user_id, such as {")
    assert cut not in rejected("empty user_id", 1200, [cut])
    assert rejected("bad rating", 3, ["[1, 2]"], total=10).startswith("3 of 10 bad rating, such as [1, 2]")
    assert rejected("bad timestamp", 1, rows({"timestamp": "noon"})).startswith("1 bad timestamp, such as 'noon'")


def test_times_of_several_units_and_histories_of_one_moment_are_suspicious():
    assert suspicions(100, 90, 3, {"s": 1000, "ms": 0}) == []
    (said,) = suspicions(100, 90, 3, {"s": 750, "ms": 250})
    assert said.startswith("times are of several units (75% in s and 25% in ms)")
    (said,) = suspicions(1000, 900, 990, {"s": 1000})
    assert said.startswith("990 of 1,000 users have all their interactions at one time")
    (said,) = suspicions(100, 0, 3, {})
    assert said.startswith("no user has 3 interactions")


def test_ids_of_both_files_are_shown_where_no_spelling_makes_them_equal():
    assert unknown_items(["x1", "x2"], ["a", "b"]) == "an ID of the interactions: 'x1'; one of the items: 'a'"
    assert unknown_items([], ["a"]) == unknown_items(["x1"], []) == unknown_items([""], ["a"]) == ""


def test_nothing_left_adds_up_what_was_rejected_and_what_was_too_rare():
    found = {"item not in items table": (7, rows({"item_id": "P1"}, {"item_id": None})), "empty user_id": (2, [])}
    page = nothing_left(10, found, 1, {"empty item_id": (3, [])}, 5, ["p1"]).splitlines()
    assert page[0] == "nothing is left of 10 interactions"
    assert page[1].startswith("  interactions: 7 item not in items table") and page[2].startswith("  interactions: 2 empty user_id")
    assert page[3].startswith("  'P1' of the interactions seems to be 'p1' of the items: ")
    assert page[4].startswith("  items: 3 of 5 empty item_id")
    assert page[5].startswith("  the other 1 are of users or items with too few interactions")
    assert len(page) == 6
