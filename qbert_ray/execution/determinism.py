"""`run.deterministic`: what makes equal runs on equal machines give equal weights to the bit.

Sums of floating-point numbers depend on their order: threads share a sum out as they come, and MKL chooses the order by where an
array lies in memory. Here a training has one thread, MKL one order, and torch its deterministic algorithms. Another processor,
number of workers or version of torch may still give other last digits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

MARK = "QBERT_RAY_DETERMINISTIC"
ENVIRONMENT = {  # read when torch is loaded, in every process of a run
    MARK: "1",
    "MKL_CBWR": "AUTO,STRICT",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def environment(wanted: bool) -> Iterator[None]:
    """The environment of a deterministic run, where that is wanted, for this process and those that it starts."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT} if wanted else {}
    os.environ.update(ENVIRONMENT if wanted else {})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def set_threads(threads: int) -> None:
    """Set torch's threads in this process: those asked for, or one and deterministic algorithms in a deterministic run."""
    import torch

    strict = os.environ.get(MARK) == "1"
    if strict:
        torch.use_deterministic_algorithms(True, warn_only=True)  # which loads torch's compiler: only where it is wanted
    torch.set_num_threads(1 if strict else max(1, threads))
