"""Settings of `run.deterministic`, under which equal runs on equal machines give bit-identical weights.

Floating-point sums depend on their order: threads split a sum differently each time, and MKL chooses the order by the memory
address of an array. A deterministic training uses one thread, one fixed order in MKL, and torch's deterministic algorithms.
Another processor, number of workers or version of torch may still change the last digits.
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
    """Set the environment of a deterministic run, if wanted, for this process and those that it starts."""
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
    """Set torch's number of threads in this process; a deterministic run gets one thread and deterministic algorithms."""
    import torch

    strict = os.environ.get(MARK) == "1"
    if strict:
        torch.use_deterministic_algorithms(True, warn_only=True)  # only if wanted, since it loads torch's compiler
    torch.set_num_threads(1 if strict else max(1, threads))
