"""Exports as shops, spreadsheets, databases and other programs write them: none ends in a traceback, loses a row in silence or invents one.

Six users with five interactions each, in one file that is written in many ways.
"""

import bz2
import datetime as dt
import gzip
import io
import json
import lzma
import math
import os
import re
import tarfile
import zipfile
from decimal import Decimal
from functools import partial

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbert_ray.config.schema import Config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.inputs import csv_files
from qbert_ray.inputs.sources import SourceError
from qbert_ray.inputs.stage import ingest_domain
from qbert_ray.inputs.text_files import Text
from qbert_ray.inputs.values import as_rating
from qbert_ray.storage.directory import RunDir

ITEMS = [f"i{number}" for number in range(8)]
START = 1_700_000_000
ROWS = [(f"u{user}", ITEMS[(user + step) % 8], START + 100 * user + step) for user in range(6) for step in range(5)]
HEAD = "user_id,item_id,timestamp"


def table(rows=ROWS, head=HEAD, sign=","):
    return "".join(f"{line}\n" for line in [head.replace(",", sign), *(sign.join(map(str, row)) for row in rows)])


def times(write):
    """The table with other times: `write(number of the row, its time)`."""
    return table([(user, item, write(number, time)) for number, (user, item, time) in enumerate(ROWS)])


def items(write):
    return table([(user, write(number, item), time) for number, (user, item, time) in enumerate(ROWS)])


def users(write):
    return table([(write(number, user), item, time) for number, (user, item, time) in enumerate(ROWS)])


def parquet(user=None, item=None, time=None):
    columns = [[row[place] for row in ROWS] if given is None else given for place, given in enumerate((user, item, time))]
    stream = io.BytesIO()
    pq.write_table(pa.table(dict(zip(HEAD.split(","), columns, strict=True))), stream)
    return stream.getvalue()


def lines(write):
    return "".join(f"{json.dumps(write(*row))}\n" for row in ROWS)


def zipped(content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("sales.csv", content)
    return stream.getvalue()


def archive():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        entry = tarfile.TarInfo("sales.csv")
        entry.size = len(table())
        file.addfile(entry, io.BytesIO(table().encode()))
    return stream.getvalue()


def arrow():
    stream = io.BytesIO()
    pl.DataFrame(ROWS, HEAD.split(","), orient="row").write_ipc(stream)
    return stream.getvalue()


def record(user, item, time):
    return {"user_id": user, "item_id": item, "timestamp": time}


def ingested(root, content, name="sales.csv", catalog=None, **domain):
    """The counts of the ingest of a file, or of a folder of files."""
    for place, each in (content if isinstance(content, dict) else {name: content}).items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(each.encode() if isinstance(each, str) else each)
    catalog = catalog or "item_id,title\n" + "".join(f"{item},thing {item}\n" for item in ITEMS)
    (root / "items.csv").write_bytes(catalog.encode() if isinstance(catalog, str) else catalog)
    shop = {"items": "items.csv", "interactions": "sales" if isinstance(content, dict) else name, **domain}
    config = Config.model_validate(
        {"data": {"root": str(root), "domains": {"shop": shop}, "min_interactions": 0}, "run": {"dir": str(root / "run")}}
    )
    return ingest_domain(config, "shop", RunDir(config.run.dir), LocalExecutor(), Quiet())


READ = {  # files of which every row is read, whatever they look like
    "mixed line ends": "".join(line + ("\r\n", "\r", "\n")[number % 3] for number, line in enumerate(table().splitlines())),
    "blanks around names": table(head=" user_id , item_id\u00a0, timestamp "),
    "invisible signs around names": table(head="\u200buser_id,item_id\u200f,timestamp\ufeff"),
    "quoted names": table(head='"user_id","item_id","timestamp"'),
    "a column twice": table([(*row, f"x{row[0]}") for row in ROWS], f"{HEAD},user_id"),
    "a column of capitals": table([(*row, "zz") for row in ROWS], f"{HEAD},USER_ID"),
    "an index without a name": table([(number, *row) for number, row in enumerate(ROWS)], f",{HEAD}"),
    "blanks around IDs": table([(f"{user} ", f"{item}\u00a0", time) for user, item, time in ROWS]),
    "a tab after IDs": users(lambda _, user: f"{user}\t"),
    "a line end in IDs": users(lambda _, user: f'"{user}\n"'),
    "UTF-16 without a mark": table().encode("utf-16-le"),
    "sep=": f"sep=,\n{table()}",
    "IDs past 64 bits": users(lambda _, user: f"1844674407370955161{user[1:]}"),
    "zones of several kinds": times(lambda number, _: f"2024-03-31T02:{number:02d}:00{['Z', '+00:00', ''][number % 3]}"),
    "days as numbers": times(lambda number, _: f"202401{number % 28 + 1:02d}"),
    "seconds as numbers": times(lambda number, _: f"202401{number % 28 + 1:02d}101500"),
    "a mark between two files": table(ROWS[:15]) + "\ufeff" + table(ROWS[15:]).split("\n", 1)[1],
    "a mark that was read as Latin-1": f"\u00ef\u00bb\u00bf{table()}",
    "backslashes before quotes": table([(*row, '"a \\"big\\" one, red"') for row in ROWS], f"{HEAD},note"),
    "times without signs": times(lambda number, _: f"202401{number % 28 + 1:02d}T101500Z"),
    "times of Java": times(lambda number, _: f"2024-01-{number % 28 + 1:02d}T10:15:00Z[UTC]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_every_row_of_a_csv_file_is_read(tmp_path, kind):
    counts = ingested(tmp_path, READ[kind])
    assert (counts["interactions"], counts["users"], counts["warnings"]) == (30, 6, [])


OTHERS = {
    "dictionaries": ("sales.parquet", parquet(pa.array([user for user, _, _ in ROWS]).dictionary_encode())),
    "views": ("sales.parquet", parquet(item=pa.array([item for _, item, _ in ROWS], pa.string_view()))),
    "large strings": ("sales.parquet", parquet(item=pa.array([item for _, item, _ in ROWS], pa.large_string()))),
    "times with a zone": ("sales.parquet", parquet(time=pa.array([time * 1000 for *_, time in ROWS], pa.timestamp("ms", "America/New_York")))),
    "days": ("sales.parquet", parquet(time=pa.array([dt.date(2024, 1, 1 + number % 28) for number in range(30)]))),
    "decimal times": ("sales.parquet", parquet(time=pa.array([Decimal(time) for *_, time in ROWS], pa.decimal128(18, 2)))),
    "structs as users": ("sales.parquet", parquet([{"id": user} for user, _, _ in ROWS])),
    "an array": ("sales.json", json.dumps([record(*row) for row in ROWS])),
    "typed values of MongoDB": ("sales.jsonl", lines(lambda user, item, time: record({"$oid": user}, item, {"$date": {"$numberLong": str(time * 1000)}}))),
    "dates of MongoDB": ("sales.jsonl", lines(lambda user, item, time: record(user, item, {"$date": f"2024-01-01T10:00:{time % 60:02d}Z"}))),
    "integers past 64 bits": ("sales.jsonl", lines(lambda user, item, time: record(2**70 + int(user[1:]), item, time))),
    "a mark in the middle": ("sales.jsonl", "\n\ufeff".join(lines(record).rsplit("\n", 16)[:2]) + "\n" + "\n".join(lines(record).rsplit("\n", 16)[2:])),
    "tabs in texts": ("sales.jsonl", lines(lambda *row: record(*row) | {"note": "a|b"}).replace("|", "\t")),
    "half a character": ("sales.jsonl", lines(lambda user, item, time: record(user, item, time)).replace(': "u', ': "\\ud83du')),
    "gzip in several members": ("sales.csv.gz", gzip.compress(table().encode()[:200]) + gzip.compress(table().encode()[200:])),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_every_row_of_other_files_is_read(tmp_path, kind):
    name, content = OTHERS[kind]
    counts = ingested(tmp_path, content, name)
    assert (counts["interactions"], counts["users"], counts["warnings"]) == (30, 6, [])


def test_typed_values_of_mongodb_are_plain_ids(tmp_path):
    ingested(tmp_path, OTHERS["typed values of MongoDB"][1], "sales.jsonl")
    rows = pl.DataFrame(RunDir(str(tmp_path / "run")).read("ingest/interactions"))
    assert set(rows["user_id"]) == {user for user, _, _ in ROWS} and rows["timestamp"].min() == 1000 * START


REJECTED = {  # one row too many, which is rejected with this reason
    "a mark and names in the middle": (f"\ufeff{table()}\ufeff{HEAD}\n", "bad timestamp"),
    "names twice": (table() + f"{HEAD}\n", "bad timestamp"),
    "a sum below": (table() + "Total,,30\n", "missing item_id"),
    "a remark below": (table() + "\n(30 rows affected)\n", "invalid CSV row"),
    "zero bytes below": (table().encode() + bytes(4096), "invalid CSV row"),
    "a zero byte in an ID": (table() + f"u0,i\x001,{START}\n", "item not in items table"),
    "a line below the names": (table(sign=" | ").replace("timestamp\n", "timestamp\n---+---+---\n", 1), "invalid CSV row"),
    "the first of all days": (times(lambda number, _: f"2024-01-{number + 1:02d}") + "u0,i0,0001-01-01\n", "bad timestamp"),
    "the last of all days": (times(lambda number, _: f"2024-01-{number + 1:02d}") + "u0,i0,9999-12-31 23:59:59\n", "bad timestamp"),
    "no day": (times(lambda number, _: f"2024-01-{number + 1:02d}") + "u0,i0,0000-00-00\n", "bad timestamp"),
    "an hour that was skipped": (times(lambda number, _: f"2024-01-{number + 1:02d}") + "u0,i0,2024-03-31 02:30:00 Europe/Berlin\n", "bad timestamp"),
    "hour 24": (times(lambda number, _: f"2024-01-{number + 1:02d}") + "u0,i0,2024-03-31 24:00:00\n", "bad timestamp"),
    "a time without end": (table() + "u0,i0,inf\n", "bad timestamp"),
    "minus zero": (table() + f"u0,-0,{START}\n", "item not in items table"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REJECTED)
def test_a_row_too_many_is_rejected_with_its_reason(tmp_path, kind):
    content, reason = REJECTED[kind]
    counts = ingested(tmp_path, content)
    assert (counts["interactions"], counts["interactions_rejected"]) == (30, {reason: 1})


WARNED = {  # what can be used and looks wrong
    "users a spreadsheet rounded": (users(lambda _, user: f"1.2345{user[1:]}E+17"), "IDs of 6 users, such as '1.2345[0-5]E[+]17', look like numbers that a spreadsheet"),
    "accents apart": (users(lambda number, user: f"{user}e\u0301"), r"IDs of 6 users, such as 'u\de\\u0301', hold invisible characters or accents apart"),
    "invisible signs in users": (users(lambda number, user: f"{user}\u200b"), r"IDs of 6 users, such as 'u\d\\u200b', hold invisible"),
    "zero as time": (times(lambda number, time: 0 if number % 5 == 0 else time), "20.0% of the times are no plausible dates"),
    "numbers of days next to dates": (times(lambda number, _: 45000 + number if number % 3 else f"2024-01-{number % 28 + 1:02d}"), "66.7% of the times are"),
    "bells in users": (users(lambda number, user: f"{user}\a"), r"IDs of 6 users, such as 'u\d\\x07', hold invisible"),
    "blanks that do not break in users": (users(lambda number, user: f"{user}\u00a0x"), r"IDs of 6 users, such as 'u\d\\xa0x', hold invisible"),
    "2118 next to 2023": (times(lambda number, time: time + 3_000_000_000 * (number % 5 == 4)), "20.0% of the times are no plausible dates"),
    "four units": (times(lambda number, time: time * 1000 ** (number % 4)), "times are of several units"),
    "dates and numbers": (times(lambda number, time: time if number % 2 else "2023-11-14 10:00:00"), "times are of several units"),
    "rounded times": (times(lambda number, _: "1.70E+09"), "6 of 6 users have all their interactions at one time, .* did a spreadsheet round it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WARNED)
def test_what_looks_wrong_is_read_with_a_warning(tmp_path, kind):
    content, said = WARNED[kind]
    counts = ingested(tmp_path, content)
    assert counts["interactions"] == 30
    assert len(counts["warnings"]) == 1 and re.search(said, counts["warnings"][0])


def test_items_that_a_spreadsheet_rounded_are_named(tmp_path):
    catalog = "item_id,title\n" + "".join(f"4.90123E+12,thing {number}\n" for number in range(8))
    counts = ingested(tmp_path, items(lambda *_: "4.90123E+12"), catalog=catalog)
    assert counts["items_rejected"] == {"duplicate item_id": 7}
    assert "IDs of 1 items, such as '4.90123E+12', look like numbers that a spreadsheet has rounded" in counts["warnings"][0]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("shift_jis", "日本語の題名"), ("gb18030", "中文标题商品"), ("cp1251", "Красная сумка"), ("iso8859_7", "Κόκκινη τσάντα"), ("euc_kr", "빨간 가방")]
)  # fmt: skip
def test_texts_of_other_encodings_are_doubted(tmp_path, encoding, text):
    catalog = ("item_id,title\n" + "".join(f"{item},{text}\n" for item in ITEMS)).encode(encoding)
    counts = ingested(tmp_path, table(), catalog=catalog)
    assert any(
        "items.csv is not in UTF-8 and was read as Windows-1252 (Latin-1), in which its texts make no sense" in said
        for said in counts["warnings"]
    )


@pytest.mark.parametrize("text", ["Größe wählbar, grün", "garçon très élégant", "niño pequeño", "Rødgrød på øen"])
def test_western_texts_are_not_doubted(tmp_path, text):
    catalog = ("item_id,title\n" + "".join(f'{item},"{text}"\n' for item in ITEMS)).encode("cp1252")
    assert ingested(tmp_path, table(), catalog=catalog)["warnings"] == []


ALIKE = {  # IDs of which none matches -> the likely reason
    "exponents": (items(lambda number, _: f"{number % 8 + 1}e5"), "'1e5' of the interactions seems to be '100000' of the items: one side is written with an exponent"),
    "thousands": (items(lambda number, _: f'"{100_000 * (number % 8 + 1):,}"'), "one side has spaces or signs in it"),
    "accents apart": (items(lambda number, _: f"cafe\u0301{number % 8}"), "other Unicode characters that look alike"),
    "wide letters": (items(lambda number, item: f"\uff49{item[1:]}"), "other Unicode characters that look alike"),
    "invisible signs": (items(lambda number, item: f"{item}\u200b"), "one side has spaces or signs in it"),
    "marks of direction": (items(lambda number, item: f"\u202a{item}\u202c"), "one side has spaces or signs in it"),
    "a mark in each cell": (items(lambda number, item: f"\ufeff{item}"), "one side has spaces or signs in it"),
    "formulas": (items(lambda number, item: f'"=""{item}"""'), "one side has spaces or signs in it"),
    "apostrophes": (items(lambda number, item: f"'{item}"), "one side has spaces or signs in it"),
    "quotes": (items(lambda number, item: f'"""{item}"""'), "one side has spaces or signs in it"),
    "global IDs": (items(lambda number, item: f"gid://shop/Product/{number % 8}00"), "one side has a prefix"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALIKE)
def test_ids_that_are_written_otherwise_are_explained(tmp_path, kind):
    content, said = ALIKE[kind]
    known = [
        *ITEMS,
        *(f"{number}00" for number in range(8)),
        *(f"{number}00000" for number in range(1, 9)),
        *(f"caf\u00e9{number}" for number in range(8)),
    ]
    with pytest.raises(SourceError, match=said):
        ingested(tmp_path, content, catalog="item_id,title\n" + "".join(f"{item},thing\n" for item in known))


CSV = table().encode()
REFUSED = {  # name and content of files that cannot be read -> what is said
    "a gzip file called .csv": ("sales.csv", gzip.compress(CSV), "it is a gzip file: add .gz to its name"),
    "gzipped twice": ("sales.csv.gz", gzip.compress(gzip.compress(CSV)), "unpack it if it has been gzipped twice"),
    "plain text called .gz": ("sales.csv.gz", CSV, "it is not gzipped, .* is .gz in its name by mistake"),
    "bytes after the gzip": ("sales.csv.gz", gzip.compress(CSV) + b"\0\0garbage", "other bytes follow the end of the gzipped ones"),
    "an empty gzip": ("sales.csv.gz", gzip.compress(b""), "sales.csv.gz is empty"),
    "zstd": ("sales.csv.zst", pa.compress(CSV, codec="zstd", asbytes=True), r"is a Zstandard file: unpack it \(zstd -d\)"),
    "xz": ("sales.csv.xz", lzma.compress(CSV), r"is an xz file: unpack it \(xz -d\)"),
    "bzip2": ("sales.csv.bz2", bz2.compress(CSV), r"is a bzip2 file: unpack it \(bzip2 -d\)"),
    "zip": ("sales.zip", zipped(CSV), "is a ZIP archive or an Excel workbook"),
    "a zip called .csv": ("sales.csv", zipped(CSV), "cannot be read as csv; it is a ZIP archive or an Excel workbook"),
    "a workbook": ("sales.xlsx", zipped(CSV), "save the sheet as CSV"),
    "an old workbook": ("sales.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "an old Excel workbook"),
    "a tar archive": ("sales.csv.gz", archive(), r"is a tar archive: unpack it \(tar -xf\)"),
    "a tar archive by its name": ("sales.tar.gz", archive(), "call it .csv.gz, .tsv.gz or .jsonl.gz if it is such a text; unpack archives"),
    "text by another name": ("sales.txt", CSV, "call a table of text .csv, whatever is between its cells"),
    "Python's literals": ("sales.jsonl", "".join(f"{record(*row)}\n" for row in ROWS), "but Python literals; write JSON: python -c .*ast.literal_eval"),
    "commas after objects": ("sales.jsonl", lines(record).replace("\n", ",\n"), "each ends in a comma; remove these: sed"),
    "a single null": ("sales.jsonl", "null", "is a JSON object but null"),
    "a web page": ("sales.csv", "<html><table><tr><td>user_id</td></tr></table></html>", "is a web page"),
    "an error page": ("sales.jsonl", "\n<!DOCTYPE html>\n<title>403 Forbidden</title>", "is a web page: is it the error message of a download"),
    "a pointer of Git LFS": ("sales.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "Arrow called .parquet": ("sales.parquet", arrow(), "is an Arrow or Feather file"),
    "Parquet called .csv": ("sales.csv", parquet(), "it is a Parquet file: call it .parquet"),
    "Parquet that was cut": ("sales.parquet", parquet()[:-20], "cannot be read as parquet"),
    "Parquet without rows": ("sales.parquet", parquet(*[pa.array([], kind) for kind in (pa.string(), pa.string(), pa.int64())]), "has no rows"),
    "SQLite": ("sales.db", b"SQLite format 3\0" + bytes(100), "is an SQLite database"),
    "UTF-32": ("sales.csv", table().encode("utf-32"), "it is text in UTF-32"),
    "EBCDIC": ("sales.csv", table().encode("cp500"), "has no column user_id"),
    "a title above": ("sales.csv", f"Sales of January\n\n{table()}", "the first line is a single cell: remove titles"),
    "a comment above": ("sales.csv", f"# exported 2024\n{table()}", "the first line is a single cell: remove titles"),
    "two colons": ("sales.csv", table(sign="::"), "separate cells with one comma, semicolon, tab or |"),
    "blanks between": ("sales.csv", table(sign=" "), "separate cells with one comma, semicolon, tab or |"),
    "no names": ("sales.csv", table().split("\n", 1)[1], "the first line looks like a row: write the names of the columns above it"),
    "names in capitals": ("sales.csv", table(head="USER_ID,Item_ID,TimeStamp"), "calls them: .*user_id=USER_ID .*item_id=Item_ID .*timestamp=TimeStamp"),
    "times of the day": ("sales.csv", times(lambda number, _: f"10:{number:02d}:00"), "30 bad timestamp, such as '10:0"),
    "weeks": ("sales.csv", times(lambda number, _: f"2024-W{number + 10}"), "30 bad timestamp, such as '2024-W"),
    "times of .NET": ("sales.csv", times(lambda _, time: f"/Date({time}000)/"), "30 bad timestamp, such as '/Date"),
    "lists as items": ("sales.parquet", parquet(item=[[item, "i0"] for _, item, _ in ROWS]), r"has the type list<.*>, and item_id is one value a row; .*explode"),
    "maps as items": ("sales.parquet", parquet(item=pa.array([[(item, 1)] for _, item, _ in ROWS], pa.map_(pa.string(), pa.int8()))), "has the type map<"),
    "lists as times": ("sales.parquet", parquet(time=[[time] for *_, time in ROWS]), "timestamp is one value a row"),
    "no users at all": ("sales.parquet", parquet(pa.nulls(30)), "30 missing user_id"),
    "users as large floats": ("sales.parquet", parquet([2.0**60 + 1000 * number for number in range(30)]), "30 inexact user_id, .*a column of floats rounds"),
    "rows inside an answer": ("sales.json", json.dumps({"data": [record(*row) for row in ROWS], "total": 30}), r"its rows are the list under 'data'; .*jq -c '.data\[\]'"),
    "objects one after the other": ("sales.json", "".join(json.dumps(record(*row)) for row in ROWS), "stand one after the other on one; write one a line: jq -c"),
    "objects over several lines": ("sales.json", "\n".join(json.dumps(record(*row), indent=2) for row in ROWS), "objects span several lines"),
    "an array with a comma at its end": ("sales.json", "[\n" + ",\n".join(json.dumps(record(*row)) for row in ROWS) + ",\n]", "damaged or not jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_cannot_be_read_says_what_it_is(tmp_path, kind):
    name, content, said = REFUSED[kind]
    with pytest.raises(SourceError, match=said) as error:
        ingested(tmp_path, content, name)
    assert "sales" in str(error.value) or "interactions" in str(error.value)
    assert len(str(error.value)) < 2000


def test_items_as_floats_that_were_rounded_are_rejected(tmp_path):
    catalog = pl.DataFrame({"item_id": pl.Series([*range(8), 2**24 + 1], dtype=pl.Float32), "title": ["thing"] * 9})
    catalog.write_parquet(tmp_path / "items.parquet")
    counts = ingested(tmp_path, items(lambda number, _: number % 8), items="items.parquet")
    assert counts["items_rejected"] == {"inexact item_id": 1} and counts["interactions"] == 30


def test_a_name_that_only_looks_the_same_is_pointed_out(tmp_path):
    catalog = "item_id,Gro\u0308\u00dfe\n" + "".join(f"{item},thing\n" for item in ITEMS)
    with pytest.raises(SourceError, match=r"'Gro\\u0308\\xdfe' looks the same as 'Gr\\xf6\\xdfe'"):
        ingested(tmp_path, table(), catalog=catalog, text_fields=["Gr\u00f6\u00dfe"])


FOLDERS = {  # files next to the table of a folder that are no tables
    "marks of Spark": {"_SUCCESS": "", ".part-0.csv.crc": b"crc\0", "_committed_1": "{}"},
    "marks of a Mac": {".DS_Store": b"\0\0\1Bud1", "._part-0.csv": b"\0\5\x16\7", "__MACOSX/._part-0.csv": b"\0\5"},
    "locks of office programs": {"~$part-0.csv": b"\x05user", ".~lock.part-0.csv#": "x"},
    "copies of editors": {"part-0.csv~": "x", "part-0.csv.bak": "x", ".part-0.csv.swp": "x"},
    "empty parts": {"part-1.csv": "", "part-2.csv": f"{HEAD}\n"},
    "columns in another order": {"part-1.csv": "timestamp,item_id,user_id\n"},
    "another delimiter": {"part-1.csv": HEAD.replace(",", ";") + "\n"},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_files_of_a_folder_are_no_rows(tmp_path, kind):
    counts = ingested(tmp_path, {f"sales/{name}": content for name, content in ({"part-0.csv": table()} | FOLDERS[kind]).items()})
    assert (counts["interactions_read"], counts["users"]) == (30, 6)


def test_links_in_a_circle_are_followed_once(tmp_path):
    (tmp_path / "sales").mkdir()
    os.symlink(tmp_path / "sales", tmp_path / "sales" / "again")
    os.symlink(tmp_path / "nowhere.csv", tmp_path / "sales" / "broken.csv")
    assert ingested(tmp_path, {"sales/part-0.csv": table()})["interactions_read"] == 30


def test_a_folder_without_tables_says_what_is_there(tmp_path):
    with pytest.raises(SourceError, match="no Parquet, CSV or JSONL file at .*/sales; there is export.xlsx, which is none of these"):
        ingested(tmp_path, {"sales/export.xlsx": zipped(b"x")})


def test_the_same_rows_in_two_files_are_counted(tmp_path):
    counts = ingested(tmp_path, {"sales/part-0.csv": table(), "sales/part-0 (1).csv": table()})
    assert (counts["interactions"], counts["interactions_rejected"]) == (30, {"duplicate interaction": 30})


def test_weights_beyond_reason_are_rejected(tmp_path):
    weights = ["1", "2.5", "1e38", "1e400", "-1", "x"]
    rows = table([(*row, weights[number % 6]) for number, row in enumerate(ROWS)], f"{HEAD},interaction_weight")
    counts = ingested(tmp_path, rows, interaction_columns={"interaction_weight": "interaction_weight"})
    assert (counts["interactions"], counts["interactions_rejected"]) == (10, {"bad interaction_weight": 20})


def test_types_of_events_are_told_apart_by_capitals(tmp_path):
    with pytest.raises(SourceError, match="30 event_type left out, such as .*Purchase.* capital letters included"):
        ingested(tmp_path, table([(*row, "Purchase") for row in ROWS], f"{HEAD},event_type"), event_weights={"purchase": 1})


@pytest.mark.parametrize("path", ["img\\a.png", ".\\img\\a.png", "img/../img\\a.png"])
def test_paths_of_windows_are_found(tmp_path, path):
    catalog = f"item_id,title,image\n{ITEMS[0]},thing,{path}\n" + "".join(f"{item},thing,\n" for item in ITEMS[1:])
    ingested(tmp_path, table(), catalog=catalog, image_column="image")
    rows = pl.DataFrame(RunDir(str(tmp_path / "run")).read("ingest/items"))
    assert rows["image_path"].drop_nulls().to_list() == [str(tmp_path / "img" / "a.png")]


@pytest.mark.parametrize("path", ["..\\..\\etc\\passwd", "C:\\pics\\a.png", "\\\\server\\share\\a.png"])
def test_paths_of_windows_lead_out_of_no_folder(tmp_path, path):
    catalog = f"item_id,title,image\n{ITEMS[0]},thing,{path}\n" + "".join(f"{item},thing,\n" for item in ITEMS[1:])
    counts = ingested(tmp_path, table(), catalog=catalog, image_column="image")
    assert counts["images_rejected"] == {"unsafe path": 1} and counts["items"] == 8


def test_texts_with_backslashes_before_quotes_are_those_that_were_written(tmp_path):
    titles = ['12\\" disc, red', "C:\\\\music", 'say \\"hi\\"', "plain"]
    catalog = "item_id,title\n" + "".join(f'{item},"{titles[number % 4]}"\n' for number, item in enumerate(ITEMS))
    ingested(tmp_path, table(), catalog=catalog, text_fields=["title"])
    rows = pl.DataFrame(RunDir(str(tmp_path / "run")).read("ingest/items")).sort("item_id")
    assert rows["text.title"].to_list()[:4] == ['12" disc, red', "C:\\music", 'say "hi"', "plain"]


@pytest.mark.parametrize("size", [8, 30, 60, 1 << 20])
def test_backslashes_mean_the_same_wherever_a_file_is_cut(size, monkeypatch):
    """A cell over several lines is read again with the next block, together with what is before it in its row."""
    content = "a,b,c\n" + '"C:\\\\","say \\"hi\\" to\nall\nof us",x\n' * 3
    dialect, names = csv_files.header(content.encode(), "csv")
    monkeypatch.setattr(csv_files, "blocks", partial(csv_files.blocks, size=size))
    tables = list(csv_files.read(io.BytesIO(content.encode()), Text(), dialect, names, names))
    rows = [tuple(row.values()) for each in tables for row in each.to_pylist()]
    assert dialect.escaped and rows == [("C:\\", 'say "hi" to\nall\nof us', "x")] * 3


def test_backslashes_at_the_end_of_cells_stay(tmp_path):
    catalog = "item_id,title,path\n" + "".join(f'{item},"C:\\","D:\\x\\"\n' for item in ITEMS)
    ingested(tmp_path, table(), catalog=catalog, text_fields=["title", "path"])
    rows = pl.DataFrame(RunDir(str(tmp_path / "run")).read("ingest/items"))
    assert set(zip(rows["text.title"], rows["text.path"], strict=True)) == {("C:\\", "D:\\x\\")}


def test_of_two_columns_of_one_name_in_parquet_the_first_is_read(tmp_path):
    columns = [pa.array([row[place] for row in ROWS]) for place in range(3)]
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([*columns, pa.array(["z"] * 30)], names=[*HEAD.split(","), "user_id"]), stream)
    assert ingested(tmp_path, stream.getvalue(), "sales.parquet")["users"] == 6


def test_two_stars_are_any_number_of_folders(tmp_path):
    files = {"sales/a.csv": table(ROWS[:10]), "sales/x/b.csv": table(ROWS[10:20]), "sales/x/y/c.csv": table(ROWS[20:])}
    assert ingested(tmp_path, files, interactions="sales/**/*.csv")["interactions"] == 30


def test_files_of_a_delta_table_are_only_read_if_all_are_asked_for(tmp_path):
    files = {"sales/_delta_log/0.json": "{}", "sales/part-0.parquet": parquet()}
    with pytest.raises(SourceError, match=r"sales is a Delta table, whose files also hold rows .* sales/\*.parquet"):
        ingested(tmp_path, files)
    assert ingested(tmp_path, files, interactions="sales/*.parquet")["interactions"] == 30


def test_an_infinite_time_does_not_change_the_unit_of_the_others(tmp_path):
    ingested(tmp_path, times(lambda number, time: "inf" if number == 3 else time))
    rows = pl.DataFrame(RunDir(str(tmp_path / "run")).read("ingest/interactions"))
    assert (rows["timestamp"].min(), rows["timestamp"].max()) == (START, ROWS[-1][2])


def test_an_infinite_rating_is_no_rating():
    for values in (["inf", "5", "-1e999"], [math.inf, 5.0, -math.inf]):
        frame = pl.DataFrame({"x": values})
        assert frame.select(as_rating(pl.col("x"), frame.schema["x"])).to_series().to_list() == [None, 5, None]
