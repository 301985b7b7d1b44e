"""The pipeline of separate steps: the vectors of one process, whatever gets lost on the way."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from qbert_ray.config.loading import load_config
from qbert_ray.config.schema import Actors, Compute
from qbert_ray.execution import ray_data
from qbert_ray.execution.local import local_executor
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_capacity import is_streamed
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.execution.ray_streaming import CONTENT, PART, _Gather, pack, unpack
from qbert_ray.features import files
from qbert_ray.features.kinds import text
from qbert_ray.features.stage import StreamPart, extract_features
from qbert_ray.storage.columns import to_numpy
from qbert_ray.storage.directory import RunDir

COUNT = 12


def image_bytes(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_items(run: RunDir, folder) -> None:
    """Items with an image by its content, by its path, a broken one, none; with equal texts, and without."""
    (folder / "a.png").write_bytes(image_bytes(99))
    contents = [image_bytes(number) if number % 4 else None for number in range(COUNT)]
    contents[5] = b"<html>"
    paths = [str(folder / "a.png"), None, None, None, str(folder / "none.png"), *[None] * (COUNT - 5)]
    table = pa.table({
        "domain": ["shop"] * COUNT, "item_id": [f"i{number}" for number in range(COUNT)], "item_index": pa.array(range(COUNT), pa.int32()),
        "image_path": pa.array(paths, pa.string()), "image_bytes": pa.array(contents, pa.binary()),
        "text.title": [None, "Frying pan", "Chess set", "Frying pan", " ", *[f"Guitar of {number} strings" for number in range(COUNT - 5)]],
    })  # fmt: skip
    for number, size in ((0, 7), (1, 5)):
        run.write_part("ingest/items", f"shop-{number:05d}.parquet", table.slice(7 * number, size))


def tables(run: RunDir):
    for modality in ("image", "text"):
        table = run.read(f"features/{modality}")
        yield modality, to_numpy(table["vectors"]), to_numpy(table["present"])


def test_separate_steps_write_what_one_process_writes(tmp_path, monkeypatch, ray_session):
    one, apart = RunDir(str(tmp_path / "one")), RunDir(str(tmp_path / "apart"))
    for run in (one, apart):
        write_items(run, tmp_path)
    settings = [f"data.root={tmp_path}", "data.domains={shop: {text_fields: [title], image_column: image}}", "compute.features.max_size=1"]
    settings += ["features.modalities=[image, text]", "features.image.image_size=64", "features.image.batch_size=2"]
    config = load_config([], settings)
    with local_executor(Compute()) as executor:
        counts = extract_features(config, one, executor, Quiet())
    monkeypatch.setattr(ray_data, "is_streamed", lambda *_: True)  # as with a GPU
    monkeypatch.setattr(files, "CHUNK", 2)  # not seen by other processes, which read a part as one chunk
    assert extract_features(config, apart, RayExecutor(), Quiet()) == counts
    for (modality, vectors, present), (_, others, there) in zip(tables(one), tables(apart), strict=True):
        assert np.array_equal(present, there), modality
        assert others == pytest.approx(vectors, abs=1e-5)
    assert apart.read("features/rejected").equals(one.read("features/rejected"))
    assert counts["image"]["images_rejected"] == 2 and counts["text"]["text_vectors"] == 10

    apart.delete("features/text/.counts/shop-00001.parquet.json")  # as if killed before the second part was done
    first = apart.filesystem.get_file_info(apart.path("features/text/shop-00000.parquet")).mtime_ns
    assert extract_features(config, apart, RayExecutor(), Quiet()) == counts
    assert apart.filesystem.get_file_info(apart.path("features/text/shop-00000.parquet")).mtime_ns == first

    unknown = load_config([], [*settings, "features.modalities=[text]", "features.text.model=no-owner/none", f"run.dir={tmp_path}/none"])
    write_items(RunDir(unknown.run.dir), tmp_path)
    with pytest.raises(ValueError, match="^encoder no-owner/none is not on this machine"):
        extract_features(unknown, RunDir(unknown.run.dir), RayExecutor(), Quiet())


@pytest.mark.parametrize("modality", ["image", "text"])
def test_any_size_of_chunks_gives_the_same_vectors(tmp_path, monkeypatch, modality):
    run = RunDir(str(tmp_path))
    write_items(run, tmp_path)
    domain = "data.domains={shop: {text_fields: [title], image_column: image}}"
    config = load_config([], [domain, f"data.root={tmp_path}", "features.image.image_size=64", "features.image.batch_size=2"])
    worker = StreamPart(run, config, modality, 4 if modality == "image" else 1)
    whole = worker("shop-00000.parquet")
    expected = to_numpy(run.read(f"features/{modality}")["vectors"])
    monkeypatch.setattr(files, "CHUNK", 2)
    monkeypatch.setattr(text, "CHUNK", 2)
    source, items = worker.items("shop-00000.parquet")
    chunks = worker.encoder.chunks(items, source) if modality == "image" else worker.encoder.chunks(items, source, 2)
    assert len(chunks) > 1
    prepare = worker.preparer()
    encoded = [worker.encode(unpack(pack("a", 0, 1, prepare(chunk)))[3]) for chunk in chunks]
    assert StreamPart(run, config, modality, 4 if modality == "image" else 1, load=False).write("shop-00000.parquet", encoded) == whole
    assert to_numpy(run.read(f"features/{modality}")["vectors"]) == pytest.approx(expected, abs=1e-5)


def test_a_row_carries_any_object_and_its_arrays_without_a_copy():
    content = {"a": [np.arange(6).reshape(2, 3), np.zeros((0, 4), np.float32)], "b": ("text", None, np.ones(3, np.uint8))}
    table = pack("shop-1", 2, 3, content)
    part, number, total, found = unpack(pa.concat_tables([pack("shop-0", 0, 1, content), table]).combine_chunks().slice(1))
    assert (part, number, total) == ("shop-1", 2, 3)
    assert np.array_equal(found["a"][0], content["a"][0]) and found["a"][1].shape == (0, 4) and found["b"][:2] == ("text", None)
    assert not found["b"][2].flags.owndata and table.nbytes < 2000


def test_chunks_are_gathered_in_order_whatever_comes_first_or_twice():
    gather = _Gather()
    given = [("a", 1), ("b", 0), ("a", 1), ("a", 2), ("a", 0)]
    found = [gather(pack(part, number, 3, np.array([number]))) for part, number in given]
    assert [len(table) for table in found] == [0, 0, 0, 0, 1]
    assert found[-1][PART].to_pylist() == ["a"] and np.concatenate(unpack(found[-1])[3]).tolist() == [0, 1, 2]
    assert gather(pack("c", 0, 1, None, "no model"))[CONTENT].to_pylist() and list(gather.open) == ["b"]


def test_parts_that_a_stream_lost_are_repeated_and_one_that_is_never_written_is_an_error(tmp_path):
    run, calls = RunDir(str(tmp_path)), []

    def stream(missing, most=2):
        calls.append(missing)
        for part in missing[:most]:
            run.write_bytes(f"made/{part}", b"")
            run.write_json(f"made/.counts/{part}.json", {})
            yield part

    assert list(ray_data._repeated(run, ["a", "b", "c"], "made", stream)) == ["a", "b", "c"] and calls == [["a", "b", "c"], ["c"]]
    with pytest.raises(RuntimeError, match="2 parts were not written, such as d"):
        list(ray_data._repeated(run, ["d", "e"], "made", lambda missing: stream(missing, 0)))


@pytest.mark.parametrize(
    ("node", "actors", "streamed"),
    [
        ({"CPU": 16, "GPU": 1}, Actors(), True),
        ({"CPU": 16}, Actors(), False),
        ({"CPU": 2, "GPU": 1}, Actors(), False),
        ({"CPU": 16, "GPU": 1}, Actors(num_gpus=0), False),
        ({"CPU": 16, "GPU": 1, "label:pool=a": 1e6}, Actors(label_selector={"pool": "b"}), False),
    ],
)
def test_steps_run_apart_where_a_gpu_has_cpus_next_to_it(node, actors, streamed):
    assert is_streamed(actors, 1, [node]) == streamed
