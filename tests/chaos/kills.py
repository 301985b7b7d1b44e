"""Kills, stops, full disks and failing stores in the middle of each stage: does the same command end with the same outputs?

    python -m tests.chaos.kills --kills 20 --seed 0 --out runs/chaos.md      (make chaos)
    python -m tests.chaos.kills --stages score --faults "link cut"

Real processes throughout: a head and a second node by `ray start`, the command line as driver. As root the second node is in a network
of its own, whose link is cut. Every case starts from the finished stages before its own, is hit once at a random moment, and is given
the same command again until that succeeds, three times at most. Its outputs are then compared with those of a run that nothing
happened to. The disk is a small tmpfs (root only), the store is moto's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from safetensors.numpy import load

from qbert_ray.pipeline import redo_from
from qbert_ray.storage import columns
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.stages import BY_NAME, STAGES
from tests.nodes import ROOT, Link, Nodes
from tests.shop import SMALL, make_shop
from tests.store import BUCKET, Store

ON_STORE = ("store fails 20 s", "store hangs 20 s")
FAULTS = ("driver killed", "driver stopped", "worker killed", "node killed", "link cut", "disk full", *ON_STORE)
SPARED = (b"IDLE", b"Board", b"Agent")  # who works not, who only tells, and whose end is that of its node
TRIES, SECONDS = 4, 400
BAD = "BAD"
DISK, SLACK = "1g", 24 * 1024  # size of the disk; bytes that the full one still takes


@dataclass
class Case:
    """One stage, one fault, and what became of it."""

    stage: str
    fault: str
    after: float = 0.0  # seconds into the stage
    hit: bool = False
    ends: list[tuple[int, str]] = field(default_factory=list)  # exit status and last line of each try
    seconds: float = 0.0
    same: str = ""

    def cell(self, undisturbed: float) -> str:
        """Of the small table: seconds lost, after "again" where the same command had to be given again."""
        if not self.hit or self.same != "the same":
            return self.same.split(":")[0] if self.hit else "–"
        return f"{'again ' if self.ends[0][0] else ''}{self.seconds - undisturbed:+.0f}"

    def row(self, undisturbed: float) -> str:
        if not self.hit:
            return f"| {self.stage} | {self.fault} | – | the stage was over before | | | |"
        first, said = self.ends[0]
        outcome = "went on by itself" if first == 0 else f"ended with status {first}" + (f": {said}" if said else "")
        again = "" if first == 0 else "finished" if self.ends[-1][0] == 0 else f"status {self.ends[-1][0]}: {self.ends[-1][1]}"
        return f"| {self.stage} | {self.fault} | {self.after:.1f} | {outcome} | {again} | {self.seconds - undisturbed:.0f} | {self.same} |"


class Chaos:
    """A cluster, a store and an undisturbed run to compare with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.name, self.random = folder, random.Random(seed)
        self.undisturbed: dict[str, float] = {}  # seconds of each stage's command
        self.working: dict[str, float] = {}  # seconds of each stage itself
        self.disk = small_disk(folder / "disk")  # before the nodes: the second one's network comes with a view of what is mounted
        self.link = Link.lay() if os.geteuid() == 0 else None
        self.store = Store(self.link.here if self.link else "127.0.0.1").start()
        os.environ.update(self.store.environment)
        health = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
        # A task sent to a node whose link is cut waits for its connection's end, by Ray's defaults 7 minutes (docs/clusters.md).
        health |= {"RAY_grpc_client_keepalive_time_ms": "20000", "RAY_grpc_client_keepalive_timeout_ms": "10000"}
        try:
            self.nodes = Nodes(2, 2, link=self.link, **health, **self.store.environment)
        except BaseException:
            self._clear()
            raise
        self.shop = make_shop(folder / "shop")

    def command(self, stage: str, run: str, said: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
        overrides = [f"data.root={self.shop}", f"run.dir={run}", *SMALL, "compute.checkpoint_seconds=0", "data.rows_per_part=10"]
        program = [sys.executable, "-m", "qbert_ray.cli.main", stage, "-c", str(ROOT / "configs" / "demo.yaml"), *overrides]
        environment = self.nodes.environment | {"RAY_ADDRESS": self.nodes.address}
        return subprocess.Popen(program, env=environment, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, text=True)

    def whole_run(self, last: str) -> None:
        for stage in STAGES[: STAGES.index(BY_NAME[last]) + 1]:
            started = time.monotonic()
            status, said = self.end(self.command(stage.name, str(self.name / "whole")))
            assert status == 0, said
            self.undisturbed[stage.name] = time.monotonic() - started
            done = Manifest.load(RunDir(str(self.name / "whole")), stage.name)
            self.working[stage.name] = done.seconds if done else 0.0
            print(f"{stage.name}: {self.undisturbed[stage.name]:.0f} s undisturbed", flush=True)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            said, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"still running after {SECONDS} s:\n{process.communicate()[0][-6000:]}", flush=True)
            return 124, f"still running after {SECONDS} s"
        if process.returncode > 0:
            print(f"status {process.returncode}:\n{said[-6000:]}", flush=True)
        return process.returncode, last_error(said)

    def play(self, case: Case) -> Case:
        with self.place(case) as (run, restore):
            redo_from(case.stage, run)
            case.after = self.random.uniform(0.05, 0.7) * self.working[case.stage]
            started = time.monotonic()
            process = self.command(case.stage, run.uri)
            self.hit(case, process, run)
            case.ends.append(self.end(process))
            restore()
            while case.ends[-1][0] != 0 and len(case.ends) < TRIES:
                case.ends.append(self.end(self.command(case.stage, run.uri)))
            case.seconds = time.monotonic() - started
            found = self.differences(case.stage, run) if case.ends[-1][0] == 0 else ["it never finished"]
            case.same = f"{BAD}: {found[:3]}" if found else "the same"
        if case.fault in ("node killed", "link cut"):
            self.replace_node()
        return case

    def replace_node(self) -> None:
        """Another node in the place of the second."""
        if self.link:
            self.link.mend()
        self.nodes.replace(1, 2)

    def hit(self, case: Case, process: subprocess.Popen[str], run: RunDir) -> None:
        marker = f"{BY_NAME[case.stage].name}/started.json"
        while process.poll() is None and not run.exists(marker) and Manifest.load(run, BY_NAME[case.stage].name) is None:
            time.sleep(0.1)
        until = time.monotonic() + case.after
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        if case.fault == "disk full":  # full from the beginning
            case.hit, case.after = True, 0.0
            return
        case.hit = process.poll() is None and self.strike(case.fault, process)

    def strike(self, fault: str, driver: subprocess.Popen[str]) -> bool:
        """Whether there was something to hit."""
        match fault:
            case "driver killed":
                return self.signal([driver.pid], signal.SIGKILL)
            case "driver stopped":
                return self.signal([driver.pid], signal.SIGTERM)
            case "worker killed":
                return self.signal(self.busy(), signal.SIGKILL)
            case "node killed":
                return self.signal(self.nodes.pids(1, "raylet/raylet"), signal.SIGKILL)
            case "link cut":
                assert self.link
                self.link.cut()
            case "store fails 20 s":
                self.store.fail(20)
            case "store hangs 20 s":
                self.store.hang(20)
        return True

    def busy(self) -> list[int]:
        """One worker that is doing something for the driver."""
        for _ in range(200):
            found = [pid for node in range(2) for pid in self.nodes.pids(node, "ray::")]
            busy = [pid for pid in found if not any(name in _command(pid) for name in SPARED)]
            if busy:
                return [self.random.choice(busy)]
            time.sleep(0.05)
        return []

    @staticmethod
    def signal(pids: list[int], number: int) -> bool:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(pids)

    @contextlib.contextmanager
    def place(self, case: Case) -> Iterator[tuple[RunDir, Callable[[], None]]]:
        """A run directory with the undisturbed run's stages, and what mends the disk."""
        name = f"{case.stage}-{case.fault.replace(' ', '-')}"
        if case.fault in ON_STORE:
            self.store.upload(self.name / "whole", name)
            yield RunDir(f"s3://{BUCKET}/{name}"), lambda: None
            return
        full = case.fault == "disk full"
        place = (self.disk if full and self.disk else self.name) / name
        shutil.copytree(self.name / "whole", place)
        if not full:
            yield RunDir(str(place)), lambda: None
        else:
            redo_from(case.stage, RunDir(str(place)))
            used = shutil.disk_usage(place).used
            resize(place.parent, f"{(used + SLACK) // 1024}k")
            yield RunDir(str(place)), lambda: resize(place.parent, DISK)
        shutil.rmtree(place)

    def differences(self, stage: str, run: RunDir) -> list[str]:
        """Names of tables and models of a stage that are not those of the undisturbed run."""
        whole, folder = RunDir(str(self.name / "whole")), Path(BY_NAME[stage].name)
        found = []
        for path in sorted((self.name / "whole" / folder).rglob("*")):
            name = str(path.relative_to(self.name / "whole"))
            if path.suffix == ".parquet" and not any(part.startswith(".") for part in Path(name).parts):
                same = run.exists(name) and _equal_tables(*(place.read_part(*os.path.split(name)) for place in (whole, run)))
            elif path.suffix == ".safetensors":
                same = run.exists(name) and _equal_tensors(*(load(place.read_bytes(name)) for place in (whole, run)))
            else:
                continue
            found += [] if same else [name]
        for left in ("checkpoints", "started.json"):
            found += [f"{folder}/{left} is left"] if run.exists(f"{folder}/{left}") else []
        return found

    def stop(self) -> None:
        self.nodes.stop()
        self._clear()

    def _clear(self) -> None:
        """Remove what else this machine has for the cluster: store, network and small disk."""
        self.store.stop()
        if self.link:
            self.link.remove()
        if self.disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)


def small_disk(place: Path) -> Path | None:
    """A file system that can be made too small; None where this machine lets nobody mount one."""
    if os.geteuid() != 0:
        return None
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)])
    return None if done.returncode else place


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def last_error(said: str) -> str:
    errors = [line.strip() for line in said.splitlines() if line.startswith(("error:", "stopped")) or "Error" in line]
    return (errors or [""])[-1][:160].replace("|", "/")


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b"IDLE"


def _equal_tables(a: pa.Table, b: pa.Table) -> bool:
    def equal(name: str) -> bool:
        kind = a.schema.field(name).type
        inner = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
        inner = inner.value_type if pa.types.is_fixed_size_list(inner) else inner
        if pa.types.is_floating(inner) and not a[name].null_count:
            return np.allclose(columns.to_numpy(a[name]), columns.to_numpy(b[name]), atol=1e-4)
        return bool(a[name].equals(b[name])) or name.endswith("weights")

    return a.schema.equals(b.schema) and a.num_rows == b.num_rows and all(equal(name) for name in a.column_names)


def _equal_tensors(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[name], b[name], atol=1e-4) for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="so many cases, drawn at random; 0: every stage with every fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=list(BY_NAME), choices=list(BY_NAME), metavar="STAGE", help="only these stages")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS, metavar="FAULT", help="only these faults")
    parser.add_argument("--minutes", type=float, default=600, help="start no further case after so long")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    chaos = Chaos(folder, options.seed)
    stages = [name for name in BY_NAME if name in options.stages and name != "refit"]  # which the demo leaves out
    there = {"link cut": chaos.link, "disk full": chaos.disk}  # None where this machine does not let us
    cases = [Case(stage, fault) for stage, fault in itertools.product(stages, options.faults) if there.get(fault, True)]
    chaos.random.shuffle(cases)
    cases = cases[: options.kills or None]
    done: list[Case] = []
    try:
        chaos.whole_run(stages[-1])
        for case in cases:
            if time.monotonic() - began > options.minutes * 60:
                break
            done.append(chaos.play(case))
            print(case.row(chaos.undisturbed[case.stage]), flush=True)
            if options.out:
                write(options.out, done, len(cases), chaos.undisturbed)
    finally:
        chaos.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if any(BAD in case.same for case in done):
        sys.exit("bad outcomes")


def write(path: Path, cases: list[Case], of: int, undisturbed: dict[str, float]) -> None:
    """The tables so far."""
    cells = {(case.stage, case.fault): case.cell(undisturbed[case.stage]) for case in cases}
    small = [
        (stage, *(cells.get((stage, fault), "") for fault in FAULTS)) for stage in BY_NAME if any(stage == case.stage for case in cases)
    ]
    heads = ("stage", "fault", "after, s", "outcome", "the same command again", "seconds lost", "outputs")
    lines = [
        f"`python -m tests.chaos.kills {' '.join(sys.argv[1:])}`: {len(cases)} of {of} cases.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (("stage", *FAULTS), ["---"] * (len(FAULTS) + 1), *small)),
        "",
        *(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads))),
        *(case.row(undisturbed[case.stage]) for case in sorted(cases, key=lambda case: (list(BY_NAME).index(case.stage), case.fault))),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
