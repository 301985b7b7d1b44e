"""Columns of the items files that something else than the ingest reads, and tables of IDs."""

import polars as pl
import pyarrow as pa
import pytest

from qbert_ray.config.schema import Domain
from qbert_ray.inputs.conditions import matching
from qbert_ray.inputs.id_tables import is_table, open_ids, read_columns, read_ids
from qbert_ray.inputs.sources import SourceError, open_source


def columns_of(folder, files: str, *names: str) -> pl.DataFrame:
    return read_columns(open_source(str(folder), "shop", "items", Domain(items=files, text_fields=[])), list(names))


def test_columns_of_a_text_file_are_what_all_their_values_are(tmp_path):
    (tmp_path / "items.csv").write_text(
        "item_id,sold,price,new,code,size,empty\n7,12,1.5,True,007,4,\n8,,2,FALSE,12,L,\n9,-3, 4 ,true,,5,\n"
    )
    rows = columns_of(tmp_path, "items.csv", "sold", "price", "new", "code", "size", "empty")
    assert rows.to_dict(as_series=False) == {
        "<item_id>": ["7", "8", "9"],
        "sold": [12, None, -3],
        "price": [1.5, 2.0, 4.0],
        "new": [True, False, True],
        "code": ["007", "12", None],  # as a number, 007 would be another code
        "size": ["4", "L", "5"],
        "empty": [None, None, None],
    }


def test_columns_of_parquet_files_stay_as_they_are_and_the_first_row_of_an_item_counts(tmp_path):
    folder = tmp_path / "items"
    folder.mkdir()
    pl.DataFrame({"item_id": [2, 1, None], "size": ["1", "x", "y"]}).write_parquet(folder / "a.parquet")
    pl.DataFrame({"item_id": [1, 3], "size": ["3", "4"]}).write_parquet(folder / "b.parquet")
    assert columns_of(tmp_path, "items", "size").rows() == [("2", "1"), ("1", "x"), ("3", "4")]


@pytest.mark.parametrize("name", ["items.parquet", "items.csv"])
def test_no_condition_holds_for_a_missing_number(tmp_path, name):
    frame = pl.DataFrame({"item_id": ["1", "2", "3"], "price": [float("nan"), 5.0, 500.0]})
    frame.write_parquet(tmp_path / name) if name == "items.parquet" else frame.write_csv(tmp_path / name)
    found = matching("price > 100", "score.exclude", open_source(str(tmp_path), "shop", "items", Domain(items=name, text_fields=[])))
    assert found.rows() == [("1", False), ("2", False), ("3", True)]


@pytest.mark.parametrize("text", ["yes == false", '"yes" = TRUE', "true = yes and price > 1", "price > 1 or yes is not true"])
def test_a_text_is_not_compared_with_true_or_false(tmp_path, text):
    """One odd cell makes a column a text, of which polars says that it is never true."""
    (tmp_path / "items.csv").write_text("item_id,yes,sold,price\n1,true,true,5\n2,?,false,6\n")
    source = open_source(str(tmp_path), "shop", "items", Domain(items="items.csv", text_fields=[]))
    with pytest.raises(SourceError, match=r"compares yes with true or false, and yes is a text such as 'true' or '\?'; write yes = '...'"):
        matching(text, "score.exclude", source)
    assert matching("sold == true and yes != 'sold = true'", "score.exclude", source).rows() == [("1", True), ("2", False)]


def test_spellings_of_nothing_are_missing_in_columns_of_text_files(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,price,brand\n1,NULL,N/A\n2,5,x\n3,n/a,y\n")
    assert columns_of(tmp_path, "items.csv", "price", "brand").rows() == [("1", None, None), ("2", 5, "x"), ("3", None, "y")]


def test_files_whose_columns_are_of_different_types_are_refused(tmp_path):
    folder = tmp_path / "items"
    folder.mkdir()
    pl.DataFrame({"item_id": ["1"], "size": [["a"]]}).write_parquet(folder / "a.parquet")
    pl.DataFrame({"item_id": ["2"], "size": [1]}).write_parquet(folder / "b.parquet")
    with pytest.raises(SourceError, match="domain shop: items: the files of .*items have columns of different types"):
        columns_of(tmp_path, "items", "size")


def test_a_file_without_rows_is_refused(tmp_path):
    pl.DataFrame(schema={"item_id": pl.String, "size": pl.Int64}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(SourceError, match="domain shop: items: .*items.parquet has no rows"):
        columns_of(tmp_path, "items.parquet", "size")


def test_ids_are_read_once_and_rows_without_one_are_counted(tmp_path):
    (tmp_path / "sold_out.csv").write_text("sku,user_id\np1,u1\n,u2\np1,u1\np1,u2\n")
    source = open_ids(str(tmp_path), "sold_out.csv", "score.exclude", Domain(item_columns={"item_id": "sku"}))
    rows, left_out = read_ids(source)
    assert rows.to_dict(as_series=False) == {"item_id": ["p1", "p1"], "user_id": ["u1", "u2"]} and left_out == 1


def test_a_table_of_ids_needs_the_column_of_items_and_may_be_empty(tmp_path):
    (tmp_path / "none.csv").write_text("sku\np1\n")
    with pytest.raises(SourceError, match="score.exclude: .*none.csv has no column item_id; columns found: sku"):
        open_ids(str(tmp_path), "none.csv", "score.exclude", Domain())
    pl.DataFrame(schema={"item_id": pl.String}).write_parquet(tmp_path / "empty.parquet")
    rows, left_out = read_ids(open_ids(str(tmp_path), "empty.parquet", "score.exclude", Domain()))
    assert rows.to_arrow() == pa.table({"item_id": pa.array([], pa.large_string())}) and left_out == 0


@pytest.mark.parametrize(("text", "table"), [("sold_out.csv", True), ("s3://b/x.parquet", True), ("folder/", True), ("price > 3", False)])
def test_a_table_is_known_by_the_end_of_its_name(text, table):
    assert is_table(text) == table
