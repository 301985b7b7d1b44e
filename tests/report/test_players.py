"""Sounds and clips of the report: what plays in the page, what is linked to, and what is left out."""

import base64

import pyarrow as pa
import pytest

from qbert_ray.inputs.addresses import Addresses
from qbert_ray.report import players as module
from qbert_ray.report.catalog import Album, Catalog
from qbert_ray.report.players import player, players, within_budget
from qbert_ray.storage.directory import RunDir
from tests.hostile_media import clip_files, sound_files

HERE = Addresses(follow_links=True)
FILES = sound_files() | clip_files()


@pytest.mark.parametrize(
    ("name", "element", "kind"),
    [
        ("wav", "audio", "wav"),
        ("mp3", "audio", "mpeg"),
        ("ogg", "audio", "ogg"),
        ("mp4", "video", "mp4"),
        ("webm", "video", "webm"),
        ("gif", "img", "gif"),
    ],
)
def test_small_files_are_part_of_the_page_as_what_they_are(tmp_path, name, element, kind):
    (tmp_path / "file.jpg").write_bytes(FILES[name])
    made = [player("sound", str(tmp_path / "file.jpg"), None, HERE), player("sound", None, FILES[name], HERE)]
    assert made[0] == made[1] and made[0]["element"] == element
    head, _, content = made[0]["source"].partition(",")
    assert head.endswith(f"/{kind};base64") and base64.b64decode(content) == FILES[name]


def test_what_is_large_strange_or_elsewhere_is_not(tmp_path, monkeypatch):
    assert player("clip", "https://example.com/a.mp4", None, HERE) == {
        "element": "a",
        "source": "https://example.com/a.mp4",
        "modality": "clip",
    }
    assert player("clip", "http://example.com/a.mp4", None, HERE) is None and player("clip", None, None, HERE) is None
    assert player("clip", "/nowhere/a.mp4", None, HERE) is None and player("clip", None, b"<script>", HERE) is None
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    (tmp_path / "a.wav").write_bytes(FILES["wav"])
    assert player("clip", None, FILES["wav"], HERE) is None and player("clip", str(tmp_path / "a.wav"), None, HERE) is None


def test_the_first_ones_have_the_budget(monkeypatch):
    found = [(key, {"element": "audio", "source": "x" * 10, "modality": "sound"}) for key in ("shop/2", "shop/2", "shop/1", "shop/3")]
    monkeypatch.setattr(module, "BUDGET", 35)
    assert {key: len(made) for key, made in within_budget(found).items()} == {"shop/2": 2, "shop/1": 1}


def test_players_of_items_by_any_modality(tmp_path):
    run = RunDir(str(tmp_path))
    lists = {
        "path.jingle": pa.array([[None], None, [None, None]], pa.list_(pa.string())),
        "bytes.jingle": pa.array([[FILES["wav"]], None, [FILES["mp3"], FILES["wav"]]], pa.list_(pa.binary())),
        "path.photo": pa.array([["https://example.com/a.png"], [], None], pa.list_(pa.string())),
        "bytes.photo": pa.array([[None], [], None], pa.list_(pa.binary())),
    }
    keys = {"domain": ["shop"] * 3, "item_id": list("abc"), "item_index": pa.array(range(3), pa.int32())}
    nothing = {"image_path": pa.nulls(3, pa.string()), "image_bytes": pa.nulls(3, pa.binary()), "text.title": ["one", "two", "three"]}
    run.write_part("ingest/items", "shop-00000.parquet", pa.table(keys | nothing | lists))
    found = [(row, made["modality"], made["element"]) for row, made in players(run, run.parts("ingest/items"), [0, 1, 2], HERE)]
    assert found == [(0, "jingle", "audio"), (2, "jingle", "audio"), (0, "photo", "a")]
    album, catalog = Album(), Catalog(run, "shop")
    album.want(catalog, [2, 0])
    assert list(album.players({"shop": catalog})) == ["shop/2", "shop/0"]
