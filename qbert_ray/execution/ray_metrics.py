"""Figures of a run in Ray's metrics, for Prometheus and Grafana."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from qbert_ray.execution.tracking import numbers
from qbert_ray.storage.directory import RunDir

# Of every figure. Not "job": that is Prometheus' own label for what it scrapes.
LABELS = ("run", "job_id", "domain")


def measure(run: RunDir, stage: str, metrics: Mapping[str, object], domains: Collection[str] = (), domain: str = "") -> None:
    """Show the latest figures of a stage in Ray's metrics, as `ray_qbert_value{run, job_id, domain, stage, name}`.

    Args:
        metrics: figures, nested at will; those below the name of a domain are labelled with it.
        domains: names of the run's domains.
        domain: that all figures are of.
    """
    for part, figures in by_domain(metrics, domains).items():
        for name, value in numbers(figures).items():
            _gauge().set(value, _labels(run, part or domain) | {"stage": stage, "name": name})


def count_items(run: RunDir, table: str, part: str, items: int) -> None:
    """Count items that an actor has done, as `ray_qbert_items_total{run, job_id, domain, table}`; its rate is items per second.

    Args:
        part: name of the part that they are in, <domain>-<number>.
    """
    if items:
        _counter().inc(items, _labels(run, part.rpartition("-")[0]) | {"table": table})


def by_domain(metrics: Mapping[str, object], domains: Collection[str]) -> dict[str, dict[str, Any]]:
    """Domain -> its figures, without the level that the domain's name was; "" holds those of no domain."""
    found: dict[str, dict[str, Any]] = {"": {}}
    for name, value in metrics.items():
        if not isinstance(value, Mapping):
            found[""][name] = value
            continue
        for domain, inner in by_domain(value, domains).items():
            if name in domains:
                found.setdefault(name, {}).update(inner)
            elif inner:
                found.setdefault(domain, {})[name] = inner
    return found


def _labels(run: RunDir, domain: str) -> dict[str, str]:
    return dict(zip(LABELS, (run.uri, _job_id(), domain), strict=True))


def _job_id() -> str:
    return ray.get_runtime_context().get_job_id()


@cache
def _gauge() -> Gauge:
    return Gauge(
        "qbert_value", "Latest figures of a run: loss, metrics, rows kept and rejected, codebook usage", tag_keys=(*LABELS, "stage", "name")
    )


@cache
def _counter() -> Counter:
    return Counter("qbert_items", "Items done, by the table they are written to", tag_keys=(*LABELS, "table"))
