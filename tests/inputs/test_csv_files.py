"""Cells, quotation marks, delimiters and encodings of files of text."""

import csv
import gzip
import io
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from qbert_ray.config.schema import Domain
from qbert_ray.inputs import csv_files, readers, text_files
from qbert_ray.inputs.csv_files import OPEN_QUOTE, WRONG_CELLS
from qbert_ray.inputs.json_files import plain_text
from qbert_ray.inputs.readers import REASON, ROW
from qbert_ray.inputs.sources import SourceError, open_source


def rows(path: Path, *names: str) -> pl.DataFrame:
    file = readers.describe(fs.LocalFileSystem(), str(path))
    wanted = dict.fromkeys(names or file.columns, plain_text)
    frames = [frame for part in readers.fragments(file) for _, frame in readers.read(fs.LocalFileSystem(), part, wanted)]
    return pl.concat(frames, how="diagonal") if frames else pl.DataFrame(schema=dict.fromkeys(wanted, pl.String))


def written(tmp_path: Path, content: str | bytes, name: str = "x.csv") -> Path:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path / name


LINES = [f"u{n},p{n},fine {n}" for n in range(50)]


@pytest.fixture(params=[16 << 20, 64], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(text_files.blocks, "__defaults__", (request.param,))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("stray", ['"great', '"', '"5" wide', 'a "b', '5"', '""x', 'x""'])
@pytest.mark.parametrize("others", ["", '"good, very"', '"say ""hi"""', '""'], ids=["none", "commas", "doubled", "empty"])
def test_a_stray_quotation_mark_swallows_no_row(tmp_path, stray, others):
    lines = [*LINES[:20], f"u,p,{stray}", *LINES[20:40], *([f"v,q,{others}"] if others else []), *LINES[40:]]
    found = rows(written(tmp_path, "\n".join(["user,item,comment", *lines])))
    assert found["user"].to_list() == [line.split(",")[0] for line in lines]
    fine = [line.split(",")[2] for line in LINES]
    assert [text for text in found["comment"].to_list() if text.startswith("fine")] == fine


def test_a_stray_quotation_mark_in_a_row_of_other_cells_is_rejected_alone(tmp_path):
    found = rows(written(tmp_path, 'a,b\n1,2\n3,"x, y\n5,6\n'))
    assert found.filter(pl.col(REASON).is_null())["a"].to_list() == ["1", "5"]
    assert found[REASON].drop_nulls().to_list() == [OPEN_QUOTE] and json.loads(found[ROW].drop_nulls()[0])["cells"] == 3


@pytest.mark.usefixtures("block")
def test_cells_of_several_lines_stay_whole(tmp_path):
    texts = ["two\nlines", 'a "quoted"\nword', "\n\n", "one, two\nthree", "x"]
    stream = io.StringIO()
    csv.writer(stream).writerows([["id", "text"], *enumerate(texts)])
    assert rows(written(tmp_path, stream.getvalue()))["text"].to_list() == texts


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    "text",
    [
        "A good shirt.\nSizes S, M, L\nWash cold.",
        "nice,\ni2,17,x\nbye",  # one line that looks like a row
        "a\nSizes S, M, L\nMade of a, b, c\nx, y",  # each line has as many delimiters as a row
        "sizes,in,cm\n10,20,30\n11,21,31\n12,22,32",
    ],
)
def test_a_text_whose_lines_have_as_many_delimiters_as_rows_is_one_cell(tmp_path, text):
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["id", "price", "text"], ["i0", 3, "fine"], ["i1", 12, text], ["i2", 5, "fine"]])
    assert rows(written(tmp_path, stream.getvalue())).rows() == [("i0", "3", "fine"), ("i1", "12", text), ("i2", "5", "fine")]


@pytest.mark.usefixtures("block")
def test_two_stray_quotation_marks_swallow_no_rows_between_them(tmp_path):
    lines = ["u0,p0,fine", 'u1,p1,"', "u2,p2,fine", "u3,p3,fine", 'u4,p4,"', "u5,p5,fine"]
    found = rows(written(tmp_path, "\n".join(["user,item,comment", *lines])))
    assert found["user"].to_list() == ["u0", "u1", "u2", "u3", "u4", "u5"]


@given(st.lists(st.lists(st.text("ab,\" \n'", max_size=8), min_size=3, max_size=3), min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_what_a_csv_writer_writes_is_what_is_read(tmp_path_factory, table):
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["a", "b", "c"], *[["k", *row[1:]] for row in table]])
    dialect, names = csv_files.header(stream.getvalue().encode(), "csv")
    content = stream.getvalue().encode()
    found = csv_files.read(io.BytesIO(content), readers.Text(), dialect, names, names)
    cells = [tuple(row.values()) for batch in found if not isinstance(batch, csv_files.Rejected) for row in batch.to_pylist()]
    wanted = [tuple(row) for row in csv.reader(io.StringIO(stream.getvalue(), newline=""))][1:]
    ambiguous = [row for row in wanted if any("\n" in cell and cell.count(",") for cell in row)]  # cells that look like rows
    assert ambiguous or cells == wanted


def test_tsv_takes_quotation_marks_as_text(tmp_path):
    titles = ['"Hi', 'the 5" one', '"all"', "plain"]
    content = "item\ttitle\n" + "\n".join(f"{n}\t{title}" for n, title in enumerate(titles))
    assert rows(written(tmp_path, content, "x.tsv"))["title"].to_list() == titles


@pytest.mark.parametrize("sign", [";", "|", "\t", ","])
@pytest.mark.parametrize("begin", ["", "\n\n", "sep={}\n"])
def test_the_delimiter_is_seen(tmp_path, sign, begin):
    content = (
        begin.format(sign) + sign.join(['"User-ID"', "ISBN", '"Rating"']) + "\n" + sign.join(['"1"', "000x", "7,5" if sign != "," else "7"])
    )
    found = rows(written(tmp_path, content))
    assert found.columns == ["User-ID", "ISBN", "Rating"] and found.row(0)[:2] == ("1", "000x")


@pytest.mark.parametrize(
    ("encoding", "remark"),
    [("utf-8", ""), ("utf-8-sig", ""), ("cp1252", "Windows-1252"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16")],
)
@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.jsonl"])
def test_encodings_are_seen_said_and_read(tmp_path, encoding, remark, name):
    titles = [f"Café {n} – größer €" for n in range(200)]
    lines = [json.dumps({"id": n, "title": title}, ensure_ascii=False) for n, title in enumerate(titles)]
    cells = ["id,title", *(f"{n},{title}" for n, title in enumerate(titles))]
    content = "".join(f"{line}\n" for line in (lines if name == "x.jsonl" else cells))
    raw = content.encode(encoding)
    path = written(tmp_path, gzip.compress(raw) if name.endswith(".gz") else raw, name)
    assert rows(path)["title"].to_list() == titles
    assert remark in readers.describe(fs.LocalFileSystem(), str(path)).remark


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_first_line_longer_than_the_sample_is_skipped_between_whole_characters(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(text_files, "SAMPLE_BYTES", 1 << 12)
    lines = [
        json.dumps({"id": 0, "text": "ascii " * 250 + "\u0a05\u010a" * 3000}, ensure_ascii=False),
        '{"id": 1, "text": "b", "more": "c"}',
    ]
    path = written(tmp_path, "".join(f"{line}\n" for line in lines).encode(encoding), "x.jsonl")
    assert set(readers.describe(fs.LocalFileSystem(), str(path)).columns) == {"id", "text", "more"}


def test_one_latin_byte_spoils_nothing_else(tmp_path):
    content = "id,title\n1,größer\n".encode() + b"2,Caf\xe9\n" + "3,日本\n".encode()
    assert rows(written(tmp_path, content))["title"].to_list() == ["größer", "Café", "日本"]


def test_a_latin_byte_far_into_the_file_is_read(tmp_path):
    content = b"id,title\n" + b"1,plain text\n" * 100_000 + b"2,Caf\xe9\n"
    assert rows(written(tmp_path, content), "title")["title"][-1] == "Café"


def test_binary_files_are_no_text(tmp_path):
    with pytest.raises(readers.FileError, match="no text"):
        readers.describe(fs.LocalFileSystem(), str(written(tmp_path, b"a,b\n\x00\xff\xfe\x01\n")))


@pytest.mark.parametrize(
    "empty", [b"", b"\n", b"item_id,title\n", b"item_id,title", gzip.compress(b"")], ids=["none", "blank", "header", "line", "gz"]
)
def test_parts_without_rows_count_none(tmp_path, empty):
    folder = tmp_path / "items"
    folder.mkdir()
    written(folder, empty, "part-0.csv.gz" if empty[:2] == b"\x1f\x8b" else "part-0.csv")
    written(folder, "item_id,title\na,A\n", "part-1.csv")
    source = open_source(str(tmp_path), "shop", "items", Domain(items="items"))
    frames = [frame for number, part in source.fragments() for frame in source.read(number, part)]
    assert pl.concat(frames)["item_id"].to_list() == ["a"]


def test_a_folder_of_empty_parts_is_refused(tmp_path):
    written(tmp_path, b"", "items.csv")
    with pytest.raises(SourceError, match="is empty"):
        open_source(str(tmp_path), "shop", "items", Domain(items="items.csv"))


def test_rows_of_other_width_say_how_many_cells_they_have(tmp_path):
    found = rows(written(tmp_path, "a,b\n1,2,\n3,4\n"))
    assert found[REASON].drop_nulls().to_list() == [WRONG_CELLS]
    assert json.loads(found[ROW].drop_nulls()[0]) == {"line": "1,2,", "cells": 3, "columns": 2}


def test_repeated_names_are_distinguished(tmp_path):
    assert rows(written(tmp_path, "id,title,title\n1,a,b\n")).row(0) == ("1", "a", "b")


def test_old_line_ends(tmp_path):
    assert rows(written(tmp_path, "id,t\r1,a\r2,b"))["t"].to_list() == ["a", "b"]
    assert rows(written(tmp_path, 'id,t\r\n1,"a\r\nb"\r\n2,c\r\n'))["t"].to_list() == ["a\r\nb", "c"]


def test_files_with_old_line_ends_before_others_lose_no_row(tmp_path):
    content = "\rid,t\r1,a\r2,b\r" + "3,c\n4,d\n"
    assert rows(written(tmp_path, content)).rows() == [("1", "a"), ("2", "b"), ("3", "c"), ("4", "d")]


def test_backslashes_before_quotation_marks_are_seen_where_they_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "SAMPLE_BYTES", 64)
    plain = [f'{n},"a, b",x' for n in range(20)]
    content = "\n".join(["id,text,more", *plain, '20,"a \\"big\\" one, red",x', *plain])
    assert rows(written(tmp_path, content))["text"].to_list() == [*["a, b"] * 20, 'a "big" one, red', *["a, b"] * 20]


# JSON of one value


@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_and_objects_of_rows_are_read(tmp_path, indent):
    records = [{"item_id": f"p{n}", "title": f"T{n}"} for n in range(5)]
    assert rows(written(tmp_path, json.dumps(records, indent=indent), "x.json"))["title"].to_list() == [f"T{n}" for n in range(5)]
    keyed = {f"p{n}": {"title": f"T{n}"} for n in range(5)}
    assert rows(written(tmp_path, json.dumps(keyed, indent=indent), "x.json")).select("item_id", "title").rows()[4] == ("p4", "T4")
    histories = rows(written(tmp_path, json.dumps({"7": [3, 1], "8": [2]}, indent=indent), "x.json"))
    assert histories.select("user_id", "item_id", "timestamp").rows() == [("7", "3", "0"), ("7", "1", "1"), ("8", "2", "0")]


@pytest.mark.parametrize(
    "value",
    [
        {"item_id": {"0": "a", "1": "b"}, "title": {"0": "A", "1": "B"}},
        {"item_id": ["a", "b"], "title": ["A", "B"]},
        {"columns": ["item_id"], "index": [0], "data": [["a"]]},
        {"sku": {"0": "a"}, "label": {"0": "A"}},
    ],
)
def test_objects_of_columns_say_how_to_write_rows(tmp_path, value):
    with pytest.raises(readers.FileError, match="orient='records', lines=True"):
        readers.describe(fs.LocalFileSystem(), str(written(tmp_path, json.dumps(value), "x.json")))


def test_large_arrays_are_described_by_their_beginning(tmp_path):
    records = [{"item_id": f"p{n}", "title": "x" * 100} for n in range(20_000)]
    path = written(tmp_path, json.dumps(records), "x.json")
    assert readers.describe(fs.LocalFileSystem(), str(path)).columns == ("item_id", "title") and len(rows(path)) == 20_000
    keyed = {f"p{n}": {"title": "x" * 100} for n in range(20_000)}
    assert len(rows(written(tmp_path, json.dumps(keyed), "x.json"), "item_id", "title")) == 20_000


# folders that are columns


def test_folders_of_partitions_are_columns(tmp_path):
    for date in ("2024-01-01", "2024-01-02", "__HIVE_DEFAULT_PARTITION__"):
        part = tmp_path / "log" / f"date={date}" / "kind=a%20b"
        part.mkdir(parents=True)
        pl.DataFrame({"user_id": ["u"], "item_id": ["a"]}).write_parquet(part / "part-0.parquet")
    domain = Domain(interactions="log", interaction_columns={"timestamp": "date"})
    source = open_source(str(tmp_path), "shop", "interactions", domain)
    assert source.files[0].columns == ("user_id", "item_id", "date", "kind")
    frames = [frame for number, part in source.fragments() for frame in source.read(number, part)]
    assert sorted(pl.concat(frames)["date"].to_list(), key=str) == ["2024-01-01", "2024-01-02", None]
    with pytest.raises(SourceError, match="columns found: user_id, item_id, date, kind"):
        open_source(str(tmp_path), "shop", "interactions", Domain(interactions="log"))


@pytest.mark.parametrize("location", ["data [2018]/i/*.csv", "data [2018]/i", "data [[]2018]/i/?.csv"])
def test_brackets_in_a_folder_that_is_there_are_no_pattern(tmp_path, location):
    (tmp_path / "data [2018]" / "i").mkdir(parents=True)
    written(tmp_path / "data [2018]" / "i", "item_id,title\na,A\n", "a.csv")
    assert len(open_source(str(tmp_path), "shop", "items", Domain(items=location)).files) == 1


def test_a_mistyped_root_is_refused_with_the_nearest_name(tmp_path):
    (tmp_path / "movielens").mkdir()
    with pytest.raises(SourceError, match="data.root.*did you mean .*movielens"):
        open_source(str(tmp_path / "movielnes"), "shop", "items", Domain())
