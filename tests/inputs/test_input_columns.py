"""Files in the cells of any type of column: every one is found, in order, as a path or as its content."""

import base64
import json

import polars as pl
import pytest

from qbert_ray.inputs.input_columns import file_lists, several_files

ENCODED = f"data:audio/wav;base64,{base64.b64encode(b'RIFF').decode()}"
CELLS = [
    ([["a.wav", None, "b.wav"], None, []], [["a.wav", "b.wav"], None, None], [[None, None], None, None]),
    ([b"RIFF", None, b""], [[None], None, None], [[b"RIFF"], None, None]),
    ([[b"one", b"two"], [], None], [[None, None], None, None], [[b"one", b"two"], None, None]),
    ([{"path": "a.wav", "bytes": b"one"}, {"path": "b.wav", "bytes": None}, None], [["a.wav"], ["b.wav"], None], [[b"one"], [None], None]),
    (["a.wav", json.dumps(["b.wav", "c.wav"]), " "], [["a.wav"], ["b.wav", "c.wav"], None], [[None], [None, None], None]),
    ([ENCODED, "[broken", "data:audio/wav;base64,@@"], [[None], ["[broken"], ["data:audio/wav;base64,@@"]], [[b"RIFF"], [None], [None]]),
    ([[82, 73, 70, 70], None, []], [[None], None, None], [[b"RIFF"], None, None]),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "paths", "contents"), CELLS)
def test_files_of_a_column_of_any_type(cells, paths, contents):
    found = file_lists(pl.DataFrame({"file": cells}))
    assert [each.to_list() for each in found] == [paths, contents]


def test_files_of_several_columns_follow_each_other():
    frame = pl.DataFrame({"front": ["a.png", None, None], "further": [["b.png", "c.png"], ["d.png"], None]})
    paths, contents = file_lists(frame)
    assert paths.to_list() == [["a.png", "b.png", "c.png"], ["d.png"], None]
    assert contents.to_list() == [[None] * 3, [None], None]


def test_a_path_that_may_not_be_followed_keeps_its_place():
    paths, contents = pl.Series([["a.png", "/etc/passwd"], None, ["x"]]), pl.Series([[None, None], None, [b"content"]])
    safe = lambda given: given.replace("/etc/passwd", None)  # noqa: E731
    found = several_files("gallery", paths, contents, safe)
    assert [each.name for each in found] == ["path.gallery", "bytes.gallery"]
    assert found[0].to_list() == [["a.png", None], None, [None]], "what is given as bytes needs no path"
    assert found[1].to_list() == [[None, None], None, [b"content"]]
