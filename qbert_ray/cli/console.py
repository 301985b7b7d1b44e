"""Terminal output of a run: a bar while a stage works, a line when it is done, a table at the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qbert_ray.cli.terminal import printable, shown
from qbert_ray.storage.columns import label
from qbert_ray.storage.directory import Manifest

if TYPE_CHECKING:  # they import scipy and torch, which most commands do not need
    from qbert_ray.metrics import Evaluation
    from qbert_ray.training import EpochMetrics

NAME_WIDTH = 14
LOG_SECONDS = 30.0


class StageBar:
    """The progress of one stage: a bar on a terminal, or a line at intervals elsewhere, such as in a job's log."""

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn(f"{name:<{NAME_WIDTH}}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.name, self.said = name, time.monotonic()
        self.task = self.bars.add_task(name, total=None, note="")

    def __enter__(self) -> StageBar:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, total: int, done: int = 0) -> None:
        self.bars.reset(self.task, total=total, completed=done)

    def advance(self, steps: int = 1) -> None:
        self.bars.advance(self.task, steps)
        self._log()

    def note(self, text: str) -> None:
        self.bars.update(self.task, note=printable(text))
        self._log()

    def epoch(self, metrics: EpochMetrics) -> None:
        self.note("  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)))

    def restarted(self, epoch: int, workers: int) -> None:
        self.note(f"restarted after epoch {epoch} with {workers} worker{'s' * (workers > 1)}")

    def _log(self) -> None:
        if not self.console.is_terminal and time.monotonic() - self.said > LOG_SECONDS:
            task = self.bars.tasks[self.task]
            self.console.print(
                f"  {self.name:<{NAME_WIDTH}} {task.completed:.0f}/{task.total or 0:.0f}  {task.fields['note']}", soft_wrap=True
            )
            self.said = time.monotonic()


def stage_line(name: str, manifest: Manifest | None, seconds: float | None, why: str | None = None) -> str:
    """One line on a stage that just finished (seconds given), was finished earlier, or is left out (why given)."""
    if manifest is None:
        return f"[dim]– {name:<{NAME_WIDTH}} left out: {shown(why)}[/dim]"
    when = f"{seconds:7.1f} s" if seconds is not None else "   done before"
    return f"[green]✓[/green] {name:<{NAME_WIDTH}}{when}  {shown(_summary(manifest))}"


def metrics_table(domain: str, content: Evaluation, ranked: str = "every item ranked") -> Table:
    """The table of one domain of evaluate/metrics.json, or of its cold items: rankings by metrics, for both protocols."""
    models = next(iter(content["protocols"].values()))
    names = list(next(iter(models.values())))
    sampled = f" drawn from {content['sampled_from']:,}" if "sampled_from" in content else ""
    refit = f", by models trained on {content['trained_on']} items too" if "trained_on" in content else ""
    table = Table(
        title=f"{domain}: {ranked} for {content['users']:,} users{sampled}{refit}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,  # so narrow that a terminal of 80 columns shows all
    )
    table.add_column("items", no_wrap=True)
    table.add_column("ranking", no_wrap=True)
    for name in [*names, "±"]:
        table.add_column(name, justify="right", no_wrap=True)
    for protocol, models in content["protocols"].items():
        for model, values in models.items():
            half = (values[names[-1]]["high"] - values[names[-1]]["low"]) / 2
            cells = [f"{values[name]['value']:.4f}" for name in names]
            table.add_row(protocol, label(model), *cells, f"{half:.3f}", style="bold" if model == "model" else None)
        table.add_section()
    table.caption = f"±: half of the 95 % interval of {names[-1]} over users"
    return table


def trials_table(trials: list[tuple[str, dict[str, Any], int]], shared: list[str], seconds: list[float | None]) -> Table:
    """Table of the trials (name, values, seed) that a sweep is going to run, the last stage each shares, and its estimated time."""
    table = Table(title=f"{len(trials)} trials", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("trial", *trials[0][1], "seed", "shares\nup to", "minutes"):
        table.add_column(name.replace(".", ".\n"), no_wrap=True)
    for (name, values, seed), last, cost in zip(trials, shared, seconds, strict=True):
        table.add_row(name, *map(_short, values.values()), str(seed), last, "?" if cost is None else f"{cost / 60:.1f}")
    return table


def sweep_table(description: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """Table of a sweep's trials, the best first; failed ones with their error."""
    metric, sign = description["metric"], -1 if description["mode"] == "max" else 1
    table = Table(title=f"{len(rows)} trials by {metric}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    columns = [*description["parameters"], "seed", *description["objectives"], "epochs", "seconds", "status"]
    for name in columns:
        table.add_column(name.replace(".", ".\n"), no_wrap=name != "status", min_width=len("stopped") if name == "status" else None)
    for row in sorted(rows, key=lambda row: sign * row[metric] if row.get(metric) is not None else float("inf")):
        status = shown(f"failed: {row['error']}") if row["status"] == "failed" else row["status"]
        table.add_row(*(_short(row.get(name)) for name in columns[:-1]), status)
    return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else shown(value)


def _summary(manifest: Manifest) -> str:
    counts = manifest.counts
    match manifest.stage:
        case "ingest":
            return "; ".join(_ingested(domain, figures) for domain, figures in counts.items() if isinstance(figures, dict))
        case "features":
            return "; ".join(_encoded(modality, figures) for modality, figures in counts.items() if isinstance(figures, dict))
        case "fusion":
            depths = {name[6:]: count for name, count in sorted(counts.items()) if name.startswith("depth_")}
            return f"{counts['items']:,} items; depth {_spread(depths)}; view distance {counts['metrics']['view_distance']:.2f}"
        case "quantizer":
            figures = counts["metrics"]
            usage = " ".join(f"{share:.0%}" for share in figures["codebook_usage"])
            return f"codebook usage {usage}; error {figures['reconstruction_error']:.2f}; raw collisions {figures['collision_rate']:.1%}"
        case "semantic_ids":
            return f"{counts['items']:,} semantic IDs, all distinct; {counts['moved']:,} moved"
        case "pretrain":
            ranked = f"validation hr@10 {counts['metrics']['hr@10']:.4f}" if "hr@10" in counts["metrics"] else "no validation items"
            return f"on {', '.join(counts['domains'])}; {ranked} after {counts['metrics']['epoch'] + 1} epochs"
        case "finetune":
            return "; ".join(f"{name}: {figures['epoch'] + 1} epochs" for name, figures in counts["metrics"].items())
        case "refit":
            return "; ".join(
                f"{name}: {figures['held_out']:,} held-out interactions, {figures['interactions']:,} in all, {figures['epochs']} epochs"
                for name, figures in counts.items()
            )
        case "ranking":
            return "; ".join(
                f"{name}: {_blending(figures.get('blending', {}))}{_reranking(figures.get('reranking', {}))}"
                for name, figures in counts.items()
            )
        case "evaluate" | "score" | "score_histories":
            return "; ".join(f"{name}: {_users(figures)} users" for name, figures in counts.items() if isinstance(figures, dict))
    return ", ".join(f"{value:,} {name}" for name, value in counts.items() if isinstance(value, int))


def _users(figures: dict[str, Any]) -> str:
    """How many users were scored or ranked, and of how many where some had no test item or were not drawn."""
    users, ranked = figures["users"], figures.get("ranked", figures["users"])
    return f"{users:,}" if ranked == users else f"{ranked:,} of {users:,}"


def _ingested(domain: str, figures: dict[str, Any]) -> str:
    rejected = sum(figures["items_rejected"].values()) + sum(figures["interactions_rejected"].values())
    cold = f" ({figures['cold_items']:,} cold)" if figures.get("cold_items") else ""
    said = f"{domain}: {figures['items']:,} items{cold}, {figures['users']:,} users, {figures['interactions']:,} interactions, {rejected:,} rows rejected"
    split = figures.get("split")
    if split is None:
        return said
    validation, test = (f" from {split[name]}" if name in split else "" for name in ("validation_from", "test_from"))
    return (
        f"{said}; validation{validation} ({split['users_validated']:,} users), test{test} "
        f"({figures['users_evaluated']:,}); only later: {split['users_only_later']:,} users, {split['items_only_later']:,} items; "
        f"{split['further_interactions']:,} further interactions"
    )


def _blending(gain: dict[str, Any]) -> str:
    if not gain:
        return "the blend"
    left_out = "" if gain["kept"] else " (no gain, left out)"
    return f"validation ndcg@10 {gain['alone']:.4f} -> {gain['blended']:.4f} with the blend{left_out}"


def _reranking(gain: dict[str, Any]) -> str:
    if "reranked" not in gain:
        return ""
    return f", the best reranked {gain['blended']:.4f} -> {gain['reranked']:.4f}" + ("" if gain["kept"] else " (no gain, left out)")


def _encoded(modality: str, figures: dict[str, Any]) -> str:
    rejected = sum(count for name, count in figures.items() if name.endswith("_rejected"))  # "..._rejected.<reason>" are its parts
    unit = next((name.removesuffix("_rejected") for name in figures if name.endswith("_rejected")), f"{modality}_vectors")
    made = figures.get(unit, figures.get("items", 0))  # a user's own vectors count items
    return f"{made:,} {modality} vectors" + (f", {rejected:,} rejected" if rejected else "")


def _spread(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return " ".join(f"{name}:{count / total:.0%}" for name, count in counts.items())
