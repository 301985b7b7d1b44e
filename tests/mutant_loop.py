"""Pytest plugin of `tests.mutants`: the collected tests run once, then for each mutant those that reach it, quickest first.

Each mutant has a fork of this process, in which everything is imported already; its first failing test ends it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation import trampoline

PLAN, RESULTS = "plan.json", "results.json"
CPU_SECONDS, CPU_FACTOR = 5, 10  # a test may take so much more under a mutant than it does without it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out tests with fixtures of conftest.py, which is not loaded: those run whole stages, most of them on Ray."""
    items[:] = [item for item in items if set(item.fixturenames) <= {"request", *item._fixtureinfo.name2fixturedefs}]


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Writes what became of every mutant of the plan: "survived", "noticed", "took too long", "crashed", "no test"."""
    if session.testsfailed:
        raise session.Interrupted("the tests cannot be collected")
    plan = json.loads(Path(PLAN).read_text())
    _wait(_fork(lambda: _clean_run(session.items)))
    clean = json.loads(Path(RESULTS).read_text())
    if clean["failed"]:
        pytest.exit(f"fails without any mutation: {', '.join(clean['failed'])}", returncode=1)
    for name in clean["modules"]:  # what tests import late, once for all forks
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    results, running = {}, {}
    for name in plan["mutants"]:
        nodes = clean["tests"].get(name.rpartition("__mutmut_")[0], {})
        if not nodes:
            results[name] = "no test"
            continue
        if len(running) == plan["jobs"]:
            done, outcome = _wait(-1)
            results[running.pop(done)] = outcome
        items = sorted((item for item in session.items if item.nodeid in nodes), key=lambda item: nodes[item.nodeid])
        seconds = CPU_SECONDS + CPU_FACTOR * max(nodes.values())  # the longest may have made a fixture that another one now makes
        running[_fork(lambda name=name, items=items, seconds=seconds: _try(name, items, seconds))] = name
    while running:
        done, outcome = _wait(-1)
        results[running.pop(done)] = outcome
    Path(RESULTS).write_text(json.dumps(results))
    return True


def _clean_run(items: list[pytest.Item]) -> int:
    """In a fork, since Polars' and other thread pools do not survive a later one."""
    hits: set[str] = set()
    trampoline.record_trampoline_hit = lambda name, caller: hits.add(name)
    trampoline.set_mutant_under_test("stats")
    tests: dict[str, dict[str, float]] = defaultdict(dict)
    failed, before = [], set(sys.modules)
    for item in items:
        begin = time.process_time()
        reports = runtestprotocol(item, log=False, nextitem=None)
        failed += [f"{item.nodeid}\n{report.longreprtext}" for report in reports if report.failed]
        for name in hits:
            tests[name][item.nodeid] = time.process_time() - begin
        hits.clear()
    modules = sorted(name for name in set(sys.modules) - before if "." not in name or name.partition(".")[0] in sys.modules)
    Path(RESULTS).write_text(json.dumps({"tests": tests, "failed": failed, "modules": modules}))
    return 0


def _try(name: str, items: list[pytest.Item], seconds: float) -> int:
    """1 where one of the tests fails under a mutant; SIGPROF ends the process where one takes more CPU time than `seconds`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    trampoline.set_mutant_under_test(name)
    for item, following in zip(items, [*items[1:], None], strict=True):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return 1
    return 0


def _fork(work: Callable[[], int]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of Python warn of forks in a process with threads
        pid = os.fork()
    if pid:
        return pid
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        code = work()
    except BaseException:
        code = 1  # pytest itself broke, or a test ended the process
    os._exit(code)


def _wait(pid: int) -> tuple[int, str]:
    done, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return done, "took too long" if os.WTERMSIG(status) == signal.SIGPROF else "crashed"
    return done, "noticed" if os.WEXITSTATUS(status) else "survived"
