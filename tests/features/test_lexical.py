"""Lexical vectors: TF-IDF worked by hand, and what the factorisation keeps."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qbert_ray.config.loading import load_config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.features.kinds.lexical import _joined
from qbert_ray.features.lexical import LexicalModel
from qbert_ray.features.stage import extend_features
from qbert_ray.pipeline import run_stage
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import BY_NAME, STAGES

SHOES = ["red shoe", "Red boot", "blue SHOE", "green"]  # two of them share "red", two "shoe"; no other word is in two texts


def fitted(texts, width=2, max_terms=100):
    return LexicalModel.fit(texts, width, max_terms)


def test_cosines_of_a_full_factorisation_are_those_of_tf_idf():
    model = fitted(SHOES)
    vectors, present = model(SHOES)
    assert model.terms == ["red", "shoe"] and model.idf == pytest.approx(np.log(5 / 3) + 1)
    assert present.tolist() == [True, True, True, False] and not vectors[3].any()
    half = 0.5**0.5  # "red shoe" holds both words, equally rare ones; the others one each
    assert vectors @ vectors.T == pytest.approx(np.array([[1, half, half, 0], [half, 1, 0, 0], [half, 0, 1, 0], [0, 0, 0, 0]]), abs=1e-6)


def test_a_word_that_is_repeated_counts_by_its_logarithm_and_a_rare_one_more():
    texts = ["red red shoe", "red", "shoe", "shoe", *["hat"] * 11]
    model = fitted(texts)
    vectors, _ = model(["red red shoe", "red", "shoe"])
    rare, common = np.log(16 / 3) + 1, np.log(16 / 4) + 1
    length = np.hypot((1 + np.log(2)) * rare, common)
    assert model.terms == ["red", "shoe"]  # "hat" is in more than a fifth of the texts
    assert (vectors[0] @ vectors[1:].T) == pytest.approx([(1 + np.log(2)) * rare / length, common / length], abs=1e-6)


def test_fewer_dimensions_keep_the_largest_singular_vectors():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.choice(40, size=6, replace=False)) for _ in range(60)]
    whole, part = fitted(texts, width=64), fitted(texts, width=5)
    exact, _ = whole(texts)
    assert (np.linalg.norm(whole.components, axis=1) > 0.5).sum() == min(len(whole.terms), 60)  # rows of zeros after those
    scaled = exact @ whole.components  # TF-IDF rows of length 1
    right = np.linalg.svd(scaled, full_matrices=False)[2][:5]
    expected = scaled @ right.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found, _ = part(texts)
    assert found.shape == (60, 5)
    assert found @ found.T == pytest.approx(expected @ expected.T, abs=0.02)


@pytest.mark.parametrize("texts", [[], [""], ["", "red"], ["red", "blue"]], ids=["none", "empty", "one", "all different"])
def test_texts_without_a_common_word_have_no_vectors(texts):
    vectors, present = fitted(texts)([*texts, "red"])
    assert vectors.shape == (len(texts) + 1, 2) and not vectors.any() and not present.any()


def test_items_of_a_domain_without_texts_have_empty_ones():
    items = pa.table({"text.title": ["red lamp", None], "text.brand": [None, None]})
    assert _joined(items, ["text.title", "text.brand"]) == ["red lamp", ""] and _joined(items, []) == ["", ""]
    _, present = LexicalModel.fit(["red lamp", "red shoe", "blue shoe"], 2, 100, 0)(_joined(items, []))
    assert not present.any()


def test_characters_of_unspaced_scripts_are_words():
    assert fitted(["红鞋", "红靴", "蓝鞋", "x"]).terms == ["红", "鞋"]


def test_the_most_frequent_terms_are_kept():
    assert fitted(["a b", "a c", "a b", "c d", *["e"] * 12], max_terms=1).terms == ["a"]


def test_a_saved_model_encodes_as_before(tmp_path):
    model, run = fitted(SHOES), RunDir(str(tmp_path))
    model.save(run, "features/lexical/.model")
    again = LexicalModel.load(run, "features/lexical/.model")
    new = ["a red hat", "nothing known"]
    assert np.array_equal(again(new)[0], model(new)[0]) and again(new)[1].tolist() == [True, False]
    empty = fitted([])
    empty.save(run, "features/other/.model")
    assert LexicalModel.load(run, "features/other/.model")(new)[0].shape == (2, 2)


TEXTS = {"shop": ["red shoe", "red boot", "blue shoe", None], "other": ["boot", "blue", "green", "green"]}


@pytest.fixture
def run(tmp_path):
    return make(tmp_path)


def make(tmp_path, *more):
    """The stages up to `features` on two domains of four items, in lexical vectors of two columns."""
    for name, texts in TEXTS.items():
        rows = [
            {"item_id": f"{name}-{number}", "title": text, "brand": "boot" if number == 3 else None} for number, text in enumerate(texts)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        users = [{"user_id": user, "item_id": row["item_id"], "timestamp": number} for user in "abc" for number, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(users), tmp_path / f"{name}-users.parquet")
    domains = {
        name: {"items": f"{name}.parquet", "interactions": f"{name}-users.parquet", "attributes": ["brand"], "role": role}
        for name, role in (("shop", "target"), ("other", "source"))
    }
    overrides = [
        f"data.root={tmp_path}",
        f"run.dir={tmp_path}/run",
        f"data.domains={json.dumps(domains)}",
        "data.min_interactions=0",
        "compute.executor=local",
        "features.modalities=[lexical]",
        "features.lexical={dim: 8}",
        *more,
    ]
    config = load_config([], overrides)
    directory = RunDir(config.run.dir)
    for stage in STAGES[: STAGES.index(BY_NAME["features"]) + 1]:
        run_stage(stage, config, directory, LocalExecutor(), Quiet())
    return config, directory


def test_texts_and_attributes_of_all_domains_are_fitted_together(run):
    _, directory = run
    model = LexicalModel.load(directory, "features/lexical/.model")
    assert model.terms == ["blue", "green", "red", "shoe"]  # "blue" of one text in each; "boot" is in half of them
    for name, texts in TEXTS.items():
        table = directory.read("features/lexical", name)
        joined = {f"{name}-{number}": (text or "") + (" boot" if number == 3 else "") for number, text in enumerate(texts)}
        expected, _ = model([joined[item] for item in table["item_id"].to_pylist()])
        assert np.array_equal(columns.to_numpy(table["vectors"])[:, 0], expected)
        assert columns.to_numpy(table["present"])[:, 0].tolist() == expected.any(1).tolist()


def test_items_that_are_held_out_as_cold_are_not_fitted_on(tmp_path, monkeypatch):
    fit, given = LexicalModel.fit, []
    monkeypatch.setattr(LexicalModel, "fit", lambda texts, *others: given.extend(texts) or fit(texts, *others))
    _, directory = make(tmp_path, "data.cold_share=0.3")
    items = [item for name in TEXTS for item in directory.read("ingest/items", name).to_pylist()]
    assert 0 < sum(item["cold"] for item in items) < len(items)
    assert sorted(given) == sorted(
        " ".join(filter(None, (item["text.title"], item["attribute.brand"]))) for item in items if not item["cold"]
    )


def test_appended_items_are_encoded_by_the_model_that_was_fitted(run):
    config, directory = run
    before = directory.read("features/lexical")
    table = directory.read("ingest/items", "shop")
    new = table.slice(0, 1).set_column(table.column_names.index("item_id"), "item_id", pa.array(["new"]))
    directory.delete("ingest/manifest.json")  # which names the parts that there may be
    directory.write_part("ingest/items", "shop-00099.parquet", new)
    extend_features(config, directory, LocalExecutor(), Quiet())
    added = directory.read_part("features/lexical", "shop-00099.parquet")
    same = before.filter(pc.equal(before["item_id"], table["item_id"][0]))
    assert np.array_equal(columns.to_numpy(added["vectors"]), columns.to_numpy(same["vectors"]))
