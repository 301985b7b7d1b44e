"""Output of a run while it works: bars, lines and tables on a terminal, or one JSON line per event in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from rich.console import Console

from qbert_ray.cli.console import LOG_SECONDS, StageBar, metrics_table, stage_line, sweep_table
from qbert_ray.cli.terminal import json_safe, shown
from qbert_ray.storage.directory import Manifest

if TYPE_CHECKING:  # they import scipy and torch, which most commands do not need
    from qbert_ray.metrics import Evaluation
    from qbert_ray.semantic_ids.stage import Version
    from qbert_ray.training import EpochMetrics


class Journal(Protocol):
    """Receives the events of a run."""

    def begin(self, what: str) -> None:
        """An operation begins that takes a while."""
        ...

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """Context that gives the `Progress` of a running stage."""
        ...

    def done(self, name: str, manifest: Manifest | None, seconds: float | None, why: str | None = None) -> None:
        """A stage is done now (seconds given), was done before, or is left out (why given)."""
        ...

    def warn(self, text: str) -> None: ...

    def metrics(self, domain: str, content: Evaluation) -> None:
        """The metrics of a domain, from evaluate/metrics.json."""
        ...

    def appended(self, version: Version) -> None:
        """A new version of the semantic IDs was appended."""
        ...

    def trials(self, description: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """The results of a sweep's trials."""
        ...

    def files(self, paths: Mapping[str, str]) -> None:
        """Results were written: description -> path."""
        ...


class Terminal:
    """A journal for a terminal: bars, lines and tables, also readable when redirected to a file."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, what: str) -> None:
        self.console.print(f"[dim]{shown(what)}[/dim]", soft_wrap=True)

    def stage(self, name: str) -> StageBar:
        return StageBar(self.console, name)

    def done(self, name: str, manifest: Manifest | None, seconds: float | None, why: str | None = None) -> None:
        self.console.print(stage_line(name, manifest, seconds, why), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]! {shown(text)}[/yellow]", soft_wrap=True)

    def metrics(self, domain: str, content: Evaluation) -> None:
        if not content["users"]:
            self.warn(f"{domain}: no user has a test item, so nothing could be ranked")
            return
        self.console.print()
        self.console.print(metrics_table(domain, content))
        if "cold" in content:
            self.console.print(metrics_table(domain, content["cold"], "items that no training saw"))

    def appended(self, version: Version) -> None:
        self.console.print(
            f"[green]✓[/green] version {version['version']} ({version['fingerprint']}): {version['items']:,} semantic IDs, {version['added']:,} added; "
            f"of those before {version['unchanged']:,} items unchanged, {version['changed']:,} changed, {version['gone']:,} gone from the files",
            soft_wrap=True,
        )
        if version.get("left_out"):
            self.console.print(
                f"  {version['left_out']:,} items of the files stay out: they had too few interactions when the files were first read; --append=all adds them",
                soft_wrap=True,
            )
        if version["added"] or version["gone"]:
            self.console.print(
                "  next: qbert-ray score --redo, which recommends the new items and leaves out those that are gone", soft_wrap=True
            )

    def trials(self, description: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.console.print(sweep_table(description, rows))

    def files(self, paths: Mapping[str, str]) -> None:
        for name, path in paths.items():
            self.console.print(f"{name:<16} {shown(path)}", soft_wrap=True)


class JsonLines:
    """A journal for machines: each line is a JSON object with `timestamp`, `event`, `run` and, if known, `stage` and `domain`."""

    def __init__(self, run: str, domains: list[str]) -> None:
        processors: list[Any] = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(_dumps),
        ]
        self.log = structlog.wrap_logger(structlog.PrintLogger(), processors=processors).bind(run=run)
        self.domains = domains

    def begin(self, what: str) -> None:
        self.log.info("started", what=what)

    @contextmanager
    def stage(self, name: str) -> Iterator[_StageLog]:
        log = self.log.bind(stage=name)
        log.info("stage started")
        try:
            yield _StageLog(log, self.domains)
        except BaseException as error:
            log.info("stage failed", error=f"{type(error).__name__}: {error}")
            raise

    def done(self, name: str, manifest: Manifest | None, seconds: float | None, why: str | None = None) -> None:
        log = self.log.bind(stage=name)
        if manifest is None:
            log.info("stage left out", why=why)
        elif seconds is None:
            log.info("stage was done before")
        else:
            log.info("stage done", seconds=round(seconds, 1), counts=manifest.counts)

    def warn(self, text: str) -> None:
        self.log.info("warning", text=text)

    def metrics(self, domain: str, content: Evaluation) -> None:
        self.log.info("metrics", domain=domain, **content)

    def appended(self, version: Version) -> None:
        self.log.info("appended", **version)

    def trials(self, description: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.log.info("trial", **row)

    def files(self, paths: Mapping[str, str]) -> None:
        self.log.info("files", **{name.replace(" ", "_"): path for name, path in paths.items()})


def _dumps(content: Any, **options: Any) -> str:
    """One line of JSON with Unicode text kept readable and terminal control characters escaped."""
    return json_safe(json.dumps(content, ensure_ascii=False, **options))


class _StageLog:
    """A `Progress` that logs each epoch and, at intervals, how far the stage is."""

    def __init__(self, log: Any, domains: list[str]) -> None:
        self.log, self.domains = log, domains
        self.total, self.completed, self.said = 0, 0, time.monotonic()

    def start(self, total: int, done: int = 0) -> None:
        self.total, self.completed = total, done

    def advance(self, steps: int = 1) -> None:
        self.completed += steps
        if time.monotonic() - self.said > LOG_SECONDS:
            self.said = time.monotonic()
            self.log.info("progress", done=self.completed, total=self.total)

    def note(self, text: str) -> None:
        if text in self.domains:
            self.log = self.log.bind(domain=text)
        else:
            self.log.info("note", text=text)

    def epoch(self, metrics: EpochMetrics) -> None:
        self.log.info("epoch", **metrics)

    def restarted(self, epoch: int, workers: int) -> None:
        self.log.info("restarted", epoch=epoch, workers=workers)


def open_journal(kind: str, console: Console, run: str, domains: list[str]) -> Journal:
    """The journal of a run; "auto" is "text" at a terminal and "json" elsewhere."""
    if kind == "json" or (kind == "auto" and not console.is_terminal):
        return JsonLines(run, domains)
    return Terminal(console)
