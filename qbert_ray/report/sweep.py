"""The page of a sweep: settings ranked over seeds, effects of single values, costs, and failed trials."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from qbert_ray.metrics import half_over_seeds
from qbert_ray.report.figures import DASHES, SYMBOLS, Figure, Series, colour, finish, lines, plain
from qbert_ray.storage.directory import ArtifactError, RunDir

SWEEP = "sweep.json"
MOST_CURVES, MOST_ROWS = 60, 500


def gather(run: RunDir) -> dict[str, Any]:
    """Content of a sweep's page.

    Raises:
        ArtifactError: there are no trials yet.
    """
    sweep = run.read_json(SWEEP)
    if not run.exists("trials.parquet"):
        raise ArtifactError(f"{run.uri} has no trials.parquet yet; the sweep writes it when its first trials are done")
    trials = numbers(pl.read_parquet(run.read_bytes("trials.parquet")), sweep["parameters"])
    curves = pl.read_parquet(run.read_bytes("curves.parquet")) if run.exists("curves.parquet") else pl.DataFrame()
    metric, up = sweep["metric"], sweep["mode"] == "max"
    finished = trials.filter((pl.col("status") != "failed") & pl.col(metric).is_not_null())
    swept = [name for name in sweep["parameters"] if trials[name].n_unique() > 1]
    settings, seeds = summarise(finished, sweep["parameters"], metric, up), len(sweep.get("seeds") or []) or 1
    done = summarise(finished.filter(pl.col("status") == "done"), sweep["parameters"], metric, up).filter(pl.col("seeds") == seeds)
    # As in best.yaml: a trial that was stopped, or one seed of several, decides nothing.
    best = (done if len(done) else settings).head(1).rows(named=True)
    return {
        "sweep": sweep,
        "statuses": dict(trials.group_by("status", maintain_order=True).len().rows()),
        "swept": swept,
        "best": best,
        "seeds": seeds,
        "effects": [effect(finished, name, sweep, best[0]) for name in swept] if best else [],
        "curves": learning(curves, finished, metric, up) if len(curves) and len(finished) else [],
        "parallel": [parallel(finished, swept, metric, up)] if len(swept) > 1 and len(finished) > 1 else [],
        "pareto": [pareto(finished, pair, sweep) for pair in combinations(sweep.get("objectives") or {}, 2)] if len(finished) else [],
        "settings": settings.head(MOST_ROWS).rows(named=True),
        "trials": finished_first(trials, metric, up).head(MOST_ROWS).rows(named=True),
        "failed": trials.filter(pl.col("status") == "failed").select("trial_id", "seed", *sweep["parameters"], "error").rows(named=True),
        "metric": metric,
        "objectives": list(dict.fromkeys([metric, *(sweep.get("objectives") or {})])),
        "seconds": float(trials["seconds"].sum()),
        "has_best": run.exists("best.yaml"),
    }


def numbers(trials: pl.DataFrame, parameters: list[str]) -> pl.DataFrame:
    """The trials with texts that are numbers converted: YAML reads 1e-3 as text."""
    texts = [name for name in parameters if trials[name].dtype == pl.String]
    parsed = {name: trials[name].str.strip_chars('"').cast(pl.Float64, strict=False) for name in texts}
    return trials.with_columns(
        values.alias(name) for name, values in parsed.items() if values.null_count() == trials[name].null_count() < len(trials)
    )


def finished_first(trials: pl.DataFrame, metric: str, up: bool) -> pl.DataFrame:
    return trials.sort(pl.col(metric), descending=up, nulls_last=True)


def summarise(trials: pl.DataFrame, parameters: list[str], metric: str, up: bool) -> pl.DataFrame:
    """Each setting with the mean of its seeds and the half-width of its 95 % interval, the best first."""
    grouped = trials.group_by(parameters, maintain_order=True).agg(
        mean=pl.col(metric).mean(), deviation=pl.col(metric).std(), seeds=pl.len(), seconds=pl.col("seconds").mean()
    )
    half = [half_over_seeds(row["deviation"], row["seeds"]) for row in grouped.rows(named=True)]
    return grouped.with_columns(half=pl.Series(half, dtype=pl.Float64)).sort("mean", descending=up)


def effect(trials: pl.DataFrame, name: str, sweep: dict[str, Any], best: dict[str, Any]) -> Figure:
    """The metric against one swept value, as the paper's Figs. 3-5: every trial, their mean and its 95 % band.

    The other values are those of the best setting, or those that the config has anyway, where trials of several values have them, so that
    the band is over seeds; else any.
    """
    metric = sweep["metric"]
    others = [other for other in sweep["parameters"] if other != name]
    like = {
        note: _like(trials, others, setting)
        for note, setting in (("in the best setting", best), ("configured", sweep.get("as_is") or best))
    }
    alike = max(like, key=lambda note: like[note][name].n_unique())
    alone = like[alike][name].n_unique() > 1
    rows = like[alike] if alone else trials
    numeric = rows[name].dtype.is_numeric()
    rows = rows.drop_nulls(name) if numeric else rows.with_columns(pl.col(name).cast(pl.String).fill_null("none"))
    means = rows.group_by(name).agg(mean=pl.col(metric).mean(), deviation=pl.col(metric).std(), number=pl.len()).sort(name)
    x, each = ([value if numeric else plain(value) for value in column] for column in (means[name], rows[name]))
    halves = [half_over_seeds(deviation, number) for deviation, number in means.select("deviation", "number").rows()]
    half = np.array([each or 0.0 for each in halves])
    shade, traces = colour("model"), []
    if numeric and len(x) > 1 and half.any():
        y = [*(means["mean"] + half), *(means["mean"] - half)[::-1]]
        band = go.Scatter(x=[*x, *x[::-1]], y=y, fill="toself", fillcolor=shade, opacity=0.18, mode="lines", line={"width": 0})
        traces.append(band.update(hoverinfo="skip", name="95 % band of the mean"))
    bars = None if numeric or not half.any() else {"type": "data", "array": half.tolist(), "width": 6}
    hover = [
        f"{name} {one}<br>mean {row['mean']:.4f}{'' if wide is None else f' ± {wide:.4f}'}, trials: {row['number']}"
        for one, wide, row in zip(x, halves, means.rows(named=True), strict=True)
    ]
    middle = go.Scatter(
        x=x, y=means["mean"].to_list(), error_y=bars, mode="lines+markers" if numeric else "markers", name="mean", text=hover
    )
    traces.append(
        middle.update(line={"color": shade, "width": 2}, marker={"size": 9, "color": shade}, hovertemplate="%{text}<extra></extra>")
    )
    dots = {"size": 7, "color": colour("popularity"), "symbol": "circle-open"}
    scatter = go.Scatter(
        x=each, y=rows[metric].to_list(), mode="markers", name="trial", marker=dots, text=[plain(str(one)) for one in rows["trial_id"]]
    )
    traces.append(scatter.update(hovertemplate="trial %{text}<br>%{y:.4f}<extra></extra>"))
    axis: dict[str, Any] = {"type": ("log" if wide_range([float(each) for each in x]) else "linear") if numeric else "category"}
    axis |= {"tickvals": x, "ticktext": [f"{value:g}" for value in x]} if numeric and len(x) <= 8 else {}
    alt = "; ".join(f"{value}: {mean:.4f}" for value, mean in zip(x, means["mean"], strict=True))
    note = f"All else as {alike}." if alone else "Over all trials of a value: what else differs between them counts too."
    return Figure(name, note, f"{metric} by {name}: {alt}.", finish(traces, name, metric, xaxis=axis), 320)


def _like(trials: pl.DataFrame, names: list[str], setting: dict[str, Any]) -> pl.DataFrame:
    return trials.filter(
        pl.Series([all(row[name] == setting.get(name) for name in names) for row in trials.rows(named=True)], dtype=pl.Boolean)
    )


def wide_range(values: list[float]) -> bool:
    """Whether positive values span so wide a range that a logarithmic axis shows them better."""
    return len(values) > 2 and min(values) > 0 and max(values) / min(values) >= 20


def learning(curves: pl.DataFrame, trials: pl.DataFrame, metric: str, up: bool) -> list[Figure]:
    """Curves of the best trials."""
    best = finished_first(trials, metric, up)["trial_id"].head(MOST_CURVES).to_list()
    result = []
    for column in [name for name in ("train_loss", "ndcg@10", "hr@10") if name in curves.columns and curves[name].count()]:
        series = []
        for number, trial in enumerate(best):
            rows = curves.filter((pl.col("trial_id") == trial) & pl.col(column).is_not_null())
            rows = rows.group_by("epoch").agg(pl.col(column).mean()).sort("epoch")  # over domains, as trials are compared
            tips = [f"trial {plain(str(trial))}<br>epoch {epoch + 1}: {value:.4f}" for epoch, value in rows.select("epoch", column).rows()]
            shade = "model" if number == 0 else "popularity"
            name = f"best trial, {trial}" if number == 0 else "other trials"
            series.append(Series(name, (rows["epoch"] + 1).to_list(), rows[column].to_list(), colour=shade, hover=tips))
        plot = lines(series[::-1], "epoch", column)  # the best on top
        for number, trace in enumerate(plot["data"][:-1]):
            trace |= {"opacity": 0.4, "line": trace["line"] | {"width": 1}, "showlegend": number == 0}
        result.append(
            Figure(column, "The best trial in colour, the others in grey.", f"{len(best)} curves of {column} by epoch.", plot, 280)
        )
    return result


def parallel(trials: pl.DataFrame, swept: list[str], metric: str, up: bool) -> Figure:
    """Parallel coordinates: a line per trial through its values and its metric; drawn as lines, so that it needs no WebGL."""
    columns, heights, ticks = [*swept, metric], {}, []
    for name in columns:
        values = trials[name]
        if values.dtype.is_numeric():
            scale = np.log10 if wide_range(values.drop_nulls().unique().to_list()) else np.asarray
            numbers = values.cast(pl.Float64).to_numpy()
            place = scale(numbers)
            low, size = np.nanmin(place), np.nanmax(place) - np.nanmin(place)
            there: list[float] = np.unique(numbers[~np.isnan(numbers)]).tolist()
            marks = there if values.n_unique() <= 6 and name != metric else [there[0], there[-1]]
            named = [(f"{mark:.4g}", (float(scale(mark)) - low) / (size or 1)) for mark in marks]
            heights[name] = [None if np.isnan(one) else (float(one) - low) / (size or 1) for one in place]
        else:
            names = sorted({str(value) for value in values})
            named = [(plain(one), number / max(len(names) - 1, 1)) for number, one in enumerate(names)]
            heights[name] = [names.index(str(value)) / max(len(names) - 1, 1) for value in values]
        ticks += [{"x": name, "y": y, "text": text, "showarrow": False, "xanchor": "right", "xshift": -5} for text, y in named]
    order = np.argsort(trials[metric].to_numpy() * (1 if up else -1), kind="stable")
    leading = set(order[-max(1, len(order) // 10) :].tolist())  # drawn last, on top
    traces = []
    for row in order.tolist():
        tip = "<br>".join(f"{name}: {plain(str(trials[name][row]))}" for name in ["trial_id", *columns])
        line = {"color": colour("model"), "width": 2.6} if row in leading else {"color": colour("popularity"), "width": 1}
        trace = go.Scatter(x=columns, y=[heights[name][row] for name in columns], mode="lines", line=line, text=[tip] * len(columns))
        traces.append(trace.update(hovertemplate="%{text}<extra></extra>", opacity=1 if row in leading else 0.55))
    x_axis = {"type": "category", "range": [-0.4, len(columns) - 0.8], "tickangle": 0}
    plot = finish(traces, "", "", showlegend=False, yaxis={"visible": False, "range": [-0.08, 1.08]}, xaxis=x_axis, annotations=ticks)
    alt = f"{len(trials)} lines through the values of {', '.join(swept)} to {metric}."
    return Figure("Which settings lead where?", f"A line a trial; the tenth with the best {metric} in colour.", alt, plot, 380)


def pareto(trials: pl.DataFrame, pair: tuple[str, str], sweep: dict[str, Any]) -> Figure:
    """Scatter plot of two objectives with the Pareto front: the trials that no other beats in both."""
    x, y = pair
    rows = trials.drop_nulls([x, y])
    points = rows.select(x, y).to_numpy()
    signs = np.array([1.0 if sweep["objectives"][name] == "max" else -1.0 for name in pair])
    front = on_front(points * signs)
    tips = [
        "<br>".join(f"{name}: {plain(str(row[name]))}" for name in ["trial_id", *sweep["parameters"], x, y])
        for row in rows.rows(named=True)
    ]
    order = np.argsort(points[front][:, 0])
    traces = [
        go.Scatter(x=points[~front][:, 0].tolist(), y=points[~front][:, 1].tolist(), mode="markers", name="beaten by another",
                   marker={"color": colour("popularity"), "size": 8, "symbol": SYMBOLS[0] + "-open"},
                   text=[tip for tip, best in zip(tips, front, strict=True) if not best]),
        go.Scatter(x=points[front][order, 0].tolist(), y=points[front][order, 1].tolist(), mode="lines+markers", name="Pareto front",
                   line={"color": colour("model"), "dash": DASHES[2], "shape": "linear"}, marker={"size": 11, "symbol": SYMBOLS[1]},
                   text=[tips[place] for place in np.flatnonzero(front)[order]]),
    ]  # fmt: skip
    for trace in traces:
        trace.update(hovertemplate="%{text}<extra></extra>")
    better = " and ".join(f"{'more' if sweep['objectives'][name] == 'max' else 'less'} {name}" for name in pair)
    alt = f"{int(front.sum())} of {len(rows)} trials are on the front of {x} and {y}."
    return Figure(f"{x} against {y}", f"Better is {better}. No trial beats one of the front in both.", alt, finish(traces, x, y), 360)


def on_front(points: np.ndarray) -> np.ndarray:
    """[N] whether each of points [N, 2] is on the Pareto front: no other is at least as large everywhere and larger somewhere."""
    at_least = np.all(points[None] >= points[:, None], axis=2)
    larger = np.any(points[None] > points[:, None], axis=2)
    return ~np.any(at_least & larger, axis=1)
