"""Every stage of a run on a generated shop of some size, one process each: seconds, peak memory, interactions a second.

    python -m tests.benchmarks.scale 10000 100000

Each size makes its shop (`qbert-ray demo-data --scale`) and runs `configs/scale.yaml` with the local executor on it. What is done already is
kept, so that an interrupted run resumes; the figures of a stage are written when it ends, and the table is of all that are there. CPU time counts
where the machine is shared; each process spends about 2 s of it on imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from qbert_ray.storage.stages import STAGES

SHOP, PER_USER = "demo-data", 10  # interactions of a user, on average


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Seconds and peak resident GiB of a process."""
    begun = time.monotonic()
    with log.open("ab") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}\nits output is in {log}")
    return {"seconds": time.monotonic() - begun, "cpu": usage.ru_utime + usage.ru_stime, "gib": usage.ru_maxrss / 2**20}


def run(folder: Path, items: int, settings: list[str], last: str = STAGES[-1].name) -> dict[str, dict[str, float]]:
    """Stage -> its figures, for a shop of so many items and users."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, python = folder / "figures.json", [sys.executable, "-m", "qbert_ray"]
    figures: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    work = {SHOP: [SHOP, str(folder / "data"), "--scale", str(items)]}
    given = [f"data.root={folder / 'data'}", f"run.dir={folder / 'run'}", "compute.executor=local", *settings]
    work |= {stage.name: [stage.command, "-c", "configs/scale.yaml", *given] for stage in STAGES if stage.command != "score-histories"}
    for name, arguments in work.items():
        if name not in figures:
            figures[name] = measured([*python, *arguments], folder / "log.txt")
            kept.write_text(json.dumps(figures, indent=1))
            print(f"{items:,} {name}: {figures[name]['seconds']:.1f} s, {figures[name]['gib']:.2f} GiB", file=sys.stderr, flush=True)
        if name == last:
            break
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sizes", type=int, nargs="+", help="items, and as many users")
    parser.add_argument("--folder", type=Path, default=Path("runs/scale"))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="further settings of the runs")
    parser.add_argument("--last", default=STAGES[-1].name, choices=[SHOP, *(stage.name for stage in STAGES)], help="stage to end with")
    given = parser.parse_args(arguments)
    done = {size: run(given.folder / str(size), size, given.set, given.last) for size in given.sizes}
    print(markdown(done))


def markdown(done: dict[int, dict[str, dict[str, float]]]) -> str:
    """A row per stage: for each size its figures, and how much more CPU time it took than at the size before."""
    sizes = sorted(done)
    growth = list(zip(sizes, sizes[1:], strict=False))
    head = ["stage"]
    for size in sizes:
        head += [f"{size:,}: CPU s", "s", "GiB", "interactions per CPU s"]
    head += [f"CPU s, {large:,} / {small:,}" for small, large in growth]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in done[sizes[0]]:
        cells = [name]
        for size in sizes:
            found = done[size].get(name)
            cells += _cells(found, size) if found else [""] * 4
        for small, large in growth:
            pair = [done[size].get(name, {}).get("cpu") for size in (large, small)]
            cells.append(f"{pair[0] / pair[1]:.1f}" if pair[0] and pair[1] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(found: dict[str, float], size: int) -> list[str]:
    return [f"{found['cpu']:.0f}", f"{found['seconds']:.0f}", f"{found['gib']:.1f}", f"{PER_USER * size / found['cpu']:,.0f}"]


if __name__ == "__main__":
    main()
