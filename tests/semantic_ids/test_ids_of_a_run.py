"""What a finished run leaves is what `qbert-ray ids` reads."""

import pytest

from qbert_ray.semantic_ids.id_report import report
from qbert_ray.semantic_ids.lookup import open_ids, read_ids, show
from qbert_ray.storage.directory import Manifest


def test_a_finished_run_has_a_report_and_its_items_can_be_looked_up(finished):
    config, run = finished
    content = report(run.uri)
    assert set(content["domains"]) == set(config.data.domains)
    counts = {domain["domain"]: domain for domain in Manifest.load(run, "semantic_ids").counts["domains"]}
    for domain, figures in content["domains"].items():
        assert figures["coverage"] == 1 and figures["collision_rate"] == 0
        assert figures["moved"] == counts[domain]["moved"] == sum(figures["moved_at"])
        assert figures["raw_collision_rate"] == counts[domain]["raw_collision_rate"]
        assert figures["neighbours"]["codewords"] > 2 * figures["neighbours"]["random"]
        shared, *_, whole = figures["following"]
        assert shared["same"] > shared["chance"] > 0 and whole == pytest.approx(
            {"same": 0, "chance": 0}, abs=1e-9
        )  # no two items have one ID
        ids = read_ids(run, [part for part in open_ids(run.uri)[1] if part.startswith(f"{domain}-")])
        assert ((ids.codes != ids.nearest).any(1) == ids.moved).all()
        for row in {0, int(ids.moved.argmax())}:
            found = show(run.uri, ids.item_ids[row], domain)
            assert (found["moved"] is not None) == ids.moved[row]
            assert found["moved"] is None or found["moved"]["kept_by"]
