"""Why something failed, and how a run ends that is told to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


def root_cause(error: BaseException) -> BaseException:
    """The error that a worker raised, from under Ray's wrappers."""
    while True:
        failures = getattr(error, "worker_failures", None)
        inner = getattr(error, "cause", None) or (next(iter(failures.values())) if failures else None)
        inner = inner or getattr(error, "_base_exc", None)
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


class Terminated(KeyboardInterrupt):
    """SIGTERM: how `ray job stop`, a scheduler or a machine that goes down ends a run."""


@contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """SIGINT and SIGTERM end what is inside with one line and the usual exit status."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise Terminated
