"""Which image paths may be followed."""

import polars as pl
import pytest

from qbert_ray.inputs.image_columns import image_bytes, image_path, safe_paths

FOLDER = "/data/shop"


def safe(path: str | None, folder: str = FOLDER, query: str = "", root: str = "/data") -> str | None:
    return safe_paths(pl.Series([path], dtype=pl.String), folder, query, root)[0]


@pytest.mark.parametrize("path", ["a.jpg", "./a.jpg", "x/../a.jpg", "/data/shop/a.jpg", "x//..//a.jpg"])
def test_paths_inside_the_folder_become_absolute(path):
    assert safe(path) == "/data/shop/a.jpg"


@pytest.mark.parametrize(
    "path", ["https://m.example.com/a.jpg", "https://8.8.8.8/a.jpg", "s3://bucket/a.jpg", "gs://bucket/a.jpg", "/data/else/a.jpg"]
)
def test_addresses_and_paths_inside_the_root_stay(path):
    assert safe(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *("../a.jpg", "x/../../a.jpg", "..", "/etc/passwd", "/data/../etc/passwd", "/database/a.jpg", "~/a.jpg", "a\x00.jpg"),
        *("file:///data/shop/a.jpg", "FILE:/etc/passwd", "ftp://example.com/a.jpg", "data:image/png;base64,AAAA"),
        *(
            "http://localhost/a",
            "http://LOCALHOST.:80/a",
            "http://127.0.0.1/a",
            "http://2130706433/a",
            "http://0x7f.1/a",
            "http://0.0.0.0/a",
        ),
        *("http://[::1]:80/a", "http://[::ffff:127.0.0.1]/a", "http://[fe80::1%25eth0]/a", "http://169.254.169.254/latest"),
        *(
            "http://user@127.0.0.1/a",
            "http://example.com\\@127.0.0.1/a",
            "http:127.0.0.1/a",
            "http:///a",
            "http://metadata.google.internal/",
        ),
    ],
)
def test_everything_else_is_refused(path):
    assert safe(path) is None


def test_paths_next_to_a_remote_catalog_keep_its_query_and_never_become_local():
    assert safe("a.jpg", "s3://bucket/shop", "?region=x") == "s3://bucket/shop/a.jpg?region=x"
    assert safe("x/../a.jpg", "s3://bucket/shop", "?region=x") == "s3://bucket/shop/a.jpg?region=x"
    assert safe("../a.jpg", "s3://bucket/shop") is safe("/data/a.jpg", "s3://bucket/shop") is safe(None) is None


@pytest.mark.parametrize(
    ("values", "path", "content"),
    [
        (["a.jpg"], "a.jpg", None),
        ([b"JPEG"], None, b"JPEG"),
        ([b""], None, None),
        ([{"bytes": b"JPEG", "path": "a.jpg"}], "a.jpg", b"JPEG"),
        ([{"bytes": None, "path": "a.jpg"}], "a.jpg", None),
        ([["a.jpg", "b.jpg"]], "a.jpg", None),
        ([[{"hi_res": "h.jpg", "large": None}]], "h.jpg", None),
        ([{"large": ["a.jpg"], "hi_res": ["h.jpg"]}], "a.jpg", None),
        ([3], None, None),
        ([" "], None, None),
    ],
)
def test_images_come_from_any_column_type(values, path, content):
    schema = {"x": pl.Struct({"bytes": pl.Binary, "path": pl.String})} if isinstance(values[0], dict) and "bytes" in values[0] else None
    frame = pl.DataFrame({"x": values}, schema=schema)
    kind = frame.schema["x"]
    assert frame.select(image_path(pl.col("x"), kind).alias("p"), image_bytes(pl.col("x"), kind).alias("b")).row(0) == (path, content)
