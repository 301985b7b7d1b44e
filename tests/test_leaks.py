"""Nothing sees a validation or test item before it should: other labels, the same training outputs.

Validation items choose among epochs and fit the mix, as they must; so there is one epoch here, and nothing to choose.
"""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbert_ray.semantic_ids.quantizers import EXTRA
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.seals import seal
from tests.benchmarks.without_ray import run_stages
from tests.shop import make_shop, small_config

ONE_EPOCH = ["pretrain.epochs=1", "finetune.epochs=1", "data.cold_share=0", "quantizer.extra_quantizers=[opq]"]
TRAINED = ["fusion/model", "quantizer/model", "pretrain/model", "finetune/demo/model"]
TABLES = ["features/text", "features/structure", "fusion/embeddings", "semantic_ids", "ranking/weights"]
CHOSEN = ["ranking/blend/demo"]


def dealt_out_anew(run, columns):
    """Deal labels out to other users, in the sequences and in the interactions."""
    rng = np.random.default_rng(0)
    for name in run.parts("ingest/sequences"):
        table = run.read_part("ingest/sequences", name)
        for column in columns:
            values = table[column].to_numpy(zero_copy_only=False)
            place = table.column_names.index(column)
            table = table.set_column(place, table.schema.field(column), pa.array(rng.permutation(values), pa.int32(), from_pandas=True))
        run.write_part("ingest/sequences", name, table)
    for name in run.parts("ingest/interactions"):
        table = run.read_part("ingest/interactions", name)
        rows = np.flatnonzero(np.isin(table["split"].to_pylist(), columns))
        items = np.array(table["item_id"].to_pylist(), dtype=object)
        items[rows] = rng.permutation(items[rows])
        place = table.column_names.index("item_id")
        run.write_part("ingest/interactions", name, table.set_column(place, table.schema.field("item_id"), pa.array(items, pa.string())))
    manifest = Manifest.load(run, "ingest")
    manifest.files = seal(run, "ingest")  # these are the stage's own parts now
    manifest.save(run, "ingest")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    shop = make_shop(folder / "shop")
    run_stages(small_config(shop, folder / "run", *ONE_EPOCH), threads=1)
    return shop, RunDir(str(folder / "run"))


def same(one, other, models, tables):
    for name in [*models, *(f"{EXTRA}/{number}/model" for number in one.folders(EXTRA))]:
        a, b = one.load_model(name)[0], other.load_model(name)[0]
        assert a.keys() == b.keys()
        for key in a:
            assert np.array_equal(a[key].numpy(), b[key].numpy(), equal_nan=True), (name, key)
    for name in tables:
        assert one.parts(name) and one.read(name).equals(other.read(name)), name


@pytest.mark.parametrize(("labels", "models"), [(["test"], TRAINED + CHOSEN), (["valid", "test"], TRAINED)], ids=["test", "both"])
def test_training_sees_no_label(honest, labels, models, tmp_path):
    shop, run = honest
    shutil.copytree(f"{run.uri}/ingest", tmp_path / "run" / "ingest")
    other = RunDir(str(tmp_path / "run"))
    dealt_out_anew(other, labels)
    config = small_config(shop, tmp_path / "run", *ONE_EPOCH)
    run_stages(config, threads=1)
    same(run, other, models, TABLES)
    if labels == ["test"]:
        assert run.folders("ranking/reranker") == other.folders("ranking/reranker")
        same(run, other, [f"ranking/reranker/{domain}" for domain in run.folders("ranking/reranker")], [])
    evaluated = [pq.read_table(f"{each.uri}/evaluate/ranks").column("rank_all") for each in (run, other)]
    assert not evaluated[0].equals(evaluated[1])  # the labels are others
