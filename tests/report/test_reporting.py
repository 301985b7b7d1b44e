"""The report of a run that the pipelines made."""

import numpy as np
import pytest

from qbert_ray.report import fused
from qbert_ray.report.catalog import Catalog
from qbert_ray.report.facts import Facts
from qbert_ray.report.page import gather
from qbert_ray.storage.directory import RunDir


def test_all_of_a_finished_run_can_be_shown(finished):
    _, run = finished
    content = gather(RunDir(run.uri))
    assert content["problems"] == [] and [row["name"] for row in content["summary"]["stages"] if row["state"] != "done"] == ["refit"]
    assert {domain["name"] for domain in content["ids"]["domains"]} == {"demo", "other"}
    (target,) = content["sequences"]["domains"]
    assert target["cold"] and target["blend"]["figure"] and len(target["groups"]) == 2 and len(target["curves"]) == 2
    assert len(content["recommendations"]["domains"][0]["users"][0]["best"]) == 10 and content["images"]


@pytest.mark.parametrize("domain", ["demo", "other"])
def test_views_are_those_of_the_catalog_in_every_domain(finished, domain):
    """Also for the cold items of the first domain, and for the second, whose ID vectors come after the first's."""
    _, run = finished
    rows, views, _ = fused._fuse(run, Facts(run), Catalog(run, domain))
    table = run.read("fusion/embeddings", domain)
    embedding = np.array(table["embedding"].to_pylist())[np.argsort(table["item_index"].to_numpy())][rows]
    assert views["fused"] == pytest.approx(embedding / np.linalg.norm(embedding, axis=1, keepdims=True), abs=1e-4)
    if domain == "demo":
        assert run.read("ingest/items", domain)["cold"].to_numpy()[rows].any()
