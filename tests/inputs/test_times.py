"""Times in the formats of many kinds of files."""

from datetime import UTC, datetime

import polars as pl
import pytest

from qbert_ray.inputs.times import TimeStyle, as_timestamp, detect_style, one_style


def read(values: list, style: TimeStyle | None = None) -> list:
    frame = pl.DataFrame({"x": values})
    return frame.select(as_timestamp(pl.col("x"), frame.schema["x"], style or TimeStyle())).to_series().to_list()


def at(*clock: int) -> int:
    return int(datetime(*clock, tzinfo=UTC).timestamp() * 1_000_000)


@pytest.mark.parametrize(
    ("text", "clock"),
    [
        ("2020-09-13 12:39:49 UTC", (2020, 9, 13, 12, 39, 49)),
        ("2020-09-13T12:39:49Z", (2020, 9, 13, 12, 39, 49)),
        ("2020-09-13 12:39:49 GMT", (2020, 9, 13, 12, 39, 49)),
        ("2020-09-13 12:39:49.123456 UTC", (2020, 9, 13, 12, 39, 49, 123456)),
        ("2020-09-13 12:39", (2020, 9, 13, 12, 39)),
        ("2020-09-13T12:39Z", (2020, 9, 13, 12, 39)),
        ("2020-09-13 12:39 CET", (2020, 9, 13, 11, 39)),
        ("2020-09-13 12:39:49 PST", (2020, 9, 13, 20, 39, 49)),
        ("2020-09-13 12:39:49 Europe/Berlin", (2020, 9, 13, 10, 39, 49)),
        ("2020-09-13T14:39:49+02:00[Europe/Berlin]", (2020, 9, 13, 12, 39, 49)),
        ("2020-09-13 12:39:49+00", (2020, 9, 13, 12, 39, 49)),
        ("2020-09-13 12:39:49 -0800", (2020, 9, 13, 20, 39, 49)),
        ("2020/09/13 12:39:49", (2020, 9, 13, 12, 39, 49)),
        ("2020-09-13 12:39:49,5", (2020, 9, 13, 12, 39, 49, 500000)),
        ("13.09.2020 12:39", (2020, 9, 13, 12, 39)),
        ("13.09.2020", (2020, 9, 13)),
        ("3.9.20 1:02", (2020, 9, 3, 1, 2)),
        ("11/11/2019 9:05:58 AM", (2019, 11, 11, 9, 5, 58)),
        ("11/11/2019 12:05 PM", (2019, 11, 11, 12, 5)),
        ("11/11/2019 12:05 a.m.", (2019, 11, 11, 0, 5)),
        ("12/1/2010 8:26", (2010, 12, 1, 8, 26)),
        ("13-09-2020", (2020, 9, 13)),
        ("13 Sep 2020", (2020, 9, 13)),
        ("13-Sep-2020", (2020, 9, 13)),
        ("September 13, 2020 5:03 PM", (2020, 9, 13, 17, 3)),
        ("Sun, 13 Sep 2020 12:39:49 GMT", (2020, 9, 13, 12, 39, 49)),
        ("Sun Sep 13 12:39:49 -0800 2020", (2020, 9, 13, 20, 39, 49)),
        ("Sun Sep 13 2020 12:39:49 GMT+0200 (Central European Summer Time)", (2020, 9, 13, 10, 39, 49)),
        ("09 13, 2014", (2014, 9, 13)),
    ],
)
def test_a_time_is_read(text, clock):
    assert read([text]) == read([text, "x"])[:1] == [at(*clock)]


@pytest.mark.parametrize("text", ["soon", "2020-09-13 25:00", "2020-02-30", "12:30", "31/12/99/1", "2020-09-13 12:39 XYZ", "13/13/2020"])
def test_what_is_no_time_is_none(text):
    assert read([text, "2020-09-13"]) == [None, at(2020, 9, 13)]


def test_which_number_is_the_day_is_said_by_the_column():
    assert detect_style([pl.Series(["1/2/2020", "13/2/2020"])]).day_first is True
    assert detect_style([pl.Series(["1/2/2020"]), pl.Series(["1/13/2020"])]).day_first is False
    assert detect_style([pl.Series(["2020-01-13"])]) == TimeStyle()
    assert detect_style([pl.Series(["1/2/2020", "12/2/2020"]), pl.Series(["3/4/2020"])]) == TimeStyle(ambiguous=True)
    assert not detect_style([pl.Series(["1/2/2020"]), pl.Series(["1/13/2020"])]).ambiguous
    assert read(["01/02/2020", "13/02/2020 12:00"], TimeStyle(day_first=True)) == [at(2020, 2, 1), at(2020, 2, 13, 12)]
    assert read(["01/02/2020"]) == [at(2020, 1, 2)] and read(["01-02-2020"]) == [at(2020, 2, 1)]


def test_a_table_of_several_files_has_one_style():
    assert one_style([TimeStyle(), TimeStyle(day_first=True), TimeStyle(day_first=False)]) == TimeStyle(day_first=True)
    assert one_style([TimeStyle(), TimeStyle(fractional=True)]) == TimeStyle(fractional=True) and one_style([]) == TimeStyle()
    assert one_style([TimeStyle(ambiguous=True), TimeStyle()]) == TimeStyle(ambiguous=True)
    assert one_style([TimeStyle(ambiguous=True), TimeStyle(day_first=False)]) == TimeStyle(day_first=False)


def test_days_of_a_spreadsheet_keep_their_hours_with_a_decimal_comma_too():
    commas, points = (pl.Series([f"45240{mark}35", f" 45240{mark}75 ", "45241"]) for mark in ",.")
    assert detect_style([commas]) == detect_style([points]) == TimeStyle(fractional=True)
    assert read(commas, TimeStyle(fractional=True)) == [45240350000, 45240750000, 45241000000]


def test_whole_numbers_next_to_fractions_are_multiplied_too():
    assert read([1_600_000_789], TimeStyle(fractional=True)) == read(["1600000789"], TimeStyle(fractional=True)) == [1_600_000_789_000_000]


@pytest.mark.parametrize("values", [[1_600_000_789.5, 1_600_000_790.0], ["1600000789.5", "1600000790"]])
def test_fractions_of_seconds_keep_the_order(values):
    style = detect_style([pl.Series(values)])
    assert style.fractional and read(values, style) == [1_600_000_789_500_000, 1_600_000_790_000_000]


def test_numbers_without_fractions_stay_as_given():
    assert detect_style([pl.Series([1.0, 2.0])]) == TimeStyle() and read([1.0, 2.0]) == [1, 2]
    assert read(["1", "1.5", "-7"]) == [1, 1, -7]  # a fraction that comes late is dropped: the unit stays


def test_a_zone_that_has_no_such_hour_is_no_time():
    assert read(["2020-03-29 02:30:00 Europe/Berlin", "2020-03-29 03:30:00 Europe/Berlin"]) == [None, at(2020, 3, 29, 1, 30)]


def test_years_of_two_digits_may_come_first():
    days = [f"24-03-{day:02d}" for day in range(1, 10)]
    style = detect_style([pl.Series(days)])
    assert style.year_first and read(days, style)[0] == at(2024, 3, 1)
    assert (
        read(["24-03-01"]) == [at(2001, 3, 24)] and not detect_style([pl.Series([f"{day:02d}-03-24" for day in range(1, 10)])]).year_first
    )
    assert detect_style([pl.Series(["99/12/31"])]).year_first
