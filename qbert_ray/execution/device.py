"""The torch device that a stage computes on in the current process."""

from __future__ import annotations

_device = "cpu"


def own_device() -> str:
    """ "cuda" if the executor assigned this process a GPU, else "cpu", even if the process can see a GPU."""
    return _device


def use_device(device: str) -> None:
    """Set what `own_device` returns in this process; executors call it before they run a stage's code."""
    global _device
    _device = device
