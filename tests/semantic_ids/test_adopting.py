"""Semantic IDs made elsewhere: what is taken, what is refused. Nothing here starts Ray."""

import polars as pl
import pyarrow as pa
import pytest

from qbert_ray.config.loading import load_config
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.semantic_ids.stage import assign_ids
from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError, RunDir

ITEMS = [["7", "8"], ["9"]]  # by part


def adopt(tmp_path, given, *domains):
    domains = domains or ("shop",)
    run = RunDir(str(tmp_path / "run"))
    for domain in domains:
        index = 0
        for number, items in enumerate(ITEMS):
            rows = [{"domain": domain, "item_id": item, "item_index": index + row} for row, item in enumerate(items)]
            run.write_part("ingest/items", f"{domain}-{number:05d}.parquet", pa.Table.from_pylist(rows, columns.ITEMS))
            index += len(items)
    pl.DataFrame(given).write_parquet(tmp_path / "given.parquet")
    entries = [f"data.domains.{domain}={{items: i.parquet, interactions: i.parquet}}" for domain in domains]
    config = load_config([], [f"data.root={tmp_path}", "data.semantic_ids=given.parquet", f"run.dir={run.uri}", *entries])
    return assign_ids(config, run, RayExecutor(), Quiet()), run.read("semantic_ids")


def test_ids_follow_the_catalog_and_become_unique(tmp_path):
    given = {"item_id": [9, 8, 7, 7, 5], "codes": [[0, 3], [0, 3], [2, 2], [0, 3], [8, 8]]}  # numbers as IDs; 7 twice: the last counts
    counts, table = adopt(tmp_path, given)
    assert table.schema.equals(columns.SEMANTIC_IDS)
    assert table["item_id"].to_pylist() == ["7", "8", "9"]
    assert table["codes"].to_pylist() == [[0, 3], [0, 4], [0, 5]]
    assert table["nearest_codes"].to_pylist() == [[0, 3]] * 3
    assert table["moved"].to_pylist() == [False, True, True]
    assert table["semantic_id"].to_pylist() == ["<a_0><b_3>", "<a_0><b_4>", "<a_0><b_5>"]
    assert counts["codebook_size"] == 9 and counts["moved"] == 2 and counts["domains"][0]["raw_collision_rate"] == pytest.approx(2 / 3)


def test_domains_are_apart(tmp_path):
    given = {"domain": ["a", "b"] * 3, "item_id": [*"778899"], "codes": [[1], [4], [2], [4], [3], [0]]}
    _, table = adopt(tmp_path, given, "a", "b")
    assert table["codes"].to_pylist() == [[1], [2], [3], [4], [1], [0]]  # the next free one after 4 is 1, as 0 is kept


@pytest.mark.parametrize(
    ("given", "domains", "said"),
    [
        ({"item": ["7"], "codes": [[1]]}, (), r"lacks \['item_id'\]; it has \['item', 'codes'\]"),
        ({"item_id": ["7", "8"], "codes": [[1], []]}, (), r"no codes for 2 of 3 items of shop, such as \['8', '9'\]"),
        (
            {"item_id": ["7", "8", "9"], "codes": [[1], [1, 2], [3]]},
            (),
            r"the same number of codes, none negative; .* has lengths \[1, 2\]",
        ),
        ({"item_id": ["7", "8", "9"], "codes": [[1], [-2], [3]]}, (), "the same number of codes, none negative"),
        ({"item_id": ["7", "8", "9"], "codes": [[1], [None], [3]]}, (), "the same number of codes, none negative"),
        ({"item_id": ["7", "8", "9"], "codes": [[1.5], [2.0], [3.0]]}, (), "codes must be lists of whole numbers"),
        ({"item_id": ["7", "8", "9"], "codes": ["1 2", "1 3", "1 4"]}, (), "codes must be lists of whole numbers"),
        ({"item_id": ["7", "8", "9"], "codes": [[0], [1], [1]]}, (), r"3 items of shop, and the codes in .* span only 2\*\*1 = 2 IDs"),
        ({"item_id": ["7", "8", "9"], "codes": [[1], [2], [2**31 + 5]]}, (), r"holds the code 2,147,483,653; codes are small numbers"),
        ({"item_id": ["7", "8", "9"], "codes": [[1], [2], [2**16]]}, (), r"from 0 to below 65,536"),
        ({"item_id": ["7", "8", "9"], "codes": [[1], [2], [3]]}, ("a", "b"), "needs a domain column"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, given, domains, said):
    with pytest.raises(ArtifactError, match=said):
        adopt(tmp_path, given, *domains)
