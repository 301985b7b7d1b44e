"""A Ray cluster of several `ray start` nodes on this machine, each ended by its own process ids."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests import ROOT

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
UP_SECONDS, TRIES = 300, 3  # a raylet gives its agents 15 s to start, which a busy machine may not keep


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def clean_environment(**more: str) -> dict[str, str]:
    """What a driver or node gets: nothing of a Ray that is already there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    ours = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "240",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "240",
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # a job's `python` is the first there
    return kept | ours | {"HF_HUB_OFFLINE": "1", "PATH": path} | more


class Link:
    """A network of its own for all nodes but the head, with a cable to this machine's that can be cut; root only."""

    def __init__(self) -> None:
        self.name = f"q{os.getpid() % 100_000}"
        subnet = f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}"
        self.here, self.there = f"{subnet}.1", f"{subnet}.2"
        self.inside = ["ip", "netns", "exec", self.name]
        self._ip("netns", "add", self.name)
        self._ip("link", "add", f"{self.name}a", "type", "veth", "peer", "name", f"{self.name}b", "netns", self.name)
        self._ip("address", "add", f"{self.here}/24", "dev", f"{self.name}a")
        self._ip("-n", self.name, "address", "add", f"{self.there}/24", "dev", f"{self.name}b")
        self._ip("-n", self.name, "link", "set", "lo", "up")
        self._ip("-n", self.name, "link", "set", f"{self.name}b", "up")
        self.mend()

    @classmethod
    def lay(cls) -> Link | None:
        """None where this machine lets nobody make networks, as in most containers."""
        try:
            return cls()
        except (OSError, subprocess.CalledProcessError):
            return None

    def cut(self) -> None:
        self._ip("link", "set", f"{self.name}a", "down")

    def mend(self) -> None:
        self._ip("link", "set", f"{self.name}a", "up")

    def remove(self) -> None:
        self._ip("netns", "delete", self.name)  # and the cable with it

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


class Nodes:
    """A head and further nodes.

    Args:
        cpus: logical CPUs of each node; the first is the head.
        link: where the nodes after the head are, instead of on loopback.
        object_store: bytes of each node's.
        environment: further variables of every node.
    """

    def __init__(
        self, *cpus: int, dashboard: bool = False, link: Link | None = None, object_store: int = 200 * 2**20, **environment: str
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qn", dir="/tmp"))  # short, since it holds sockets
        self.environment = clean_environment(**environment)
        self.object_store = object_store
        self.port, self.dashboard_port, self.link = free_port(), free_port(), link
        self.host = link.here if link else "127.0.0.1"
        self.address, self.jobs = f"{self.host}:{self.port}", f"http://127.0.0.1:{self.dashboard_port}"
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start_head(cpus[0], dashboard)
            for number in cpus[1:]:
                self.add(number)
        except BaseException:
            self.stop()
            raise

    def _start_head(self, cpus: int, dashboard: bool) -> None:
        ports = ["--port", self.port, "--dashboard-port", self.dashboard_port, "--ray-client-server-port", free_port()]
        places = ["--temp-dir", self.folder, "--dashboard-host", "127.0.0.1", "--include-dashboard", str(dashboard).lower()]
        self._start("--head", *ports, *places, cpus=cpus)
        if dashboard:
            self._wait("the dashboard", lambda: _answers(f"{self.jobs}/api/version"))

    def add(self, cpus: int) -> None:
        self._start("--address", self.address, cpus=cpus)

    def replace(self, node: int, cpus: int) -> None:
        """Another node in the place of one that was killed."""
        self._end(self.processes[node])
        self.add(cpus)
        self.processes[node] = self.processes.pop()

    def _start(self, *options: object, cpus: int) -> None:
        more = ["--num-cpus", cpus, "--object-store-memory", self.object_store, "--dashboard-agent-listen-port", free_port(), "--block"]
        there = self.link if self.processes else None
        address = there.there if there else self.host
        command = [*(there.inside if there else []), *RAY, "start", "--node-ip-address", address, *map(str, [*options, *more])]
        log = self.folder / f"node{len(self.processes)}.log"
        for left in reversed(range(TRIES)):
            with log.open("wb") as output:
                process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT)
            self.processes.append(process)
            try:
                self._wait(f"node {len(self.processes) - 1}", lambda: "Ray runtime started" in log.read_text())
                break
            except AssertionError:
                if not left:
                    raise
                self._end(self.processes.pop())

    def _wait(self, what: str, there: Callable[[], bool]) -> None:
        until = time.monotonic() + UP_SECONDS
        while not there():
            logs = "\n".join(path.read_text() for path in self.folder.glob("node*.log"))
            assert time.monotonic() < until and self.processes[-1].poll() is None, f"{what} did not come up:\n{logs}"
            time.sleep(0.2)

    def pids(self, node: int, name: str) -> list[int]:
        """Processes of a node whose command line holds a name: `raylet`, or what Ray calls a busy worker, such as `ray::_Publisher`."""
        return [pid for pid, command in descendants(self.processes[node].pid).items() if name in command]

    def stop(self) -> None:
        for process in reversed(self.processes):
            self._end(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        tree = descendants(process.pid)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in tree:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line, of all that a process started and of what these started."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    processes = [
        (int(child), int(parent), command) for child, parent, command in (row.split(None, 2) for row in rows if len(row.split()) > 2)
    ]
    found: dict[int, str] = {}
    family = {pid}
    while family:
        family = {child for child, parent, _ in processes if parent in family} - set(found)
        found |= {child: command for child, _, command in processes if child in family}
    return found
