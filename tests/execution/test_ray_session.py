"""Which Ray a run connects to."""

import pytest

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
