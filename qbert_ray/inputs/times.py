"""Converts times to whole numbers: numbers as given, dates and times in any usual format as microseconds since 1970.

Which number of 11/12/2019 is the day, and whether numbers have fractions, is the same for a whole table: `detect_style` finds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import polars as pl

MICROSECONDS = 1_000_000
FORMATS = (
    "whole numbers, Unix times with fractions, 2026-01-31, 2026-01-31 12:00[:30[.5]] with or without T, Z, UTC, +01:00 or a zone's name, "
    "31.01.2026 12:00, 1/31/2026 9:05:58 AM, 31 Jan 2026, Jan 31, 2026; of 1900 to 2200"
)
ZONES = {  # minutes east of Greenwich
    "UTC": 0, "GMT": 0, "Z": 0, "UT": 0, "WET": 0, "WEST": 60, "BST": 60, "CET": 60, "MEZ": 60, "CEST": 120, "MESZ": 120, "EET": 120, "EEST": 180,
    "MSK": 180, "IST": 330, "HKT": 480, "SGT": 480, "JST": 540, "KST": 540, "AEST": 600, "AEDT": 660, "NZST": 720, "NZDT": 780, "EST": -300,
    "EDT": -240, "CST": -360, "CDT": -300, "MST": -420, "MDT": -360, "PST": -480, "PDT": -420,
}  # fmt: skip
_LARGEST = 9.2e18
_EARLIEST, _LATEST = -2_208_988_800 * MICROSECONDS, 7_258_118_400 * MICROSECONDS  # 1900-01-01 and 2200-01-01
# Digits are written as [0-9] and not as \d, whose digits of all scripts make matching a hundred times slower.
_BY_NUMBERS = r"^([0-9]{1,2})([/-])([0-9]{1,2})[/-][0-9]{2,4}(?:[^0-9]|$)"  # a date whose first two numbers may be in either order
_CLOCK = (
    r"^(?<date>.*?)(?:[T, ]+(?:at )?)(?<hour>[0-9]{1,2}):(?<minute>[0-9]{2})(?::(?<second>[0-9]{2})(?:[.,:](?<fraction>[0-9]{1,9})[0-9]*)?)?"
    r" *(?<half>[AaPp])?[.]?(?:[Mm][.]?)?$"
)
_OFFSET = r"([0-9]) *([+-])([0-9]{2}):?([0-9]{2})?$"
_DATES = (
    r"^(?<year>[0-9]{4})[-/.](?<month>[0-9]{1,2})[-/.](?<day>[0-9]{1,2})$",
    r"^(?<year>[0-9]{4})(?<month>[0-9]{2})(?<day>[0-9]{2})$",
    r"^(?<day>[0-9]{1,2})[.] ?(?<month>[0-9]{1,2})[.] ?(?<year>[0-9]{4}|[0-9]{2})$",
    r"^(?<month>[0-9]{1,2}) (?<day>[0-9]{1,2}), (?<year>[0-9]{4})$",  # Amazon's reviewTime
    r"^(?<day>[0-9]{1,2})(?:st|nd|rd|th|[.])?[ -]?(?<month>[A-Za-z]{3})[a-z]*[.]?,?[ -](?<year>[0-9]{4}|[0-9]{2})$",
    r"^(?<month>[A-Za-z]{3})[a-z]*[.]? +(?<day>[0-9]{1,2})(?:st|nd|rd|th)?,? (?<year>[0-9]{4})$",
    r"^(?<year>[0-9]{4})[ -](?<month>[A-Za-z]{3})[a-z]*[ -](?<day>[0-9]{1,2})$",
)
_EITHER_ORDER = r"^(?<first>[0-9]{1,2})(?<sign>[/-])(?<second>[0-9]{1,2})[/-](?<year>[0-9]{4}|[0-9]{2})$"
_SHORT = r"^([0-9]{2})[-/.][0-9]{1,2}[-/.]([0-9]{2})(?:[^0-9]|$)"  # a date whose first or last number is a year of two digits
_YEAR_FIRST = r"^(?<year>[0-9]{2})[-/.](?<month>[0-9]{1,2})[-/.](?<day>[0-9]{1,2})$"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


@dataclass(frozen=True)
class TimeStyle:
    """Properties of a column of times that a single value does not show."""

    fractional: bool = False  # numbers have fractions of a second: all are multiplied by a million
    day_first: bool | None = None  # of 11/12/2019; None: unknown, so the month comes first with slashes and the day with dashes
    year_first: bool = False  # of 24-03-01
    ambiguous: bool = False  # there are dates such as 11/12/2019, and none of them shows which number is the day


def detect_style(batches: Iterable[pl.Series]) -> TimeStyle:
    """The style of a column of times, judged by its first batch, or by as many as are needed to distinguish days from months."""
    style = TimeStyle()
    for number, values in enumerate(batches):
        if values.dtype.is_float() or values.dtype.is_decimal():
            return TimeStyle(fractional=_has_fractions(values.cast(pl.Float64)))
        if values.dtype != pl.String:
            return style
        if number == 0:
            numbers = _decimal_point(values).cast(pl.Float64, strict=False)
            style = TimeStyle(fractional=_has_fractions(numbers), year_first=_year_first(values))
        parts = values.to_frame("text").select(
            first=pl.col("text").str.extract(_BY_NUMBERS, 1).cast(pl.Int32), second=pl.col("text").str.extract(_BY_NUMBERS, 3).cast(pl.Int32)
        ).drop_nulls()  # fmt: skip
        if parts.is_empty():
            return style
        telling = parts.filter((pl.col("first") > 12) != (pl.col("second") > 12))
        if len(telling):
            return replace(style, day_first=telling["first"][0] > 12, ambiguous=False)
        style = replace(style, ambiguous=True)
    return style


def one_style(styles: Iterable[TimeStyle]) -> TimeStyle:
    """The style of a column by those of its files: what any of them shows, and the order of days and months by the first that shows one."""
    found = list(styles)
    day_first = next((style.day_first for style in found if style.day_first is not None), None)
    fractional, year_first, ambiguous = (any(getattr(style, name) for style in found) for name in ("fractional", "year_first", "ambiguous"))
    return TimeStyle(fractional, day_first, year_first, ambiguous and day_first is None and not year_first)


def as_timestamp(value: pl.Expr, kind: Any, style: TimeStyle = TimeStyle()) -> pl.Expr:
    """Whole numbers as given; dates and times as microseconds since 1970; null for anything else.

    Fractions of numbers are dropped unless the style says that the column has them.
    """
    if kind.is_integer():
        return _whole(value.cast(pl.Int64, strict=False), style)
    if kind.is_numeric():
        return _number(value.cast(pl.Float64), style)
    if isinstance(kind, pl.Datetime | pl.Date):
        return _plausible(value.cast(pl.Datetime("us")).dt.epoch("us"))
    if kind not in (pl.String, pl.Categorical, pl.Enum):
        return pl.lit(None, pl.Int64)
    return value.cast(pl.String).map_batches(partial(_read, style=style), return_dtype=pl.Int64)


def _has_fractions(values: pl.Series) -> bool:
    values = values.drop_nulls()
    values = values.filter(values.is_finite())  # infinity less infinity is no number, and so differs from 0
    return bool(((values - values.floor()) != 0).any())


def _year_first(values: pl.Series) -> bool:
    """Whether dates with years of two digits begin with them: one is past 31, or they are few and the last numbers many, as days are."""
    first, last = (values.str.extract(_SHORT, group).drop_nulls().cast(pl.Int32) for group in (1, 2))
    few = last.n_unique() > 5 and 3 * first.n_unique() <= last.n_unique() and bool((last <= 31).all())
    return few or bool((first > 31).any())


def _plausible(time: pl.Expr) -> pl.Expr:
    """Microseconds since 1970 of a date that can be meant; dates such as 0001-01-01 and 9999-12-31 stand for none."""
    return pl.when(time.is_between(_EARLIEST, _LATEST)).then(time)


def _whole(value: pl.Expr, style: TimeStyle) -> pl.Expr:
    return pl.when(value.abs() < _LARGEST / MICROSECONDS).then(value * MICROSECONDS) if style.fractional else value


def _number(value: pl.Expr, style: TimeStyle) -> pl.Expr:
    scaled = (value * MICROSECONDS).round() if style.fractional else value.floor()
    return pl.when(scaled.is_finite() & (scaled.abs() < _LARGEST)).then(scaled).cast(pl.Int64, strict=False)


def _read(values: pl.Series, style: TimeStyle) -> pl.Series:
    """Times in a column of text; each step reads what the ones before it could not."""
    text = values.str.strip_chars()
    digits = text.cast(pl.Int64, strict=False)  # first: only they keep all 64 bits
    times = digits.to_frame("x").select(_whole(pl.col("x"), style)).to_series()
    steps: list[Callable[[pl.Series], pl.Series]] = [
        partial(_numbers, style=style),
        _iso,
        partial(_common, style=style),
        partial(_dates, style=style),
    ]
    for step in steps:
        left = (times.is_null() & text.is_not_null()).arg_true()
        if not len(left):
            break
        found = step(text[left].alias("text"))
        times = times.scatter(left, found if step is steps[0] else found.to_frame("x").select(_plausible(pl.col("x"))).to_series())
    return times


def _numbers(text: pl.Series, style: TimeStyle) -> pl.Series:
    """Whole numbers written as decimals or with exponents, as spreadsheets do."""
    return _decimal_point(text).to_frame().select(_number(pl.col("text").cast(pl.Float64, strict=False), style)).to_series()


def _decimal_point(text: pl.Series) -> pl.Series:
    return text.str.strip_chars().str.replace(r"^(-?\d{5,}),(\d+)$", "$1.$2")


def _iso(text: pl.Series) -> pl.Series:
    """Times in common forms of ISO 8601; fast."""
    plain = pl.col("text").str.replace("[Tt ]", " ").str.replace(r" ?(Z|z|UTC|GMT)$", "+00:00")
    zoned = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%#z", time_unit="us", time_zone="UTC", strict=False).dt.epoch("us")
    clock = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False).dt.epoch("us")
    date = plain.str.to_datetime("%Y-%m-%d", time_unit="us", strict=False).dt.epoch("us")
    return text.to_frame().select(pl.coalesce(zoned, clock, date)).to_series()


def _common(text: pl.Series, style: TimeStyle) -> pl.Series:
    """Times in other usual formats, each tried on the remaining values if it fits some of the first; fast too."""
    numbers = "%d/%m/%Y" if style.day_first else "%m/%d/%Y"
    dates = ("%Y-%m-%d", "%d.%m.%Y", "%Y/%m/%d", numbers)
    times = pl.Series("text", [None] * len(text), pl.Int64)
    for date, clock in itertools.product(dates, (" %H:%M", " %H:%M:%S%.f", " %I:%M:%S %p", " %I:%M %p", "")):
        left = times.is_null().arg_true()
        if len(left) and _datetimes(text[left.head(100)], date + clock).is_not_null().any():
            times = times.scatter(left, _datetimes(text[left], date + clock))
    return times


def _datetimes(text: pl.Series, form: str) -> pl.Series:
    found = text.str.replace("T", " ", literal=True).str.to_datetime(form, time_unit="us", strict=False)
    return (
        found.to_frame("x").select(pl.when(pl.col("x").dt.year() >= 1000).then(pl.col("x").dt.epoch("us"))).to_series()
    )  # %Y also takes 20


def _dates(text: pl.Series, style: TimeStyle) -> pl.Series:
    """Times in any other format, parsed field by field; equal texts are parsed once."""
    rows = text.unique().to_frame().with_columns(pl.col("text").alias("given"))
    plain = pl.col("text").str.replace(r" *\([^)]*\)$", "").str.replace(r"([0-9Zz]) *\[.*\]$", "$1")
    plain = plain.str.replace(r"^([0-9]{8})T([0-9]{2})([0-9]{2})([0-9]{2})", "$1 $2:$3:$4")  # ISO 8601 without signs
    plain = plain.str.replace(r"^(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*[.]?,? +", "")
    plain = plain.str.replace(r"^([A-Z][a-z]{2}) +([0-9]{1,2}) ([0-9]{2}:[0-9]{2}:[0-9]{2}) ?(.*?) ([0-9]{4})$", "$2 $1 $5 $3 $4")
    rows = rows.with_columns(plain.str.replace(r" *(?:UTC|GMT)([+-][0-9])", "$1").str.strip_chars())
    zone = pl.col("text").str.extract(r"[0-9] *([A-Za-z]{1,5}|[A-Z][A-Za-z]+/[A-Za-z_/+-]+)$", 1)
    rows = rows.with_columns(pl.when(~zone.str.to_uppercase().is_in(["AM", "PM", "A", "P"])).then(zone).alias("zone"))
    bare = pl.when(pl.col("zone").is_not_null()).then(pl.col("text").str.replace(r" *[A-Za-z_/+-]+$", "")).otherwise("text")
    rows = rows.with_columns(bare.alias("local")).with_columns(pl.col("local").str.contains(r":[0-9]{2}").alias("timed"))
    sign, hours, minutes = (pl.col("local").str.extract(_OFFSET, group) for group in (2, 3, 4))
    east = (hours.cast(pl.Int64) * 60 + minutes.fill_null("0").cast(pl.Int64)) * pl.when(sign == "-").then(-1).otherwise(1)
    rows = rows.with_columns(pl.when("timed").then(east).alias("east"))  # 2020-09-13 has no offset at its end
    rows = rows.with_columns(
        pl.when(pl.col("east").is_not_null()).then(pl.col("local").str.replace(_OFFSET, "$1")).otherwise("local").alias("local")
    )
    times = _to_utc(_day(rows["local"], style) + _clock(rows["local"]), rows["zone"], rows["east"])
    return text.to_frame().join(pl.DataFrame({"text": rows["given"], "time": times}), on="text", how="left", maintain_order="left")["time"]


def _day(local: pl.Series, style: TimeStyle) -> pl.Series:
    """Midnight of the date in `local`, in microseconds."""
    clock = local.str.extract_groups(_CLOCK).struct.field("date")
    text = pl.DataFrame({"text": pl.select(pl.coalesce(clock, local)).to_series().str.strip_chars(" ,T")})
    patterns = (_YEAR_FIRST, *_DATES) if style.year_first else _DATES
    found = [_date(text["text"].str.extract_groups(pattern)) for pattern in patterns]
    parts = text["text"].str.extract_groups(_EITHER_ORDER).struct.unnest()
    half_day = local.str.contains(r"(?i)[0-9] *[ap][.]?m[.]?$")
    day_first = (parts["sign"] == "-") & ~half_day if style.day_first is None else pl.lit(style.day_first)
    ordered = parts.select(
        "year",
        *(pl.when(day_first).then(a).otherwise(b).alias(name) for name, a, b in (("day", "first", "second"), ("month", "second", "first"))),
    )
    return pl.select(pl.coalesce(*found, _date(ordered.to_struct()))).to_series().dt.epoch("us")


def _date(parts: pl.Series) -> pl.Series:
    """The date of a year, a month (number or name) and a day, as text."""
    year = pl.col("year")
    month = pl.col("month").str.slice(0, 3).str.to_lowercase().replace(dict(zip(_MONTHS, map(str, range(1, 13)), strict=True)))
    century = pl.when(year.str.len_bytes() > 2).then(pl.lit("")).when(year < "70").then(pl.lit("20")).otherwise(pl.lit("19"))
    text = pl.concat_str(century + year, month.str.zfill(2), pl.col("day").str.zfill(2), separator="-")
    return parts.struct.unnest().select(text.str.to_datetime("%Y-%m-%d", time_unit="us", strict=False)).to_series()


def _clock(local: pl.Series) -> pl.Series:
    """Microseconds since midnight of the time in `local`; 0 if there is no time, null if it is invalid."""
    parts = local.str.extract_groups(_CLOCK).struct.unnest()
    hour, minute, second = (pl.col(name).cast(pl.Int64) for name in ("hour", "minute", "second"))
    fraction = pl.col("fraction").str.pad_end(6, "0").str.slice(0, 6).cast(pl.Int64).fill_null(0)
    half = pl.col("half").str.to_lowercase()
    of_day = pl.when(half.is_null()).then(hour).when(hour <= 12).then(hour % 12 + pl.when(half == "p").then(12).otherwise(0))
    right = (of_day < 24) & (minute < 60) & (second.fill_null(0) <= 60)
    micros = ((of_day * 60 + minute) * 60 + second.fill_null(0)) * MICROSECONDS + fraction
    return parts.select(pl.when(hour.is_null()).then(0).when(right).then(micros)).to_series()


def _to_utc(local: pl.Series, zones: pl.Series, east: pl.Series) -> pl.Series:
    """Local times converted to UTC; null if the time zone is unknown."""
    frame = pl.DataFrame({"time": local, "zone": zones, "east": east})
    minutes = pl.col("zone").str.to_uppercase().replace_strict(ZONES, default=None, return_dtype=pl.Int64)
    frame = frame.with_columns(pl.coalesce("east", minutes, pl.when(pl.col("zone").is_null()).then(0)).alias("east"))
    done = frame["time"] - frame["east"] * 60 * MICROSECONDS
    for name in frame.filter(pl.col("east").is_null())["zone"].unique().drop_nulls().to_list():
        rows = (frame["zone"] == name).arg_true()
        try:
            there = frame["time"][rows].cast(pl.Datetime("us")).dt.replace_time_zone(name, ambiguous="earliest", non_existent="null")
        except pl.exceptions.PolarsError:
            continue
        done = done.scatter(rows, there.dt.epoch("us"))
    return done
