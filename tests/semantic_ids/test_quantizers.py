"""Quantizers other than the one of the finished run, the sample they train on, and the gates that their IDs must pass."""

import json
import shutil

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.pipeline import redo_from, run_stage
from qbert_ray.semantic_ids.quantizers import EXTRA, load_quantizers
from qbert_ray.semantic_ids.stage import GateError
from qbert_ray.semantic_ids.task import ExtraQuantizerTask, sample_embeddings
from qbert_ray.sequence.task import SequencerTask
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import catalog_codes
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.stages import BY_NAME
from tests.shop import SOURCE, small_config


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[1].uri, tmp_path / "copy")
    return RunDir(str(tmp_path / "copy"))


@pytest.mark.parametrize("quantizer", ["kmeans", "opq"])
def test_a_quantizer_without_gradients_leaves_what_a_training_leaves(copy, shop, quantizer):
    settings = f"quantizer={{kind: {quantizer}, num_levels: 3, codebook_size: 6, codebook_dim: 8}}"  # hardly more IDs than items
    config = small_config(shop, copy.uri, SOURCE, settings)
    redo_from("quantizer", copy)
    trained = run_stage(BY_NAME["quantizer"], config, copy, RayExecutor(), Quiet())
    tensors, description = copy.load_model("quantizer/model")
    assert tensors["quantizer.codebooks"].shape == (3, 6, 8) and description["hidden"] == []
    assert trained.config["quantizer.kind"] == quantizer
    assert (
        trained.counts["metrics"]["items"] == copy.read("ingest/items").filter(~pc.field("cold")).num_rows
        and min(trained.counts["metrics"]["codebook_usage"]) == 1.0
    )

    copy.delete("quantizer/manifest.json")  # cut after the model was written: it is taken as it is
    copy.write_json("quantizer/started.json", {"fingerprint": trained.fingerprint})
    (before,) = (info.mtime_ns for info in copy.filesystem.get_file_info([copy.path("quantizer/model/model.safetensors")]))
    assert run_stage(BY_NAME["quantizer"], config, copy, RayExecutor(), Quiet()).counts == trained.counts
    assert copy.filesystem.get_file_info(copy.path("quantizer/model/model.safetensors")).mtime_ns == before

    strict = small_config(shop, copy.uri, SOURCE, settings, "gates.max_raw_collision=0.01")
    with pytest.raises(GateError, match=r"of demo.*gates.max_raw_collision allows 1.00%.*To continue with these IDs"):
        run_stage(BY_NAME["semantic_ids"], strict, copy, RayExecutor(), Quiet())
    counts = run_stage(BY_NAME["semantic_ids"], config, copy, RayExecutor(), Quiet()).counts
    assert len(set(copy.read("semantic_ids", "demo")["semantic_id"].to_pylist())) == counts["domains"][0]["items"]
    assert counts["codebook_size"] == 6


def test_extra_codes_are_those_of_their_quantizers_and_the_semantic_ids_know_nothing_of_them(finished, copy):
    config, run = finished
    embeddings = columns.to_numpy(run.read("fusion/embeddings", "demo")["embedding"])
    codes = catalog_codes(run, "demo")
    others = load_quantizers(run)[1:]
    with torch.inference_mode():
        expected = [model.quantizer.codes(model.encode(torch.tensor(embeddings))).numpy() for model in others]
    assert len(others) == len(config.quantizer.extra_quantizers) == 2
    assert np.array_equal(codes[:, 3:], np.concatenate(expected, axis=1))
    assert not any(np.array_equal(codes[:, :3], codes[:, 3 * each : 3 * each + 3]) for each in (1, 2))

    redo_from("semantic_ids", copy)
    copy.delete(EXTRA)  # as a run without extra quantizers is
    run_stage(BY_NAME["semantic_ids"], config, copy, RayExecutor(), Quiet())
    assert len(load_quantizers(copy)) == 1
    assert copy.read("semantic_ids").equals(run.read("semantic_ids").drop_columns(columns.EXTRA_CODES))
    assert np.array_equal(catalog_codes(copy, "demo"), codes[:, :3])

    for tokens, levels in (("item", 9), ("flat", 3)):  # a position per code: those of the semantic ID alone
        settings = config.model_copy(update={"sequencer": config.sequencer.model_copy(update={"tokens": tokens})})
        model = SequencerTask(settings, run, ["demo"], settings.finetune).build()
        assert model.num_levels == levels


def test_more_levels_than_dimensions_leave_the_extra_product_quantizer_fewer(finished):
    config, run = finished
    config = config.model_copy(update={"quantizer": config.quantizer.model_copy(update={"num_levels": 5, "codebook_dim": 4})})
    assert [ExtraQuantizerTask(config, run, number).settings.num_levels for number in (0, 1)] == [4, 5]


def test_codebooks_that_collapsed_stop_the_run_and_a_lower_gate_resumes_it(copy, finished, shop):
    redo_from("semantic_ids", copy)
    done = Manifest.load(copy, "quantizer")
    copy.delete("quantizer/manifest.json")
    copy.write_json("quantizer/started.json", {"fingerprint": done.fingerprint})
    metrics = done.counts["metrics"] | {"codebook_usage": [1.0, 0.25, 0.9]}
    copy.write_bytes("quantizer/metrics.jsonl", json.dumps(metrics).encode())
    with pytest.raises(GateError, match=r"100% 25% 90% of the 16 codewords.*To continue with this model: gates.min_usage=0.24"):
        run_stage(BY_NAME["quantizer"], finished[0], copy, RayExecutor(), Quiet())
    lower = small_config(shop, copy.uri, SOURCE, "gates.min_usage=0.24")
    assert run_stage(BY_NAME["quantizer"], lower, copy, RayExecutor(), Quiet()).fingerprint == done.fingerprint


def test_small_catalogs_are_not_asked_to_fill_the_codebooks(finished):
    from qbert_ray.semantic_ids.stage import check_usage

    figures = {"codebook_usage": [0.9, 0.1, 0.1]}
    check_usage(finished[0], figures | {"items": 63})
    with pytest.raises(GateError):
        check_usage(finished[0], figures | {"items": 64})


def test_a_sample_of_the_catalog_does_not_depend_on_its_parts(finished, tmp_path):
    _, run = finished
    whole = run.read("fusion/embeddings", "demo")
    one_part = RunDir(str(tmp_path))
    one_part.write_part("fusion/embeddings", "demo-00000.parquet", whole)
    one_part.write_part("ingest/items", "demo-00000.parquet", run.read("ingest/items", "demo"))
    assert len(run.parts("fusion/embeddings", "demo")) > 1
    chosen = sample_embeddings(run, ["demo"], 50, seed=0)
    assert np.array_equal(chosen, sample_embeddings(one_part, ["demo"], 50, seed=0))
    assert not np.array_equal(chosen, sample_embeddings(one_part, ["demo"], 50, seed=1))
    rows = {row.tobytes() for row in columns.to_numpy(whole["embedding"])}
    assert len({row.tobytes() for row in chosen} & rows) == 50
    assert len(sample_embeddings(run, ["demo", "other"], 10**6, seed=0)) == run.read("ingest/items").filter(~pc.field("cold")).num_rows
