"""Every benchmark, each in a process of its own so that its peak memory is its own, then one table.

python -m tests.benchmarks                    # what `make bench` runs
python -m tests.benchmarks --full             # `make bench-full`: the long ones too
python -m tests.benchmarks scoring training   # some of them
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from tests.benchmarks.table import Figure, markdown

NAMES = ["scoring", "products", "training", "beam", "encoding", "depth", "codes", "ingesting", "overhead", "growth", "step_cost"]
LONG = ["streaming"]


def main() -> int:
    flags = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")] or (NAMES + LONG if "--full" in flags else NAMES)
    figures, failed = [], []
    for name in names:
        started = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-m", f"tests.benchmarks.{name}", "--json", *flags], stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout or ():
                if line.startswith("["):
                    figures.append(Figure(*json.loads(line)))
                    print(f"{figures[-1].what}: {figures[-1].ours}; {figures[-1].against}", file=sys.stderr, flush=True)
        if process.returncode:
            failed.append(name)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(markdown(figures))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
