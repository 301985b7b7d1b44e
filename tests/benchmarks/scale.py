"""Every stage of a run on a generated shop of some size, one process each: seconds, peak memory, rows a second.

    python -m tests.benchmarks.scale 10000 100000

Each size makes its shop (`qbert-ray demo-data --scale`) and runs `configs/scale.yaml` with the local executor on it. What is done already is
kept, so that an interrupted run resumes; the figures of a stage are written when it ends, and the table is of all that are there.
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

SHOP = "demo-data"


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
    """A row per stage, and for each size its seconds, peak memory and how much longer it took than at the size before."""
    sizes = sorted(done)
    head = [
        "stage",
        *(f"{size:,}: s | GiB | interactions/s" for size in sizes),
        *(f"{b:,} / {a:,}" for a, b in zip(sizes, sizes[1:], strict=False)),
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * (1 + 3 * len(sizes) + len(sizes) - 1)]
    for name in done[sizes[0]]:
        cells = [f"{done[n][name]['seconds']:.0f} | {done[n][name]['gib']:.1f} | {10 * n / done[n][name]['seconds']:,.0f}" for n in sizes]
        cells += [f"{done[b][name]['seconds'] / done[a][name]['seconds']:.1f}" for a, b in zip(sizes, sizes[1:], strict=False)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
