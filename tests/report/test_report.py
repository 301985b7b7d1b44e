"""`qbert-ray report` on run and sweep directories written by hand."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pyarrow as pa
import pytest

from qbert_ray.cli import main as cli
from qbert_ray.config.schema import Config
from qbert_ray.report import evaluation, figures, fused, recommendations, summary, sweep
from qbert_ray.report.catalog import SIDE, Album, Catalog, thumbnail
from qbert_ray.report.facts import Facts, redact
from qbert_ray.report.page import PAGE, embed, gather, seconds, write
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir
from qbert_ray.storage.stages import BY_NAME
from tests.reported import EVIL, ITEMS, NAME, write_run, write_sweep


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run):
    path, problems = write(run.uri)
    assert problems == []
    return Path(path).read_text(encoding="utf-8")


def test_the_page_is_one_file_that_fetches_nothing(page):
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", markup) and "@import" not in page and "url(" not in markup
    assert "default-src 'none'" in page and len(page) < 15_000_000


def test_no_text_of_a_user_becomes_markup(page):
    assert page.count("<script") == page.count("</script>")
    assert EVIL not in page and "<img src=x" not in page and "{{ 7 * 7 }}" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "\\u003cscript\\u003ealert(1)" in page


@pytest.mark.parametrize("value", [EVIL, "</SCRIPT>", "<!--", "]]>", "\u2028", "a'b\"c&amp;", "é漢"])
def test_embedded_json_is_inert_and_exact(value):
    text = str(embed({"a": [value]}))
    assert json.loads(text) == {"a": [value]} and not set("<>&'\u2028") & set(text)


def test_every_figure_is_one_that_plotly_takes(page):
    plots = [json.loads(text) for text in re.findall(r'class="plot-data">(.*?)</script>', page)]
    assert len(plots) > 15
    for plot in plots:
        assert all(trace.type for trace in go.Figure(plot).data)
        assert plot["layout"]["xaxis"]["title"] and plot["layout"]["yaxis"]["title"] is not None


def test_masks_of_the_last_item_are_drawn_as_training_draws_them(run):
    facts = Facts(run)
    facts.config = Config.model_validate(
        {"pretrain": {"enabled": False}, "finetune": {"objective": "masked", "prefix_share": 1.0}}
    ).model_dump(mode="json")
    strategies = {row["strategy"]: row["draws"] for row in evaluation.masks(facts)}
    assert {len(draw) for draw in strategies["random"]} == {20}
    assert len({len(draw) for draw in strategies["last"]}) > 1  # beginnings of other lengths
    assert all(sum(draw) == 1 and draw[-1] and 2 <= len(draw) <= 20 for draw in strategies["last"])
    facts.config["finetune"]["prefix_share"] = 0.0
    assert [len(draw) for draw in evaluation.masks(facts)[-1]["draws"]] == [20]


@pytest.mark.parametrize(
    ("changes", "trainings"),
    [
        ({"finetune": {"objective": "masked"}, "pretrain": {"enabled": False}}, {"finetune"}),
        ({"finetune": {"objective": "causal"}, "pretrain": {"enabled": False}}, set()),
        ({"data": {"domains": {"a": {"role": "source"}, "b": {"role": "target"}}}, "finetune": {"objective": "causal"}}, {"pretrain"}),
        ({"finetune": {"objective": "causal"}}, set()),  # one domain: nothing to train before
        ({"sequencer": {"kind": "generative"}, "finetune": {"objective": "masked"}}, set()),
    ],
)
def test_masks_are_shown_of_trainings_that_mask(run, changes, trainings):
    facts = Facts(run)
    facts.config = Config.model_validate(changes).model_dump(mode="json")
    assert {row["training"] for row in evaluation.masks(facts)} == trainings


def test_a_figure_shows_the_tags_of_a_title_as_letters():
    assert figures.plain(EVIL) == "&lt;script&gt;alert(1)&lt;/script&gt;" and len(figures.plain("x" * 500)) == figures.LONGEST


@pytest.mark.parametrize("done", [0, 1, 3, 5, 9])
def test_an_unfinished_run_says_what_is_missing(tmp_path, done):
    stages = list(BY_NAME)[:done]
    content = gather(write_run(tmp_path, stages))
    assert content["problems"] == []
    missing = [row["name"] for row in content["summary"]["stages"] if row["state"] != "done"]
    assert missing == list(BY_NAME)[done:]
    assert any("not finished" in warning for warning in content["summary"]["warnings"]) == bool(missing)
    write(str(tmp_path))


def test_a_run_without_a_reranker_or_a_blend_has_a_report(tmp_path):
    run = write_run(tmp_path)
    manifest = Manifest.load(run, "ranking")
    for name in ("reranking", "blending"):
        manifest.counts = {"shop": {key: value for key, value in manifest.counts["shop"].items() if key != name}}
        manifest.save(run, "ranking")
        assert "users it was fitted on" in Path(write(run.uri)[0]).read_text()


def test_a_report_is_written_in_its_run_alone(tmp_path):
    run, elsewhere = write_run(tmp_path / "run", []), tmp_path / "site"
    elsewhere.mkdir()
    (elsewhere / "index.html").write_text("home")
    (tmp_path / "run/report").symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="report is a link to another folder"):
        write(run.uri)
    assert (elsewhere / "index.html").read_text() == "home"
    (tmp_path / "link").symlink_to(tmp_path / "run")  # a run may lie behind a link itself
    (tmp_path / "run/report").unlink()
    write(str(tmp_path / "link"))


def test_given_semantic_ids_leave_stages_one_and_two_out(tmp_path):
    stages = [stage for stage in BY_NAME if stage not in ("features", "fusion", "quantizer")]
    run = write_run(tmp_path, stages, data__semantic_ids="ids.parquet")
    content = gather(run)
    assert content["problems"] == [] and not any("not finished" in warning for warning in content["summary"]["warnings"])
    assert content["fusion"] == {"missing": "Left out: semantic IDs are given."} and content["ids"]["domains"][0]["tree"]["total"] == ITEMS
    write(run.uri)


def test_a_run_without_a_test_item_says_so(tmp_path):
    run = write_run(tmp_path)
    run.write_json("evaluate/metrics.json", {"shop": {"users": 0, "protocols": {"all": {}, "unseen": {}}}})
    path, problems = write(run.uri)
    assert problems == [] and "No user has a test item" in Path(path).read_text(encoding="utf-8")


def test_a_damaged_table_costs_its_section_alone(tmp_path):
    run = write_run(tmp_path)
    run.write_bytes(f"score/{NAME}", b"torn")
    content = gather(run)
    (problem,) = content["problems"]
    assert "recommendations" in problem and "missing" in content["recommendations"] and "domains" in content["ids"]
    assert "could not be shown" in Path(write(run.uri)[0]).read_text()


def test_no_run_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="neither config.yaml nor sweep.json"):
        write(str(tmp_path))


@pytest.mark.parametrize(("model", "baseline", "level"), [(1, 9, "good"), (9, 1, "bad"), (5, 5, "unclear")])
def test_the_verdict_follows_the_paired_difference(tmp_path, model, baseline, level):
    run = write_run(tmp_path, model_rank=model, baseline_rank=baseline)
    content = gather(run)["summary"]
    (verdict,) = content["verdicts"]
    assert verdict["level"] == level and {row["best"] for row in verdict["rows"]} == {"ridge"}
    assert any("ridge" in warning for warning in content["warnings"]) == (level != "good")


def test_the_harder_protocol_decides():
    ranks = [("u1", "model", 1, 2), ("u1", "ridge", 5, 1), ("u2", "model", 1, 2), ("u2", "ridge", 6, 1)]
    frame = pl.DataFrame(ranks, ["user_id", "model", "rank_all", "rank_unseen"], orient="row")
    facts = type("Facts", (), {"targets": ["shop"]})
    (verdict,) = summary.verdicts(facts, {"shop": frame})
    assert verdict["level"] == "bad" and [row["level"] for row in verdict["rows"]] == ["bad", "good"]
    assert verdict["rows"][0]["difference"] == pytest.approx(1 / np.log2(3) - 1)


def test_a_training_without_validation_items_shows_its_loss_alone():
    lines = [{"epoch": 0, "train_loss": 3.0}, {"epoch": 1, "train_loss": 2.0}]
    assert [figure.title for figure in evaluation.training("pretrain", lines)] == ["Training loss"]
    ranked = [line | {"hr@10": 0.2, "ndcg@10": 0.1} for line in lines]
    assert len(evaluation.training("pretrain", ranked)) == 2


def test_views_are_those_that_the_catalog_was_embedded_with(run):
    rows, views, there = fused._fuse(run, Facts(run), Catalog(run, "shop"))
    embedding = np.array(run.read("fusion/embeddings")["embedding"].to_pylist())[rows]
    assert views["fused"] == pytest.approx(embedding / np.linalg.norm(embedding, axis=1, keepdims=True), abs=1e-5)
    assert there["fused"].all() and set(views) == {"fused", "text", "structure"}


def test_reasons_name_the_longest_prefix_and_the_most_common_company(run):
    catalog = Catalog(run, "shop")  # codes of item n: n % 6, n // 6
    assert recommendations.reasons(catalog, 0, np.array([6, 12, 1]), np.array([0, 3, 1])) == [
        "shares <a_0> with Film 12",
        "3 users had it and Film 12",
    ]
    assert "order" in recommendations.reasons(catalog, 0, np.array([1, 2]), np.array([0, 0]))[0]


def test_company_counts_users_who_had_both(run):
    counts = recommendations.co_occurrence(run, Catalog(run, "shop"), np.arange(ITEMS))
    train = [set(items) for items in run.read("ingest/sequences")["train"].to_pylist()]
    expected = [[sum({a, b} <= items for items in train) for b in range(ITEMS)] for a in range(ITEMS)]
    assert counts.tolist() == expected


def test_images_keep_to_the_budget_and_broken_ones_are_left_out(run, monkeypatch):
    catalog, album = Catalog(run, "shop"), Album()
    album.want(catalog, [5, 4, 7, 6])  # broken, none, two that are there
    assert list(album.images({"shop": catalog})) == ["shop/7", "shop/6"] and album.left_out == 0
    monkeypatch.setattr("qbert_ray.report.catalog.BUDGET", 8_000 // 5)
    album.wanted = {("shop", row): None for row in (7, 6)}
    assert len(album.images({"shop": catalog})) < 2 and album.left_out >= 1


def test_the_image_of_an_item_is_the_first_of_its_files_that_is_one(tmp_path, monkeypatch):
    import io

    from PIL import Image

    kept = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(kept, "PNG")
    (tmp_path / "cover.png").write_bytes(kept.getvalue())
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    nothing, cover = pa.nulls(3, pa.list_(pa.binary())), [str(tmp_path / "cover.png")]
    items = pa.table({
        "item_index": pa.array([0, 1, 2], pa.int32()), "image_path": pa.nulls(3, pa.string()), "image_bytes": pa.nulls(3, pa.binary()),
        "path.audio": [[str(tmp_path / "a.wav")], None, None], "bytes.audio": nothing, "path.gallery": [cover, cover, None], "bytes.gallery": nothing,
    })  # fmt: skip
    run = RunDir(str(tmp_path / "run"))
    run.write_part("ingest/items", "shop-00000.parquet", items)
    catalog, album = SimpleNamespace(domain="shop", run=run, parts=["shop-00000.parquet"]), Album()
    album.want(catalog, range(3))
    assert list(album.images({"shop": catalog})) == ["shop/0", "shop/1"] and album.left_out == 0
    monkeypatch.setattr("qbert_ray.report.catalog.BUDGET", 1500)  # for one image at most
    album.images({"shop": catalog})
    assert album.left_out == 1, "an item without files has no image to leave out"


def test_a_thumbnail_is_small_and_the_web_is_not_asked(run):
    import io

    from PIL import Image

    assert thumbnail("https://example.com/a.jpg", None) is None and thumbnail("/no/such.jpg", None) is None
    image = Image.open(io.BytesIO(thumbnail(None, run.read("ingest/items")["image_bytes"][1].as_py())))
    assert image.size == (SIDE, round(SIDE * 2 / 3))


def test_keys_of_a_store_are_not_shown(tmp_path):
    assert redact("s3://id:secret@bucket/shop?region=x") == "s3://…@bucket/shop?…"
    page = Path(write(write_run(tmp_path, ["ingest"], data__root="s3://id:secret@bucket").uri)[0]).read_text()
    assert "secret" not in page and "…@bucket" in page


def test_durations_are_readable():
    assert [seconds(value) for value in (None, 9.94, 143, 7300)] == ["", "9.9 s", "2 min 23 s", "2 h 1 min"]


def test_the_command_writes_where_the_run_is(run, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", run.uri])
    assert run.path(PAGE) in capsys.readouterr().out.replace("\n", "")


def test_a_failing_report_does_not_lose_a_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_stages", lambda *_: None)
    monkeypatch.setattr("qbert_ray.report.page.render", lambda *_: 1 / 0)
    (tmp_path / "config.yaml").write_text(f"run: {{dir: {run.uri}}}\n")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "-c", str(tmp_path / "config.yaml")])
    assert "no report: ZeroDivisionError" in capsys.readouterr().out


# sweeps


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


def test_a_sweep_is_known_by_its_file(swept):
    path, problems = write(swept.uri)
    page = Path(path).read_text(encoding="utf-8")
    assert problems == [] and EVIL not in page and "1 failed" in page and "ValueError: &lt;script&gt;" in page


def test_settings_are_means_over_seeds_with_students_interval():
    trials = pl.DataFrame({"x": [1, 1, 2], "ndcg@10": [0.1, 0.3, 0.5], "seconds": [1.0, 3.0, 5.0]})
    best, other = sweep.summarise(trials, ["x"], "ndcg@10", up=True).rows(named=True)
    assert (best["x"], best["half"]) == (2, None)
    assert other["mean"] == pytest.approx(0.2) and other["half"] == pytest.approx(12.7062 * 0.1, rel=1e-4)  # t of one degree of freedom


def test_failed_trials_are_listed_and_count_for_nothing(swept):
    content = sweep.gather(swept)
    (failed,) = content["failed"]
    assert failed["error"].startswith("ValueError") and content["statuses"]["failed"] == 1
    assert sum(row["seeds"] for row in content["settings"]) == len(content["trials"]) - 1


def test_an_effect_holds_the_other_values_at_the_best_where_it_can(swept):
    content = sweep.gather(swept)
    notes = {figure.title: figure.note for figure in content["effects"]}
    assert notes["finetune.learning_rate"].startswith("All else") and notes["sequencer.num_layers"].startswith("Over all")
    assert content["best"][0]["finetune.learning_rate"] == 0.001


def test_the_best_setting_is_one_whose_trials_all_finished(tmp_path):
    run = RunDir(str(tmp_path))
    run.write_json("sweep.json", {"metric": "ndcg@10", "mode": "max", "stage": "finetune", "parameters": ["x"], "seeds": [0, 1]})
    rows = [
        ("a", "done", 1, 0, 0.30),
        ("b", "done", 1, 1, 0.31),
        ("c", "done", 2, 0, 0.35),
        ("d", "failed", 2, 1, None),
        ("e", "stopped", 3, 0, 0.4),
    ]
    trials = pl.DataFrame(rows, ["trial_id", "status", "x", "seed", "ndcg@10"], orient="row")
    trials.with_columns(seconds=pl.lit(1.0), error=pl.lit(None, pl.String)).write_parquet(run.path("trials.parquet"))
    content = sweep.gather(run)
    assert [row["x"] for row in content["best"]] == [1] and [row["x"] for row in content["settings"]] == [3, 2, 1]
    hover = next(trace for trace in content["effects"][0].plot["data"] if trace["name"] == "mean")["text"]
    assert hover[1] == "x 2<br>mean 0.3500, trials: 1" and "±" in hover[0], "one trial has no interval"


@pytest.mark.parametrize("empty", ["all failed", "no curves", "one trial"])
def test_a_sweep_that_has_hardly_begun(tmp_path, empty):
    run = write_sweep(tmp_path)
    trials = pl.read_parquet(run.path("trials.parquet"))
    if empty == "all failed":
        trials = trials.with_columns(status=pl.lit("failed"), **{"ndcg@10": pl.lit(None, pl.Float64)})
    trials.head(1 if empty == "one trial" else None or len(trials)).write_parquet(run.path("trials.parquet"))
    if empty == "no curves":
        run.delete("curves.parquet")
    write(run.uri)


def test_the_front_is_what_no_other_point_beats():
    points = np.array([[1.0, 1.0], [2.0, 0.0], [0.5, 0.5], [1.0, 1.0], [2.0, -1.0]])
    assert sweep.on_front(points).tolist() == [True, True, False, True, False]


def test_a_sweep_without_trials_says_so(tmp_path):
    RunDir(str(tmp_path)).write_json("sweep.json", {"metric": "ndcg@10", "mode": "max", "parameters": []})
    with pytest.raises(ArtifactError, match="no trials"):
        write(str(tmp_path))
