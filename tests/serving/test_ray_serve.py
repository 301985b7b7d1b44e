"""Real HTTP requests to a run that Ray Serve serves, also while another run takes its place."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from qbert_ray.config.loading import with_values
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.storage.catalog import run_config
from qbert_ray.storage.directory import ArtifactError
from tests.serving.test_service import finish
from tests.small_run import ITEMS, make_run

HISTORIES = [["shop-item-3", "shop-item-9"], [], ["shop-item-20"]]


def call(url, body=None, method=None):
    """Status and JSON of a request."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that rank differently."""
    return [
        finish(make_run(tmp_path_factory.mktemp("run") / name, **sequencer)) for name, sequencer in (("a", {}), ("b", {"logits": "dot"}))
    ]


@pytest.fixture(scope="module")
def configs(runs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        serving = {"serve.port": free.getsockname()[1], "serve.reload_seconds": 0.5}
    return [with_values(run_config(run), serving) for run in runs]


@pytest.fixture(scope="module")
def url(ray_session, configs):
    serve = pytest.importorskip("ray.serve")
    from qbert_ray.serving import ray_serve

    ray_serve.deploy(configs[0])
    yield f"http://127.0.0.1:{configs[0].serve.port}"
    ray_serve.stop()
    serve.shutdown()


def listed(items):
    return [(row["item_id"], pytest.approx(row["score"], abs=1e-4)) for row in items]


def test_answers_over_http_are_those_of_the_recommender(url, runs):
    recommender = Recommender.load(runs[0].uri)
    for history in HISTORIES:
        status, body = call(f"{url}/recommend", {"history": history, "k": 7, "exclude": ["shop-item-2"]})
        assert status == 200 and body["unknown_items"] == 0
        assert listed(body["items"]) == recommender.recommend([history], 7, exclude=["shop-item-2"])[0]
    status, body = call(f"{url}/similar", {"item": "shop-item-5", "k": 3})
    assert status == 200 and listed(body["items"]) == recommender.similar_items("shop-item-5", 3)
    assert call(f"{url}/health") == (200, {"status": "ok", "run": runs[0].uri, "version": body["version"], "domains": {"shop": ITEMS}})


@pytest.mark.parametrize(
    ("path", "body", "method", "status", "said"),
    [
        ("/recommend", {"histories": []}, "POST", 400, "histories: no such field"),
        ("/recommend", b"{", "POST", 400, "the body is no JSON"),
        ("/recommend", None, "GET", 405, "/recommend takes POST"),
        ("/similar", {"item": "x"}, "POST", 400, "it must be an item_id of shop"),
        ("/elsewhere", None, "GET", 404, "there are /recommend, /similar, /health"),
        ("/recommend", b" " * (2 << 20), "POST", 413, "the body is longer than 1,048,576 bytes"),
    ],
)
def test_what_cannot_be_answered_says_why(url, path, body, method, status, said):
    found, answer = call(f"{url}{path}", body, method)
    assert found == status and said in answer["error"]


def test_another_run_takes_over_without_a_dropped_request(url, runs, configs):
    from qbert_ray.serving import ray_serve

    expected = {run.uri: Recommender.load(run.uri).recommend(HISTORIES, 5) for run in runs}
    assert expected[runs[0].uri] != expected[runs[1].uri]
    versions = {call(f"{url}/health")[1]["version"]: runs[0].uri}
    failed, seen, done = [], [], threading.Event()

    def ask(number):
        while not done.is_set():
            try:
                status, body = call(f"{url}/recommend", {"history": HISTORIES[number], "k": 5})
                seen.append((number, body["version"], body["items"]))
                if status != 200:
                    failed.append(body)
            except Exception as error:
                failed.append(error)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(HISTORIES))]
    for client in clients:
        client.start()
    try:
        ray_serve.deploy(configs[1])
        deadline = time.monotonic() + 120
        while call(f"{url}/health")[1]["run"] != runs[1].uri:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        versions[call(f"{url}/health")[1]["version"]] = runs[1].uri
        after = len(seen) + 2 * len(clients)
        while len(seen) < after:
            time.sleep(0.05)
    finally:
        done.set()
        for client in clients:
            client.join()
    assert failed == [] and {version for _, version, _ in seen} == set(versions)
    for number, version, items in seen:
        assert listed(items) == expected[versions[version]][number]
    with pytest.raises(ArtifactError, match="cannot be served: ingest is not done"):
        ray_serve.deploy(with_values(configs[1], {"run.dir": f"{runs[1].uri}/nothing", "sequencer.kind": "generative"}))
    assert call(f"{url}/health")[1]["run"] == runs[1].uri
    with pytest.raises(ArtifactError, match="end that first: qbert-ray serve --stop"):
        ray_serve.deploy(with_values(configs[1], {"serve.port": 1}))
