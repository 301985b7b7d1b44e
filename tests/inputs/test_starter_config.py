"""What `qbert-ray init` writes passes `qbert-ray validate`."""

from qbert_ray.config.loading import load_config
from qbert_ray.execution.ray_executor import RayExecutor
from qbert_ray.inputs.starter_page import write_config
from qbert_ray.inputs.validation import format_validation, validate
from tests.inputs.test_starter import ITEMS, USERS, catalog, sales, write_amazon


def test_a_written_config_passes_validation(tmp_path, ray_session):
    (tmp_path / "own").mkdir()
    catalog("code").write_csv(tmp_path / "own" / "goods.csv")
    sales("Customer", "article", "bought").write_ndjson(tmp_path / "own" / "orders.jsonl")
    (tmp_path / "raw").mkdir()
    write_amazon(tmp_path / "raw", 2018, "Toys")
    write_config([tmp_path], tmp_path / "both.yaml")
    report = validate(load_config([tmp_path / "both.yaml"]), RayExecutor())
    assert set(report) == {"own", "Toys_5"}
    for domain in report.values():
        assert domain["errors"] == [], format_validation(report)
        assert domain["counts"]["items"] == ITEMS and domain["counts"]["users"] == USERS
        assert not domain["rejected"]
