"""Serving over HTTP: latency of /recommend at 1, 8 and 32 clients, and while another run takes over; answers are those of the recommender.

    python -m tests.benchmarks.serving          # 6,250 items
    python -m tests.benchmarks.serving --full   # more requests

Ray, its HTTP proxy, one replica of one thread and the clients share the machine. The model has the recipe's sizes and random weights, with
item-item model, content and reranker, as in `scoring`. Clients keep their connections and ask again as soon as they have an answer.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from qbert_ray.config.loading import with_values
from qbert_ray.config.schema import Config
from qbert_ray.ranking.recommender import Recommender
from qbert_ray.storage.catalog import run_config
from qbert_ray.storage.directory import RunDir
from tests import small_run
from tests.benchmarks.table import Figure, main
from tests.serving.test_service import finish

ITEMS, USERS, CLIENTS, K = 6250, 2000, (1, 8, 32), 10
RECIPE = {"width": 128, "num_layers": 2, "num_heads": 4, "ffn_width": 256, "content_width": 128, "max_items": 50}


def make_run(folder: Path, **sequencer: Any) -> RunDir:
    """The run of `small_run` in the sizes of a real shop."""
    sizes = {"ITEMS": ITEMS, "COLD": 50, "USERS": USERS, "LEVELS": 4, "SIZE": 256, "WIDTH": 128, "PART": 2048}
    before = {name: getattr(small_run, name) for name in sizes}
    try:
        for name, value in sizes.items():
            setattr(small_run, name, value)
        return finish(small_run.make_run(folder, **(RECIPE | sequencer)))
    finally:
        for name, value in before.items():
            setattr(small_run, name, value)


def ask(port: int, histories: list[list[str]], counts: Any, seconds: float, done: Callable[[], bool]) -> None:
    """One client: puts (milliseconds, status) of each request until it is done."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    found, number, until = [], 0, time.monotonic() + seconds
    while time.monotonic() < until and not done():
        body = json.dumps({"history": histories[number % len(histories)], "k": K})
        started = time.perf_counter()
        connection.request("POST", "/recommend", body)
        answer = connection.getresponse()
        answer.read()
        found.append(((time.perf_counter() - started) * 1e3, answer.status))
        number += 1
    counts.append(found)


def clients(port: int, number: int, seconds: float, histories: list[list[str]], results: Any) -> None:
    """A process with so many clients."""
    counts: list[list[tuple[float, int]]] = []
    threads = [threading.Thread(target=ask, args=(port, histories[each:], counts, seconds, lambda: False)) for each in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put([pair for found in counts for pair in found])


def measured(port: int, number: int, seconds: float, histories: list[list[str]]) -> tuple[np.ndarray, int, float]:
    """[requests] milliseconds, how many failed, and requests per second."""
    context = get_context("spawn")
    results = context.Queue()
    process = context.Process(target=clients, args=(port, number, seconds, histories, results))
    process.start()
    found = results.get(timeout=seconds + 300)
    process.join()
    return np.array([each for each, _ in found]), sum(status != 200 for _, status in found), len(found) / seconds


def figures(full: bool) -> Iterator[Figure]:
    os.environ["OMP_NUM_THREADS"] = "1"
    from qbert_ray.execution.ray_session import ray
    from qbert_ray.serving import ray_serve

    seconds = 30.0 if full else 10.0
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        runs = [make_run(Path(folder) / "a"), make_run(Path(folder) / "b", logits="dot")]
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        configs = [with_values(run_config(run), {"serve.port": port, "serve.reload_seconds": 1.0}) for run in runs]
        recommender = Recommender.load(runs[0].uri)
        rng = np.random.default_rng(0)
        histories = [[recommender.ids[item] for item in rng.integers(0, ITEMS - 50, rng.integers(3, 30))] for _ in range(500)]
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            ray_serve.deploy(configs[0])
            check(port, recommender, histories)
            started = time.process_time()
            recommender.recommend(histories, K)
            alone = (time.process_time() - started) / len(histories) * 1e3
            yield from at_each_load(port, seconds, histories, alone)
            yield taking_over(port, configs[1], histories, seconds)
        finally:
            ray_serve.stop()
            ray.shutdown()


def at_each_load(port: int, seconds: float, histories: list[list[str]], alone: float) -> Iterator[Figure]:
    measured(port, 8, 3.0, histories)  # warm
    for number in CLIENTS:
        times, failed, rate = measured(port, number, seconds, histories)
        p50, p99 = np.percentile(times, [50, 99])
        what = f"serving, {ITEMS:,} items, one replica of one thread, {number} client{'s' * (number > 1)}"
        ours = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {rate:.0f} requests/s"
        yield Figure(what, ours, f"the recommender in batches, without HTTP: {alone:.2f} ms", None, "no request fails", failed == 0)


def taking_over(port: int, config: Config, histories: list[list[str]], seconds: float) -> Figure:
    """Latency of 8 clients while another run takes over."""
    from qbert_ray.serving import ray_serve

    context = get_context("spawn")
    results = context.Queue()
    process = context.Process(target=clients, args=(port, 8, seconds + 10, histories, results))
    process.start()
    time.sleep(3)
    ray_serve.deploy(config)
    started = time.monotonic()
    while health(port)["run"] != config.run.dir:
        time.sleep(0.2)
    took = time.monotonic() - started
    found = results.get(timeout=seconds + 300)
    process.join()
    failed, times = sum(status != 200 for _, status in found), np.array([each for each, _ in found])
    p50, p99 = np.percentile(times, [50, 99])
    what = f"serving, 8 clients while another run takes over in {took:.1f} s"
    return Figure(
        what,
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, largest {times.max():.0f} ms, {failed} of {len(found)} fail",
        "",
        None,
        "none fails",
        failed == 0,
    )


def health(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())


def check(port: int, recommender: Recommender, histories: list[list[str]]) -> None:
    """Answers over HTTP are those of the recommender."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    expected = recommender.recommend(histories[:20], K)
    for history, best in zip(histories, expected, strict=False):
        connection.request("POST", "/recommend", json.dumps({"history": history, "k": K}))
        items = json.loads(connection.getresponse().read())["items"]
        assert [row["item_id"] for row in items] == [item for item, _ in best]
        assert np.allclose([row["score"] for row in items], [score for _, score in best], atol=1e-3)


if __name__ == "__main__":
    main(figures)
