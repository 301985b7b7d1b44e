"""Hit after hit over whole runs: does the same command, given again and again, end with the outputs of a run that nothing happened to?

    python -m tests.chaos.storm --hits 100 --seed 0 --out docs/storm.md

The cluster and the faults of `tests/chaos.py`. `qbert-ray run` starts with nothing, is hit at random moments, and is started again
whenever it ended, until it is done; then comes the next run, until there were enough hits. Only hits inside a stage count, and each is
told with the stage that it met.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO

from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.stages import STAGES
from tests.chaos.kills import Chaos, last_error

FAULTS = {"worker killed": 0.4, "driver killed": 0.2, "driver stopped": 0.1, "node killed": 0.15, "link cut": 0.15}  # and how often
GAP = (1.0, 30.0)  # seconds between hits, and from a start to the first
HANG = 300  # seconds without a hit or an end
NOTICED = 5.0  # seconds until a node is known to be gone


class Storm:
    """Runs and hits so far."""

    def __init__(self, chaos: Chaos, hits: int) -> None:
        self.chaos, self.left = chaos, hits
        self.hits: Counter[tuple[str, str]] = Counter()  # stage, fault
        self.gave_up: Counter[str] = Counter()  # what a driver said that ended although it was not the one hit
        self.seconds: list[float] = []
        self.bad: list[str] = []

    def run(self, name: str) -> None:
        run, started = RunDir(str(self.chaos.name / name)), time.monotonic()
        while not self._try(run) and not self.bad:
            pass
        self.seconds.append(time.monotonic() - started)
        for stage in [] if self.bad else STAGES:
            self.bad += [f"{name}: {path} differs" for path in self.chaos.differences(stage.name, run)]
        if not self.bad:
            shutil.rmtree(self.chaos.name / name)

    def _try(self, run: RunDir) -> bool:
        """One command, hit until it ends; whether that was the end of the run."""
        with tempfile.TemporaryFile("a+") as said:
            process, hit = self.chaos.command("run", run.uri, said), False
            while True:
                gap = self.chaos.random.uniform(*GAP) if self.left else HANG
                try:
                    process.wait(gap)
                    break
                except subprocess.TimeoutExpired:
                    if not self.left:
                        process.kill()
                        process.wait()
                        self.bad.append(f"{run.uri}: still running {HANG} s after the last hit")
                        return False
                hit = self._hit(process, said) or hit
            if process.returncode and not hit:  # drivers that were hit may end in any way
                stage = working_on(said) or "between stages"
                said.seek(0)
                text = said.read()
                self.gave_up[f"{stage}, status {process.returncode}: {last_error(text)}"] += 1
                print(f"{stage}: the driver ended by itself\n{text[-6000:]}", flush=True)
        return process.returncode == 0

    def _hit(self, process: subprocess.Popen[str], said: IO[str]) -> bool:
        """Whether the driver itself was hit."""
        stage = working_on(said)
        fault = self.chaos.random.choices(list(FAULTS), list(FAULTS.values()))[0]
        if not stage or (fault == "link cut" and not self.chaos.link) or not self.chaos.strike(fault, process):
            return False
        self.hits[stage, fault] += 1
        self.left -= 1
        print(f"{stage}: {fault}; {self.left} to go", flush=True)
        if fault in ("node killed", "link cut"):
            time.sleep(NOTICED)
            self.chaos.replace_node()
        return fault.startswith("driver")

    def undisturbed(self) -> None:
        """A run that nothing happens to, to compare with."""
        status, said = self.chaos.end(self.chaos.command("run", str(self.chaos.name / "whole")))
        assert status == 0, said
        whole = RunDir(str(self.chaos.name / "whole"))
        self.chaos.working = {stage.name: done.seconds for stage in STAGES if (done := Manifest.load(whole, stage.name))}

    def table(self) -> str:
        faults = list(FAULTS)
        rows = [f"| {' | '.join(['stage', *faults])} |", "|---" * (len(faults) + 1) + "|"]
        for stage in [stage.command for stage in STAGES]:  # as the log names them
            counts = [self.hits[stage, fault] for fault in faults]
            rows += [f"| {stage} | {' | '.join(map(str, counts))} |"] if sum(counts) else []
        undisturbed = sum(self.chaos.working.values())
        outcome = f"{len(self.bad)} bad" if self.bad else "all with the outputs of the undisturbed run"
        return "\n".join([
            f"`python -m tests.chaos.storm {' '.join(sys.argv[1:])}`: {self.hits.total()} hits in {len(self.seconds)} runs, {outcome}. A run took "
            f"{statistics.median(self.seconds):.0f} s (median; its stages {undisturbed:.0f} s undisturbed).",
            "", *rows, "",
            *(f"Drivers that ended although they were not hit, {count} times: {said}" for said, count in self.gave_up.items()), *self.bad,
        ])  # fmt: skip


def working_on(said: IO[str]) -> str:
    """The stage that a driver is in by its log; "" for none."""
    said.seek(0)
    events = [json.loads(line) for line in said.read().splitlines() if line.startswith('{"') and line.endswith("}")]
    last = [event for event in events if event["event"] in ("stage started", "stage done")][-1:]
    return "".join(event["stage"] for event in last if event["event"] == "stage started")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hits", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="storm"))
    chaos = Chaos(folder, options.seed)
    storm = Storm(chaos, options.hits)
    try:
        storm.undisturbed()
        while storm.left and not storm.bad:
            storm.run(f"run-{len(storm.seconds)}")
            print(storm.table(), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(storm.table() + "\n")
    finally:
        chaos.stop()
        if not storm.bad:  # else it is there to be looked at
            shutil.rmtree(folder, ignore_errors=True)
    if storm.bad:
        sys.exit(f"bad outcomes, {folder} is left")


if __name__ == "__main__":
    main()
