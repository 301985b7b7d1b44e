"""What went wrong, from under the wrappers of those who pass it on."""

from __future__ import annotations


def root_cause(error: BaseException) -> BaseException:
    """The error that a worker raised, from under Ray's wrappers."""
    while True:
        failures = getattr(error, "worker_failures", None)
        inner = getattr(error, "cause", None) or (next(iter(failures.values())) if failures else None)
        inner = inner or getattr(error, "_base_exc", None)
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner
