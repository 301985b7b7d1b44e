"""Figures of a run in Ray's metrics, for Prometheus and Grafana."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge

from qbert_ray.execution.tracking import numbers


def measure(stage: str, metrics: Mapping[str, object]) -> None:
    """Show the latest figures of a stage in Ray's metrics, as `ray_qbert_value{stage, name}`."""
    for name, value in numbers(metrics).items():
        _gauge().set(value, {"stage": stage, "name": name})


def count_items(table: str, items: int) -> None:
    """Count items that an actor has done, as `ray_qbert_items_total{table}`; its rate is items per second."""
    if items:
        _counter().inc(items, {"table": table})


@cache
def _gauge() -> Gauge:
    return Gauge(
        "qbert_value", "Latest figures of a run: loss, metrics, rows kept and rejected, codebook usage", tag_keys=("stage", "name")
    )


@cache
def _counter() -> Counter:
    return Counter("qbert_items", "Items done, by the table they are written to", tag_keys=("table",))
