"""What `validate` says: a verdict on each domain, and why nothing is left."""

import io
import time
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from qbert_ray.cli.main import main
from qbert_ray.config.loading import load_config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.inputs import validation
from qbert_ray.inputs.sources import SourceError
from qbert_ray.inputs.validation import format_validation, validate

ITEMS = pl.DataFrame({"item_id": [f"p{n}" for n in range(20)], "title": [f"steel mug {n}" for n in range(20)]})
LOG = pl.DataFrame(
    [(f"u{u}", f"p{(u + n) % 20}", 1_600_000_000 + u * 100 + n) for u in range(20) for n in range(6)],
    ["user_id", "item_id", "timestamp"],
    orient="row",
)


def verdict(folder: Path, items=ITEMS, log=LOG, *overrides: str) -> tuple[dict, str]:
    for name, table in (("items", items), ("log", log)):
        table.write_parquet(folder / f"{name}.parquet") if isinstance(table, pl.DataFrame) else (folder / f"{name}.csv").write_text(table)
    files = {name: f"{name}.{'parquet' if isinstance(table, pl.DataFrame) else 'csv'}" for name, table in (("items", items), ("log", log))}
    domain = f"data.domains={{shop: {{items: {files['items']}, interactions: {files['log']}}}}}"
    config = load_config([], [f"data.root={folder}", domain, f"run.dir={folder / 'run'}", *overrides])
    report = validate(config, LocalExecutor())
    return report["shop"], format_validation(report)


def test_unreadable_times_come_with_an_example_and_what_is_understood(tmp_path):
    _, page = verdict(tmp_path, log=LOG.with_columns(timestamp=pl.lit("the day after")))
    assert "120 bad timestamp, such as 'the day after'" in page and "1/31/2026 9:05:58 AM" in page
    assert "data.min_interactions" not in page  # of which there is nothing to lower


@pytest.mark.parametrize(
    ("alike", "why"),
    [
        (pl.col("item_id").str.replace("p", "p00"), "prefix"),
        (pl.col("item_id").str.to_uppercase(), "capitals"),
        (pl.col("item_id").str.replace("p", ""), "prefix"),
        (pl.col("item_id").str.replace("p", "p-"), "spaces or signs"),
    ],
)
def test_ids_that_do_not_match_are_shown_from_both_sides(tmp_path, alike, why):
    _, page = verdict(tmp_path, log=LOG.with_columns(alike))
    assert "seems to be 'p" in page and why in page and "data.min_interactions" not in page


def test_leading_zeros_are_named(tmp_path):
    items = ITEMS.with_columns(item_id=pl.col("item_id").str.replace("p", "").str.zfill(8))
    _, page = verdict(tmp_path, items, LOG.with_columns(pl.col("item_id").str.replace("p", "").cast(pl.Int64)))
    assert "'0' of the interactions seems to be '00000000'" not in page and "leading zeros on one side" in page


def test_rows_of_another_width_are_explained(tmp_path):
    lines = ITEMS.write_csv().splitlines()
    _, page = verdict(tmp_path, "\n".join([lines[0], *(f"{line}," for line in lines[1:])]))
    assert (
        "20 of 20 invalid CSV row, such as 'p0,steel mug 0,' (3 cells, the header has 2: is there a comma at the end of each line?)" in page
    )


def test_too_few_interactions_are_what_remains(tmp_path):
    _, page = verdict(tmp_path, ITEMS, LOG, "data.min_interactions=50")
    assert "the other 120 are of users or items with too few interactions" in page


def test_warnings_of_what_can_be_used(tmp_path):
    mixed = LOG.with_columns(
        pl.when(pl.col("timestamp") % 2 == 0).then(pl.col("timestamp") * 1000).otherwise("timestamp").alias("timestamp")
    )
    assert "50% in s and 50% in ms" in verdict(tmp_path, log=mixed)[1]
    assert (
        "20 of 20 users have all their interactions at one time"
        in verdict(tmp_path, log=LOG.with_columns(timestamp=pl.lit(1_600_000_000)))[1]
    )
    short = LOG.group_by("user_id", maintain_order=True).head(2)
    assert "no user has 3 interactions" in verdict(tmp_path, ITEMS, short, "data.min_interactions=0")[1]
    assert "WARNING" not in verdict(tmp_path)[1]


def test_decoded_counts_what_was_decoded(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    images = [stream.getvalue() if n % 3 else b"no picture" for n in range(20)]
    report, page = verdict(tmp_path, ITEMS.with_columns(pl.Series("image", images)), LOG, "data.domains.shop.image_column=image")
    assert report["images"]["decoded"] == 13 and "looked for 20, decoded 13 of them, 7 bad" in page


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (pl.col("timestamp") * 1000, "time: 2020-09-13 to 2020-09-13 (in ms)"),
        (pl.int_range(pl.len()), "time: 0 to 119 (numbers, not dates)"),
        (pl.lit(1_600_000_000), "100% of interactions share user and time"),
    ],
)
def test_times_are_shown_as_dates_where_they_can_be_some(tmp_path, times, said):
    assert said in verdict(tmp_path, log=LOG.with_columns(timestamp=times))[1]


def test_only_small_local_files_are_read_in_this_process(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ITEMS.write_parquet(tmp_path / "items.parquet")
    LOG.write_parquet(tmp_path / "interactions.parquet")

    def here(*overrides):
        config = load_config([], [f"data.root={tmp_path}", "data.domains={shop: {}}", *overrides])
        return validation.in_this_process(config, validation.open_sources(config))

    assert here() and not here("compute.address=auto") and here("compute.address=auto", "compute.executor=local")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not here()
    monkeypatch.delenv("RAY_ADDRESS")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    monkeypatch.setattr(validation, "SMALL_BYTES", size)
    assert here()
    monkeypatch.setattr(validation, "SMALL_BYTES", size - 1)
    assert not here() and here("compute.executor=local")


def test_a_crash_in_one_domain_hides_no_other(tmp_path, monkeypatch):
    real = validation.ingest_domain

    def crash(config, name, *arguments):
        if name == "a":
            raise KeyError("a bug")
        return real(config, name, *arguments)

    monkeypatch.setattr(validation, "ingest_domain", crash)
    ITEMS.write_parquet(tmp_path / "items.parquet")
    LOG.write_parquet(tmp_path / "interactions.parquet")
    config = load_config([], [f"data.root={tmp_path}", "data.domains={a: {}, b: {}, c: {items: none.csv}}", f"run.dir={tmp_path / 'run'}"])
    report = validate(config, LocalExecutor())
    assert "KeyError: 'a bug'" in report["a"]["errors"][0] and not report["b"]["errors"] and "none.csv" in report["c"]["errors"][0]


def test_the_command_lists_the_files_before_it_reads_them(tmp_path, monkeypatch, capsys):
    ITEMS.write_parquet(tmp_path / "items.parquet")
    LOG.write_parquet(tmp_path / "interactions.parquet")
    (tmp_path / "shop.yaml").write_text(f"data: {{root: {tmp_path}, domains: {{shop: {{}}}}}}\nrun: {{dir: {tmp_path}/run}}")
    said: list[str] = []
    real = validation.validate

    def check(config, executor, sources):
        said.append(capsys.readouterr().out)
        assert executor.name == "local"  # small files do not start Ray
        return real(config, executor, sources)

    monkeypatch.setattr(validation, "validate", check)
    with pytest.raises(SystemExit) as end:
        main(["validate", "-c", str(tmp_path / "shop.yaml")])
    assert end.value.code == 0 and "columns: item_id, title" in said[0] and "can be used" in capsys.readouterr().out


def test_a_mistyped_root_is_refused_before_anything_starts(tmp_path, capsys):
    (tmp_path / "movies").mkdir()
    (tmp_path / "shop.yaml").write_text(f"data: {{root: {tmp_path}/moveis}}\nrun: {{dir: {tmp_path}/run}}")
    for command in ("validate", "run"):
        begin = time.monotonic()
        with pytest.raises(SystemExit) as end:
            main([command, "-c", str(tmp_path / "shop.yaml")])
        assert end.value.code == 2 and "did you mean" in capsys.readouterr().err and time.monotonic() - begin < 30
    with pytest.raises(SourceError):
        validation.open_sources(load_config([tmp_path / "shop.yaml"]))
