"""Serves a run over HTTP with Ray Serve: /recommend, /similar and /health (`pip install 'qbert-ray[serve]'`).

Requests that wait are answered together. A replica looks at intervals whether the run that it is to serve has changed, loads the new
one next to the old one, and then answers from it, so that no request is dropped or waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from qbert_ray.config.schema import Config
from qbert_ray.execution import ray_session  # before ray, which reads its environment when it is imported
from qbert_ray.execution.determinism import set_threads
from qbert_ray.serving.service import MOST_BYTES, Answer, Asked, RequestError, Service, served_version
from qbert_ray.storage.directory import ArtifactError

try:
    import ray
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse
except ImportError as _error:
    raise ArtifactError(f"serving needs Ray Serve ({_error}): pip install 'qbert-ray[serve]'") from None

APPLICATION, WANTED, NAMESPACE = "qbert-ray", "wanted run", "qbert-ray serving"
ENDPOINTS = {"/recommend": "POST", "/similar": "POST", "/health": "GET"}
log = logging.getLogger("ray.serve")


class Wanted:
    """An actor that holds the config that all replicas are to serve."""

    def __init__(self) -> None:
        self.config: str | None = None

    def get(self) -> str | None:
        return self.config

    def set(self, config: str) -> None:
        self.config = config


class Replica:
    """One process that answers requests.

    Args:
        config: as JSON; it is served until the actor `WANTED` names another.
        cuda: compute the sequence model on a GPU.
    """

    def __init__(self, config: str, cuda: bool) -> None:
        self.device = "cuda" if cuda else "cpu"
        first = Config.model_validate_json(_wanted() or config)
        set_threads(max(1, int(first.serve.num_cpus)))
        self.service = Service.load(first, self.device)
        batching: Any = self.answer_together
        batching.set_max_batch_size(first.serve.max_batch_size)

    async def __call__(self, request: Request) -> JSONResponse:
        """The answer to an HTTP request."""
        try:
            answer = await self._answer(request)
        except RequestError as error:
            answer = Answer(400, {"error": str(error)})
        return JSONResponse(answer.body, answer.status)

    async def check_health(self) -> None:
        """Called by Ray Serve at intervals: take over a run that has changed. One that cannot be served leaves the old one at work."""
        try:
            service = await asyncio.to_thread(self._changed)
        except Exception as error:  # noqa: BLE001 - it must not stop what works
            log.warning("the run is not reloaded: %s", error)
            return
        if service is not None:
            self.service = service
            log.info("serves version %s of %s", service.version, service.config.run.dir)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0)
    async def answer_together(self, asked: list[Asked]) -> list[Answer]:
        """Answers to the requests that came while others were being answered."""
        return await asyncio.to_thread(_by_service, asked)

    async def _answer(self, request: Request) -> Answer:
        service, method = self.service, ENDPOINTS.get(request.url.path)
        if method is None:
            return Answer(404, {"error": f"{request.url.path}: there are {', '.join(ENDPOINTS)}"})
        if request.method != method:
            return Answer(405, {"error": f"{request.url.path} takes {method}"})
        if method == "GET":
            return service.health()
        body = await _body(request)
        if body is None:
            return Answer(413, {"error": f"the body is longer than {MOST_BYTES:,} bytes"})
        if request.url.path == "/similar":
            return await asyncio.to_thread(service.similar, body)
        return await self.answer_together(service.read(body))

    def _changed(self) -> Service | None:
        """The service that is to take over; None if nothing has changed."""
        wanted = _wanted()
        config = Config.model_validate_json(wanted) if wanted else self.service.config
        return Service.load(config, self.device) if served_version(config) != self.service.version else None


async def _body(request: Request) -> bytes | None:
    """The body of a request; None where it is longer than `MOST_BYTES`."""
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > MOST_BYTES:
            return None
    return content


def _by_service(asked: list[Asked]) -> list[Answer]:
    """Answers, each by the service that has read the request: after a reload there may be requests of both."""
    answers: dict[int, Answer] = {}
    for service in {id(each.service): each.service for each in asked}.values():
        rows = [row for row, each in enumerate(asked) if each.service is service]
        answers |= dict(zip(rows, service.recommend([asked[row] for row in rows]), strict=True))
    return [answers[row] for row in range(len(asked))]


def _wanted() -> str | None:
    """The config that is to be served; None where no actor says so."""
    try:
        actor: Any = ray.get_actor(WANTED, namespace=NAMESPACE)
        return cast(str | None, ray.get(actor.get.remote(), timeout=10))
    except (ValueError, ray.exceptions.RayError):
        return None


def deploy(config: Config) -> None:
    """Serve a run on the Ray that this process is connected to, or let what is served there take over this run.

    Args:
        config: of a finished run; its section `serve` says where and with what.

    Raises:
        ArtifactError: the run is not done.
    """
    served_version(config)
    content = config.model_dump_json()
    make: Any = ray.remote(num_cpus=0)(Wanted)
    actor = make.options(name=WANTED, namespace=NAMESPACE, lifetime="detached", get_if_exists=True).remote()
    running, s = cast(str | None, ray.get(actor.get.remote())), config.serve
    before = Config.model_validate_json(running).serve if running and APPLICATION in serve.status().applications else None
    if before is not None and (before.host, before.port) != (s.host, s.port):
        raise ArtifactError(f"a run is served at {before.host}:{before.port} already; end that first: qbert-ray serve --stop -c <config>")
    ray.get(actor.set.remote(content))
    if before == s:
        return
    serve.start(http_options={"host": s.host, "port": s.port}, logging_config={"enable_access_log": False, "log_level": "WARNING"})
    resources: dict[str, Any] = {"num_cpus": s.num_cpus, "num_gpus": s.num_gpus}
    deployment: Any = serve.deployment(Replica)
    replica = deployment.options(
        name="replica",
        num_replicas=s.num_replicas,
        max_ongoing_requests=4 * s.max_batch_size,
        ray_actor_options=resources,
        health_check_period_s=s.reload_seconds,
        health_check_timeout_s=600.0,  # a run is loaded in between
    )
    serve.run(replica.bind(content, s.num_gpus > 0), name=APPLICATION, route_prefix="/")


def stop() -> None:
    """End what is served on the Ray that this process is connected to.

    Raises:
        ArtifactError: nothing is served there.
    """
    if APPLICATION not in serve.status().applications:
        raise ArtifactError("nothing is served there; name the cluster by compute.address or RAY_ADDRESS")
    serve.delete(APPLICATION)
    with suppress(ValueError):
        ray.kill(ray.get_actor(WANTED, namespace=NAMESPACE))


def serve_run(config: Config, say: Callable[[str], None], until: Callable[[], bool] = lambda: False) -> None:
    """Serve a run until the process ends; on a cluster that was there before, it is served on from then.

    Args:
        config: of a finished run.
        say: receives a line when it is served.
        until: asked each second whether to end.
    """
    with ray_session.session(config.compute.address):
        deploy(config)
        s = config.serve
        example = json.dumps({"history": ["item"], "k": 3})
        say(f"serving {config.run.dir} at http://{s.host}:{s.port}: curl -d '{example}' http://{s.host}:{s.port}/recommend")
        if not ray_session.started_locally():
            say("the cluster serves on when this command ends; qbert-ray serve --stop -c <config> ends it")
        while not until():
            time.sleep(1)
