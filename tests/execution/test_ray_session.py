"""Which Ray a run connects to."""

import socket

import pytest
from ray.exceptions import AuthenticationError

from qbert_ray.execution import ray_session


@pytest.mark.parametrize(
    ("address", "environment", "asked"),
    [
        (None, None, "local"),  # None would join whatever cluster runs on this machine
        (None, "ray://head:10001", None),  # Ray reads RAY_ADDRESS by itself
        ("auto", None, "auto"),
        ("10.0.0.1:6379", "ray://head:10001", "10.0.0.1:6379"),
    ],
)
def test_a_run_without_an_address_starts_a_ray_of_its_own(monkeypatch, address, environment, asked):
    called = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setattr(ray_session, "_check_reachable", lambda _: None)
    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session.ray, "init", lambda **arguments: called.append(arguments))
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    with ray_session.session(address):
        assert ray_session.started_locally() == (asked == "local")
    assert [call["address"] for call in called] == [asked]
    assert not ray_session.started_locally()


def test_a_cluster_that_asks_for_a_token_is_named_with_what_to_set(monkeypatch):
    def refuse(**_):
        raise AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(ray_session, "_check_reachable", lambda _: None)
    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session.ray, "init", refuse)
    with pytest.raises(
        ValueError, match=r"^Ray at 10\.0\.0\.1:6379 asks for a token \(InvalidAuthToken\); set RAY_AUTH_MODE=token"
    ) as error:
        ray_session.session("10.0.0.1:6379").__enter__()
    assert {"RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", "~/.ray/auth_token,"} <= set(str(error.value).split())


@pytest.mark.parametrize("failures", [0, 1, ray_session.TRIES])
def test_a_node_that_is_slow_to_start_is_started_again(monkeypatch, failures):
    tried = []

    def init(**_):
        tried.append(1)
        if len(tried) <= failures:
            raise Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")

    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session.ray, "init", init)
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    if failures == ray_session.TRIES:
        with pytest.raises(ValueError, match="Ray did not start on this machine: 3 times .*compute.executor=local"):
            ray_session._init(address="local")
    else:
        ray_session._init(address="local")
    assert len(tried) == min(failures + 1, ray_session.TRIES)


def test_other_errors_of_ray_are_not_tried_again(monkeypatch):
    def init(**_):
        raise RuntimeError("no such option")

    monkeypatch.setattr(ray_session.ray, "init", init)
    monkeypatch.setattr(ray_session.ray, "shutdown", lambda: None)
    with pytest.raises(RuntimeError, match="no such option"):
        ray_session._init(address="local")


@pytest.mark.parametrize("form", ["{}:{}", "ray://{}:{}", "[{}]:{}"])
def test_an_address_where_nothing_answers_is_refused_at_once(form):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format("127.0.0.1", server.getsockname()[1])
        ray_session._check_reachable(address)
    with pytest.raises(ValueError, match="no cluster answers at .*refused.* such as 10.0.0.1:6379"):
        ray_session._check_reachable(address)


@pytest.mark.parametrize("address", ["auto", "local", "anyscale://name", "host-without-a-port"])
def test_other_addresses_are_left_to_ray(monkeypatch, address):
    tried = []
    monkeypatch.setattr(ray_session.socket, "create_connection", lambda *arguments, **_: tried.append(arguments))
    ray_session._check_reachable(address)
    assert tried == []


@pytest.mark.parametrize("address", ["10.0.0.1:99999999", "no-such-host.invalid:6379"])
def test_an_address_that_cannot_be_is_refused(address):
    with pytest.raises(ValueError, match=f"no cluster answers at {address}"):
        ray_session._check_reachable(address)
