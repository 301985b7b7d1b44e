"""Vectors that a user brings along, in any of the usual files."""

import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from qbert_ray.features import vectors
from qbert_ray.features.vectors import read_vectors, vectors_shape

IDS, MATRIX = ["a", "b", "7"], np.arange(6, dtype=np.float32).reshape(3, 2)


def write(folder: Path, form: str) -> str:
    """The three vectors in a file of some form."""
    path = folder / form.split()[0]
    frame = pl.DataFrame({"item_id": IDS, "vector": MATRIX.tolist()})
    if path.suffix == ".npz":
        np.savez(path, item_id=np.array(IDS), vector=MATRIX)
    elif form.endswith("structured"):
        rows = np.zeros(3, dtype=[("item_id", "U3"), ("vector", "f4", 2)])
        rows["item_id"], rows["vector"] = IDS, MATRIX
        np.save(path, rows)
    elif path.suffix == ".npy":
        np.save(path, MATRIX.astype(np.float64))
        np.save(folder / "v_ids.npy", np.array(IDS)) if form.endswith("npy") else (folder / "v_ids.txt").write_text("\n".join(IDS))
    elif path.suffix == ".jsonl":
        frame.write_ndjson(path)
    elif form.endswith("columns"):
        pl.DataFrame({"item_id": IDS, "0": MATRIX[:, 0], "1": MATRIX[:, 1]}).write_csv(path)
    elif path.suffix == ".csv":
        path.write_text('item_id,vector\na,"[0, 1]"\nb,"[2.0 3.0]"\n7.0,4 5\n')
    else:
        frame.write_parquet(path)
    return str(path)


@pytest.mark.parametrize("form", ["v.parquet", "v.npz", "v.npy structured", "v.npy npy", "v.npy txt", "v.csv", "v.csv columns", "v.jsonl"])
def test_every_form_gives_the_same_vectors(tmp_path, form):
    uri = write(tmp_path, form)
    assert vectors_shape(uri) == (1, 2)
    placed = read_vectors(uri, pa.array(["b", "7", "c"]), 1, 2)
    assert placed.vectors[:, 0].tolist() == [[2, 3], [4, 5], [0, 0]] and placed.present[:, 0].tolist() == [True, True, False]
    assert placed.rejected == [("unknown item", {"item_id": "a"})]


def test_several_vectors_of_an_item_in_a_cube(tmp_path):
    np.savez(tmp_path / "v.npz", item_id=np.array([1, 2]), vectors=np.ones((2, 3, 4)))
    assert vectors_shape(str(tmp_path / "v.npz")) == (3, 4)
    assert read_vectors(str(tmp_path / "v.npz"), pa.array(["2"]), 3, 4).present.all()


def test_a_row_with_too_many_vectors_sets_no_size(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "MOST_VECTORS", 3)
    rows = {"item_id": ["a", "b", "c"], "vectors": [[[1.0, 2.0]] * 2, [[1.0, 2.0]] * 4, [[1.0, 2.0]] * 3]}
    pl.DataFrame(rows).write_parquet(tmp_path / "v.parquet")
    uri = str(tmp_path / "v.parquet")
    assert vectors_shape(uri) == (3, 2)
    placed = read_vectors(uri, pa.array(["a", "b", "c"]), 3, 2)
    assert placed.present.sum(1).tolist() == [2, 0, 3] and placed.rejected == [("too many vectors", {"item_id": "b"})]


def test_arrays_that_are_not_asked_for_are_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "v.npz", item_id=np.array(IDS), vector=MATRIX, other=np.zeros(50 << 20, np.uint8))
    tracemalloc.start()
    assert vectors_shape(str(tmp_path / "v.npz")) == (1, 2)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    np.savez(tmp_path / "w.npz", item_id=np.array(IDS), embedding=MATRIX)
    with pytest.raises(ValueError, match="it has item_id, embedding"):
        vectors_shape(str(tmp_path / "w.npz"))


def test_vectors_of_no_item_are_an_error_that_shows_both_ids(tmp_path):
    with pytest.raises(ValueError, match=r"0 of 2 items have a vector.*3 unknown item.*an ID there: 'a', one of the items: 'A'"):
        read_vectors(write(tmp_path, "v.npz"), pa.array(["A", "B"]), 1, 2)


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda path: np.save(path, MATRIX), "matrix without the IDs of its rows.*np.savez"),
        (lambda path: np.save(path, np.array(IDS)), "array of shape"),
        (lambda path: np.save(path, np.array([{"a": 1}], dtype=object)), "arrays of objects are not opened"),
        (lambda path: path.write_bytes(b"no array"), "cannot be read"),
    ],
)
def test_arrays_that_cannot_be_read_say_why(tmp_path, save, said):
    save(tmp_path / "v.npy")
    with pytest.raises(ValueError, match=f"(?s){said}"):
        vectors_shape(str(tmp_path / "v.npy"))


def csv(text):
    return lambda folder: (folder / "v.csv").write_text(text)


@pytest.mark.parametrize(
    ("save", "name", "said"),
    [
        (csv("item_id\na\n"), "v.csv", "must have the column item_id, and vector or one column per dimension; it has item_id"),
        (csv("id,vector\na,1 2\n"), "v.csv", "must have the column item_id.*it has id, vector"),
        (csv("item_id,name\na,mug\nb,cup\n"), "v.csv", "numbers in all columns but item_id; name holds none"),
        (lambda folder: np.savez(folder / "v.npz", ids=np.array(IDS), vector=MATRIX), "v.npz", r"must have the columns item_id and vector"),
        (lambda folder: np.savez(folder / "v.npz", item_id=np.array(IDS[:2]), vector=MATRIX), "v.npz", r"item_id has the shape \(2,\)"),
        (lambda folder: np.savez(folder / "v.npz", item_id=np.array(IDS), vector=MATRIX[:, 0]), "v.npz", r"the vectors \(3,\)"),
        (
            lambda folder: pl.DataFrame({"item_id": IDS, "vector": ["x"] * 3}).write_parquet(folder / "v.parquet"),
            "v.parquet",
            "must hold lists of numbers, or lists of such lists; it holds (large_)?string",
        ),
        (
            lambda folder: pl.DataFrame(
                {"item_id": IDS, "vector": [[]] * 3}, {"item_id": str, "vector": pl.List(pl.Float32)}
            ).write_parquet(folder / "v.parquet"),
            "v.parquet",
            "holds no vector",
        ),
        (lambda folder: None, "none.parquet", "no file or folder with vectors at"),
    ],
)
def test_tables_that_hold_no_vectors_of_items_say_what_they_hold(tmp_path, save, name, said):
    save(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        vectors_shape(str(tmp_path / name))


def test_ids_next_to_a_matrix_are_as_many_as_its_rows_or_have_a_header(tmp_path):
    np.save(tmp_path / "v.npy", MATRIX)
    (tmp_path / "v_ids.csv").write_text('item_id\n"a"\nb\n\n7\n')
    assert read_vectors(str(tmp_path / "v.npy"), pa.array(["7", "a"]), 1, 2).vectors[:, 0].tolist() == [[4, 5], [0, 1]]
    (tmp_path / "v_ids.csv").write_text("a\nb\n")
    with pytest.raises(ValueError, match="v_ids.csv has 2 IDs; .*v.npy has 3 rows"):
        vectors_shape(str(tmp_path / "v.npy"))


def test_ids_are_written_as_the_ingest_writes_them(tmp_path):
    pl.DataFrame({"item_id": [1.0, -7.0], "vector": [[2.0], [1.0]]}).write_parquet(tmp_path / "v.parquet")
    assert read_vectors(str(tmp_path / "v.parquet"), pa.array(["-7", "1"]), 1, 1).present.all()


READ = {  # texts of a vector -> what is read
    "decimal commas": ('item_id;vector\na;"1,5 2,5"\nb;"3,5; 4"\n', [[1.5, 2.5]], [[3.5, 4]]),
    "a list in a list": ('item_id,vectors\na,"[[1,2],[3,4]]"\nb,"[[5,6], [7,8]]"\n', [[1, 2], [3, 4]], [[5, 6], [7, 8]]),
    "row numbers of pandas": (",item_id,0,1\n0,a,1,2\n1,b,3,4\n", [[1, 2]], [[3, 4]]),
    "row numbers of pandas, read again": ("Unnamed: 0,item_id,0,1\n0,a,1,2\n1,b,3,4\n", [[1, 2]], [[3, 4]]),
}


@pytest.mark.parametrize("kind", READ)
def test_numbers_in_texts_are_those_that_are_meant(tmp_path, kind):
    content, first, second = READ[kind]
    (tmp_path / "v.csv").write_text(content)
    shape = vectors_shape(str(tmp_path / "v.csv"))
    assert read_vectors(str(tmp_path / "v.csv"), pa.array(["a", "b"]), *shape).vectors.tolist() == [first, second]


def test_several_vectors_of_an_item_in_json_lines(tmp_path):
    (tmp_path / "v.jsonl").write_text('{"item_id": "a", "vectors": [[1, 2], [3, 4]]}\n{"item_id": "b", "vectors": [["5", "6"]]}\n')
    assert vectors_shape(str(tmp_path / "v.jsonl")) == (2, 2)
    placed = read_vectors(str(tmp_path / "v.jsonl"), pa.array(["a", "b"]), 2, 2)
    assert placed.vectors.tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]] and placed.present.tolist() == [[True, True], [True, False]]


def test_a_row_that_cannot_be_read_is_not_lost_in_silence(tmp_path):
    (tmp_path / "v.csv").write_text("item_id,0,1\na,1,2\nb,3\n")
    with pytest.raises(ValueError, match=r"v.csv has 1 of 2 rows that cannot be read, such as .*b,3.*invalid CSV row"):
        vectors_shape(str(tmp_path / "v.csv"))


def test_arrays_of_other_types_are_refused(tmp_path):
    np.savez(tmp_path / "v.npz", item_id=np.array(IDS), vector=MATRIX.astype(complex))
    with pytest.raises(ValueError, match="v.npz: the vectors are of the type complex128"):
        vectors_shape(str(tmp_path / "v.npz"))
    np.savez(tmp_path / "v.npz", item_id=np.array(IDS), vector=MATRIX)
    (tmp_path / "v.npz").write_bytes((tmp_path / "v.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match="v.npz is damaged: File is not a zip file"):
        vectors_shape(str(tmp_path / "v.npz"))


def test_ids_in_bytes_and_with_a_mark_are_texts(tmp_path):
    np.savez(tmp_path / "v.npz", item_id=np.array(["é".encode(), b"b", b"7"]), vector=MATRIX)
    assert read_vectors(str(tmp_path / "v.npz"), pa.array(["é"]), 1, 2).present.all()
    np.save(tmp_path / "v.npy", MATRIX)
    (tmp_path / "v_ids.txt").write_bytes("\ufeffa\r\nb\r\n7\r\n".encode())
    assert read_vectors(str(tmp_path / "v.npy"), pa.array(["a"]), 1, 2).present.all()
    (tmp_path / "v_ids.txt").write_bytes("é\nb\n7\n".encode("latin-1"))
    with pytest.raises(ValueError, match="v_ids.txt is not in UTF-8"):
        vectors_shape(str(tmp_path / "v.npy"))
