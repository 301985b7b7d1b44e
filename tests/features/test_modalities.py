"""Modalities by name: which ones a config has, what their settings are, and that all of them are read, made and used alike."""

import io
import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qbert_ray.config.features_section import TAKEN
from qbert_ray.config.loading import ConfigError, load_config
from qbert_ray.config.schema import Config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.features.item_features import ItemFeatures
from qbert_ray.features.modality import Encoded
from qbert_ray.features.vectors import disturb
from qbert_ray.pipeline import run_stage
from qbert_ray.ranking.score_features import ALWAYS, score_features
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import item_content, modalities_there
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.stages import BY_NAME, STAGES

BARE = {"text_fields": []}


@pytest.mark.parametrize(
    ("domains", "expected"),
    [
        ({"shop": {}}, ["text", "image", "lexical"]),
        ({"shop": BARE | {"image_column": "cover"}}, ["text", "image"]),
        ({"shop": BARE | {"attributes": ["brand"]}}, ["text", "image", "lexical"]),
        ({"shop": BARE | {"vectors": {"text": "vectors.parquet"}}}, ["text", "image"]),
        ({"shop": BARE}, ["text", "image", "structure"]),  # nothing else tells its items apart
        ({"shop": {}, "bare": BARE}, ["text", "image", "structure", "lexical"]),
        (
            {"shop": {"vectors": {"structure": "vectors.parquet"}}},
            ["text", "image", "structure", "lexical"],
        ),  # vectors of one's own are used
    ],
)
def test_structure_joins_only_where_a_domain_has_neither_texts_nor_images(domains, expected):
    assert Config.model_validate({"data": {"domains": domains}}).modalities == expected


def test_modalities_that_are_named_are_taken_in_one_order():
    config = Config.model_validate({"features": {"modalities": ["structure", "text"]}})
    assert config.modalities == ["text", "structure"]


def configure(*overrides):
    return load_config([], list(overrides))


def test_a_name_of_ones_own_has_the_settings_of_its_kind_with_its_changes():
    config = configure(
        "features.modalities={gallery: {kind: image, grid: 1}, text: {}, image: false, notes: {kind: text}}",
        "features.image.batch_size=5",
        "features.text.max_tokens=9",
    )
    assert config.modalities == ["text", "gallery", "notes"]
    assert (config.features.settings("gallery").grid, config.features.settings("gallery").batch_size) == (1, 5)
    assert config.features.image.grid == 2 and config.features.settings("notes").max_tokens == 9
    assert [config.features.is_from_interactions(name) for name in ("gallery", "structure")] == [False, True]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["features.modalities=[sound]"], "names 'sound', which is none of the kinds text, image"),
        (["features.modalities={gallery: {kind: picture}}"], "modalities.gallery.kind is 'picture'"),
        (["features.modalities={gallery: {kind: image, grit: 1}}"], "modalities.gallery.grit: .* settings of the kind image: .*grid"),
        (["features.modalities={gallery: {kind: image, grid: 0}}"], "modalities.gallery.grid"),
        (["features.modalities={a b: {kind: image}}"], "letters, digits"),
        (["features.modalities={image: false}"], "at least one"),
        (["data.domains.items.inputs={image: {texts: [caption]}}"], "inputs.image names texts; the kind image reads files"),
        (["data.domains.items.inputs={sounds: {files: [sound]}}"], "set features.modalities.sounds.kind"),
        (["data.domains.items.inputs={structure: {values: [a]}}"], "reads no columns"),
        (["data.domains.items.text_features=mine.parquet"], "has a new name; write vectors.text"),
    ],
)
def test_what_is_wrong_with_a_modality_is_said_with_what_is_right(overrides, said):
    with pytest.raises(ConfigError, match=said):
        configure(*overrides)


@pytest.mark.parametrize("name", ["sequencer", "ridge", "following", "content", "seen", "rejected", "texts_rejected"])
def test_a_name_of_a_score_or_a_table_is_none_of_a_modality(name):
    with pytest.raises(ValueError, match=f"a modality cannot be called '{name}'"):
        configure(f"data.domains.items.vectors={{{name}: mine.parquet}}")


def test_the_names_that_are_taken_are_those_of_the_other_score_features():
    assert set(TAKEN) == set(score_features()) - set(ALWAYS)


def test_vectors_of_ones_own_are_a_modality_by_any_name():
    config = configure("data.domains.items.vectors={mine: mine.parquet}")
    assert config.modalities == ["text", "image", "lexical", "mine"]
    assert configure("data.domains.items.vectors={mine: mine.parquet}", "features.modalities=[mine]").modalities == ["mine"]


def test_settings_of_kinds_without_a_modality_change_no_stage():
    stage = BY_NAME["features"]
    one, other = (configure("features.modalities=[text]", f"features.image.grid={grid}") for grid in (1, 2))
    assert stage.depends_on(one) == stage.depends_on(other)
    one, other = (configure("features.modalities=[text, image]", f"features.image.grid={grid}") for grid in (1, 2))
    assert stage.depends_on(one) != stage.depends_on(other)


# from the files to the vectors


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(file, "PNG")
    return file.getvalue()


def run_stages(root, last, **domain):
    """The stages up to `last` on six items that three users had all of."""
    users = [{"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": 100 * user + item} for user in range(3) for item in range(6)]
    pq.write_table(pa.Table.from_pylist(users), root / "interactions.parquet")
    config = load_config(
        [],
        [
            f"data.root={root}",
            f"run.dir={root}/run",
            f"data.domains={json.dumps({'shop': domain})}",
            "data.min_interactions=0",
            "compute.executor=local",
            "features.image={image_size: 64, grid: 1}",
            "features.modalities={gallery: {kind: image, max_images: 3}, notes: {kind: text}, mine: {}}",
        ],
    )
    run, executor = RunDir(config.run.dir), LocalExecutor()
    for stage in STAGES[: STAGES.index(BY_NAME[last]) + 1]:
        run_stage(stage, config, run, executor, Quiet())
    return config, run


GALLERIES = [["a.png", "b.png"], ["broken.png", "a.png"], [], None, ["a.png", "b.png", "a.png", "b.png"], ["../secret.png", "none.png"],
             ["broken.png", "a.png", "../secret.png", "b.png", "none.png", "a.png", "b.png"]]  # fmt: skip


@pytest.fixture(params=["parquet", "jsonl", "csv"])
def shop(tmp_path, request):
    """Seven items with up to seven images each in two columns, and vectors of one's own of the first."""
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("blue"))
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [{"item_id": f"i{n}", "photos": photos, "cover": "b.png" if n == 2 else None} for n, photos in enumerate(GALLERIES)]
    rows = [row | {"note": "a long note" if n % 2 else None} for n, row in enumerate(rows)]
    name = f"items.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif request.param == "jsonl":
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        cells = [row | {"photos": json.dumps(row["photos"]) if row["photos"] is not None else None} for row in rows]
        pl.DataFrame(cells, infer_schema_length=None).write_csv(tmp_path / name)
    pq.write_table(pa.table({"item_id": ["i0"], "vectors": [[[1.0, 0.0], [0.0, 1.0]]]}), tmp_path / "mine.parquet")
    inputs = {"gallery": {"files": ["photos", "cover"]}, "notes": {"texts": ["note"]}}
    return run_stages(tmp_path, "features", items=name, text_fields=[], inputs=inputs, vectors={"mine": "mine.parquet"})


def by_item(run, modality):
    """item_id -> [J] which vectors are there, and [J, D] the vectors."""
    table = run.read(f"features/{modality}")
    found = zip(table["item_id"].to_pylist(), columns.to_numpy(table["present"]), columns.to_numpy(table["vectors"]), strict=True)
    return {item: (present.tolist(), vectors) for item, present, vectors in found}


def test_every_image_of_an_item_gives_vectors_and_broken_ones_are_rejected_one_by_one(shop):
    _, run = shop
    found = by_item(run, "gallery")
    there = {item: sum(present) for item, (present, _) in found.items()}
    assert there == {"i0": 2, "i1": 1, "i2": 1, "i3": 0, "i4": 3, "i5": 0, "i6": 3}
    assert {len(present) for present, _ in found.values()} == {3}, "J is max_images grids"
    red, blue = found["i0"][1][:2]
    assert not np.allclose(red, blue, atol=1e-2)
    assert found["i1"][1][0] == pytest.approx(red, abs=1e-5) and found["i2"][1][0] == pytest.approx(blue, abs=1e-5)
    assert found["i4"][1] == pytest.approx(np.stack([red, blue, red]), abs=1e-5)
    assert found["i6"][1] == pytest.approx(np.stack([red, blue, red]), abs=1e-5), "what follows takes the place of broken ones"
    rejected = run.read("features/rejected").to_pylist()
    said = {(json.loads(row["row"])["item_id"], row["reason"]) for row in rejected if row["table"] == "images"}
    assert said == {("i1", "not an image"), ("i5", "unsafe path"), ("i5", "file not found")} | {
        ("i6", reason) for reason in ("not an image", "unsafe path", "file not found")
    }
    counts = Manifest.load(run, "features").counts["gallery"]
    assert (counts["images"], counts["images_rejected"], counts["images_missing"], counts["images_over_limit"]) == (10, 6, 1, 2)


def test_texts_and_vectors_by_names_of_ones_own(shop):
    config, run = shop
    assert [any(present) for present, _ in by_item(run, "notes").values()].count(True) == 3
    mine = by_item(run, "mine")
    assert mine["i0"][1].tolist() == [[1, 0], [0, 1]] and not any(mine["i1"][0])
    assert modalities_there(run) == ["gallery", "mine", "notes"] == config.modalities
    assert ItemFeatures(run, domains=["shop"]).widths == {"gallery": 1280, "mine": 2, "notes": 384}
    content = item_content(run, "shop", config)
    assert content is None, "the stages after this one are not done"


def test_vectors_are_left_out_and_replaced_for_shares_of_the_items():
    ids, shape = pa.chunked_array([[f"i{n}" for n in range(2000)]]), (2000, 2, 8)
    rng = np.random.default_rng(0)
    vectors, present = rng.normal(size=shape).astype(np.float32), rng.random(shape[:2]) < 0.9
    vectors *= present[..., None]

    def disturbed(**settings):
        made = Encoded(vectors.copy(), present.copy(), {})
        disturb(made, ids, "audio", Config.model_validate({"features": {"modalities": ["text", "audio"]} | settings}))
        return made

    same = disturbed(missing={"text": 1.0})
    assert np.array_equal(same.vectors, vectors) and np.array_equal(same.present, present)
    half, most = disturbed(missing={"audio": 0.5}), disturbed(missing={"audio": 0.9})
    lost, more = (present.any(1) & ~each.present.any(1) for each in (half, most))
    assert lost.sum() == pytest.approx(0.5 * present.any(1).sum(), rel=0.1) and (more | ~lost).all()
    assert not half.vectors[~half.present].any() and np.array_equal(half.vectors[half.present], vectors[half.present])
    noisy = disturbed(noise={"audio": 0.3})
    changed = (noisy.vectors != vectors).any((1, 2))
    assert changed.mean() == pytest.approx(0.3, abs=0.04) and np.array_equal(noisy.present, present)
    assert np.linalg.norm(noisy.vectors, axis=2) == pytest.approx(np.linalg.norm(vectors, axis=2), rel=1e-4)
    cosines = (noisy.vectors * vectors).sum(2)[changed[:, None] & present] / (np.linalg.norm(vectors, axis=2) ** 2)[
        changed[:, None] & present
    ]
    assert abs(cosines.mean()) < 0.05
    assert np.array_equal(disturbed(noise={"audio": 0.3}).vectors, noisy.vectors)
