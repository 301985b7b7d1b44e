"""Converts the values of a column of any type to text, IDs and ratings of the input contract."""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa

Kind = Any  # a polars data type; polars types its inner types more loosely than its own functions take them
# How programs write a missing value: what pandas reads as missing, MySQL's \N, and values of JavaScript and SQL.
NOTHING = [
    *("nan", "NaN", "NAN", "-nan", "-NaN", "null", "NULL", "Null", "None", "NA", "N/A", "n/a", "<NA>", "#N/A", "#N/A N/A", "#NA"),
    *("1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN", "NaT", "\\N", "undefined"),
]
NO_ID = [*NOTHING, "none", "NONE", "na", "Na", "nil", "NIL", "<null>", "<none>", "(null)", "#n/a", "nat"]  # in a text these could be words
_SIGN = r"(?:[€$£¥₹₽₩₺%]|(?i:eur|usd|gbp|chf|jpy|cny|sek|nok|dkk|pln|czk|huf|kr|zł|rs|us\$))"
# A number with a currency or a percent sign and with thousands separators, such as 1.234,50 € or USD 1,234.50.
AMOUNT = rf"^[+-]?(?:{_SIGN}\s*)?[+-]?(?:\d{{1,3}}(?:[.,'’\s]\d{{3}})+|\d+)(?:[.,]\d+)?(?:\s*{_SIGN}\.?)?$"
_LARGE_FLOAT = r"^-?(?:[0-9]{16,}[.]0|[0-9](?:[.][0-9]+)?e[+][0-9]+)$"  # as Python writes floats from 2^53 on
EXACT = {pl.Float32: 2.0**24, pl.Float64: 2.0**53}  # type -> whole numbers from here on may be other ones, rounded
_WHOLE = 2.0**53  # below it, floats represent whole numbers exactly


def as_text(value: pl.Expr, kind: Kind) -> pl.Expr:
    """Stripped text, null if empty: whole numbers without .0, lists joined with a comma, structs as JSON.

    Spellings of a missing value, such as NaN and NULL, are null.
    """
    text, written = _text(value, kind)
    filled = text != ""
    return pl.when(filled & ~text.is_in(NOTHING) if written else filled).then(text)


def as_id(value: pl.Expr, kind: Kind) -> pl.Expr:
    """IDs as text, like `as_text`; 12.0 is 12 in any type, since whole numbers of a column with gaps are often written as floats."""
    if kind.is_integer():
        return as_text(value, kind)
    text, written = _text(value, kind)
    text = text if written else as_text(value, kind)  # NO_ID holds every spelling that `as_text` leaves out
    return pl.when((text != "") & ~text.is_in(NO_ID)).then(text.map_batches(_whole_numbers, return_dtype=pl.String))


def inexact(value: pl.Expr, kind: Kind, of_json: bool = False) -> pl.Expr:
    """True where a number is too large for its type to tell it from its neighbours, else null.

    Args:
        of_json: texts are values of JSON, whose numbers with a point or an exponent are floats.
    """
    if of_json and kind == pl.String:
        value, kind = value.str.extract(_LARGE_FLOAT, 0).cast(pl.Float64, strict=False), pl.Float64()
    return pl.when(value.abs() >= EXACT[kind]).then(True) if kind in EXACT else pl.lit(None, pl.Boolean)


def as_rating(value: pl.Expr, kind: Kind) -> pl.Expr:
    """Finite numbers, null for anything else; a decimal comma is accepted."""
    if kind in (pl.String, pl.Categorical, pl.Enum):
        value = value.cast(pl.String).str.strip_chars().str.replace(r"^(-?[0-9]+),([0-9]+)$", "$1.$2")
    elif not (kind.is_numeric() or kind == pl.Boolean):
        return pl.lit(None, pl.Float32)
    number = value.cast(pl.Float32, strict=False)
    return pl.when(number.is_finite()).then(number)


def is_given(value: pl.Expr, kind: Kind) -> pl.Expr:
    """True where there is a value, else null."""
    if kind.is_float():
        value = value.fill_nan(None)
    numbers = kind.is_integer() or kind.is_float() or kind.is_temporal()  # these types have no spelling of a missing value
    there = value if numbers else as_text(value, kind)
    return pl.when(there.is_not_null()).then(True)


def _whole_numbers(text: pl.Series) -> pl.Series:
    """12.0 as 12; looked for only where some text ends as such a number does, since the expression is slow."""
    return text.str.replace(r"^(-?[0-9]+)[.]0+$", "$1") if (text.str.ends_with("0") & text.str.contains(".0", literal=True)).any() else text


def _text(value: pl.Expr, kind: Kind) -> tuple[pl.Expr, bool]:
    """Stripped text, and whether it may spell out a missing value."""
    if isinstance(kind, pl.Array):
        value, kind = value.arr.to_list(), pl.List(kind.inner)
    if isinstance(kind, pl.List):
        return value.list.eval(as_text(pl.element(), kind.inner)).list.drop_nulls().list.join(", ").str.strip_chars(), True
    if isinstance(kind, pl.Struct):
        shown = [value.struct.field(field.name) for field in kind.fields if not _holds_bytes(field.dtype)]  # polars writes no bytes as JSON
        return (pl.when(value.is_not_null()).then(pl.struct(shown).struct.json_encode()) if shown else pl.lit(None, pl.String)), False
    if kind.is_float():
        whole = (value == value.round(0)) & (value.abs() < _WHOLE)
        number = pl.when(value.is_not_nan()).then(value.cast(pl.String))
        return pl.when(whole).then(value.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(number), False
    if kind == pl.Binary:
        return value.map_batches(_decode, return_dtype=pl.String).str.strip_chars(), True
    if kind == pl.Duration:
        return value.dt.to_string("iso"), False
    text = value.cast(pl.String, strict=False).str.strip_chars()
    return text, kind in (pl.String, pl.Categorical, pl.Enum)


def _holds_bytes(kind: Kind) -> bool:
    if isinstance(kind, pl.Struct):
        return any(_holds_bytes(field.dtype) for field in kind.fields)
    return _holds_bytes(kind.inner) if isinstance(kind, pl.List | pl.Array) else kind == pl.Binary


def _decode(values: pl.Series) -> pl.Series:
    """Bytes decoded as text, or as hexadecimal digits if they are not text."""
    try:
        return pl.Series(values.name, values.to_arrow().cast(pa.large_string()))
    except pa.ArrowInvalid:
        return pl.Series(values.name, [None if value is None else _spelled(value) for value in values.to_list()], pl.String)


def _spelled(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()
