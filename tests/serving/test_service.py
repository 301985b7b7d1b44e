"""Answers without HTTP: equal to what is scored in batch, whichever requests are answered together."""

import json

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from qbert_ray.config.loading import with_values
from qbert_ray.ranking import score as scoring
from qbert_ray.serving.service import MOST_ITEMS, RequestError, Service, served_version
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import run_config
from qbert_ray.storage.directory import ArtifactError
from tests.small_run import ITEMS, USERS, make_run


def finish(run):
    """Manifests as finished stages leave them."""
    for stage in ("ingest", "semantic_ids", "finetune", "ranking"):
        counts = {"codebook_size": 8} if stage == "semantic_ids" else {}
        run.write_json(f"{stage}/manifest.json", {"stage": stage, "counts": counts, "checksum": stage})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finish(make_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def service(run):
    return Service.load(run_config(run))


def ask(service, **request):
    return service.read(json.dumps(request).encode())


def items_of(answer):
    assert answer.status == 200
    return [row["item_id"] for row in answer.body["items"]]


def test_answers_are_those_of_batch_scoring(run, service, monkeypatch):
    monkeypatch.setattr(scoring, "own_device", lambda: "cpu")
    scoring.ScorePart(run, "shop", run_config(run).ranking, 10, True)("shop-00000.parquet")
    stored = pl.DataFrame(run.read("score")).group_by("user_id", maintain_order=True).agg("item_id", "score")
    sequences = columns.to_sequences(run.read("ingest/sequences", "shop"))
    histories = [[f"shop-item-{item}" for item in sequences.history(user, "end")] for user in range(USERS)]
    answers = service.recommend([ask(service, history=history) for history in histories])
    assert [items_of(answer) for answer in answers] == stored["item_id"].to_list()
    found = [[row["score"] for row in answer.body["items"]] for answer in answers]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(stored["score"].to_list()), atol=1e-4)


def test_requests_that_are_answered_together_do_not_matter_to_each_other(service):
    ids = [f"shop-item-{item}" for item in range(ITEMS)]
    asked = [
        dict(history=ids[:3], k=5),
        dict(history=ids[:3], k=12, remove_seen=False),
        dict(history=[], k=1),
        dict(history=ids[4:9], exclude=ids[20:30]),
        dict(history=["elsewhere", ids[7]], allow=ids[:6], k=3),
        dict(history=ids[:2], allow=[]),
    ]
    together = service.recommend([ask(service, **each) for each in asked])
    for each, answer in zip(asked, together, strict=True):
        (alone,) = service.recommend([ask(service, **each)])
        assert items_of(alone) == items_of(answer)
    assert [len(items_of(answer)) for answer in together] == [5, 12, 1, 10, 3, 0]
    assert not set(items_of(together[3])) & set(ids[20:30]) and set(items_of(together[4])) <= set(ids[:6])
    assert [answer.body["unknown_items"] for answer in together] == [0, 0, 0, 0, 1, 0]


def test_a_request_for_many_items_does_not_widen_the_search_of_others(service, monkeypatch):
    ranker, asked = service.recommenders["shop"].ranker, []
    best = ranker.best
    monkeypatch.setattr(ranker, "best", lambda histories, k, *rest: asked.append((len(histories), k)) or best(histories, k, *rest))
    answers = service.recommend([ask(service, history=[], k=k) for k in (3, ITEMS, 3)])
    assert asked == [(2, 3), (1, ITEMS)]
    assert [len(items_of(answer)) for answer in answers] == [3, ITEMS, 3]


def test_similar_items_and_health(service):
    answer = service.similar(json.dumps({"item": "shop-item-3", "k": 4, "exclude": ["shop-item-1"]}).encode())
    expected = service.recommenders["shop"].similar_items("shop-item-3", 4, exclude=["shop-item-1"])
    assert items_of(answer) == [item for item, _ in expected] and answer.body["version"] == service.version
    assert service.health().body | {"run": "", "version": ""} == {"status": "ok", "run": "", "version": "", "domains": {"shop": ITEMS}}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is no JSON"),
        (b"[]", "the body is a JSON list; it must be an object with history, k"),
        (b'{"histories": []}', "histories: no such field; known are history, k"),
        (rb'{"\ud800": 1}', r"\\ud800: no such field"),
        (b'{"history": "a"}', "history is 'a'; it must be a list"),
        (b'{"history": [1]}', "history holds 1 of type int"),
        (b'{"k": 0}', "k is 0; it must be at least 1"),
        (b'{"k": 1.5}', "k is 1.5"),
        (json.dumps({"k": MOST_ITEMS + 1}).encode(), "it may be 1000 at most"),
        (b'{"remove_seen": 1}', "remove_seen is 1; it must be true or false"),
        (b'{"domain": "toys"}', "domain is 'toys'; it must be one of shop"),
    ],
)
def test_requests_that_cannot_be_answered_say_why(service, body, said):
    with pytest.raises(RequestError, match=said):
        service.read(body)
    with pytest.raises(RequestError, match="item is 'x'; it must be an item_id of shop, such as 'shop-item-0'"):
        service.similar(b'{"item": "x"}')


def test_standing_filters_hold_for_every_request(run, tmp_path):
    (tmp_path / "out.csv").write_text("item_id\nshop-item-1\nshop-item-2\n")
    pl.DataFrame({"user_id": ["u"], "item_id": ["shop-item-5"]}).write_parquet(tmp_path / "pairs.parquet")
    config = with_values(run_config(run), {"data.root": str(tmp_path), "score.exclude": "out.csv"})
    service = Service.load(config)
    (answer,) = service.recommend([ask(service, history=[], k=ITEMS)])
    assert len(items_of(answer)) == ITEMS - 2 and not {"shop-item-1", "shop-item-2"} & set(items_of(answer))
    assert not {"shop-item-1", "shop-item-2"} & set(items_of(service.similar(json.dumps({"item": "shop-item-3", "k": ITEMS}).encode())))
    by_user = Service.load(with_values(config, {"score.allow": "pairs.parquet"}))
    assert items_of(by_user.recommend([ask(by_user, history=[], user_id="u")])[0]) == ["shop-item-5"]
    assert items_of(by_user.recommend([ask(by_user, history=[], user_id="v")])[0]) == []
    with pytest.raises(RequestError, match="user_id is needed"):
        ask(by_user, history=[])
    with pytest.raises(RequestError, match="user_id is no text"):
        ask(by_user, history=[], user_id="\ud800")
    (tmp_path / "out.csv").write_text("item_id\nshop-item-1\n")
    assert served_version(config) != service.version


def test_versions_change_with_what_is_served(tmp_path):
    run = finish(make_run(tmp_path))
    config = run_config(run)
    first = served_version(config)
    assert served_version(config) == first != served_version(with_values(config, {"score.top_k": 3}))
    wider = config.model_dump(mode="json") | {"sequencer": config.sequencer.model_dump(mode="json") | {"beam": 40}}
    run.write_bytes("config.yaml", yaml.safe_dump(wider).encode())  # as an evaluate with sequencer.beam=40 leaves it
    assert served_version(config) != first
    run.write_bytes("config.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    assert served_version(config) == first
    run.write_json("ranking/manifest.json", {"stage": "ranking", "counts": {}, "checksum": "another"})
    assert served_version(config) != first
    run.write_json("ingest/appending.json", {})
    with pytest.raises(ArtifactError, match="cannot be served: items are being appended"):
        served_version(config)
    run.delete("ingest/appending.json")
    run.delete("finetune/manifest.json")
    with pytest.raises(ArtifactError, match="cannot be served: finetune is not done"):
        Service.load(config)


def test_several_domains_are_served_by_name(tmp_path):
    service = Service.load(run_config(finish(make_run(tmp_path, ("shop", "toys")))))
    with pytest.raises(RequestError, match="domain is None; it must be one of shop, toys"):
        ask(service, history=[])
    answers = service.recommend([ask(service, history=[], domain=domain) for domain in ("toys", "shop", "toys")])
    assert [items_of(answer)[0].split("-")[0] for answer in answers] == ["toys", "shop", "toys"]
    assert torch.is_inference_mode_enabled() is False
