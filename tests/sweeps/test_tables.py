"""Tables over variants and seeds: right means and intervals, and a word where a difference is chance."""

import numpy as np
import polars as pl
import pytest
import yaml

from qbert_ray.cli.main import main
from qbert_ray.config.loading import ConfigError, load_config
from qbert_ray.storage.directory import RunDir
from qbert_ray.sweeps.tables import MARKDOWN, RANKS, Table, collect, impossible, impossible_rows, load_table, markdown, ranks_of, summarise
from tests import ROOT

TABLE = Table(title="T", reference="base", variants={"base": {}, "better": {}}, rankings=["ridge"], seeds=[0, 1])


def evaluated(rank, domain="shop", ridge=None):
    """evaluate/ranks of a run in which user n's target ranked rank[n]."""
    users = [f"u{number}" for number in range(len(rank))]
    kinds = {"model": rank, "ridge": np.full(len(rank), 3) if ridge is None else ridge, "popularity": np.full(len(rank), 100)}
    frames = [
        pl.DataFrame(
            {"domain": domain, "user_id": users, "model": kind, "target": "i", "rank_all": values, "rank_unseen": np.maximum(values - 1, 1)}
        )
        for kind, values in kinds.items()
    ]
    return pl.concat(frames)


@pytest.fixture
def ranks():
    rng = np.random.default_rng(0)
    base = [rng.integers(1, 40, 400) for _ in range(2)]
    pieces = [ranks_of(evaluated(rank), "base", seed, TABLE) for seed, rank in enumerate(base)]
    pieces += [ranks_of(evaluated(np.maximum(rank - 4, 1)), "better", seed, TABLE) for seed, rank in enumerate(base)]
    return pl.concat(pieces)


def find(summary, **wanted):
    (line,) = [line for line in summary if all(line[name] == value for name, value in wanted.items())]
    return line


def test_means_and_intervals_are_those_of_the_plain_formulas(ranks):
    summary = summarise(ranks, TABLE)
    assert {line["row"] for line in summary} == {"base", "better", "ridge"}  # popularity was not asked for
    line = find(summary, row="base", protocol="all", metric="hr@10")
    by_seed = [float((ranks.filter((pl.col("row") == "base") & (pl.col("seed") == seed))["rank_all"] <= 10).mean()) for seed in (0, 1)]
    assert line["mean"] == pytest.approx(np.mean(by_seed)) and line["seeds"] == 2 and line["users"] == 400
    assert line["half"] == pytest.approx(12.706 * np.std(by_seed, ddof=1) / 2**0.5, rel=1e-3)
    better = find(summary, row="better", protocol="all", metric="ndcg@10")
    assert 0 < better["low"] < better["difference"] < better["high"]
    assert better["difference"] == pytest.approx(better["mean"] - find(summary, row="base", protocol="all", metric="ndcg@10")["mean"])
    assert find(summary, row="ridge", protocol="unseen", metric="hr@10")["mean"] == 1.0


def test_a_difference_that_may_be_chance_is_not_bold(ranks):
    rng = np.random.default_rng(1)
    same = [ranks_of(evaluated(rng.permutation(rank)), name, 0, TABLE) for name in ("base", "better") for rank in [np.arange(1, 401)]]
    text = markdown(summarise(pl.concat(same), TABLE), TABLE)
    row = next(line for line in text.splitlines() if line.startswith("| better"))
    assert "**" not in row
    assert "| better" in (strong := markdown(summarise(ranks, TABLE), TABLE)) and "**+" in strong


def test_the_sequence_model_of_a_variant_is_held_against_that_of_the_reference():
    table = TABLE.model_copy(update={"sequencers": True})
    alone = {"base": 20, "better": 5}
    pieces = []
    for name, rank in alone.items():
        table_of_run = evaluated(np.arange(1, 31), ridge=np.full(30, rank))
        table_of_run = table_of_run.with_columns(pl.col("model").replace("ridge", "sequencer"))
        pieces.append(ranks_of(table_of_run, name, 0, table))
    summary = summarise(pl.concat(pieces), table)
    assert [line["row"] for line in summary if (line["protocol"], line["metric"]) == ("all", "hr@10")] == [
        "base",
        "base, sequencer",
        "better",
        "better, sequencer",
    ]
    assert find(summary, row="base, sequencer", protocol="all", metric="hr@10")["difference"] is None
    assert find(summary, row="better, sequencer", protocol="all", metric="hr@10")["difference"] == 1.0  # to the model it would be 2 / 3


def test_equal_rows_differ_by_nothing():
    both = [ranks_of(evaluated(np.arange(1, 20)), name, 0, TABLE) for name in ("base", "better")]
    line = find(summarise(pl.concat(both), TABLE), row="better", protocol="all", metric="hr@10")
    assert (line["difference"], line["low"], line["high"]) == (0.0, 0.0, 0.0)


def test_rows_are_shown_without_differences_where_every_trial_of_the_reference_failed(ranks):
    summary = summarise(ranks.filter(pl.col("row") == "better"), TABLE)
    assert all(line["difference"] is None for line in summary) and "| better | 0." in markdown(summary, TABLE)


def test_data_sets_add_up_in_one_folder_and_a_repeated_one_is_replaced(ranks, tmp_path):
    folder = RunDir(str(tmp_path))
    collect(folder, ranks, TABLE)
    other = pl.concat([ranks_of(evaluated(np.arange(1, 31), "books"), name, 0, TABLE) for name in ("base", "better")])
    collect(folder, other, TABLE)
    collect(folder, other, TABLE)
    page = (tmp_path / MARKDOWN).read_text()
    assert "## shop, all items ranked: 400 users, 2 seeds" in page and "## books, unseen items ranked: 30 users, 1 seed\n" in page
    assert len(pl.read_parquet(tmp_path / RANKS)) == len(ranks) + len(other)
    theirs = ranks.filter(pl.col("row") == "base").with_columns(row=pl.lit("another system"))  # added by hand
    theirs = theirs.drop("training_seconds").cast({"rank_all": pl.Int64, "seed": pl.Int64})
    pl.concat([pl.read_parquet(tmp_path / RANKS), theirs], how="diagonal_relaxed").write_parquet(tmp_path / RANKS)
    collect(folder, ranks, TABLE)
    assert "| another system |" in (tmp_path / MARKDOWN).read_text()


def test_seconds_of_training_are_means_over_seeds_of_what_is_trained():
    """The sequence model takes stage 1 to fine-tuning, the full ranking `ranking` too, and counts take nothing."""
    more = {"rankings": ["sequencer", "ridge"], "metrics": ["hr@1"], "paper": {"shop": {"other": {"hr@1": 0.1}}}}
    table = TABLE.model_copy(update=more)
    models = pl.concat(
        [evaluated(np.arange(1, 20)), evaluated(np.arange(1, 20)).filter(model="model").with_columns(model=pl.lit("sequencer"))]
    )
    took = {"fusion": 10, "quantizer": 20, "finetune": 300, "ranking": 4000}
    ranks = pl.concat([ranks_of(models, "base", seed, table, took | {"pretrain": 1000.0 * seed}) for seed in (0, 2)])
    theirs = ranks.filter(row="base", seed=0).with_columns(row=pl.lit("another system")).drop("training_seconds")
    found = {line["row"]: line["seconds"] for line in summarise(pl.concat([ranks, theirs], how="diagonal"), table)}
    assert found == {"base": 5330, "sequencer": 1330, "ridge": None, "another system": None}
    page = markdown(summarise(ranks, table), table)
    assert (
        "| hr@1 | against base | paper | seconds of training |\n|---|---|---|---|---|\n| **base** | 0.0526 ± 0.0000 |  |  | 5,330 |\n"
        in page
    )
    assert "(-0.1579 to +0.0000) |  |  |\n" in page and " |  | 1,330 |\n| other |  |  | 0.1000 |  |\n" in page
    assert "seconds" not in markdown(summarise(theirs, table), table)


def test_published_figures_are_next_to_ours_for_the_protocol_they_follow():
    published = TABLE.model_copy(update={"paper": {"shop": {"base": {"hr@10": 0.1418}}}})
    text = markdown(summarise(ranks_of(evaluated(np.arange(1, 31)), "base", 0, TABLE), published), published)
    first, second = text.split("## shop, unseen")
    assert "0.1418" in first and "0.1418" not in second


def test_a_published_row_that_was_not_run_stands_by_itself():
    published = TABLE.model_copy(update={"metrics": ["hr@10", "ndcg@10"], "paper": {"shop": {"SASRec, published": {"hr@10": 0.1233}}}})
    first, second = markdown(summarise(ranks_of(evaluated(np.arange(1, 31)), "base", 0, TABLE), published), published).split(
        "## shop, unseen"
    )
    assert "| SASRec, published |  |  | 0.1233 |  |  |  |" in first and "SASRec" not in second and "‡" not in first


def test_figures_that_cannot_be_right_are_marked():
    """hr@1 .0075 and hr@5 .0408 allow ndcg@5 from .0075 + .0333 / log2(6) to .0075 + .0333 / log2(3)."""
    values = {"hr@1": 0.0075, "hr@5": 0.0408, "ndcg@5": 0.0422}
    published = TABLE.model_copy(update={"metrics": ["hr@5", "ndcg@5"], "paper": {"shop": {"VQ-Rec": values}}})
    text = markdown(summarise(ranks_of(evaluated(np.arange(1, 31)), "base", 0, TABLE), published), published)
    assert "| VQ-Rec |  |  | 0.0408 |  |  | 0.0422 ‡ |" in text and "‡ cannot be right for one target per user" in text


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"hr@1": 0.0075, "hr@5": 0.0408, "ndcg@5": 0.0203}, set()),  # the least is .02038
        ({"hr@1": 0.0075, "hr@5": 0.0408, "ndcg@5": 0.0202}, {"ndcg@5"}),
        ({"hr@1": 0.0075, "hr@5": 0.0408, "ndcg@5": 0.0286}, set()),  # the most is .02851
        ({"hr@1": 0.0075, "hr@5": 0.0408, "ndcg@5": 0.0287}, {"ndcg@5"}),
        ({"hr@5": 0.1, "ndcg@5": 0.05, "hr@10": 0.2, "ndcg@10": 0.0789}, set()),  # .1 / log2(11) = .02891
        ({"hr@5": 0.1, "ndcg@5": 0.05, "hr@10": 0.2, "ndcg@10": 0.0786}, {"ndcg@10"}),
        ({"hr@5": 0.1, "ndcg@5": 0.05, "hr@10": 0.2, "ndcg@10": 0.0856}, set()),  # .1 / log2(7) = .03562
        ({"hr@5": 0.1, "ndcg@5": 0.05, "hr@10": 0.2, "ndcg@10": 0.0859}, {"ndcg@10"}),
        ({"hr@1": 0.05, "hr@5": 0.1, "hr@10": 0.2, "ndcg@10": 0.1172}, set()),  # both steps without ndcg@5: .03155 + .03562 above .05
        ({"hr@1": 0.05, "hr@5": 0.1, "hr@10": 0.2, "ndcg@10": 0.1175}, {"ndcg@10"}),
        ({"ndcg@10": 0.5}, set()),
        ({"hr@10": 0.2, "ndcg@10": 0.9}, set()),  # what lies above is not known
    ],
)
def test_ndcg_lies_between_what_the_hits_allow(values, wanted):
    assert impossible(values) == wanted


def test_seven_pairs_of_the_papers_second_table_are_impossible():
    paper = load_table(ROOT / "configs" / "tables" / "comparison.yaml").paper
    found = {(domain, row.partition(",")[0]) for domain, rows in paper.items() for row, values in rows.items() if impossible(values)}
    assert found == {("games", "VQ-Rec")} | {(domain, row) for domain in ("instruments", "arts") for row in ("S3-Rec", "MISSRec", "P5-CID")}


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "tables").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_table_that_comes_with_the_project_is_one_a_sweep_accepts(file, tmp_path):
    from qbert_ray.config.loading import load_config, with_values
    from qbert_ray.sweeps.trials import Plan

    table = load_table(file)
    config = load_config([ROOT / "configs" / "movielens.yaml"], [f"run.dir={tmp_path}"])
    sweep = {"name": f"table-{file.stem}", "stage": "evaluate", "search": "variants", "variants": table.variants, "seeds": [0, 1]}
    plan = Plan(with_values(config, {"sweep": sweep}))
    assert len(plan.trials) == 2 * len(table.variants) and set(plan.names.values()) == set(table.variants)
    assert "ingest" in plan.shared(plan.trials[-1])
    known = [*table.variants, *table.rankings]
    assert all(row in known or row.endswith(", published") for rows in table.paper.values() for row in rows)


MODALITIES = {
    "instruments": {"image", "text", "lexical"},  # structure only
    "games": {"image"},  # titles
    "movielens": set(),
}


@pytest.mark.parametrize(("data", "lacking"), MODALITIES.items())
def test_rows_of_modalities_that_a_data_set_lacks_are_left_out(data, lacking):
    config = load_config([ROOT / "configs" / f"{data}.yaml"])
    left_out = impossible_rows(config, load_table(ROOT / "configs" / "tables" / "modalities.yaml"))
    assert set(left_out) == lacking
    assert all(f"no domain has input for features.modalities=['{name}']" in why for name, why in left_out.items())
    recipe = impossible_rows(config, load_table(ROOT / "configs" / "tables" / "comparison.yaml"))
    assert list(recipe) == ["paper's recipe"] * (lacking >= {"image", "text"})


def test_rows_stay_where_semantic_ids_are_given():
    config = load_config([ROOT / "configs" / "instruments.yaml"], ["data.semantic_ids=ids.parquet"])
    assert impossible_rows(config, load_table(ROOT / "configs" / "tables" / "readings.yaml")) == {}


def test_a_reference_that_the_data_cannot_have_is_refused():
    config = load_config([ROOT / "configs" / "instruments.yaml"])
    table = Table(title="T", reference="image", variants={"image": {"features": {"modalities": ["image"]}}, "all": {}})
    with pytest.raises(ConfigError, match="compares with the row 'image', which these data cannot have: no domain has input"):
        impossible_rows(config, table)


def test_the_command_runs_the_other_rows_and_says_which_it_left_out(monkeypatch, tmp_path, capsys):
    from qbert_ray.cli import main as cli
    from qbert_ray.sweeps import tuning

    ran, plans, users = [], [], np.arange(1, 31)

    def search(plan, journal):
        plans.append(plan)
        ran.extend(plan.names.values())

    monkeypatch.setattr(cli, "_search", search)
    monkeypatch.setattr(tuning, "ranks", lambda plan, table: pl.concat([ranks_of(evaluated(users), name, 0, table) for name in ran]))
    table, config = ROOT / "configs" / "tables" / "modalities.yaml", ROOT / "configs" / "instruments.yaml"
    with pytest.raises(SystemExit):  # no trial was run
        main(["reproduce", str(table), "-c", str(config), "-o", str(tmp_path / "out"), f"run.dir={tmp_path / 'run'}", "sweep.seeds=[0]",
              "sweep.space.sequencer.dropout=[0.1]", "sweep.objectives={hr@5: max}", "sweep.max_concurrent=3"])  # fmt: skip
    (plan,) = plans
    assert (plan.sweep.space, plan.sweep.max_concurrent, plan.metric) == ({}, 3, "ndcg@10"), (
        "limits hold, a search of the config's own does not"
    )
    assert plan.folder.uri == f"{tmp_path / 'run'}/table-modalities", "no folder of a stage, whatever the table is called"
    told = " ".join("".join(capsys.readouterr()).split())
    assert ran == ["all", "structure", "id"] and "row 'image' is left out: no domain has input" in told
    page = (tmp_path / "out" / MARKDOWN).read_text()
    assert "Not run, text: no domain has input for features.modalities=['text']." in page and "| structure |" in page
    more = pl.concat([ranks_of(evaluated(users, "books"), name, 0, load_table(table)) for name in ("all", "text")])
    collect(RunDir(str(tmp_path / "out")), more, load_table(table))
    page = (tmp_path / "out" / MARKDOWN).read_text()
    assert page.count("Not run, text") == 2  # under both protocols of the first data set alone


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "tables").glob("*.yaml")), ids=lambda file: file.stem)
def test_tables_show_the_five_metrics(file):
    assert load_table(file).metrics == ["hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"title": "T", "reference": "b", "variants": {"a": {}}}, "reference 'b' is none of the variants"),
        ({"title": "T", "reference": "a", "variants": {"a": "nowhere.yaml"}}, "no config file at"),
        ({"title": "T", "variants": {"a": {}}}, "reference: Field required"),
        ({"title": "T", "reference": "a", "variants": {"a": {}}, "rankings": ["sequencer"], "sequencers": True}, "those rows are made"),
        ({"title": "T", "reference": "a", "variants": {"a": {}, "a, sequencer": {}}, "sequencers": True}, "those rows are made"),
        ({"title": "T", "reference": "a", "variants": ["a"]}, "variants"),
        ({"title": "T", "reference": "a", "variants": {"a": {}}, "metrics": ["mrr@10"]}, "metrics.0: String should match"),
        ({"title": "T", "reference": "a", "variants": {"a": {}}, "rankings": ["bert"]}, "rankings.0: Input should be 'sequencer', 'ridge'"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, said):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=said):
        load_table(tmp_path / "t.yaml")


@pytest.mark.parametrize(
    ("output", "message"), [("ftp://host/folder", "cannot open"), ("s3://key:secret@bucket/folder", "holds credentials")]
)
def test_an_output_that_cannot_be_is_refused_before_anything_runs(output, message, tmp_path, capsys):
    table, config = ROOT / "configs" / "tables" / "fusion.yaml", ROOT / "configs" / "demo.yaml"
    with pytest.raises(SystemExit):
        main(["reproduce", str(table), "-c", str(config), "-o", output, f"run.dir={tmp_path / 'run'}"])
    told = "".join(capsys.readouterr())
    assert message in " ".join(told.split()) and "secret" not in told
    assert not (tmp_path / "run").exists()
