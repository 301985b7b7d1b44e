import json
import re
import sys

import numpy as np
import polars as pl
import pytest
import torch

from qbert_ray.cli.main import main
from qbert_ray.config.schema import Ranking
from qbert_ray.ranking.export import ABOUT, ITEMS, MODEL, README, DenseSequencer, ExportError, export, padded
from qbert_ray.ranking.loader import load_ranker
from qbert_ray.semantic_ids.export import TOKENIZER
from qbert_ray.semantic_ids.rqvae import RQVAE
from qbert_ray.storage import columns
from tests import small_run
from tests.small_run import make_run

HISTORIES = [np.array(items, dtype=np.int64) for items in ([], [3], [1, 2, 3], [5, 5, 39], range(30))]  # the last is too long


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logits": "dot"},
        {"recall": False},
        {"content_width": 0},
        {"item_embeddings": {"shop": 30}},
        {"tokens": "flat", "content_width": 0, "recall": False},
        {"tokens": "flat", "content_width": 0, "recall": False, "logits": "dot"},
    ],
    ids=str,
)
def test_the_dense_path_gives_the_numbers_of_the_packed_one(tmp_path, settings):
    ranker = load_ranker(make_run(tmp_path, **settings), "shop", Ranking(enabled=False))
    dense = DenseSequencer(ranker).eval()
    items, mask = map(torch.from_numpy, padded(HISTORIES, dense.history))
    with torch.inference_mode():
        expected = ranker.model_scores(HISTORIES)
        found = dense(items, mask)
        noise = torch.where(mask, items, torch.randint(small_run.ITEMS, items.shape))
        assert torch.equal(dense(noise, mask), found)  # items at the padding never matter
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    run = make_run(tmp_path_factory.mktemp("run"))
    description = {
        "width": small_run.WIDTH,
        "hidden": [24],
        "num_levels": small_run.LEVELS,
        "codebook_size": small_run.SIZE,
        "codebook_dim": 8,
    }
    model = RQVAE(**description)
    model.start(torch.from_numpy(columns.to_numpy(run.read("fusion/embeddings")["embedding"]).copy()))
    run.save_model("quantizer/model", model.state_dict(), description)
    folder = tmp_path_factory.mktemp("exported")
    export(run.uri, folder)
    return run, folder


def test_the_onnx_file_gives_the_scores_of_pytorch_for_any_batch(exported):
    import onnxruntime

    run, folder = exported
    ranker = load_ranker(run, "shop", Ranking(enabled=False))
    session = onnxruntime.InferenceSession(str(folder / MODEL))
    for histories in (HISTORIES, HISTORIES[:1], HISTORIES * 7):
        items, mask = padded(histories, ranker.model.max_items - 1)
        (found,) = session.run(None, {"items": items, "mask": mask})
        np.testing.assert_allclose(found, ranker.model_scores(histories).numpy(), atol=1e-4, rtol=1e-4)


def test_the_tokenizer_gives_the_codes_of_pytorch_for_any_batch(exported):
    import onnxruntime

    run, folder = exported
    model = run.load_module(RQVAE, "quantizer/model")
    session = onnxruntime.InferenceSession(str(folder / TOKENIZER))
    for size in (1, 7, 300):
        embedding = torch.randn(size, small_run.WIDTH)
        (codes,) = session.run(None, {"embedding": embedding.numpy()})
        assert np.array_equal(codes, model.quantizer.codes(model.encode(embedding)).numpy())
    about = json.loads((folder / ABOUT).read_text())["tokenizer"]
    assert about == {"width": small_run.WIDTH, "levels": small_run.LEVELS, "apart": 0.0}
    assert TOKENIZER in (folder / README).read_text()


def test_the_table_translates_items(exported):
    run, folder = exported
    table = pl.read_parquet(folder / ITEMS)
    assert table.columns == ["item_id", "item_index", "codes", "semantic_id"]
    assert table["item_index"].to_list() == list(range(small_run.ITEMS))
    assert table["item_id"].to_list() == run.read("ingest/items", "shop")["item_id"].to_pylist()


def test_the_files_say_that_the_blend_is_left_out(exported):
    _, folder = exported
    about = json.loads((folder / ABOUT).read_text())
    assert about["blended"] is True and about["history"] == 19
    assert 0 <= about["largest_difference"] < 1e-4
    assert "sequence model alone" in about["note"] and about["note"] in (folder / README).read_text()


def test_the_code_in_the_readme_runs(exported, monkeypatch):
    run, folder = exported
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / README).read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    ranker = load_ranker(run, "shop", Ranking(enabled=False))
    scores = ranker.model_scores([np.arange(3)])[0]
    scores[:3] = -torch.inf
    assert names["best"] == [f"shop-item-{item}" for item in scores.argsort(descending=True)[:10]]


@pytest.mark.slow
def test_flat_tokens_are_exported_too(tmp_path):
    pytest.importorskip("onnxscript")
    run = make_run(tmp_path / "run", tokens="flat", content_width=0, recall=False)
    assert export(run.uri, tmp_path / "exported")["largest_difference"] < 1e-4


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"pip install 'qbert-ray\[export\]'"):
        export(str(tmp_path), tmp_path)


def test_the_command_says_what_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path), "-o", str(tmp_path / "out")])
    assert end.value.code == 2 and "no run in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
