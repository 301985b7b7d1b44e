"""IDs, texts, ratings and images of any column type, and the spellings of nothing."""

import base64
import json
from datetime import time, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbert_ray.config.schema import Domain
from qbert_ray.inputs.arrow_types import plain_table
from qbert_ray.inputs.markup import strip_markup
from qbert_ray.inputs.readers import REASON
from qbert_ray.inputs.rows import UNREAD, normalise_interactions, normalise_items
from qbert_ray.inputs.sources import SourceError, open_source
from qbert_ray.inputs.values import NOTHING

KEY = UUID("12345678-1234-5678-1234-567812345678")
PIXEL = bytes([0x89, *b"PNG\r\n\x1a\n", *range(32)])


def items(folder: Path, table: pa.Table | list[dict] | str, **domain) -> pl.DataFrame:
    """What is read of a catalog in Parquet, JSON lines or CSV."""
    name = "items.parquet" if isinstance(table, pa.Table) else "items.csv" if isinstance(table, str) else "items.jsonl"
    if isinstance(table, pa.Table):
        pq.write_table(table, folder / name)
    else:
        (folder / name).write_text(table if isinstance(table, str) else "\n".join(map(json.dumps, table)))
    domain = Domain(**({"items": name, "text_fields": []} | domain))
    source = open_source(str(folder), "shop", "items", domain)
    return pl.concat(normalise_items(raw, source, n, domain, str(folder)) for n, part in source.fragments() for raw in source.read(n, part))


def log(folder: Path, table: pa.Table | list[dict], min_rating: float | None = None) -> pl.DataFrame:
    name = "log.parquet" if isinstance(table, pa.Table) else "log.jsonl"
    pq.write_table(table, folder / name) if isinstance(table, pa.Table) else (folder / name).write_text("\n".join(map(json.dumps, table)))
    source = open_source(str(folder), "shop", "interactions", Domain(interactions=name))
    return pl.concat(normalise_interactions(raw, source, min_rating) for n, part in source.fragments() for raw in source.read(n, part))


# IDs


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([KEY.bytes], pa.uuid()), str(KEY)),
        (pa.array([KEY.bytes], pa.binary(16)), str(KEY)),
        (pa.array([b"sku-1"]), "sku-1"),
        (pa.array([b"\xff\x00"]), "ff00"),
        (pa.array([b"ab"], pa.binary(2)), "ab"),
        (pa.array([Decimal("12.00")], pa.decimal128(20, 2)), "12"),
        (pa.array([Decimal("12")], pa.decimal256(50, 0)), "12"),
        (pa.array([-3.0]), "-3"),
        (pa.array([2.0], pa.float32()).cast(pa.float16()), "2"),
        (pa.array(["-3.0"]), "-3"),
        (pa.array(["0012"]), "0012"),
        (pa.array(["v1.0"]), "v1.0"),
        (pa.array(["x"]).dictionary_encode(), "x"),
        (pa.array(["x"], pa.large_string()).dictionary_encode(), "x"),
        (pa.array([7]).dictionary_encode(), "7"),
        (pa.array(["x"], pa.string_view()), "x"),
        (pa.array([time(1, 2, 3)]), "01:02:03"),
    ],
)
def test_an_id_of_any_type_is_text(tmp_path, values, expected):
    assert items(tmp_path, pa.table({"item_id": values}))["item_id"].to_list() == [expected]


def test_whole_numbers_with_gaps_are_the_same_id_in_csv(tmp_path):
    found = items(tmp_path, "item_id,title\n-1.0,a\n12.0,b\n,c\n1.5,d\n")
    assert found["item_id"].to_list() == ["-1", "12", None, "1.5"] and found[REASON][2] == "missing item_id"


@pytest.mark.parametrize("nothing", [float("nan"), None, *NOTHING, "none", "nil", " NaN ", ""])
def test_spellings_of_nothing_are_no_user_no_item_and_no_title(tmp_path, nothing):
    rows = [{"user_id": nothing, "item_id": "a", "timestamp": 1}, {"user_id": "u", "item_id": nothing, "timestamp": 1}]
    assert log(tmp_path, rows)[REASON].to_list() == ["missing user_id", "missing item_id"]
    if nothing not in ("none", "nil"):  # which are words
        assert items(tmp_path, [{"item_id": "a", "title": nothing}], text_fields=["title"])["text.title"].to_list() == [None]


def test_names_that_only_hold_such_a_word_stay(tmp_path):
    titles = ["Nanny", "NA NA NA", "null island", "None of these", "nan khatai"]
    found = items(tmp_path, [{"item_id": n, "title": title} for n, title in enumerate(titles)], text_fields=["title"])
    assert found["text.title"].to_list() == titles


# texts and attributes


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([timedelta(days=1, hours=2)]), "1 day, 2:00:00"),
        (pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), '{"key":"a","value":"b"}'),
        (pa.array([[["a", "b"], ["c"]]]), "a, b, c"),
        (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), "a, b"),
        (pa.array([["a"]], pa.list_view(pa.string())), "a"),
        (pa.array([{"day": timedelta(1)}]), '{"day":"1 day, 0:00:00"}'),
        (pa.array([True]), "true"),
        (pa.nulls(1), None),
    ],
)
def test_an_attribute_of_any_type_is_text(tmp_path, values, expected):
    found = items(tmp_path, pa.table({"item_id": ["a"], "x": values}), attributes=["x"])
    assert found["attribute.x"].to_list() == [expected]


@pytest.mark.parametrize(
    "values",
    [
        pa.RunEndEncodedArray.from_arrays([2], ["x"]),
        pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
        pa.array([[["a"]], None], pa.list_view(pa.list_(pa.string()))),
        pa.array([{"a": [timedelta(1)]}, None]),
        pa.array([[KEY.bytes], None], pa.list_(pa.binary(16))),
        pa.UnionArray.from_dense(pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array(["x"]), pa.array([1])]),
    ],
)
def test_types_that_polars_lacks_become_usual_ones(values):
    frame = pl.DataFrame(plain_table(pa.table({"x": values}), ["x"]))
    assert len(frame) == 2 and (frame["x"].null_count() == 1) == (values.to_pylist()[1] is None)


@pytest.mark.parametrize(
    "name", ["_reason", "_row", "_position", "given_path", "image_bytes", "item_index", "cold", "domain", "table", "_group"]
)
def test_a_column_may_have_any_name(tmp_path, name):
    found = items(tmp_path, pa.table({"item_id": ["a"], name: ["x"]}), text_fields=[name], attributes=[name])
    assert found.select(f"text.{name}", f"attribute.{name}", REASON).row(0) == ("x", "x", None)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<p>Soft &amp; warm<br>mug</p>", "Soft & warm mug"),
        ("<style>p {color: red}</style><p>mug</p><script type='x'>var a = '<b>';</script>", "mug"),
        ("mug<!-- a > comment --> blue", "mug blue"),
        ("<div class='a'>" * 50 + "mug" + "</div>" * 50, "mug"),
        ("mug&nbsp;5&#8364; &quot;x&quot;", 'mug 5€ "x"'),
        ("&amp;lt;b&amp;gt;mug&amp;lt;/b&amp;gt;", "mug"),
        ("a < b and c > d", "a < b and c > d"),
        ("AT&T, R&D; I <3 it", "AT&T, R&D; I <3 it"),
        ("<script>never closed", None),
        ("R&amp;D &#" + "9" * 5000 + ";", "R&D &#" + "9" * 5000 + ";"),  # Python reads no number of so many digits
        ("two  spaces\nand a line", "two  spaces\nand a line"),
    ],
)
def test_markup_is_stripped_from_every_text(tmp_path, text, plain):
    assert strip_markup(pl.Series([text])).to_list() == [plain]
    found = items(tmp_path, [{"item_id": "a", "title": text}], text_fields=["title"], attributes=["title"])
    assert found.select("text.title", "attribute.title").row(0) == (plain, plain)


# ratings


def test_ratings_that_are_no_numbers_are_rejected_where_they_count(tmp_path):
    given = ["5", "4,5", "3", "★★★★", "4 stars", "good", None, True]
    rows = [{"user_id": "u", "item_id": n, "timestamp": n, "rating": rating} for n, rating in enumerate(given)]
    reasons = [None, None, "below min_rating", "bad rating", "bad rating", "bad rating", None, "bad rating"]
    assert log(tmp_path, rows, min_rating=4)[REASON].to_list() == reasons
    assert log(tmp_path, rows)[REASON].to_list() == [None] * len(given)


# images

LINK = "https://example.org/a.jpg"
NUMBERS = list(PIXEL)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([LINK]),
        pa.array([LINK]).dictionary_encode(),
        pa.array([LINK], pa.large_string()),
        pa.array([[LINK, "b"]]),
        pa.array([[None, LINK]], pa.list_(pa.string(), 2)),
        pa.array([[LINK]], pa.large_list(pa.large_string())),
        pa.array([{"url": LINK, "width": 3}]),
        pa.array([{"src": LINK}]),
        pa.array([[{"large": None, "thumb": None}, {"large": LINK, "thumb": "t"}]]),
        pa.array([{"image": {"href": LINK}}]),
        pa.array([{"large": [None, LINK]}]),
        pa.array([[("url", LINK)]], pa.map_(pa.string(), pa.string())),
        pa.array([json.dumps({"hi_res": [None], "large": [LINK]})]),
        pa.array([str({"hi_res": [None], "large": [LINK]})]),
        pa.array([str([LINK, "b"])]),
        pa.array([f"['{LINK}' 'b']"]),
    ],
)
def test_a_path_is_found_in_any_type_of_column(tmp_path, values):
    found = items(tmp_path, pa.table({"item_id": ["a"], "image": values}), image_column="image")
    assert found["image_path"].to_list() == [LINK] and found["image_bytes"].to_list() == [None]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([PIXEL]),
        pa.array([PIXEL], pa.large_binary()),
        pa.array([PIXEL], pa.binary(len(PIXEL))),
        pa.array([PIXEL]).dictionary_encode(),
        pa.array([NUMBERS], pa.list_(pa.uint8())),
        pa.array([NUMBERS], pa.list_(pa.int64())),
        pa.array([NUMBERS], pa.list_(pa.uint8(), len(PIXEL))),
        pa.array([{"bytes": PIXEL, "path": None}]),
        pa.array([{"bytes": NUMBERS}]),
        pa.array([[PIXEL, PIXEL]]),
        pa.array([f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"]),
        pa.array([base64.b64encode(PIXEL * 5).decode()]),
    ],
)
def test_images_are_found_in_any_type_of_column(tmp_path, values):
    found = items(tmp_path, pa.table({"item_id": ["a"], "image": values}), image_column="image")
    assert found["image_bytes"][0].startswith(PIXEL) and found["image_path"].to_list() == [None]


@pytest.mark.parametrize(
    ("image", "path", "unread"),
    [
        ({"url": LINK}, LINK, None),
        ({"src": LINK}, LINK, None),
        ([{"href": LINK}], LINK, None),
        ({"image": {"link": LINK}}, LINK, None),
        ({"caption": "a mug"}, None, '{"caption": "a mug"}'),
        ([{"width": 3}], None, '[{"width": 3}]'),
        ([], None, None),
        ({"url": None}, None, None),
        ("None", None, None),
        (float("nan"), None, None),
    ],
)
def test_images_of_json_are_read_or_reported(tmp_path, image, path, unread):
    found = items(tmp_path, [{"item_id": "a", "image": image}], image_column="image")
    assert found.select("image_path", UNREAD).row(0) == (path, unread)


BASE64 = base64.b64encode(PIXEL).decode()
LINES = "\n".join(BASE64[start : start + 20] for start in range(0, len(BASE64), 20))


@pytest.mark.parametrize(
    "image",
    [
        f"data:image/png;base64, {LINES}",
        f"DATA:image/png;charset=utf-8;BASE64,{BASE64}",
        f"data:;base64,{BASE64.replace('+', '-').replace('/', '_').rstrip('=')}",
        f"data:;base64,{BASE64.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        f"data:;base64,{LINES}".replace("\n", " \r\n"),
    ],
)
def test_base64_is_read_as_it_is_written_elsewhere(tmp_path, image):
    found = items(tmp_path, [{"item_id": "a", "image": image}], image_column="image")
    assert found.select("image_bytes", "image_path", UNREAD).row(0) == (PIXEL, None, None)


@pytest.mark.parametrize("image", ["data:image/png;base64,@@", "data:image/svg+xml;utf8,<svg/>", "data:,", "data:image/png;base64,"])
def test_a_data_uri_without_an_image_is_reported(tmp_path, image):
    found = items(tmp_path, [{"item_id": "a", "image": image}], image_column="image")
    assert found.select("image_bytes", "image_path", UNREAD).row(0) == (None, None, image)


def test_bytes_as_numbers_in_json(tmp_path):
    for image in (NUMBERS, {"bytes": NUMBERS}, [NUMBERS]):
        assert items(tmp_path, [{"item_id": "a", "image": image}], image_column="image")["image_bytes"].to_list() == [PIXEL]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([1.5]), "double"),
        (pa.array([7]), "int64"),
        (pa.array([{"width": 3, "caption": "x"}]), "struct<width: int64, caption: string>"),
        (pa.array([[0.5, 0.25]]), "list<element: double>"),
        (pa.array([True]), "bool"),
    ],
)
def test_a_type_that_holds_no_image_is_refused_by_name(tmp_path, values, kind):
    with pytest.raises(SourceError) as error:
        items(tmp_path, pa.table({"item_id": ["a"], "image": values}), image_column="image")
    assert f"the image column image of {tmp_path}/items.parquet has the type {kind}" in str(error.value)


def test_images_called_by_id(tmp_path):
    rows = [{"item_id": "0108775015"}, {"item_id": "../../etc/passwd"}]
    found = items(tmp_path, rows, image_template="images/{item_id:.3}/{item_id}.jpg")
    assert found["image_path"].to_list() == [f"{tmp_path}/images/010/0108775015.jpg", None]


@pytest.mark.parametrize("template", ["covers/a.jpg", "{title}.jpg", "{item_id:>9}.jpg"])
def test_a_template_that_names_no_item_is_refused(tmp_path, template):
    with pytest.raises(SourceError, match="image_template"):
        items(tmp_path, [{"item_id": "a"}], image_template=template)
