"""What values mean, whatever the type of their column."""

import json
from datetime import date, datetime
from decimal import Decimal

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbert_ray.config.schema import Domain
from qbert_ray.inputs.json_files import plain_text
from qbert_ray.inputs.markup import strip_markup
from qbert_ray.inputs.readers import REASON, ROW
from qbert_ray.inputs.rows import UNSAFE, normalise_interactions, normalise_items, stable_hash
from qbert_ray.inputs.sources import open_source
from qbert_ray.inputs.times import as_timestamp
from qbert_ray.inputs.values import as_text


def converted(convert, values, dtype=None) -> list:
    frame = pl.DataFrame({"x": pl.Series(values, dtype=dtype)})
    return frame.select(convert(pl.col("x"), frame.schema["x"]).alias("y"))["y"].to_list()


def interactions(tmp_path, frame: pl.DataFrame, min_rating: float | None = None, kind: str = "parquet") -> pl.DataFrame:
    (frame.write_parquet if kind == "parquet" else frame.write_csv)(tmp_path / f"log.{kind}")
    source = open_source(str(tmp_path), "shop", "interactions", Domain(interactions=f"log.{kind}"))
    return pl.concat([normalise_interactions(raw, source, min_rating) for fragment in source.fragments() for raw in source.read(*fragment)])


# hash


def test_the_hash_never_changes():
    expected = [16294208416658607535, 6774081908283191102, 9245128965073422038, 14690935847201975099, 12213114911819052007]
    assert stable_hash(pl.Series(["", "a", "abcdefgh", "abcdefghi", "é"])).tolist() == expected


@given(st.lists(st.text(max_size=30)), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_the_hash_of_a_string_does_not_depend_on_its_neighbours(texts, cut):
    series = pl.Series(texts, dtype=pl.String)
    alone = [int(stable_hash(pl.Series([text]))[0]) for text in texts]
    assert stable_hash(series).tolist() == alone
    assert stable_hash(series[cut:]).tolist() == alone[cut:]


def test_the_hash_spreads_similar_ids_evenly():
    hashes = stable_hash(pl.Series([f"user{n}" for n in range(20_000)]))
    assert len(np.unique(hashes)) == 20_000
    counts = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
    assert abs(counts - 1250).max() < 5 * np.sqrt(1250)
    assert not (hashes == stable_hash(pl.Series([f"user{n}" for n in range(20_000)]), salt=1)).any()


# text and IDs


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([" a ", "", "  ", None], ["a", None, None, None]),
        ([12, -3], ["12", "-3"]),
        ([12.0, 0.5, float("nan"), -0.0], ["12", "0.5", None, "0"]),
        ([True, False], ["true", "false"]),
        ([["a", None, " b "], [], None], ["a, b", None, None]),
        ([[["a"], ["b", "c"]]], ["a, b, c"]),
        ([[1.0, 2.5]], ["1, 2.5"]),
        ([{"k": 1}, None], ['{"k":1}', None]),
        ([[{"k": 1}]], ['{"k":1}']),
        ([b"bytes"], ["bytes"]),
        ([date(2020, 1, 2)], ["2020-01-02"]),
        ([None], [None]),
    ],
)
def test_any_column_becomes_text(values, expected):
    assert converted(as_text, values) == expected


@given(st.lists(st.one_of(st.integers(-(2**60), 2**60), st.text("ab c", max_size=5)), max_size=4))
@settings(max_examples=50, deadline=None)
def test_json_and_columns_agree_on_lists(values):
    texts = [str(value) for value in values]
    assert (converted(as_text, [texts], pl.List(pl.String))[0] or "") == (plain_text(values) or "").strip()


def test_markup_is_taken_out_of_texts():
    texts = pl.Series(["Rock &amp; Roll", "<b>bold</b><br/>next", "a < b > c", "<script>var x = 1;</script>", None, "plain", "&lt;i&gt;x"])
    assert strip_markup(texts).to_list() == ["Rock & Roll", "bold next", "a < b > c", None, None, "plain", "x"]


# time


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, -5, 2**62], [1, -5, 2**62]),
        ([1.0, 1.5, float("nan"), float("inf"), 1e30], [1, 1, None, None, None]),
        ([Decimal("3.0"), Decimal("3.5")], [3, 3]),
        (
            ["1", " 2 ", "3.0", "8.8E8", "9223372036854775807", "x", "", "nan", "1.5"],
            [1, 2, 3, 880_000_000, 2**63 - 1, None, None, None, 1],
        ),
        (
            ["1970-01-02", "1970-01-01T00:00:01Z", "1970-01-01 00:00:01.5", "1970-01-01T01:00:00+01:00"],
            [86_400_000_000, 1_000_000, 1_500_000, 0],
        ),
        ([datetime(1970, 1, 1, 0, 0, 1)], [1_000_000]),
        ([date(1970, 1, 2)], [86_400_000_000]),
        ([True], [None]),
        ([[1]], [None]),
    ],
)
def test_timestamps_are_whole_numbers_or_dates(values, expected):
    assert converted(as_timestamp, values) == expected


def test_unsigned_timestamps_that_do_not_fit_are_bad():
    assert converted(as_timestamp, [1, 2**64 - 1], pl.UInt64) == [1, None]


# rows


def test_each_reason_is_named_and_the_row_kept(tmp_path):
    frame = pl.DataFrame(
        {
            "user_id": ["u", None, "u", "u", "u", "u", "u"],
            "item_id": ["a", "a", " ", "a", "a", "a", "a"],
            "timestamp": ["1", "1", "1", None, "soon", "-7", "2"],
            "rating": [5.0, 5.0, 5.0, 5.0, 5.0, 1.0, float("nan")],
        }
    )
    rows = interactions(tmp_path, frame, min_rating=3)
    reasons = [None, "missing user_id", "missing item_id", "missing timestamp", "bad timestamp", "below min_rating", None]
    assert rows[REASON].to_list() == reasons
    assert [row is None for row in rows[ROW]] == [reason is None for reason in reasons]
    assert json.loads(rows[ROW][4]) == {"user_id": "u", "item_id": "a", "timestamp": "soon", "rating": 5.0}
    assert rows["rating"].to_list()[-1] is None


def test_whole_numbers_are_the_same_id_in_any_type(tmp_path):
    for users in ([1, 2], [1.0, 2.0], ["1", "2"], pl.Series(["1", "2"], dtype=pl.Categorical)):
        rows = interactions(tmp_path, pl.DataFrame({"user_id": users, "item_id": ["a", "b"], "timestamp": [1, 2]}))
        assert rows["user_id"].to_list() == ["1", "2"]
    frame = pl.DataFrame({"user_id": [1.0, None], "item_id": ["007", "1.50"], "timestamp": [1.0, 2.0]})
    rows = interactions(tmp_path, frame, kind="csv")
    assert (rows["user_id"].to_list(), rows["item_id"].to_list(), rows["timestamp"].to_list()) == (["1", None], ["007", "1.50"], [1, 2])


def test_an_item_stays_without_its_unsafe_image(tmp_path):
    struct = pl.Struct({"bytes": pl.Binary, "path": pl.String})
    images = [{"bytes": b"JPEG", "path": "../x.jpg"}, {"bytes": None, "path": "../x.jpg"}, {"bytes": None, "path": "x.jpg"}, None]
    frame = pl.DataFrame({"item_id": ["a", "b", "c", None], "image": pl.Series(images, dtype=struct)})
    frame.write_parquet(tmp_path / "items.parquet")
    domain = Domain(text_fields=[], image_column="image")
    source = open_source(str(tmp_path), "shop", "items", domain)
    (raw,) = source.read(*source.fragments()[0])
    rows = normalise_items(raw, source, 0, domain, str(tmp_path))
    assert rows["image_path"].to_list() == [None, None, f"{tmp_path}/x.jpg", None]
    assert rows["image_bytes"].to_list() == [b"JPEG", None, None, None]
    assert rows[UNSAFE].to_list() == [None, "../x.jpg", None, None]
    assert rows[REASON].to_list() == [None, None, None, "missing item_id"]
    assert rows[ROW][3] == '{"item_id":null}'  # bytes never go into a rejected row


def test_bytes_where_a_text_is_wanted_are_a_text_or_nothing():
    """Found by fuzzing: polars refuses a column for one byte that is no UTF-8, and ends the process for bytes inside a struct."""
    frame = pl.DataFrame({"b": [b"abc", b"\xa8", None], "s": [{"path": "a", "bytes": b"x"}, None, {"path": None, "bytes": None}]})
    frame = frame.with_columns(only=pl.struct(pl.col("b")), many=pl.concat_list("b", "b"))
    texts = frame.select(as_text(pl.col(name), frame.schema[name]).alias(name) for name in frame.columns)
    assert texts["b"].to_list() == ["abc", "a8", None] and texts["many"].to_list()[:2] == ["abc, abc", "a8, a8"]
    assert texts["s"].to_list() == ['{"path":"a"}', None, '{"path":null}'] and texts["only"].to_list() == [None] * 3


def test_a_text_of_megabytes_is_hashed_at_once():
    """Word by word this would be two million steps."""
    hashes = stable_hash(pl.Series(["x" * (16 << 20), "x" * (16 << 20) + "y", "x"]))
    assert len(set(hashes.tolist())) == 3 and hashes[2] == stable_hash(pl.Series(["x"]))[0]
