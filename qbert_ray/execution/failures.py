"""The root cause of an error, and a clean end for a run that is interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


def root_cause(error: BaseException) -> BaseException:
    """The error that a worker raised, without Ray's wrappers."""
    while True:
        failures = getattr(error, "worker_failures", None)
        inner = getattr(error, "cause", None) or (next(iter(failures.values())) if failures else None)
        inner = inner or getattr(error, "controller_failure", None) or getattr(error, "_base_exc", None)
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


@contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """Context in which SIGINT and SIGTERM end the command with one line of output and the usual exit status."""
    signals: list[int] = []  # kept outside the exception: while Ray waits, it catches any KeyboardInterrupt and raises its own

    def terminate(number: int, _: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to resume")
        raise typer.Exit(143 if signals else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
