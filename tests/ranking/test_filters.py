"""Filters hold before the top k: every list is the best of what is left, by plain sorting of the scores of the whole catalog."""

import warnings

import numpy as np
import polars as pl
import pytest
import torch

from qbert_ray.config.schema import Config, Ranking
from qbert_ray.inputs import conditions
from qbert_ray.inputs.rules import check_rules
from qbert_ray.inputs.sources import SourceError
from qbert_ray.ranking import blocks, ranker
from qbert_ray.ranking import score as scoring
from qbert_ray.ranking.filters import EVERYTHING, Filter, own_lists
from qbert_ray.ranking.loader import load_ranker
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.ranking.rules import load_rules
from qbert_ray.storage import columns
from tests.small_run import COLD, ITEMS, USERS, make_run

NONE = np.zeros(0, np.int64)
HISTORIES = [np.array([3, 1, 4, 1]), NONE, np.array([38, 2])]
FILTERS = {
    "items": Filter(items=np.arange(ITEMS) % 3 != 0),
    "cold items alone": Filter(items=np.arange(ITEMS) >= ITEMS - COLD),
    "nothing": Filter(items=np.zeros(ITEMS, bool)),
    "excluded": Filter(excluded=[np.array([5, 6, 7]), NONE, np.arange(ITEMS)]),
    "allowed": Filter(allowed=[np.array([8, 3, 39, 8]), None, NONE]),
    "lists": Filter(np.arange(ITEMS) != 4, [np.array([8]), np.array([2]), NONE], [np.array([8, 3, 39, 8]), np.arange(7), NONE]),
    "all kinds": Filter(np.arange(ITEMS) % 2 == 0, [np.array([2, 4]), np.array([0]), np.array([8])], [None, np.arange(20), np.arange(9)]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender.load(run.uri)


def left(only, history, row, remove_seen):
    """The items that a history may get, by definition."""
    items = set(range(ITEMS)) if only.items is None else set(np.flatnonzero(only.items).tolist())
    items -= set(history.tolist()) if remove_seen else set()
    items -= set(only.excluded[row].tolist()) if only.excluded is not None else set()
    own = only.allowed[row] if only.allowed is not None else None
    return items if own is None else items & set(own.tolist())


def plainly_best(scores, items, k):
    """The k largest scores of some items, equal ones by index."""
    return sorted(items, key=lambda item: (-scores[item], item))[:k]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("block", [7, 8192])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_best_are_those_of_the_items_that_are_left(run, monkeypatch, name, block, enabled):
    monkeypatch.setattr(blocks, "BLOCK", block)
    rank, only = load_ranker(run, "shop", Ranking(enabled=enabled, rerank=0)), FILTERS[name]
    scores = rank.scores(HISTORIES)["model"].tolist()
    for remove_seen in (True, False):
        values, items = rank.best(HISTORIES, 9, remove_seen, only)
        for row, history in enumerate(HISTORIES):
            expected = plainly_best(scores[row], left(only, history, row, remove_seen), 9)
            assert [item for item in items[row].tolist() if item >= 0] == expected
            assert values[row, : len(expected)].tolist() == pytest.approx([scores[row][item] for item in expected], abs=1e-4)
            assert values[row, len(expected) :].isneginf().all()


@pytest.mark.parametrize("size", [0, 4, 64])
@pytest.mark.parametrize("enabled", [True, False])
def test_short_lists_are_scored_alone_and_ranked_as_in_the_whole_catalog(run, monkeypatch, enabled, size):
    rank, only = load_ranker(run, "shop", Ranking(enabled=enabled, rerank=size)), FILTERS["lists"]
    assert own_lists(only, HISTORIES, 5)[0].shape == (3, 5) and own_lists(FILTERS["allowed"], HISTORIES, ITEMS) is None
    for remove_seen in (True, False):
        found = []
        for share in (ITEMS, 1):  # the whole catalog is scored, or the lists alone
            monkeypatch.setattr(ranker, "LISTED", share)
            found.append(rank.best(HISTORIES, 6, remove_seen, only))
        assert torch.equal(found[0][1], found[1][1])
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)


def test_a_single_long_list_is_not_laid_out_for_every_history(run, monkeypatch):
    only, wide = Filter(allowed=[np.arange(20), *[np.arange(2)] * 255]), []
    monkeypatch.setattr(ranker, "own_lists", lambda *given: wide.append(own_lists(*given)) or wide[-1])
    best = load_ranker(run, "shop", Ranking()).best([NONE] * 256, 20, True, only)[1]
    assert (best >= 0).sum(1).tolist() == [20, *[2] * 255] and wide == [None]
    assert own_lists(only, [NONE] * 256, 19) is None and own_lists(only, [NONE] * 256, 20)[0].shape == (256, 20)


@pytest.mark.parametrize("block", [7, 8192])
def test_the_reranker_reorders_the_best_of_the_items_that_are_left(run, monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    blended, corrected = (load_ranker(run, "shop", Ranking(rerank=size)) for size in (0, 6))
    only = FILTERS["items"]
    before, after = (each.best(HISTORIES, ITEMS, True, only)[1] for each in (blended, corrected))
    assert torch.equal(before[:, :6].sort(1).values, after[:, :6].sort(1).values)
    assert torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.equal(before, after)
    full = load_ranker(run, "shop", Ranking())  # what is hidden must not be a candidate: all 64 are items that are left
    assert set(full.best(HISTORIES, 64, False, only)[1].flatten().tolist()) - {-1} == set(np.flatnonzero(only.items))


def test_both_filters_are_as_one_after_the_other():
    one, other = FILTERS["all kinds"], Filter(np.arange(ITEMS) < 10, [np.array([6])] * 3, [np.arange(5), None, np.arange(4, 30)])
    for both in (one.also(other), other.also(one)):
        for row in range(3):
            expected = left(one, HISTORIES[0], row, False) & left(other, HISTORIES[0], row, False)
            assert left(both, HISTORIES[0], row, False) == expected
    assert EVERYTHING.also(EVERYTHING) == EVERYTHING and one.also(EVERYTHING).part(slice(1, 2)).excluded[0].tolist() == [0]


@pytest.mark.parametrize("block", [7, 8192])
def test_a_sequence_model_alone_adds_its_number_to_repeats_in_every_way_of_ranking(tmp_path, monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    rank = load_ranker(make_run(tmp_path / "run", repeats=True), "shop", Ranking(enabled=False))
    rank.model.repeats.fill_(-3.0)
    scores = rank.scores(HISTORIES)["model"]
    for row, history in enumerate(HISTORIES):
        scores[row, np.unique(history)] -= 3
    values, items = rank.best(HISTORIES, ITEMS, remove_seen=False)
    assert items.tolist() == [plainly_best(row, range(ITEMS), ITEMS) for row in scores.tolist()]
    torch.testing.assert_close(values, scores.gather(1, items))
    some = torch.tensor([[4, 3, 30]] * 3)
    torch.testing.assert_close(rank.candidate_scores(HISTORIES, some), scores.gather(1, some))
    assert rank.repeats() == -3 and rank.repeats("sequencer") == 0


def test_with_a_blend_the_number_is_the_sequence_models_own(tmp_path):
    rank = load_ranker(make_run(tmp_path / "run", repeats=True), "shop", Ranking(rerank=0))
    before = rank.best(HISTORIES, 9, remove_seen=False)
    rank.model.repeats.fill_(-3.0)
    assert all(torch.equal(one, other) for one, other in zip(before, rank.best(HISTORIES, 9, remove_seen=False), strict=True))
    assert rank.repeats() == 0 and rank.repeats("sequencer") == -3


# the recommender


def names(best):
    return [item for item, _ in best]


def test_recommended_items_are_those_that_are_allowed(recommender):
    history, ids = recommender.ids[:3], recommender.ids
    everything = names(recommender.recommend([history], ITEMS)[0])
    some, others = everything[::2], everything[1::2]
    assert len(everything) == ITEMS - 3
    assert names(recommender.recommend([history], 40, exclude=others)[0]) == names(recommender.recommend([history], 40, allow=some)[0])
    per_history = recommender.recommend([history, history, []], 40, exclude=[others, None, []], allow=[None, some, some])
    assert set(names(per_history[0])) == set(names(per_history[1])) == set(some) and set(names(per_history[2])) == set(some)
    assert len(recommender.recommend([history], 5, exclude=everything[:5])[0]) == 5  # other items take the places
    assert recommender.recommend([history], 5, allow=[]) == [[]]
    assert recommender.recommend([history], 5, exclude=["no such item"]) == recommender.recommend([history], 5)
    assert names(recommender.recommend([history], 9, allow=(item for item in ids[:5]))[0]) != []


def test_an_unknown_item_that_is_allowed_is_said(recommender):
    known = recommender.ids[7]
    with pytest.warns(UserWarning, match="1 of 2 items of allow are not in the catalog, such as 'x'"):
        assert names(recommender.recommend([[]], allow=["x", known])[0]) == [known]
    with pytest.raises(ValueError, match="1 of 1 items of allow"):
        recommender.recommend([[]], allow=["x"], unknown="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recommender.recommend([[]], exclude=["x"], unknown="error")  # there is nothing to leave out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(exclude=5), "exclude is of type int"),
        (dict(allow={"a": 1}), "allow is of type dict"),
        (dict(exclude=[1]), "exclude holds 1 of type int; item_ids are text: write '1'"),
        (dict(exclude=[["a"], ["b"]]), "exclude has 2 lists for 1 histories"),
        (dict(exclude=[["a", 3]]), "exclude 0 holds 3"),
        (dict(allow=[["a"], "b"]), "allow holds"),
        (dict(exclude="price > 3", bare=True), "a recommender without a run takes lists"),
    ],
)
def test_filters_of_another_kind_are_refused_by_name(recommender, arguments, said):
    asked = Recommender(recommender.ranker, recommender.ids) if arguments.pop("bare", False) else recommender
    with pytest.raises(ValueError, match=said):
        asked.recommend([["shop-item-1"]], **arguments)


@pytest.mark.parametrize("size", [0, 3, 64])
def test_scores_of_candidates_are_those_where_they_are_the_only_items(run, size):
    recommender = Recommender(load_ranker(run, "shop", Ranking(rerank=size)), [f"shop-item-{item}" for item in range(ITEMS)])
    candidates = recommender.ids[::3] + recommender.ids[-2:]
    for history in (recommender.ids[:4], [], recommender.ids[-1:]):
        found = recommender.score_candidates(history, candidates)
        expected = recommender.recommend([history], ITEMS, remove_seen=False, allow=candidates)[0]
        assert names(found) == names(expected)
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)
    assert recommender.score_candidates([], []) == []
    with pytest.raises(ValueError, match="1 of 2 items of the candidates"):
        recommender.score_candidates([], ["x", candidates[0]], unknown="error")


def test_similar_items_have_the_largest_cosines(recommender):
    vectors = torch.nn.functional.normalize(recommender.ranker.item_vectors()[0], dim=-1)
    cosines = (vectors @ vectors[5]).tolist()
    expected = [recommender.ids[item] for item in plainly_best(cosines, set(range(ITEMS)) - {5}, 6)]
    found = recommender.similar_items(recommender.ids[5], 6)
    assert names(found) == expected
    assert found[0].score == pytest.approx(cosines[recommender.index[expected[0]]], abs=1e-5)
    assert names(recommender.similar_items(recommender.ids[5], 5, exclude=expected[:1])) == expected[1:]
    assert names(recommender.similar_items(recommender.ids[5], 3, allow=expected[2:4])) == expected[2:4]
    with pytest.raises(ValueError, match="no item 'x' in the catalog of 40 items, such as 'shop-item-0'"):
        recommender.similar_items("x")


def test_products_of_the_embeddings_are_the_sequence_models_scores(recommender):
    ids = recommender.ids
    users, items = recommender.user_embeddings([ids[:3], [], ids[5:9]], ["a", "b", "c"]), recommender.item_embeddings()
    assert users["user_id"].to_pylist() == ["a", "b", "c"] and items["item_id"].to_pylist() == ids
    vectors = [columns.to_numpy(table["embedding"]) for table in (users, items)]
    histories = [np.array([0, 1, 2]), NONE, np.array([5, 6, 7, 8])]
    expected = recommender.ranker.scores(histories)["sequencer"].numpy()
    np.testing.assert_allclose(vectors[0] @ vectors[1].T + items["bias"].to_numpy(), expected, atol=1e-4)
    assert recommender.user_embeddings([]).num_rows == 0
    with pytest.raises(ValueError, match="user_ids has 1 entries for 2 histories"):
        recommender.user_embeddings([[], []], ["a"])


# score.exclude and score.allow


@pytest.fixture
def files(tmp_path):
    """The items files of the shop in which every other item is in stock, and the config of a folder with them."""
    rows = pl.DataFrame({"item_id": [f"shop-item-{item}" for item in range(ITEMS)]}).with_row_index("price")
    rows = rows.with_columns((pl.col("price") % 2 == 0).alias("in_stock"), pl.lit("Acme").alias("brand"))
    rows = rows.with_columns(pl.when(pl.col("price") < 5).then(None).otherwise("in_stock").alias("in_stock"))
    rows.write_parquet(tmp_path / "items.parquet")
    rows.write_csv(tmp_path / "items.csv")
    return tmp_path


def config(folder, items="items.parquet", **score):
    return Config.model_validate({"data": {"root": str(folder), "domains": {"shop": {"items": items}}}, "score": score})


def mask(rules):
    return np.flatnonzero(rules.items).tolist()


@pytest.mark.parametrize("items", ["items.parquet", "items.csv"])
def test_expressions_are_computed_over_the_items_files(run, files, items):
    stocked = [item for item in range(5, ITEMS) if item % 2 == 0]
    rules, report = load_rules(config(files, items, allow="in_stock == true"), run, "shop")
    assert mask(rules) == stocked and not rules.by_user
    assert report == {"score.allow": {"expression": "in_stock == true", "items_in_files": ITEMS, "items": len(stocked)}}
    rules, _ = load_rules(config(files, items, exclude="in_stock == false"), run, "shop")
    assert mask(rules) == sorted({*range(5), *stocked})  # where nothing is known, the expression does not hold
    rules, _ = load_rules(config(files, items, allow="price >= 10 and brand = 'Acme'", exclude="price in (12, 13)"), run, "shop")
    assert mask(rules) == [10, 11, *range(14, ITEMS)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("in_stok == true", "names in_stok, which .* does not have; did you mean in_stock"),
        ("price <", "neither an expression such as in_stock == true .* nor a table"),
        ("price", "is UInt32, neither true nor false; the columns are price UInt32"),
        ("brand > 3", "cannot be computed"),
        ("1 = 1", "names no column"),
        ("brand in (select x from read_csv('/etc/passwd'))", "holds 'select'"),
        ("price < 0", "leave none of 40 items"),
        ("none.csv", "no Parquet, CSV or JSONL file at"),
        ("bad.csv", "has no column item_id; columns found: sku"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(run, files, text, said):
    (files / "bad.csv").write_text("sku\n1\n")
    with pytest.raises(SourceError, match=said):
        load_rules(config(files, allow=text), run, "shop")
    if said.startswith(("names", "neither", "holds", "no Parquet", "has no")):  # known before anything is trained
        with pytest.raises(SourceError, match=said):
            check_rules(config(files, allow=text))


@pytest.mark.parametrize(
    "text",
    [
        "price = 1 or exists (from read_csv('/etc/passwd'))",
        "price = 1 /* ' */ or exists (select a from read_csv('x')) /* ' */",
        "price = 1 -- '\n or exists (from read_csv('x')) -- '",
        "brand = E'\\'' or exists (from read_csv('x')) or brand = ''",
        "brand = $$'$$ or price in (table x) or brand = $$'$$",
        "brand = `'` or price in (values 1) or brand = `'`",
        "read_parquet('x') = price",
    ],
)
def test_expressions_hold_no_queries_however_they_are_hidden(text, monkeypatch):
    monkeypatch.setattr(pl, "sql_expr", lambda _: pytest.fail("polars opens what a query names as it parses"))
    with pytest.raises(SourceError, match="holds '.*without queries and comments"):
        conditions.parse(text, "score.exclude")


@pytest.mark.parametrize(
    "text", ["brand = 'from $5 -- a select /* table'", '"from" > 3', "brand = 'it''s' and price > 1", "brand in ('a','b')", "a_from > 1"]
)
def test_words_of_queries_may_be_values_and_quoted_columns(text):
    assert conditions.parse(text, "score.exclude").meta.root_names()


def test_tables_of_items_and_of_users(run, files):
    (files / "out.csv").write_text("item_id\nshop-item-1\nshop-item-1\n,\nelsewhere\n")
    pl.DataFrame({"user_id": ["user-1", "user-1", "user-3"], "item_id": ["shop-item-7", "shop-item-8", "gone"]}).write_parquet(
        files / "seen.parquet"
    )
    rules, report = load_rules(config(files, exclude="out.csv", allow="seen.parquet"), run, "shop")
    assert mask(rules) == [item for item in range(ITEMS) if item != 1]
    assert report["score.exclude"] == {"table": "out.csv", "rows": 2, "without_an_id": 1, "unknown_items": 1, "items": 1}
    assert report["score.allow"]["users"] == 1 and report["score.allow"]["unknown_items"] == 1
    only = rules.of(["user-3", "user-1", "user-0", "zzz"])
    assert [sorted(items.tolist()) for items in only.allowed] == [[], [7, 8], [], []] and only.excluded is None
    (files / "other.csv").write_text("item_id\nSHOP-ITEM-1\n")
    _, report = load_rules(config(files, exclude="other.csv"), run, "shop")
    assert "one side is written in capitals" in report["score.exclude"]["warning"]


def test_scored_users_get_what_the_rules_leave_and_others_are_counted(run, files, monkeypatch):
    monkeypatch.setattr(scoring, "own_device", lambda: "cpu")
    rows = [(user, item) for user in range(1, USERS) for item in range(10, 14)]
    pl.DataFrame(rows, schema=["user", "item"], orient="row").select(
        pl.format("user-{}", "user").alias("user_id"), pl.format("shop-item-{}", "item").alias("item_id")
    ).write_parquet(files / "allowed.parquet")
    rules, _ = load_rules(config(files, allow="allowed.parquet", exclude="price = 12"), run, "shop")
    counts = scoring.ScorePart(run, "shop", Ranking(), 7, False, rules)("shop-00000.parquet")
    table = run.read("score").to_pylist()
    assert {row["item_id"] for row in table} == {"shop-item-10", "shop-item-11", "shop-item-13"}
    users = {"users": USERS, "users_without_items": 1, "users_with_rules": USERS - 1}
    assert counts == users | {"rows": 3 * (USERS - 1)}
    assert {row["user_id"] for row in table} == {f"user-{user}" for user in range(1, USERS)}


def test_texts_are_filters_in_python_too(run, files):
    asked = Recommender.load(run.uri)
    asked.read_rules = lambda key, text: load_rules(config(files, **{key: text}), run, "shop")[0]
    (files / "out.csv").write_text("item_id\nshop-item-6\n")
    found = names(asked.recommend([[]], ITEMS, allow="in_stock == true", exclude="out.csv")[0])
    assert sorted(found) == sorted(f"shop-item-{item}" for item in range(8, ITEMS, 2))
    pl.DataFrame({"user_id": ["u"], "item_id": ["shop-item-7"]}).write_parquet(files / "pairs.parquet")
    with pytest.raises(ValueError, match="a table of users and items; give a list of item_id for each history"):
        asked.recommend([[]], exclude="pairs.parquet")


def test_items_that_are_gone_are_never_recommended(tmp_path):
    run = make_run(tmp_path)
    before = Recommender.load(run.uri)
    best = names(before.recommend([[]], 5)[0])
    for part, gone in enumerate((best[2:4], best[:2])):  # the last list holds
        index = [before.index[item] for item in gone]
        table = pl.DataFrame({"domain": ["shop"] * 2, "item_id": gone, "item_index": index}).to_arrow().cast(columns.GONE)
        run.write_part("ingest/gone", f"shop-{part:05d}.parquet", table)
    after = Recommender.load(run.uri)
    found = names(after.recommend([[]], ITEMS)[0])
    assert len(found) == ITEMS - 2 and not set(best[:2]) & set(found)
    assert names(after.recommend([[]], ITEMS, allow=best)[0]) == [item for item in found if item in best]
    assert set(names(after.score_candidates([], best))) == set(best[2:])
    assert not set(best[:2]) & set(names(after.similar_items(best[3], ITEMS)))
    assert len(after.recommend([[best[0]]], 5)[0]) == 5  # what users had of it still counts
