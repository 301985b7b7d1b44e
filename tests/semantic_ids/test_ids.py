"""`qbert-ray ids` on a run directory written by hand."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from qbert_ray.cli.main import main
from qbert_ray.semantic_ids.collisions import resolve_collisions, to_tokens
from qbert_ray.semantic_ids.id_report import REPORT, report
from qbert_ray.semantic_ids.lookup import diff, show
from qbert_ray.semantic_ids.quality import decode
from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir

GENRES = ["Drama", "Comedy, Drama", "War", None, "Drama", "Comedy", "Western"]
CODEBOOKS = np.array([[[0, 0], [10, 0], [0, 10]], [[0, 0], [1, 0], [0, 1]]], dtype=np.float32)  # [K = 2, M = 3, E = 2]


def write_run(folder, nearest, latents, parts=((0, None),), domain="shop", codebooks=CODEBOOKS):
    """A run whose items are called i0, i1, ... "Film 0", "Film 1", ..., cut into parts at these rows."""
    run = RunDir(str(folder))
    resolved = resolve_collisions(np.array(nearest), latents, codebooks)
    for number, (begin, end) in enumerate(parts):
        rows = range(*slice(begin, end).indices(len(nearest)))
        keys = [{"domain": domain, "item_id": f"i{row}", "item_index": row} for row in rows]
        name = f"{domain}-{number:05d}.parquet"
        texts = [{"text.title": f"Film {row}" if row else None, "attribute.genre": GENRES[row % len(GENRES)]} for row in rows]
        text_schema = pa.schema([("text.title", pa.string()), ("attribute.genre", pa.string())])
        run.write_part(
            "ingest/items",
            name,
            pa.Table.from_pylist([a | b for a, b in zip(keys, texts, strict=True)], pa.unify_schemas([columns.ITEMS, text_schema])),
        )
        ids = [
            {
                "codes": resolved.codes[row].tolist(),
                "semantic_id": to_tokens(resolved.codes[[row]])[0],
                "moved": bool(resolved.moved[row]),
                "nearest_codes": list(nearest[row]),
            }
            for row in rows
        ]
        run.write_part("semantic_ids", name, pa.Table.from_pylist([a | b for a, b in zip(keys, ids, strict=True)], columns.SEMANTIC_IDS))
        embedding = pa.Table.from_pylist(
            [key | {"embedding": latents[row].tolist(), "depth": 1} for key, row in zip(keys, rows, strict=True)],
            columns.embeddings_schema(2),
        )
        run.write_part("fusion/embeddings", name, embedding)
    run.save_model("quantizer/model", {"quantizer.codebooks": torch.from_numpy(codebooks)}, {})
    Manifest("semantic_ids", {}, {}, "0", counts={"codebook_size": codebooks.shape[1], "num_levels": 2}).save(run, "semantic_ids")
    return run, resolved


@pytest.fixture
def crowd(tmp_path):
    """Five items want <a_0><b_0>, but three fit under <a_0>; two more are elsewhere."""
    nearest = [(0, 0)] * 5 + [(1, 1), (2, 0)]
    latents = np.array([[0.1, 0], [0.2, 0], [0.3, 0], [0.4, 0], [0.5, 0], [11, 0], [0, 10]], dtype=np.float32)
    return write_run(tmp_path / "crowd", nearest, latents, ((0, 4), (4, None)))


def test_an_item_that_kept_its_codes_and_its_siblings(crowd):
    run, _ = crowd
    found = show(run.uri, "i0")
    assert (found["title"], found["semantic_id"], found["moved"]) == ("i0", "<a_0><b_0>", None)  # it has no title
    (level,) = found["siblings"]
    assert level["prefix"] == "<a_0>" and level["items"] == level["further"] == 2
    assert [other["title"] for other in level["nearest"]] == ["Film 1", "Film 2"]


def test_a_moved_item_names_who_kept_its_codes_and_what_was_full(crowd):
    run, resolved = crowd
    assert resolved.codes.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 2], [1, 1], [2, 0]]
    inside, outside = (show(run.uri, item)["moved"] for item in ("i1", "film 3"))
    assert inside["nearest"] == outside["nearest"] == "<a_0><b_0>"
    assert inside["kept_by"]["item_id"] == outside["kept_by"]["item_id"] == "i0"
    assert inside["full"] is None and outside["full"] == "<a_0>"


@pytest.mark.parametrize(
    ("item", "domain", "said"),
    [
        ("i00", None, r"no item 'i00' in shop; near it: i\d"),
        ("ilm 3", None, r"near it: i3 \(Film 3\)"),
        ("???", None, "nothing is spelled like it"),
        ("i1", "hop", "no domain hop in .*; it has shop"),
    ],
)
def test_an_unknown_item_ends_with_its_neighbours_in_spelling(crowd, item, domain, said):
    with pytest.raises(ArtifactError, match=said):
        show(crowd[0].uri, item, domain)


def test_an_item_of_two_domains_needs_the_domain(crowd, tmp_path):
    write_run(tmp_path / "crowd", [(0, 0)], np.zeros((1, 2), dtype=np.float32), domain="other")
    with pytest.raises(ArtifactError, match=r"'i0' is 2 items: i0 \(other\), i0 \(shop\); .* --domain"):
        show(crowd[0].uri, "i0")
    assert show(crowd[0].uri, "i0", "other")["domain"] == "other"


def test_a_run_without_ids_or_of_an_older_format_is_refused(crowd, tmp_path):
    with pytest.raises(ArtifactError, match="no semantic IDs in .*: qbert-ray semantic-ids"):
        show(str(tmp_path), "i0")
    run, _ = crowd
    part = run.parts("semantic_ids")[0]
    run.write_part("semantic_ids", part, run.read_part("semantic_ids", part).drop_columns("nearest_codes"))
    with pytest.raises(ArtifactError, match="older format"):
        report(run.uri)


def test_diff_counts_by_the_first_level_that_differs(tmp_path):
    latents = np.zeros((4, 2), dtype=np.float32)
    a, _ = write_run(tmp_path / "a", [(0, 0), (0, 1), (1, 1), (2, 2)], latents)
    b, _ = write_run(tmp_path / "b", [(0, 0), (0, 2), (2, 1)], latents)
    (found,) = diff(a.uri, b.uri).values()
    assert (found["only_first"], found["only_second"], found["same"], found["changed"], found["changed_at"]) == (1, 0, 1, 2, [1, 1])
    assert found["examples"][0] == {"item_id": "i1", "first": "<a_0><b_1>", "second": "<a_0><b_2>"}
    (back,) = diff(b.uri, a.uri).values()
    assert back["only_second"] == 1 and back["changed_at"] == [1, 1]
    other, _ = write_run(tmp_path / "c", [(0, 0)], latents, domain="other")
    assert diff(a.uri, other.uri) == {
        name: {"only_first": first, "only_second": second, "same": 0, "changed": 0, "changed_at": [], "examples": []}
        for name, first, second in (("other", 0, 1), ("shop", 4, 0))
    }


def test_versions_are_the_parts_up_to_them(crowd):
    run, _ = crowd
    manifest = Manifest.load(run, "semantic_ids")
    manifest.counts["versions"] = [{"version": version, "parts": [part]} for version, part in enumerate(run.parts("semantic_ids"))]
    manifest.save(run, "semantic_ids")
    (found,) = diff(f"{run.uri}@0", run.uri).values()
    assert (found["same"], found["only_second"]) == (4, 3)
    with pytest.raises(ArtifactError, match="no version 2 of its semantic IDs; it has 0, 1"):
        diff(run.uri, f"{run.uri}@2")
    now, before = report(run.uri), report(f"{run.uri}@0")
    assert (now["domains"]["shop"]["with_id"], before["domains"]["shop"]["with_id"]) == (7, 4)
    assert run.read_json(REPORT) == json.loads(json.dumps(now))  # not that of the version before


def test_the_report_says_what_happened(crowd):
    run, _ = crowd
    figures = report(run.uri)["domains"]["shop"]
    assert json.loads(run.read_bytes("semantic_ids/report.json"))["domains"]["shop"] == figures
    assert (figures["items"], figures["with_id"], figures["coverage"]) == (7, 7, 1)
    assert figures["raw_collision_rate"] == pytest.approx(4 / 7) and figures["collision_rate"] == 0
    assert figures["moved"] == 4 and figures["moved_at"] == [2, 2]
    assert [level["usage"] for level in figures["levels"]] == [1, 1]
    assert figures["neighbours"] is None  # too few items to have ten neighbours
    assert figures["attributes"]["genre"]["items"] == 4  # "Drama" and "Comedy" twice; two are alone, one has none
    assert figures["examples"][0]["prefix"] in ("<a_0>", "<a_1>") and figures["examples"][0]["items"] == 3


def test_ids_that_say_everything_find_every_neighbour(tmp_path):
    codebooks = np.random.default_rng(0).normal(size=(2, 5, 2)).astype(np.float32)
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(25), (5, 5)), axis=1)
    run, resolved = write_run(
        tmp_path / "all", codes.tolist(), decode(codes, codebooks), ((0, 3), (3, 20), (20, None)), codebooks=codebooks
    )
    found = report(run.uri)["domains"]["shop"]["neighbours"]
    assert not resolved.moved.any()
    assert found["codewords"] == 1 > found["prefix"] > 0 and found["random"] == 10 / 24 and found["sampled"] == 25


def test_the_commands_print_what_they_found(crowd, capsys):
    run, _ = crowd
    for arguments, said in [
        (
            ["report", run.uri],
            ["7 of 7 items have an ID", "collisions 57.14% before, 0.00% after; 4 moved", "genre", "Film 5", "report.json"],
        ),
        (
            ["show", run.uri, "i4"],
            ["moved from <a_0><b_0>, which i0 (i0) has and keeps; every ID under <a_0> was taken", "<a_1>  2 others"],
        ),
        (["diff", run.uri, run.uri], ["shop: 0 items only in A, 0 only in B, 7 in both"]),
    ]:
        with pytest.raises(SystemExit) as end:
            main(["ids", *arguments])
        assert end.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert [text for text in said if " ".join(text.split()) not in printed] == []
    with pytest.raises(SystemExit) as end:
        main(["ids", "show", run.uri, "i99"])
    assert end.value.code == 2 and "error: no item 'i99'" in capsys.readouterr().err
