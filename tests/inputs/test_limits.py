"""Small files that ask for gigabytes: opened and read within bounded memory, or refused by name; no row is lost."""

import gzip
import json
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from qbert_ray.config.schema import Domain
from qbert_ray.inputs import limits
from qbert_ray.inputs.readers import REASON, FileError, describe
from qbert_ray.inputs.sources import POSITION, SourceError, open_source
from tests import ROOT

BOUNDED = """
import resource, sys
from qbert_ray.config.schema import Domain
from qbert_ray.inputs.readers import REASON
from qbert_ray.inputs.sources import SourceError, open_source
import polars, pyarrow.csv
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    source = open_source(sys.argv[1], "shop", "items", Domain(items=sys.argv[2]))
    rows = rejected = 0
    for number, fragment in source.fragments():
        for frame in source.read(number, fragment):
            rows, rejected = rows + len(frame), rejected + frame[REASON].count()
    print(rows, rejected, end=" ")
except SourceError as error:
    print("refused", str(error).replace(" ", "_")[:300], end=" ")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10)
"""


def read_bounded(folder, name):
    """What reading a file gives, and how many MiB it took at most, in a process of its own."""
    command = [sys.executable, "-c", BOUNDED, str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    *answer, peak = done.stdout.split()
    return answer, int(peak)


def write_gz(path, *pieces):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for piece, times in pieces:
            for _ in range(times):
                file.write(piece)


def test_one_line_of_gigabytes_in_a_small_gzip_is_one_rejected_row(tmp_path):
    mebibyte = b"a" * (1 << 20)
    write_gz(
        tmp_path / "items.jsonl.gz", (b'{"item_id": "a", "title": "', 1), (mebibyte, 700), (b'"}\n{"item_id": "b", "title": "x"}\n', 1)
    )
    answer, peak = read_bounded(tmp_path, "items.jsonl.gz")
    assert answer == ["2", "1"] and peak < 400


def test_one_line_of_gigabytes_in_a_gzipped_csv_costs_little_memory(tmp_path):
    write_gz(tmp_path / "items.csv.gz", (b"item_id,title\na,b\nc,", 1), (b"a" * (1 << 20), 700))
    answer, peak = read_bounded(tmp_path, "items.csv.gz")
    assert answer[0] == "2" and peak < 600


def test_a_parquet_file_whose_few_values_stand_for_gigabytes_is_read_in_pieces(tmp_path):
    """200 KiB of text by number 20,000 times: 4 GiB from a few kilobytes."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 200_000])).dictionary_encode()
    table = pa.table({"item_id": [f"i{n}" for n in range(20_000)], "title": text})
    pq.write_table(table, tmp_path / "items.parquet", compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30)
    assert (tmp_path / "items.parquet").stat().st_size < 500_000
    answer, peak = read_bounded(tmp_path, "items.parquet")
    assert answer == ["20000", "0"] and peak < 1000


def test_values_that_are_written_by_number_are_read_as_they_are(tmp_path):
    values = {"item_id": ["a", "b", "a", None] * 50, "title": ["long " * 40, None, "x", "y"] * 50, "price": [1, 2, 3, 4] * 50}
    pq.write_table(pa.table(values), tmp_path / "items.parquet", row_group_size=64)
    source = open_source(str(tmp_path), "shop", "items", Domain(items="items.parquet", attributes=["price"]))
    frames = pl.concat([frame for number, fragment in source.fragments() for frame in source.read(number, fragment)])
    assert {name: frames[name].to_list() for name in values} == values and frames[POSITION].is_sorted()


def test_a_value_of_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MOST_VALUE", 1000)
    pq.write_table(pa.table({"item_id": ["a"], "title": ["x" * 2000]}), tmp_path / "items.parquet")
    source = open_source(str(tmp_path), "shop", "items", Domain(items="items.parquet"))
    with pytest.raises(SourceError, match=r"items.parquet .*a value is larger"):
        list(source.read(*source.fragments()[0]))


def written(kind: str, ids: list[str], titles: list[str]) -> str:
    pairs = zip(ids, titles, strict=True)
    if kind == "jsonl":
        return "\n".join(json.dumps({"item_id": name, "title": title}) for name, title in pairs)
    return "item_id,title\n" + "\n".join(f'"{name}","{title}"' if kind == "quoted" else f"{name},{title}" for name, title in pairs)


def test_lines_below_the_bound_are_parsed_a_few_at_a_time(tmp_path):
    line = json.dumps({"item_id": "a", "title": "x" * (8 << 20)}).encode() + b"\n"
    write_gz(tmp_path / "items.jsonl.gz", (line, 60))
    answer, peak = read_bounded(tmp_path, "items.jsonl.gz")
    assert answer == ["60", "0"] and peak < 600


def test_a_line_of_millions_of_values_is_a_rejected_row(tmp_path):
    (tmp_path / "items.jsonl").write_bytes(b'{"item_id": "a"}\n{"item_id": "b", "title": [' + b"[]," * (2 << 20) + b"[]]}\n")
    answer, peak = read_bounded(tmp_path, "items.jsonl")
    assert answer == ["2", "1"] and peak < 300


def test_an_array_is_parsed_element_by_element(tmp_path):
    element = json.dumps({"item_id": "a", "title": "T", "sizes": [[]] * 1000}).encode()
    write_gz(tmp_path / "items.json.gz", (b"[" + element, 1), (b",\n" + element, 19_999), (b"]", 1))
    answer, peak = read_bounded(tmp_path, "items.json.gz")
    assert answer == ["20000", "0"] and peak < 700


@pytest.mark.parametrize("end", ["", "] 1", "}", ',{"item_id": '])
def test_an_array_that_is_cut_or_goes_on_is_damaged(tmp_path, end):
    (tmp_path / "items.json").write_text('[{"item_id": "a"},\n {"item_id": "b"}\n' + end)
    with pytest.raises(SourceError, match="items.json"):
        source = open_source(str(tmp_path), "shop", "items", Domain(items="items.json"))
        for number, fragment in source.fragments():
            list(source.read(number, fragment))


def test_large_texts_of_parquet_are_read_in_pieces_too(tmp_path):
    texts = pa.array(["x" * (1 << 20)] * 100, pa.large_string())
    schema = pa.schema({"item_id": pa.string(), "title": pa.large_string()})
    with pq.ParquetWriter(tmp_path / "items.parquet", schema, compression="zstd", dictionary_pagesize_limit=1 << 30) as writer:
        for begin in range(0, 2000, 100):
            writer.write_table(pa.table({"item_id": [f"i{begin + row}" for row in range(100)], "title": texts}, schema))
    assert (tmp_path / "items.parquet").stat().st_size < 1 << 20
    answer, peak = read_bounded(tmp_path, "items.parquet")
    assert answer == ["2000", "0"] and peak < 1000


def test_names_of_columns_that_repeat_are_counted_in_linear_time(tmp_path, monkeypatch):
    (tmp_path / "items.csv").write_text(",".join(["a"] * 9_999) + "\n")
    names = describe(fs.LocalFileSystem(), str(tmp_path / "items.csv")).columns
    assert len(set(names)) == 9_999 and names[:3] == ("a", "a_2", "a_3") and names[-1] == "a_9999"
    (tmp_path / "mixed.csv").write_text("a,a_2,a,a\n1,2,3,4\n")
    assert describe(fs.LocalFileSystem(), str(tmp_path / "mixed.csv")).columns == ("a", "a_2", "a_3", "a_4")


@pytest.mark.parametrize("megabytes", [17, 40])  # within the blocks that are read at once, and past them
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "quoted"])
def test_a_line_past_the_bound_is_rejected_and_no_other(tmp_path, kind, encoding, megabytes):
    ids, end = [f"i{number}" for number in range(200)], "\n" if megabytes == 17 else ""
    titles = ["x" * 100] * 200
    titles[100] = "y" * (megabytes << 20)
    name = f"items.{'jsonl' if kind == 'jsonl' else 'csv'}.gz"
    (tmp_path / name).write_bytes(gzip.compress((written(kind, ids, titles) + end).encode(encoding), 1))
    source = open_source(str(tmp_path), "shop", "items", Domain(items=name))
    frames = [frame for fragment in source.fragments() for frame in source.read(*fragment)]
    rejected = [reason for frame in frames for reason in frame[REASON].drop_nulls()]
    found = [item for frame in frames for item in frame["item_id"].drop_nulls()]
    assert sorted(found) == sorted(set(ids) - {"i100"})
    assert rejected == ["invalid JSON" if kind == "jsonl" else "line too long"]


def test_an_array_on_a_single_line_is_read_whole(tmp_path):
    rows = [{"item_id": f"i{number}", "title": "x" * 10_000} for number in range(4000)]
    (tmp_path / "items.json").write_text(json.dumps(rows))
    assert (tmp_path / "items.json").stat().st_size > 2 * limits.MOST_LINE
    source = open_source(str(tmp_path), "shop", "items", Domain(items="items.json"))
    assert sum(len(frame) for fragment in source.fragments() for frame in source.read(*fragment)) == len(rows)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_too_many_columns_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(limits, "MOST_COLUMNS", 50)
    names, path = [f"c{n}" for n in range(60)], tmp_path / f"items.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({name: [1] for name in names}), path)
    elif kind == "csv":
        path.write_text(",".join(names) + "\n")
    else:
        path.write_text("\n".join(json.dumps({name: 1}) for name in names))
    with pytest.raises(FileError, match=rf"items.{kind} .*more than 50 columns"):
        describe(fs.LocalFileSystem(), str(path))


def test_columns_that_are_nested_too_deeply_are_refused(tmp_path):
    kind = pa.int64()
    for _ in range(70):
        kind = pa.struct([("x", kind)])
    pq.write_table(pa.table({"item_id": pa.nulls(1, kind)}), tmp_path / "items.parquet")
    with pytest.raises(FileError, match=r"items.parquet .*nested more than 64 levels"):
        describe(fs.LocalFileSystem(), str(tmp_path / "items.parquet"))
