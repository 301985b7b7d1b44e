"""The generative kind of sequence model from training to recommendations, in this process."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from qbert_ray.config.schema import Config
from qbert_ray.execution.local import LocalExecutor
from qbert_ray.execution.progress import Quiet
from qbert_ray.ranking import evaluate, score
from qbert_ray.ranking.filters import Filter
from qbert_ray.ranking.generative import GenerativeRanker, load_generative_ranker
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.sequence import beam_search
from qbert_ray.sequence import stage as sequence
from qbert_ray.sequence.beam_search import Trie
from qbert_ray.sequence.decoder import Generator
from qbert_ray.sequence.decoder_task import GenerativeTask
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import BY_NAME
from qbert_ray.training import Loop
from tests.ranking.test_filters import FILTERS, HISTORIES, left, plainly_best
from tests.small_run import COLD, ITEMS, LEVELS, SIZE, USERS, make_run

SEQUENCER = {"kind": "generative", "width": 16, "num_layers": 1, "num_heads": 2, "head_width": 4, "ffn_width": 16, "max_items": 6}
FINETUNE = {"epochs": 5, "batch_size": 32, "microbatches": 2, "learning_rate": 3e-3, "warmup_steps": 0, "patience": None}
SECTIONS = {"sequencer": SEQUENCER, "finetune": FINETUNE, "evaluate": {"cutoffs": [1, 10]}}


def make_config(run, **sections):
    domains = {"run": {"dir": run.uri, "tensorboard": False}, "data": {"domains": {"shop": {}}}}
    config = Config.model_validate(domains | SECTIONS | sections)
    run.write_bytes("config.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    return config


@pytest.fixture(scope="module")
def config_and_run(tmp_path_factory):
    """A run that was trained, evaluated and scored."""
    run = make_run(tmp_path_factory.mktemp("run"))
    run.write_json("semantic_ids/manifest.json", {"stage": "semantic_ids", "counts": {"codebook_size": SIZE, "num_levels": LEVELS}})
    run.delete("finetune")
    config = make_config(run)
    for work in (sequence.finetune, evaluate.evaluate, score.score):
        work(config, run, LocalExecutor(), Quiet())
    return config, run


@pytest.fixture(scope="module")
def ranker(config_and_run):
    return load_generative_ranker(config_and_run[1], "shop", 20)


def histories_of(run, upto="test"):
    sequences = columns.to_sequences(run.read("ingest/sequences", "shop"))
    return [sequences.history(user, upto) for user in range(len(sequences.user_ids))]


def test_training_learns_and_leaves_its_epochs(config_and_run):
    log = [json.loads(line) for line in config_and_run[1].read_bytes("finetune/shop/metrics.jsonl").splitlines()]
    assert len(log) == FINETUNE["epochs"]
    assert log[-1]["train_loss"] < log[0]["train_loss"] < 2 * np.log(SIZE)
    assert all(0 <= line["ndcg@10"] <= line["hr@10"] <= 1 for line in log)


def test_every_prefix_is_a_sample_once_an_epoch(config_and_run):
    config, run = config_and_run
    task = GenerativeTask(config, run, ["shop"], config.finetune)
    sequences = task.sequences["shop"]
    expected = Counter()
    for begin, end in zip(sequences.indptr[:-1], sequences.indptr[1:], strict=True):
        for place in range(begin + 1, end):
            expected[(0, max(begin, place - SEQUENCER["max_items"]), place)] += 1
    for epoch in (0, 1):
        batches = task.batches(epoch)
        assert Counter(tuple(row) for batch in batches for row in batch.tolist()) == expected
        assert max(map(len, batches)) <= FINETUNE["batch_size"]
    assert not np.array_equal(task.batches(0)[0], task.batches(1)[0])


def test_microbatches_do_not_change_the_loss(config_and_run):
    config, run = config_and_run
    task = GenerativeTask(config, run, ["shop"], config.finetune)
    model = task.build().eval()
    samples = task.batches(0)[0]
    device = torch.device("cpu")
    whole, size = task.loss(model, samples, 0, device)
    parts = [task.loss(model, piece, 0, device) for piece in np.array_split(samples, 3)]
    assert size == sum(each for _, each in parts) == LEVELS * len(samples)
    assert torch.allclose(whole, sum(loss for loss, _ in parts), rtol=1e-5)


def test_a_wide_beam_ranks_as_exact_scores_do(ranker, config_and_run):
    histories = histories_of(config_and_run[1])
    wide = GenerativeRanker(ranker.model, ranker.codes, ranker.trained, ITEMS)
    exact = ranker.exact_scores(histories)
    scores, items = wide.best(histories, ITEMS, remove_seen=False)
    expected = exact.sort(dim=1, descending=True, stable=True)
    assert torch.equal(items, expected.indices)
    torch.testing.assert_close(scores, expected.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide.scores(histories)["model"], exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FILTERS)
def test_a_wide_beam_finds_the_best_of_the_items_that_are_left(ranker, name):
    wide, only = GenerativeRanker(ranker.model, ranker.codes, ranker.trained, ITEMS), FILTERS[name]
    exact = ranker.exact_scores(HISTORIES).tolist()
    for remove_seen in (True, False):
        values, items = wide.best(HISTORIES, 9, remove_seen, only)
        for row, history in enumerate(HISTORIES):
            expected = plainly_best(exact[row], left(only, history, row, remove_seen), 9)
            assert [item for item in items[row].tolist() if item >= 0] == expected
            assert values[row, : len(expected)].tolist() == pytest.approx([exact[row][item] for item in expected], abs=1e-4)
    narrow = GenerativeRanker(ranker.model, ranker.codes, ranker.trained, 2).best(HISTORIES, 2, True, only)[1]
    for row, history in enumerate(HISTORIES):  # beams are spent on items that are left alone
        assert set(narrow[row].tolist()) - {-1} <= left(only, history, row, True)
        assert (narrow[row] >= 0).sum() == min(2, len(left(only, history, row, True)))


def test_a_filter_that_another_thread_puts_in_its_place_is_not_used():
    rng, odd = np.random.default_rng(0), np.arange(ITEMS) % 2 == 1
    codes = rng.permutation(np.unique(rng.integers(0, SIZE, (10 * ITEMS, LEVELS)), axis=0))[:ITEMS]
    others = b"", Trie.build(torch.from_numpy(codes), torch.from_numpy(~odd))

    class Shared(GenerativeRanker):
        """Another thread writes its own filter right after each that is written."""

        def __setattr__(self, name, value):
            super().__setattr__(name, others if name == "_filtered" and value is not None else value)

    model = Generator(LEVELS, SIZE, width=16, num_layers=1, num_heads=2, head_width=4, ffn_width=16).eval()
    items = Shared(model, codes, ITEMS, 5).best(HISTORIES, 5, True, Filter(items=odd))[1]
    assert (items % 2 == 1).all()


def test_candidates_have_exact_scores_and_items_are_similar_by_their_codes(ranker):
    recommender = Recommender(ranker, [f"shop-item-{item}" for item in range(ITEMS)])
    exact = ranker.exact_scores([np.array([3, 1, 4, 1])])[0].tolist()
    found = recommender.score_candidates([f"shop-item-{item}" for item in (3, 1, 4, 1)], [f"shop-item-{item}" for item in (9, 2, 38)])
    assert {name: score for name, score in found} == pytest.approx({f"shop-item-{item}": exact[item] for item in (9, 2, 38)}, abs=1e-4)
    best = recommender.similar_items("shop-item-5", ITEMS)
    assert len(best) == ITEMS - 1
    shared = [(ranker.codes[recommender.index[item]] == ranker.codes[5]).sum() for item, _ in best]
    assert np.corrcoef(shared, [score for _, score in best])[0, 1] > 0.9
    for method in (recommender.item_embeddings, lambda: recommender.user_embeddings([[]])):
        with pytest.raises(ValueError, match="embeddings needs a run with sequencer.kind=masked"):
            method()


def test_scores_are_those_of_the_beams_and_cold_items_are_searched_for_by_themselves(ranker, config_and_run):
    histories = histories_of(config_and_run[1])
    narrow = GenerativeRanker(ranker.model, ranker.codes, ranker.trained, 10)
    scores, cold, exact = narrow.scores(histories)["model"], narrow.cold_scores(histories), narrow.exact_scores(histories)
    found = scores > -torch.inf
    assert (found.sum(1) == 10).all()
    torch.testing.assert_close(scores[found], exact[found], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cold, exact[:, -COLD:], atol=1e-5, rtol=1e-5)
    assert GenerativeRanker(ranker.model, ranker.codes, ITEMS, 10).cold_scores(histories) is None


def test_a_target_in_no_beam_is_the_last_of_all(ranker, config_and_run, tmp_path):
    run = RunDir(str(shutil.copytree(config_and_run[1].uri, tmp_path / "run")))
    sequences = columns.to_sequences(run.read("ingest/sequences", "shop"))
    found = GenerativeRanker(ranker.model, ranker.codes, ranker.trained, 3).scores(histories_of(run))["model"]
    table = {row["user_id"]: row for row in run.read("evaluate/ranks", "shop").to_pylist() if row["model"] == "model"}
    run.delete("evaluate")
    config = make_config(run, sequencer=SEQUENCER | {"beam": 3}, evaluate={"cutoffs": [1]}, score={"top_k": 3})
    evaluate.evaluate(config, run, LocalExecutor(), Quiet())
    again = {row["user_id"]: row for row in run.read("evaluate/ranks", "shop").to_pylist() if row["model"] == "model"}
    unfound = [f"user-{user}" for user in range(USERS) if found[user, sequences.test[user]] == -torch.inf]
    assert unfound and all((again[user]["rank_all"], again[user]["rank_unseen"]) == (ITEMS, ITEMS) for user in unfound)
    assert any(table[user]["rank_all"] < ITEMS for user in unfound), "wider beams reach some of them"


def test_more_items_than_the_catalog_has_are_asked_for_in_bounded_memory(ranker, monkeypatch):
    histories = [np.array([3, 1, 4])] * 9
    expected = ranker.best(histories, ITEMS)
    sizes = []
    searched = beam_search.beam_search

    def seen(model, memory, trie, beam, *others):
        sizes.append((memory.size, beam))
        return searched(model, memory, trie, beam, *others)

    monkeypatch.setattr(beam_search, "beam_search", seen)
    monkeypatch.setattr(beam_search, "SEARCHED_AT_ONCE", 8)
    found = ranker.best(histories, 10**7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sizes == [(4, ITEMS), (4, ITEMS), (1, ITEMS)], "half as many histories where beams are twice as wide as 20"


def test_the_scores_table_holds_unseen_items_by_beams(ranker, config_and_run):
    config, run = config_and_run
    table = run.read("score").to_pylist()
    histories = histories_of(run, "end")
    _, items = ranker.best(histories, config.score.top_k)
    expected = [(f"user-{user}", f"shop-item-{item}") for user, row in enumerate(items.tolist()) for item in row if item >= 0]
    assert [(row["user_id"], row["item_id"]) for row in table] == expected
    assert not {(user, f"shop-item-{item}") for user, history in enumerate(histories) for item in history} & {
        (int(row["user_id"].removeprefix("user-")), row["item_id"]) for row in table
    }


def test_the_recommender_gives_what_the_stage_wrote(config_and_run):
    run = config_and_run[1]
    recommender = Recommender.load(run.uri)
    assert isinstance(recommender.ranker, GenerativeRanker)
    lists = recommender.recommend([[f"shop-item-{item}" for item in history] for history in histories_of(run, "end")], 10)
    found = [(f"user-{user}", item, value) for user, row in enumerate(lists) for item, value in row]
    table = run.read("score").to_pylist()
    assert [(user, item) for user, item, _ in found] == [(row["user_id"], row["item_id"]) for row in table]
    assert [value for *_, value in found] == pytest.approx([row["score"] for row in table], abs=1e-5)
    assert len(recommender.recommend([[]], 5)[0]) == 5


def test_evaluation_writes_ranks_of_the_model(config_and_run):
    run = config_and_run[1]
    table = run.read("evaluate/ranks", "shop").to_pylist()
    ranks = {row["user_id"]: row for row in table if row["model"] == "model"}
    assert len(ranks) == USERS
    exact = load_generative_ranker(run, "shop", 20).exact_scores(histories_of(run))
    target = columns.to_sequences(run.read("ingest/sequences", "shop")).test
    for user in range(USERS):
        rank = 1 + int((exact[user] > exact[user, target[user]]).sum())
        if ranks[f"user-{user}"]["rank_all"] <= 10 and rank <= 10:  # a beam of 20 of 40 items may miss, but not err
            assert ranks[f"user-{user}"]["rank_all"] <= rank
    assert set(run.read_json("evaluate/metrics.json")["shop"]["protocols"]["all"]) == {"model", "popularity", "co_occurrence"}


def test_pretraining_is_of_other_domains_and_taken_whole(tmp_path):
    run = make_run(tmp_path, ("shop", "other"))
    run.write_json("semantic_ids/manifest.json", {"stage": "semantic_ids", "counts": {"codebook_size": SIZE, "num_levels": LEVELS}})
    run.delete("finetune")
    roles = {"domains": {"shop": {}, "other": {"role": "source"}}}
    config = make_config(run, data=roles, pretrain={"epochs": 1, "batch_size": 32})
    assert config.no_pretraining is None
    sequence.pretrain(config, run, LocalExecutor(), Quiet())
    tensors, _ = run.load_model("pretrain/model")
    asked = {}
    executor = SimpleNamespace(fit=lambda task, config, run, folder, workers, progress, **arguments: asked.update({folder: arguments}))
    sequence.finetune(config, run, executor, Quiet())
    loop = Loop(GenerativeTask(config, run, **asked["finetune/shop"]), torch.device("cpu"))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loop.model.state_dict().items())


def test_stages_that_do_not_apply_are_skipped(config_and_run):
    config = config_and_run[0]
    assert BY_NAME["pretrain"].skipped(config) and BY_NAME["ranking"].skipped(config)
    changes = {"sequencer": {"kind": "masked"}, "finetune": {"objective": "masked"}}
    masked = config.model_copy(update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()})
    assert not BY_NAME["pretrain"].skipped(masked) and not BY_NAME["ranking"].skipped(masked)


def test_another_beam_needs_no_new_training(config_and_run):
    config = config_and_run[0]
    wider = config.model_copy(update={"sequencer": config.sequencer.model_copy(update={"beam": 50})})
    changed = {name for name, stage in BY_NAME.items() if stage.depends_on(config) != stage.depends_on(wider)}
    assert changed == {"evaluate", "score"}


def test_a_beam_narrower_than_the_lists_is_refused():
    with pytest.raises(ValueError, match="sequencer.beam is 5"):
        Config.model_validate({"sequencer": {"kind": "generative", "beam": 5}})
    Config.model_validate({"sequencer": {"beam": 5}})  # the masked model has no beams
