"""Which Ray a run connects to."""

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

    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session.ray, "init", refuse)
    with pytest.raises(
        ValueError, match=r"^Ray at 10\.0\.0\.1:6379 asks for a token \(InvalidAuthToken\); set RAY_AUTH_MODE=token"
    ) as error:
        ray_session.session("10.0.0.1:6379").__enter__()
    assert {"RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", "~/.ray/auth_token,"} <= set(str(error.value).split())
