"""A catalog is untrusted: what it holds is refused or kept as plain text, never followed, opened or run."""

import json
import struct
import zlib
from pathlib import Path

import polars as pl
import pytest

from qbert_ray.config.schema import Domain
from qbert_ray.features.encoders import ImageRejected, decode_image
from qbert_ray.inputs.readers import REASON, ROW
from qbert_ray.inputs.rows import UNSAFE, normalise_items
from qbert_ray.inputs.sources import open_source


def items(folder: Path, name: str) -> pl.DataFrame:
    domain = Domain(items=name, text_fields=["title"], image_column="image")
    source = open_source(str(folder), "shop", "items", domain)
    frames = [frame for number, fragment in source.fragments() for frame in source.read(number, fragment)]
    return pl.concat([normalise_items(frame, source, 0, domain, str(folder)) for frame in frames])


@pytest.mark.parametrize(
    "image",
    [
        *("../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "x/../../../etc/shadow", "~/.aws/credentials"),
        *("http://169.254.169.254/latest/meta-data/iam", "http://127.0.0.1:8265/api/jobs", "http://[::1]/", "http://localhost:8265"),
    ],
)
def test_images_outside_the_catalog_are_refused_and_reported(tmp_path, image):
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "a", "title": "x", "image": image}))
    row = items(tmp_path, "items.jsonl").row(0, named=True)
    assert row["image_path"] is None and row[UNSAFE] == image and row[REASON] is None


def test_a_small_file_of_a_huge_image_is_not_decoded():
    """30,000 x 30,000 pixels, 900 MB, in a PNG of a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    side = 30_000
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(side))) + chunk(b"IEND", b"")
    assert len(bomb) < 1000
    with pytest.raises(ImageRejected, match="too many pixels"):
        decode_image(bomb, max_bytes=20_000_000, max_pixels=50_000_000)


def test_formulas_stay_text(tmp_path):
    texts = ['=HYPERLINK("http://evil","x")', "=cmd|' /C calc'!A0", "@SUM(1+1)", "-2+3", "+1"]
    frame = pl.DataFrame({"item_id": texts, "title": texts, "image": [None] * len(texts)}, schema_overrides={"image": pl.String})
    (tmp_path / "items.csv").write_text(frame.write_csv())
    rows = items(tmp_path, "items.csv")
    assert rows["item_id"].to_list() == rows["text.title"].to_list() == texts


@pytest.mark.parametrize("depth", [65, 300, 600, 950, 5000, 1_000_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"large":', "}")])
@pytest.mark.parametrize("field", ["title", "image"])
def test_deeply_nested_json_is_one_rejected_row(tmp_path, depth, opening, closing, field):
    deep = f'{{"item_id": "a", "{field}": {opening * depth}1{closing * depth}}}'
    (tmp_path / "items.jsonl").write_text(f'{deep}\n{{"item_id": "b", "title": "x", "image": "b.jpg"}}\n')
    rows = items(tmp_path, "items.jsonl")
    assert rows[REASON].to_list() == ["invalid JSON", None]
    assert len(rows[ROW][0]) <= 2000


def test_brackets_in_a_text_are_not_nested(tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "a", "title": "[" * 500, "image": [f"{n}.jpg" for n in range(100)]}))
    assert items(tmp_path, "items.jsonl")["text.title"].to_list() == ["[" * 500]


def test_pickles_under_other_names_are_not_opened(tmp_path):
    """As Parquet they are refused; nothing here unpickles (tests/test_layout.py)."""
    import pickle

    class Shell:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    (tmp_path / "items.parquet").write_bytes(pickle.dumps(Shell()))
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        items(tmp_path, "items.parquet")
    with pytest.raises(ImageRejected, match="not an image"):
        decode_image(pickle.dumps(Shell()), 1000, 1000)
    assert not (tmp_path / "run").exists()
