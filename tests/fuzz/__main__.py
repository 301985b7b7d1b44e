"""Fuzz every target in a process of its own with bounded memory: python -m tests.fuzz --seconds 300

The table says how many inputs each got, how many it accepted, and its largest memory. A crash, an error that is not the
package's own, or a lost row ends with status 1 and the smallest input that shows it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

MEMORY = 3 << 30  # bytes of data that a process may hold, torch and Arrow included
ROUND = 200  # inputs that hypothesis draws under one seed


def fuzz(name: str, seconds: float, first_seed: int) -> dict[str, Any]:
    """Draw inputs of a target until the time is over; counts, and the error of the first input that breaks a promise."""
    from tests.fuzz.targets import TARGETS

    strategy, check = TARGETS[name]
    counts: Counter[str] = Counter()
    ends = time.monotonic() + seconds

    def one(drawn: Any) -> None:
        if time.monotonic() > ends and not counts["failed"]:
            return
        counts["inputs"] += 1
        try:
            counts["accepted"] += check(drawn)
        except BaseException:
            counts["failed"] += 1
            raise

    quiet = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    number, error = first_seed, ""
    while time.monotonic() < ends and not error:
        try:
            seed(number)(quiet(given(strategy())(one)))()
        except BaseException as problem:  # noqa: BLE001 - whatever a parser met
            error = f"{type(problem).__name__}: {problem}\n" + "\n".join(getattr(problem, "__notes__", []))
        number += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {"inputs": counts["inputs"], "accepted": counts["accepted"], "peak_mib": peak, "error": error[:4000]}


def run_target(name: str, seconds: float, first_seed: int) -> dict[str, Any]:
    """`fuzz` in a process of its own: a crash of a native parser is an error like any other."""
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(seconds), "--seed", str(first_seed), "--target", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 600)
    if done.returncode or not done.stdout.strip():
        return {"inputs": 0, "accepted": 0, "peak_mib": 0, "error": f"ended with status {done.returncode}\n{done.stderr[-3000:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="only this one, in this process")
    arguments = parser.parse_args()
    if arguments.target:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        print(json.dumps(fuzz(arguments.target, arguments.seconds, arguments.seed)))
        return 0
    from tests.fuzz.targets import TARGETS

    print(f"| target | inputs | accepted | memory, MiB |\n|{'---|' * 4}", flush=True)
    failed, total = [], 0
    for name in TARGETS:
        found = run_target(name, arguments.seconds / len(TARGETS), arguments.seed)
        total += found["inputs"]
        print(f"| {name} | {found['inputs']:,} | {found['accepted']:,} | {found['peak_mib']:,} |", flush=True)
        if found["error"]:
            failed.append(f"{name}: {found['error']}")
    print(f"\n{total:,} inputs, {len(failed)} targets failed")
    print("\n\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
