import http.server
import io
import json
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qbert_ray.config.loading import load_config
from qbert_ray.execution import ray_data as sharding
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.features.stage import EncodePart, extract_features
from qbert_ray.inputs.addresses import AddressError, Addresses, read_image
from qbert_ray.storage.columns import features_schema, to_numpy
from qbert_ray.storage.directory import RunDir

TITLES = ["Guitar strings", "Frying pan", None, "  ", "Frying pan", "Chess set"]
COLOURS = [None, "Red", "Blue", None, "Red", ""]
pytestmark = pytest.mark.usefixtures("ray_session")


def write_items(run, domain, rows_per_part=3, **columns):
    """Fake ingest/items of six items: item_index and id i, titles, colours and whatever `columns` gives."""
    count = len(TITLES)
    table = {
        "domain": [domain] * count,
        "item_id": [f"i{index}" for index in range(count)],
        "item_index": pa.array(range(count), pa.int32()),
        "image_path": pa.nulls(count, pa.string()),
        "image_bytes": pa.nulls(count, pa.binary()),
        "text.title": TITLES,
        "attribute.colour": COLOURS,
    } | columns
    for start in range(0, count, rows_per_part):
        run.write_part("ingest/items", f"{domain}-{start // rows_per_part:05d}.parquet", pa.table(table).slice(start, rows_per_part))


def write_sequences(run, domain, train):
    count = len(train)
    rows = {"domain": [domain] * count, "user_id": list(map(str, range(count))), "train": pa.array(train, pa.list_(pa.int32()))}
    held_out = {"valid": pa.array([4] * count, pa.int32()), "test": pa.array([5] * count, pa.int32())}
    run.write_part("ingest/sequences", f"{domain}-00000.parquet", pa.table(rows | held_out))


def configure(*overrides, domains="{shop: {text_fields: [title], attributes: [colour]}}"):
    return load_config([], [f"data.domains={domains}", "features.image.image_size=64", *overrides])


def vectors_of(run, modality, domain=None):
    table = run.read(f"features/{modality}", domain)
    return to_numpy(table["vectors"]), to_numpy(table["present"])


def image(colour):
    file = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def run(tmp_path):
    run = RunDir(str(tmp_path / "run"))
    write_items(run, "shop")
    return run


def write_own(path, **columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


# text


def test_text_vectors_whatever_the_actors_and_reruns(run, tmp_path, monkeypatch):
    config = configure("features.modalities=[text]", "compute.features.max_size=1")
    counts = extract_features(config, run, RayExecutor(), Quiet())
    vectors, present = vectors_of(run, "text")
    assert present.tolist() == [[True, False], [True, True], [False, True], [False, False], [True, True], [True, False]]
    assert counts == {"text": {"items": 6, "text_vectors": 7, "items_without_text": 1}}
    assert vectors[1] == pytest.approx(vectors[4], abs=1e-5) and not vectors[~present].any()
    assert run.parts("features/text") == run.parts("ingest/items")
    assert run.read("features/text").schema == features_schema(2, 384)

    other = RunDir(str(tmp_path / "other"))
    write_items(other, "shop")
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "FEW", 0)  # in actors, where the first were tasks
        extract_features(configure("features.modalities=[text]", "compute.features.min_size=2"), other, RayExecutor(), Quiet())
    assert vectors_of(other, "text")[0] == pytest.approx(vectors, abs=1e-5)

    first, second = run.parts("features/text")
    untouched = run.filesystem.get_file_info(run.path(f"features/text/{first}")).mtime_ns
    run.delete(f"features/text/.counts/{second}.json")  # as if killed before the second part was done
    assert extract_features(config, run, RayExecutor(), Quiet()) == counts
    assert run.filesystem.get_file_info(run.path(f"features/text/{first}")).mtime_ns == untouched
    assert np.array_equal(vectors_of(run, "text")[0], vectors)


def test_an_encoder_that_is_not_there_is_one_clear_error(run):
    with pytest.raises(ValueError, match="^encoder nobody/none is not on this machine"):
        extract_features(configure("features.modalities=[text]", "features.text.model=nobody/none"), run, RayExecutor(), Quiet())


# images


def test_images_are_encoded_missing_or_rejected_and_the_counts_agree(run, tmp_path):
    (tmp_path / "red.png").write_bytes(image("red"))
    (tmp_path / "page.png").write_text("<html>")
    paths = [str(tmp_path / name) for name in ("red.png", "page.png", "none.png")]
    write_items(run, "shop", image_path=[*paths, None, None, None], image_bytes=[None, None, None, image("red"), b"", None])
    config = configure("features.modalities=[image]", f"data.root={tmp_path}", domains="{shop: {image_column: image}}")
    counts = extract_features(config, run, RayExecutor(), Quiet())["image"]
    vectors, present = vectors_of(run, "image")
    assert present.any(axis=1).tolist() == [True, False, False, True, False, False] and present.all(axis=1).sum() == 2
    assert vectors.shape == (6, 4, 1280) and vectors[0] == pytest.approx(vectors[3], abs=1e-5)
    reasons = {f"images_rejected.{reason}": 1 for reason in ("a web page, not an image", "file not found", "empty file")}
    assert counts == {"items": 6, "images": 2, "images_missing": 1, "images_rejected": 3} | reasons
    rejected = run.read("features/rejected", "shop").to_pylist()
    assert [json.loads(row["row"])["item_id"] for row in rejected] == ["i1", "i2", "i4"]
    assert {row["table"] for row in rejected} == {"images"}


def test_images_come_back_in_order_whatever_the_batch(run):
    write_items(run, "shop", rows_per_part=6, image_bytes=[image(colour) for colour in ("red", "green", "blue", "white", "black", "gray")])
    results = []
    for batch_size in (2, 4):
        config = configure(f"features.image.batch_size={batch_size}", domains="{shop: {image_column: image}}")
        EncodePart(run, config, "image", num_vectors=4)("shop-00000.parquet")
        results.append(vectors_of(run, "image")[0])
    assert results[0] == pytest.approx(results[1], abs=1e-5)


def test_images_of_the_web_without_redirects():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", "/here")
            self.end_headers()
            self.wfile.write(b"0123456789")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    here = Addresses(schemes=("http",), hosts=("127.0.0.1",))
    assert read_image(f"{address}/here", 4, here) == b"01234", "one more, so that a longer file is noticed"
    assert read_image(f"{address}/here", 40, here) == b"0123456789"
    with pytest.raises(AddressError, match="cannot be read"):
        read_image(f"{address}/moved", 4, here)
    for uri in (f"{address}/here", "gopher://host/file", "http://[/"):
        with pytest.raises(AddressError, match="unsafe path"):
            read_image(uri, 4, Addresses(schemes=("http",)))
    server.shutdown()


# vectors of the user's own


def test_own_vectors_are_joined_and_what_does_not_fit_is_rejected(run, tmp_path):
    ids = ["i4", "i0", "unknown", "i1", "i2", "i3", "i5", "i0"]
    own = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [float("nan"), 1.0], [1.0, 2.0, 3.0], None, [0.0, -0.0], [7.0, 8.0]]
    write_own(tmp_path / "own" / "a.parquet", item_id=ids, vector=own)
    config = configure("features.modalities=[text]", f"data.root={tmp_path}", domains="{shop: {vectors: {text: own}}}")
    counts = extract_features(config, run, RayExecutor(), Quiet())["text"]
    vectors, present = vectors_of(run, "text")
    assert vectors[:, 0].tolist() == [[3, 4], [0, 0], [0, 0], [0, 0], [1, 2], [0, 0]]
    assert present[:, 0].tolist() == [True, False, False, False, True, False]
    reasons = ("unknown item", "not finite", "wrong width", "no vector", "only zeros", "item given twice")
    assert counts == {"items": 6, "text_vectors": 2, "items_without_text": 4} | {f"text_rejected.{reason}": 1 for reason in reasons}
    assert run.read("features/rejected", "shop")["reason"].to_pylist() == list(reasons)


def test_an_own_vector_too_large_for_sums_costs_its_item_alone(run, tmp_path):
    write_own(tmp_path / "own.parquet", item_id=["i0", "i1", "i2"], vector=[[1.0, 2.0], [1e25, 1.0], [1e15, -1.0]])
    config = configure("features.modalities=[text]", f"data.root={tmp_path}", domains="{shop: {vectors: {text: own.parquet}}}")
    assert extract_features(config, run, RayExecutor(), Quiet())["text"]["text_rejected.too large"] == 1
    assert vectors_of(run, "text")[1][:, 0].tolist() == [True, False, True, False, False, False]


def test_several_own_vectors_per_item_and_a_domain_without_any(run, tmp_path):
    write_items(run, "books")
    path = write_own(tmp_path / "own.parquet", item_id=["i5", "i1"], vectors=[[[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]], [[4.0, 0.0]]])
    config = configure("features.modalities=[image]", domains=f"{{shop: {{vectors: {{image: {path}}}}}, books: {{}}}}")
    extract_features(config, run, RayExecutor(), Quiet())
    vectors, present = vectors_of(run, "image", "shop")
    assert vectors[5, :, 0].tolist() == [1, 0, 3] and vectors[1, :, 0].tolist() == [4, 0, 0]
    assert present[5].tolist() == [True, False, True] and present[1].tolist() == [True, False, False]
    absent, none = vectors_of(run, "image", "books")
    assert absent.shape == vectors.shape and not none.any()


def test_vectors_of_two_widths_are_refused(run, tmp_path):
    write_items(run, "books")
    path = write_own(tmp_path / "own.parquet", item_id=["i0"], vector=[[1.0, 2.0]])
    config = configure("features.modalities=[text]", domains=f"{{shop: {{}}, books: {{vectors: {{text: {path}}}}}}}")
    with pytest.raises(ValueError, match="text vectors must have one width .* 2 of books .*; 384 of shop"):
        extract_features(config, run, RayExecutor(), Quiet())


def test_own_vectors_that_are_not_there_are_one_clear_error(run, tmp_path):
    path = write_own(tmp_path / "own.parquet", item_id=["i0"], embedding=[[1.0]])
    for location, message in ((path, "must have the columns item_id and vector"), ("none.parquet", "no file or folder with vectors")):
        config = configure("features.modalities=[text]", domains=f"{{shop: {{vectors: {{text: {location}}}}}}}")
        with pytest.raises(ValueError, match=message):
            extract_features(config, run, RayExecutor(), Quiet())


# structure


def test_structure_uses_training_interactions_only(run):
    write_sequences(run, "shop", [[0, 1], [0, 1], [2, 3], [2, 3]])
    config = configure("features.modalities=[structure]", "features.structure.dim=8")
    assert extract_features(config, run, RayExecutor(), Quiet()) == {
        "structure": {"items": 6, "structure_vectors": 4, "items_without_structure": 2}
    }
    vectors, present = vectors_of(run, "structure")
    assert present[:, 0].tolist() == [True, True, True, True, False, False], "4 and 5 occur as validation and test items only"
    assert vectors[0, 0] @ vectors[1, 0] > 0.9 > 0.1 > vectors[0, 0] @ vectors[2, 0]


def test_no_input_at_all_is_refused(run):
    with pytest.raises(ValueError, match="no domain has input"):
        extract_features(configure("features.modalities=[image]"), run, RayExecutor(), Quiet())
