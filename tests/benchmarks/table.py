"""The one table of `make bench`: what a benchmark measured, compared with what, and whether that is what it should be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Figure(NamedTuple):
    """A line of the table. Both sides were measured side by side in one run."""

    what: str  # "batch scoring, 6,250 items, default recipe"
    ours: str  # ".12 ms per user"
    against: str  # "transformers BERT, padded: 2.1 ms per user"
    ratio: float | None  # against / ours, so more is better; None where the bar is no ratio
    bar: str  # ">= 12 x", empty: only told
    met: bool | None  # None: no bar


HEAD = ("what", "ours", "against", "ratio", "bar", "met")


def markdown(figures: list[Figure]) -> str:
    rows = [
        (f.what, f.ours, f.against, "" if f.ratio is None else f"{f.ratio:.2f}", f.bar, {None: "", True: "yes", False: "no"}[f.met])
        for f in figures
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [HEAD, ("---",) * len(HEAD), *rows])


def main(figures: Callable[[bool], Iterator[Figure]]) -> None:
    """What `python -m tests.benchmarks.<name> [--full] [--json]` does: print figures as they come, as a table or as JSON lines."""
    found = []
    for figure in figures("--full" in sys.argv):
        found.append(figure)
        print(json.dumps(figure) if "--json" in sys.argv else f"{figure.what}: {figure.ours}; {figure.against}", flush=True)
    if "--json" not in sys.argv:
        print("\n" + markdown(found))
