"""Which files a config names, and their raw rows."""

import gzip
import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbert_ray.config.schema import Domain
from qbert_ray.inputs.json_files import first_image, plain_text
from qbert_ray.inputs.readers import REASON, ROW
from qbert_ray.inputs.rows import normalise_interactions
from qbert_ray.inputs.sources import POSITION, SourceError, open_source
from qbert_ray.storage.directory import join

ITEMS = pl.DataFrame({"item_id": ["a", "b", "c"], "title": ["A", None, "C"]})


def raw_items(root: Path, **domain) -> pl.DataFrame:
    source = open_source(str(root), "shop", "items", Domain(**{"items": "items.parquet", **domain}))
    return pl.concat([frame for file, fragment in source.fragments() for frame in source.read(file, fragment)])


def write_lines(path: Path, lines: list[str]) -> None:
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["items.parquet", "items.csv", "items.jsonl", "items.csv.gz", "items.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    plain = tmp_path / name.removesuffix(".gz")
    {".parquet": ITEMS.write_parquet, ".csv": ITEMS.write_csv, ".jsonl": ITEMS.write_ndjson}[plain.suffix](plain)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    rows = raw_items(tmp_path, items=name).with_columns(pl.col("title").replace("", None))
    assert rows.select("item_id", "title").equals(ITEMS)
    assert rows[POSITION].to_list() == [0, 1, 2]


def test_row_groups_are_read_apart_and_positions_count_on(tmp_path, monkeypatch):
    monkeypatch.setattr("qbert_ray.inputs.readers.FRAGMENT_ROWS", 2)
    pl.DataFrame({"item_id": range(5)}).write_parquet(tmp_path / "items.parquet", row_group_size=1)
    source = open_source(str(tmp_path), "shop", "items", Domain(text_fields=[]))
    assert [fragment.first_row for _, fragment in source.fragments()] == [0, 2, 4]
    rows = raw_items(tmp_path, text_fields=[])
    assert rows["item_id"].to_list() == rows[POSITION].to_list() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("location", ["parts", "parts/", "parts/*.csv", "par[st]s/?.csv"])
def test_folders_and_globs_read_their_files_in_order_of_the_name(tmp_path, location):
    (tmp_path / "parts").mkdir()
    for name, item in [("b.csv", "b"), ("a.csv", "a"), (".hidden.csv", "x"), ("_success.csv", "x"), ("notes.txt", "x")]:
        (tmp_path / "parts" / name).write_text(f"item_id,title\n{item},T\n")
    assert raw_items(tmp_path, items=location)["item_id"].to_list() == ["a", "b"]


def test_a_query_of_the_root_stays_at_the_end():
    assert join("s3://bucket/data/?region=x", "items.csv") == "s3://bucket/data/items.csv?region=x"
    assert join("s3://bucket/data?region=x", "/local/items.csv") == "/local/items.csv"
    assert join("data", "items.csv") == "data/items.csv"


def test_a_broken_line_is_kept_with_its_reason(tmp_path):
    write_lines(tmp_path / "items.jsonl", ['{"item_id": "a", "title": "A"}', "{'item_id': 'b'}", "[1]", "", '{"item_id": "c"}', "{}"])
    rows = raw_items(tmp_path, items="items.jsonl")
    assert rows["item_id"].to_list() == ["a", None, None, "c", None]
    assert rows[REASON].to_list() == [None, "invalid JSON", "invalid JSON", None, None]
    assert json.loads(rows[ROW][1]) == {"line": "{'item_id': 'b'}"}


def test_a_csv_row_with_too_few_cells_is_kept_with_its_reason(tmp_path):
    write_lines(tmp_path / "items.csv", ["\ufeffitem_id,title", "a,A", "b", '"c","two\nlines, one cell"'])
    rows = raw_items(tmp_path, items="items.csv")
    assert rows["title"].to_list() == ["A", "two\nlines, one cell", None]
    assert rows[REASON].to_list() == [None, None, "invalid CSV row"]


def test_types_may_change_from_line_to_line(tmp_path):
    values = [12, 12.0, "12", True, ["x", None, 3.5, " y "], {"k": 1}, None, "\ud800"]
    write_lines(tmp_path / "items.jsonl", [json.dumps({"item_id": "a", "title": value}) for value in values])
    assert raw_items(tmp_path, items="items.jsonl")["title"].to_list() == ["12", "12", "12", "true", "x, 3.5, y", '{"k": 1}', None, "?"]


def test_json_values_as_text_and_as_images():
    assert plain_text(float("nan")) is None
    assert plain_text([["a"], ["b", "c"]]) == "a, b, c"
    assert first_image([]) is None
    assert first_image([{"large": None, "hi_res": "h"}, {"large": "l"}]) == "h"
    assert first_image({"path": "p", "bytes": "..."}) == "p"


AMAZON = {
    "amazon_2018": {
        "asin": "a",
        "title": "T",
        "brand": "B",
        "category": ["C", "D"],
        "imageURLHighRes": [],
        "imageURL": ["https://x/1.jpg"],
    },
    "amazon_2023": {"parent_asin": "a", "title": "T", "store": "B", "categories": ["C", "D"], "images": [{"large": "https://x/1.jpg"}]},
}


@pytest.mark.parametrize("form", AMAZON)
@pytest.mark.parametrize("given", ["auto", "explicit"])
def test_raw_amazon_metadata_is_known_by_its_columns(tmp_path, form, given):
    write_lines(tmp_path / "meta.json.gz", [json.dumps(AMAZON[form])])
    domain = Domain(
        items="meta.json.gz", attributes=["brand", "categories"], image_column="image", format=form if given == "explicit" else given
    )
    source = open_source(str(tmp_path), "shop", "items", domain)
    assert source.format == form
    (rows,) = source.read(*source.fragments()[0])
    values = {name: next(filter(None, (rows[column][0] for column in columns))) for name, columns in source.columns.items()}
    assert values == {"item_id": "a", "title": "T", "brand": "B", "categories": "C, D", "image": "https://x/1.jpg"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no Parquet, CSV or JSONL file"),
        ("", "is empty"),
        ("[1, 2]", "one JSON array, but not of objects"),
        ("{'asin': 1}", "Python literals"),
        ('{"asin2": 1, "title": "T"}', "no column item_id.*columns found: asin2, title"),
        ('{"item_id": 1}', "no column title.*data.domains.shop.text_fields"),
    ],
)
def test_unusable_jsonl_is_refused_by_name(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "items.jsonl").write_text(content)
    with pytest.raises(SourceError, match=f"(?s)domain shop: items.*{expected}"):
        raw_items(tmp_path, items="items.jsonl")


@pytest.mark.parametrize("name", ["items.parquet", "items.jsonl.gz", "items.csv.gz", "items.csv"])
def test_unreadable_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"item_id\n\xff\xfe\x00 not what the name says")
    with pytest.raises(SourceError, match=name):
        raw_items(tmp_path, items=name, text_fields=[])


def test_a_truncated_file_is_refused_by_name(tmp_path):
    content = gzip.compress("\n".join(json.dumps({"item_id": f"{n * 7919 % 100_003:x}"}) for n in range(50_000)).encode())
    (tmp_path / "items.jsonl.gz").write_bytes(content[:-1000])
    with pytest.raises(SourceError, match="items.jsonl.gz is damaged"):
        raw_items(tmp_path, items="items.jsonl.gz", text_fields=[])


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    ITEMS.write_csv(tmp_path / "items.csv")
    ITEMS.write_parquet(tmp_path / "items.parquet")
    with pytest.raises(SourceError, match="several kinds"):
        raw_items(tmp_path, items=".")


def test_a_rating_is_needed_only_to_filter_by_it(tmp_path):
    pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]}).write_csv(tmp_path / "log.csv")
    assert open_source(str(tmp_path), "shop", "interactions", Domain(interactions="log.csv")).columns["rating"] == ()
    with pytest.raises(SourceError, match=r"no column rating.*data\.min_rating"):
        open_source(str(tmp_path), "shop", "interactions", Domain(interactions="log.csv"), needs_rating=True)


def test_columns_of_other_names_are_named_in_the_config(tmp_path):
    pl.DataFrame({"sku": ["a"], "title": ["A"]}).write_parquet(tmp_path / "items.parquet")
    pl.DataFrame({"customer": ["u"], "product": ["a"], "bought": [1], "stars": [2.0]}).write_csv(tmp_path / "sales.csv")
    domain = Domain(
        interactions="sales.csv",
        item_columns={"item_id": "sku"},
        interaction_columns={"user_id": "customer", "item_id": "product", "timestamp": "bought", "rating": "stars"},
    )
    items = open_source(str(tmp_path), "shop", "items", domain)
    sales = open_source(str(tmp_path), "shop", "interactions", domain, needs_rating=True)
    assert items.columns["item_id"] == ("sku",) and sales.columns["item_id"] == ("product",)
    ((file, fragment),) = sales.fragments()
    (raw,) = sales.read(file, fragment)
    rows = normalise_interactions(raw, sales, None)
    assert rows.select("user_id", "item_id", "timestamp", "rating").rows() == [("u", "a", 1, 2.0)]


def test_a_missing_column_says_how_to_name_another(tmp_path):
    pl.DataFrame({"sku": ["a"], "title": ["A"]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(SourceError, match="data.domains.shop.item_columns.item_id=sku"):
        open_source(str(tmp_path), "shop", "items", Domain())


def test_a_config_without_data_says_so(tmp_path, monkeypatch):
    """Such as configs/paper.yaml by itself."""
    monkeypatch.chdir(tmp_path)
    said = "no items.parquet here, and neither data.domains.items.items nor data.root is set; .* -c shop.yaml -c configs/paper.yaml"
    with pytest.raises(SourceError, match=said):
        open_source(".", "items", "items", Domain())


def test_every_file_may_show_how_times_are_written(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log/2023.csv").write_text("user_id,item_id,timestamp\nu,a,2023-12-31\n")
    (tmp_path / "log/2024.csv").write_text("user_id,item_id,timestamp\nu,b,31/01/2024\nu,c,05/02/2024\n")
    assert open_source(str(tmp_path), "shop", "interactions", Domain(interactions="log")).times.day_first is True


def test_a_mapping_to_a_column_that_is_not_there_is_named(tmp_path):
    ITEMS.write_parquet(tmp_path / "items.parquet")
    with pytest.raises(SourceError, match="item_columns.item_id=sku names a column that is not there; say what") as error:
        raw_items(tmp_path, item_columns={"item_id": "sku"})
    assert "looks the same" not in str(error.value)


def test_amazon_files_with_own_brands_and_images_are_read(tmp_path):
    pl.DataFrame({"parent_asin": ["a"], "brand": ["B"], "image": ["a.jpg"]}).write_parquet(tmp_path / "items.parquet")
    source = open_source(str(tmp_path), "shop", "items", Domain(text_fields=[], attributes=["brand"], image_column="image"))
    assert source.format == "amazon_2023" and (source.columns["brand"], source.columns["image"]) == (("brand",), ("image",))


def test_floats_that_round_ids_are_told_in_json(tmp_path):
    ids = ["9007199254740992.0", "1e17", "12.0", "9007199254740993", '"9007199254740993"']
    (tmp_path / "interactions.jsonl").write_text("".join(f'{{"user_id": {each}, "item_id": "a", "timestamp": 1}}\n' for each in ids))
    source = open_source(str(tmp_path), "shop", "interactions", Domain(interactions="interactions.jsonl"))
    rows = [normalise_interactions(frame, source, None) for file, fragment in source.fragments() for frame in source.read(file, fragment)]
    assert pl.concat(rows)[REASON].to_list() == ["inexact user_id", "inexact user_id", None, None, None]


def test_times_at_an_offset_are_the_same_moments(tmp_path):
    times = pa.array([1_700_000_000_000_000, None], pa.timestamp("us", "+05:30"))
    pq.write_table(pa.table({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": times}), tmp_path / "interactions.parquet")
    source = open_source(str(tmp_path), "shop", "interactions", Domain())
    rows = [normalise_interactions(frame, source, None) for file, fragment in source.fragments() for frame in source.read(file, fragment)]
    assert pl.concat(rows)["timestamp"].to_list() == [1_700_000_000_000_000, None]


def test_columns_of_json_may_come_late(tmp_path, monkeypatch):
    monkeypatch.setattr("qbert_ray.inputs.json_files.SAMPLED_LINES", 1)
    first, second = {"user_id": "u", "item_id": "a", "timestamp": 1}, {"user_id": "u", "item_id": "b", "timestamp": 2}
    lines = [json.dumps(first), json.dumps(second | {"rating": 4, "interaction_weight": 3})]
    write_lines(tmp_path / "interactions.jsonl", lines)
    domain = Domain(interactions="interactions.jsonl")
    source = open_source(str(tmp_path), "shop", "interactions", domain, needs_rating=True)
    rows = [normalise_interactions(frame, source, None) for file, fragment in source.fragments() for frame in source.read(file, fragment)]
    assert pl.concat(rows).select("rating", "weight").rows() == [(None, 1.0), (4.0, 3.0)]
    write_lines(tmp_path / "interactions.jsonl", lines[:1])
    with pytest.raises(SourceError, match="no column rating"):
        open_source(str(tmp_path), "shop", "interactions", domain, needs_rating=True)
