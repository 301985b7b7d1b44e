"""What is fuzzed: inputs of each door of the package, and what must hold whatever they are.

A target takes what hypothesis draws. It returns whether the input was accepted, and raises only where the package broke a
promise: an error that is not one of its own, a row that is lost, a file that is followed.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st
from PIL import Image

from qbert_ray.config.loading import ConfigError, load_config, read_config
from qbert_ray.config.schema import Config, Domain
from qbert_ray.execution.progress import Quiet
from qbert_ray.features.encoders import ImageRejected, decode_image
from qbert_ray.features.media import Limits, MediaRejected, decode_frames, decode_sound
from qbert_ray.features.vectors import read_vectors, vectors_shape
from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.inputs.image_columns import safe_paths
from qbert_ray.inputs.readers import REASON, ROW
from qbert_ray.inputs.rows import normalise_interactions, normalise_items
from qbert_ray.inputs.sources import SourceError, open_source
from qbert_ray.ranking.reranker import Reranker
from qbert_ray.semantic_ids.collisions import CapacityError
from qbert_ray.semantic_ids.stage import _use_given_ids
from qbert_ray.storage.columns import ITEMS
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.models import rebuild
from qbert_ray.storage.seals import seal
from tests.hostile_media import clip_files, sound_files

Check = Callable[[Any], bool]
SCRATCH = Path(tempfile.mkdtemp(prefix="qbert-fuzz-"))
ITEM = Domain(items="items", text_fields=["title"], attributes=["brand"], image_column="image")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["item_id", "title", "brand", "image", "user_id", "timestamp", "rating", "asin", "codes", "vector"])


def mutated(original: bytes, *others: bytes) -> st.SearchStrategy[bytes]:
    """A file with some bytes changed, cut out, doubled, or replaced by another's."""

    def change(arguments: tuple[int, int, bytes]) -> bytes:
        seed, times, noise = arguments
        draw, content = random.Random(seed), bytearray(original)
        for _ in range(times):
            place, length = draw.randrange(len(content) + 1), draw.choice([1, 1, 1, 2, 4, 8, 64, 1000])
            match draw.randrange(6):
                case 0:
                    del content[place : place + length]
                case 1:
                    content[place:place] = content[place : place + length]
                case 2:
                    content[place : place + length] = noise
                case 3:
                    content[place : place + length] = draw.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]) * length
                case 4 if others:
                    content[place:] = draw.choice(others)[place:]
                case _ if place < len(content):
                    content[place] ^= 1 << draw.randrange(8)
        return bytes(content)

    return st.tuples(st.integers(0, 2**32), st.integers(1, 6), st.binary(max_size=20)).map(change)


# files of tables


def lines_of(content: bytes) -> int:
    stripped = (line.strip().removeprefix(b"\xef\xbb\xbf") for line in content.split(b"\n"))
    return sum(1 for line in stripped if line)


def read_table(name: str, content: bytes, table: str = "items") -> int | None:
    """Rows of a file after they were normalised; None where it was refused."""
    file = SCRATCH / name
    file.write_bytes(content)
    domain = ITEM.model_copy(update={table: name})
    try:
        source = open_source(str(SCRATCH), "shop", table, domain)  # type: ignore[arg-type]
        total = 0
        for number, fragment in source.fragments():
            for raw in source.read(number, fragment):
                rows = (
                    normalise_items(raw, source, number, domain, str(SCRATCH))
                    if table == "items"
                    else normalise_interactions(raw, source, 2.0)
                )
                assert len(rows) == len(raw), "a row was lost"
                assert rows.filter(pl.col(REASON).is_not_null() & pl.col(ROW).is_null()).is_empty(), "a rejected row is not kept"
                total += len(rows)
        return total
    except SourceError:
        return None


json_lines = st.lists(
    st.dictionaries(names | st.text(max_size=5), json_values, max_size=5).map(lambda row: json.dumps({"item_id": "a"} | row).encode())
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode(errors="replace")),
    max_size=8,
)


def jsonl(lines: list[bytes]) -> bool:
    head = b'{"item_id": "x", "title": "y", "brand": "z", "image": "a.jpg"}\n'
    content = head + b"\n".join(lines)
    found = read_table("items.jsonl", content)
    assert found is None or found == lines_of(content), f"{lines_of(content)} lines gave {found} rows"
    return found is not None


def jsonl_gz(content: bytes) -> bool:
    return read_table("items.jsonl.gz", content) is not None


csv_rows = st.lists(
    st.lists(st.text(st.characters(exclude_characters="\x00\r\n", exclude_categories=["Cs"]), max_size=20), max_size=5), max_size=8
)


def csv_written(rows: list[list[str]]) -> bool:
    """Rows as a writer of CSV makes them: none may be lost, whatever they hold."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["item_id", "title", "brand", "image"])
    writer.writerows([row for row in rows if row and row != [""]])  # Arrow skips empty lines, as it should
    kept = sum(1 for row in rows if row and row != [""])
    found = read_table("items.csv", text.getvalue().encode())
    assert found is None or found == kept, f"{kept} rows gave {found}"
    return found is not None


def csv_bytes(content: bytes) -> bool:
    return read_table("items.csv", b"item_id,title,brand,image\n" + content) is not None


@cache
def parquet_file() -> bytes:
    sink = pa.BufferOutputStream()
    rows = {"item_id": [f"item-{n}" for n in range(30)], "title": ["a", "b", None] * 10, "brand": [1.5, 2.0, None] * 10}
    rows |= {"image": [{"bytes": b"x", "path": "a.jpg"}] * 30}
    pq.write_table(pa.table(rows), sink, row_group_size=10)
    return sink.getvalue().to_pybytes()


def parquet(content: bytes) -> bool:
    return read_table("items.parquet", content) is not None


column_values = st.one_of(
    st.lists(st.none() | st.text(max_size=12), min_size=4, max_size=4),
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4),
    st.lists(st.none() | st.floats(), min_size=4, max_size=4),
    st.lists(st.none() | st.binary(max_size=8), min_size=4, max_size=4),
    st.lists(st.none() | st.booleans(), min_size=4, max_size=4),
    st.lists(st.none() | st.datetimes(), min_size=4, max_size=4),
    st.lists(st.none() | st.lists(st.text(max_size=4), max_size=3), min_size=4, max_size=4),
    st.lists(
        st.none() | st.fixed_dictionaries({"path": st.none() | st.text(max_size=9), "bytes": st.none() | st.binary(max_size=4)}),
        min_size=4,
        max_size=4,
    ),
    st.lists(st.none() | st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=2), min_size=4, max_size=4),
)
frames = st.fixed_dictionaries({name: column_values for name in ("item_id", "title", "brand", "image", "user_id", "timestamp", "rating")})


def rows(columns: dict[str, list[Any]]) -> bool:
    """Columns of any type: as many rows come out as went in."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    found = [read_table("rows.parquet", sink.getvalue().to_pybytes(), table) for table in ("items", "interactions")]
    assert all(count in (None, 4) for count in found), f"4 rows gave {found}"
    return None not in found


# images


@cache
def image_files() -> list[bytes]:
    files = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        sink = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)).save(sink, kind)
        files.append(sink.getvalue())
    return files


def image(content: bytes) -> bool:
    try:
        decoded = decode_image(content, 1 << 20, 1 << 20)
    except ImageRejected:
        return False
    assert decoded.mode == "RGB" and decoded.width * decoded.height <= 1 << 20
    return True


# sounds and clips


@cache
def media_files() -> list[bytes]:
    return [*sound_files().values(), *clip_files().values()]


def media(content: bytes) -> bool:
    limits, found = Limits(1 << 20, 4, 1 << 20, 40), 0
    with suppress(MediaRejected):
        samples = decode_sound(content, 8000, limits)
        assert np.isfinite(samples).all() and 0 < len(samples) <= 32_000
        found += 1
    for scenes in (False, True):
        with suppress(MediaRejected):
            frames = decode_frames(content, 3, scenes, limits)
            assert 0 < len(frames) <= 3 and all(max(frame.size) <= 512 for frame in frames)
            found += 1
    return found > 0


pieces = st.sampled_from(
    [
        "http",
        "https",
        "s3",
        "gs",
        "file",
        "abfs",
        ":",
        "://",
        "//",
        "/",
        "..",
        ".",
        "%2e",
        "%31",
        "@",
        "?",
        "#",
        "&",
        "\\",
        "127.0.0.1",
        "[::1]",
    ]
    + [
        "localhost",
        "example.com",
        "bucket",
        "a.jpg",
        "endpoint_override=evil",
        "~",
        "\x00",
        " ",
        "etc/passwd",
        "0x7f.1",
        "169.254.169.254",
        "ä",
    ]
)
addresses = st.lists(pieces | st.text(max_size=3), max_size=9).map("".join)


def address(text: str) -> bool:
    """No address is followed out of the folder, to this machine, or with options for a store."""
    anything = Addresses(schemes=("http", "https", "s3", "gs"), folders=("/data/shop",))
    found = safe_paths(pl.Series([text], dtype=pl.String), "/data/shop", "", "/data", anything)[0]
    remote = safe_paths(pl.Series([text], dtype=pl.String), "s3://mine/shop", "", "", anything)[0]
    for path in (found, remote):
        if path and "://" in path and not path.lower().startswith("http"):
            assert "?" not in path and "@" not in path.split("/")[2] and path.lower().startswith(("s3://", "gs://"))
    if found and "://" not in found:
        assert found.startswith("/data/") and "/../" not in f"{found}/" and "\x00" not in found
        with_link = Addresses(folders=("/data",))
        with contextlib.suppress(AddressError):
            read_image(found, 10, with_link)
    return found is not None


# configs


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@cache
def config_text() -> bytes:
    import yaml

    return yaml.safe_dump(Config().model_dump(mode="json"), sort_keys=False).encode()


@cache
def config_paths() -> list[str]:
    from qbert_ray.config.loading import flatten

    return sorted(flatten(Config().model_dump(mode="json")))


overrides = st.deferred(lambda: st.lists(st.tuples(st.sampled_from(config_paths()), yaml_values), max_size=3))


def config_values(drawn: list[tuple[str, Any]]) -> bool:
    try:
        load_config([], [f"{path}={json.dumps(value)}" for path, value in drawn])
    except ConfigError:
        return False
    return True


def config_file(content: bytes) -> bool:
    (SCRATCH / "config.yaml").write_bytes(content)
    try:
        assert isinstance(load_config([SCRATCH / "config.yaml"]), Config)
        assert isinstance(read_config(content, "config.yaml"), Config)
    except ConfigError:
        return False
    return True


yaml_bytes = st.binary(max_size=80) | st.text("&*a0:[]{}-,<>|'\"#!%\n \t?", max_size=80).map(str.encode)


# a run directory from another user


@cache
def run_files() -> tuple[RunDir, dict[str, bytes]]:
    """A small finished stage, and its files as they should be."""
    run = RunDir(str(SCRATCH / "run"))
    run.write_part("stage", "a-00000.parquet", pa.table({"x": list(range(20)), "s": [f"item {n}" for n in range(20)]}))
    torch.manual_seed(0)
    run.save_model("stage/model", Reranker().state_dict(), {})
    Manifest("stage", {"run.seed": 0}, {}, "0", files=seal(run, "stage")).save(run, "stage")
    names = ["stage/manifest.json", "stage/a-00000.parquet", "stage/model/model.json", "stage/model/model.safetensors"]
    return run, {name: Path(run.uri, name).read_bytes() for name in names}


damages = st.deferred(
    lambda: st.sampled_from(sorted(run_files()[1])).flatmap(lambda name: st.tuples(st.just(name), mutated(run_files()[1][name])))
)


def artefact(damage: tuple[str, bytes]) -> bool:
    """A file of a finished stage is what was written, or refused by name."""
    run, files = run_files()
    name, content = damage
    wanted = {"x": list(range(20)), "s": [f"item {n}" for n in range(20)]}
    Path(run.uri, name).write_bytes(content)
    try:
        Manifest.load(run, "stage")
        assert run.read("stage").to_pydict() == wanted, "a damaged part was read"
        model = rebuild(Reranker, run, "stage/model")
        torch.manual_seed(0)
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in Reranker().state_dict().items()), (
            "damaged weights were read"
        )
    except ArtifactError as error:
        assert "stage" in str(error)
        return False
    finally:
        Path(run.uri, name).write_bytes(files[name])
    return True


descriptions = st.dictionaries(
    st.sampled_from(
        ["num_levels", "codebook_size", "width", "num_layers", "num_heads", "ffn_width", "max_items", "content_width", "other"]
    ),
    st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, 3, 8, 16])
    | st.none()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2),
    max_size=9,
)


@cache
def small_sequencer() -> Any:
    from qbert_ray.sequence.model import Sequencer

    return Sequencer(num_levels=2, codebook_size=8, width=16, num_layers=1, num_heads=2, ffn_width=16, max_items=8)


def description(fields: dict[str, Any]) -> bool:
    """A description from another user builds the model of its weights, or none, and allocates nothing else."""
    from qbert_ray.sequence.model import Sequencer

    run = RunDir(str(SCRATCH / "described"))
    own = {"num_levels": 2, "codebook_size": 8, "width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16, "max_items": 8}
    run.save_model("model", small_sequencer().state_dict(), own | fields)
    try:
        rebuild(Sequencer, run, "model")
    except ArtifactError:
        return False
    return True


# vectors and IDs of one's own


vector_columns = st.one_of(
    st.lists(st.none() | st.lists(st.none() | st.floats(width=32), max_size=3), min_size=1, max_size=6),
    st.lists(st.none() | st.lists(st.none() | st.lists(st.floats(width=32), max_size=3), max_size=3), min_size=1, max_size=6),
    st.lists(st.none() | st.lists(st.integers(-9, 9), min_size=2, max_size=2), min_size=1, max_size=6),
    st.lists(st.text(max_size=3), min_size=1, max_size=6),
)
vector_tables = st.tuples(vector_columns, st.lists(st.none() | st.sampled_from(["a", "b", "c", "d"]), min_size=6, max_size=6))


def vectors(drawn: tuple[list[Any], list[str | None]]) -> bool:
    column, ids = drawn
    file = SCRATCH / "vectors.parquet"
    pq.write_table(pa.table({"item_id": pa.array(ids[: len(column)], pa.string()), "vector": column}), file)
    try:
        num_vectors, width = vectors_shape(str(file))
        placed = read_vectors(str(file), pa.array(["a", "b", "c"]), num_vectors, width)
    except ValueError:
        return False
    assert np.isfinite(placed.vectors).all() and not placed.vectors[~placed.present].any()
    assert int(placed.present.any(axis=1).sum()) + len(placed.rejected) == len(column), "a row was lost"
    return True


codes = st.lists(st.lists(st.integers(-1, 5) | st.integers(0, 2**63 - 1), max_size=3), min_size=6, max_size=6) | st.lists(
    st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=6, max_size=6
)


def given_ids(drawn: list[list[int]]) -> bool:
    run = RunDir(str(SCRATCH / "given"))
    ids = [f"i{n}" for n in range(6)]
    if not run.parts("ingest/items"):
        columns = [pa.array(["shop"] * 6), pa.array(ids), pa.array(range(6), pa.int32())]
        columns += [pa.nulls(6, pa.string()), pa.nulls(6, pa.binary()), pa.array([False] * 6)]
        run.write_part("ingest/items", "shop-00000.parquet", pa.table(columns, schema=ITEMS))
    pq.write_table(pa.table({"item_id": ids, "codes": pa.array(drawn, pa.list_(pa.int64()))}), SCRATCH / "ids.parquet")
    config = load_config([], [f"data.semantic_ids={SCRATCH / 'ids.parquet'}", "data.domains={shop: {}}"])
    try:
        _use_given_ids(config, run, Quiet())
    except (ArtifactError, CapacityError):
        return False
    found = run.read("semantic_ids", "shop")["semantic_id"].to_pylist()
    assert len(set(found)) == 6, "two items share an ID"
    return True


TARGETS: dict[str, tuple[Callable[[], st.SearchStrategy[Any]], Check]] = {
    "jsonl": (lambda: json_lines, jsonl),
    "jsonl.gz": (lambda: mutated(gzip.compress(b'{"item_id": "a", "title": "b", "brand": 1, "image": null}\n' * 50)), jsonl_gz),
    "csv, written": (lambda: csv_rows, csv_written),
    "csv, bytes": (lambda: st.binary(max_size=200) | mutated(b'a,"b ""c""",d,e\nf,g,h,i\n' * 4), csv_bytes),
    "parquet": (lambda: mutated(parquet_file(), run_files()[1]["stage/a-00000.parquet"]), parquet),
    "rows": (lambda: frames, rows),
    "images": (lambda: st.sampled_from(image_files()).flatmap(lambda file: mutated(file, *image_files())), image),
    "sounds and clips": (lambda: st.sampled_from(media_files()).flatmap(lambda file: mutated(file, *media_files())), media),
    "addresses": (lambda: addresses, address),
    "config values": (lambda: overrides, config_values),
    "config files": (lambda: mutated(config_text()) | yaml_bytes, config_file),
    "run files": (lambda: damages, artefact),
    "model descriptions": (lambda: descriptions, description),
    "vectors": (lambda: vector_tables, vectors),
    "semantic IDs": (lambda: codes, given_ids),
}
