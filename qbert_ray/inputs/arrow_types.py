"""Converts columns of any Arrow type to the types that polars supports, without changing their values."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

UUID_BYTES = 16


def plain_table(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """The given columns of a table, in types that polars supports.

    UUIDs and other binary values of fixed length, maps, durations, times at an offset such as +05:30, intervals, unions, 256-bit decimals, views and encoded runs
    are converted; any other unsupported type becomes the text that Python prints of its values.
    """
    chosen = [table.column(table.schema.names.index(name)) for name in columns]
    return pa.table(
        [pa.chunked_array([plain(chunk) for chunk in column.chunks] or [plain(pa.array([], column.type))]) for column in chosen],
        list(columns),
    )


def plain(array: pa.Array) -> pa.Array:
    """An array in a type that polars supports."""
    kind = array.type
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage)
    if types.is_dictionary(kind):
        return plain(array.dictionary_decode())
    if types.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(array))
    if types.is_fixed_size_binary(kind):
        return _uuids(array) if kind.byte_width == UUID_BYTES else array
    if types.is_map(kind):
        entries = pa.list_(pa.struct([pa.field("key", kind.key_type), pa.field("value", kind.item_type)]))
        return plain(array.cast(entries))
    if types.is_struct(kind):
        fields = [plain(array.field(number)) for number in range(kind.num_fields)]
        if array.null_count or array.offset:
            fields = [plain(values) for values in array.flatten()]
        return pa.StructArray.from_arrays(fields, [field.name for field in kind], mask=array.is_null())
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return plain(array.cast(pa.large_list(kind.value_type)))
    if types.is_fixed_size_list(kind):
        return plain(array.cast(pa.large_list(kind.value_type)))
    if types.is_list(kind) or types.is_large_list(kind):
        return _lists(array)
    if types.is_timestamp(kind) and str(kind.tz).startswith(("+", "-")):
        return array.cast(pa.timestamp(kind.unit, "UTC"))  # the same moments; polars knows zones by name alone
    if types.is_duration(kind):
        return _durations(array)
    if types.is_binary_view(kind):
        return array.cast(pa.large_binary())
    if types.is_decimal256(kind):
        return array.cast(pa.string())
    if types.is_float16(kind):
        return array.cast(pa.float32())
    if types.is_union(kind) or types.is_interval(kind):
        return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.string())
    return array


def _lists(array: pa.Array) -> pa.Array:
    inner = plain(pa.array([], array.type.value_type)).type
    if inner == array.type.value_type:
        return array
    values = plain(array.flatten())
    lengths = pc.fill_null(pc.list_value_length(array), 0)
    offsets = (
        pa.array([0], pa.int64())
        if not len(array)
        else pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(lengths.cast(pa.int64()))])
    )
    return pa.LargeListArray.from_arrays(offsets, values, mask=array.is_null() if array.null_count else None)


def _uuids(array: pa.Array) -> pa.Array:
    """UUIDs of 16 bytes as text in their usual form."""
    digits = pl.Series(array.cast(pa.large_binary())).bin.encode("hex")
    return digits.str.replace(r"^(.{8})(.{4})(.{4})(.{4})(.{12})$", "$1-$2-$3-$4-$5").to_arrow()


def _durations(array: pa.Array) -> pa.Array:
    """Durations as text: 1 day, 2:03:04."""
    return pa.array([None if value is None else str(value) for value in array.cast(pa.duration("us"), safe=False).to_pylist()], pa.string())
