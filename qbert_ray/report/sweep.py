"""A sweep: which settings were better, over which seeds, at what price, and which trials failed."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.colors import sample_colorscale
from scipy.special import stdtrit

from qbert_ray.artifacts import ArtifactError, RunDir
from qbert_ray.report.figures import DASHES, SYMBOLS, Figure, Series, colour, finish, lines, plain

SWEEP = "sweep.json"
MOST_CURVES, MOST_ROWS = 60, 500


def gather(run: RunDir) -> dict[str, Any]:
    """All that the page of a sweep shows.

    Raises:
        ArtifactError: there are no trials yet.
    """
    sweep = run.read_json(SWEEP)
    if not run.exists("trials.parquet"):
        raise ArtifactError(f"{run.uri} has no trials.parquet yet; the sweep writes it when its first trials are done")
    trials = pl.read_parquet(run.read_bytes("trials.parquet"))
    curves = pl.read_parquet(run.read_bytes("curves.parquet")) if run.exists("curves.parquet") else pl.DataFrame()
    metric, up = sweep["metric"], sweep["mode"] == "max"
    finished = trials.filter((pl.col("status") != "failed") & pl.col(metric).is_not_null())
    swept = [name for name in sweep["parameters"] if trials[name].n_unique() > 1]
    settings = summarise(finished, sweep["parameters"], metric, up)
    return {
        "sweep": sweep,
        "statuses": dict(trials.group_by("status", maintain_order=True).len().rows()),
        "swept": swept,
        "best": settings.head(1).rows(named=True),
        "seeds": len(sweep.get("seeds") or []) or 1,
        "effects": [effect(finished, name, metric) for name in swept] if len(finished) else [],
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


def finished_first(trials: pl.DataFrame, metric: str, up: bool) -> pl.DataFrame:
    return trials.sort(pl.col(metric), descending=up, nulls_last=True)


def summarise(trials: pl.DataFrame, parameters: list[str], metric: str, up: bool) -> pl.DataFrame:
    """Each setting with the mean of its seeds and the half-width of its 95 % interval, the best first."""
    grouped = trials.group_by(parameters, maintain_order=True).agg(
        mean=pl.col(metric).mean(), deviation=pl.col(metric).std(), seeds=pl.len(), seconds=pl.col("seconds").mean()
    )
    half = [_half(row["deviation"], row["seeds"]) for row in grouped.rows(named=True)]
    return grouped.with_columns(half=pl.Series(half, dtype=pl.Float64)).sort("mean", descending=up)


def _half(deviation: float | None, number: int) -> float | None:
    return None if deviation is None or number < 2 else float(stdtrit(number - 1, 0.975) * deviation / number**0.5)


def effect(trials: pl.DataFrame, name: str, metric: str) -> Figure:
    """The metric against one swept value, as the paper's Figs. 3-5: every trial, mean and 95 % band."""
    numeric = trials[name].dtype.is_numeric()
    rows = trials.drop_nulls(name) if numeric else trials.with_columns(pl.col(name).cast(pl.String).fill_null("none"))
    means = rows.group_by(name).agg(mean=pl.col(metric).mean(), deviation=pl.col(metric).std(), number=pl.len()).sort(name)
    x = means[name].to_list() if numeric else [plain(value) for value in means[name]]
    half = [_half(deviation, number) or 0.0 for deviation, number in means.select("deviation", "number").rows()]
    low, high = (means["mean"].to_numpy() + sign * np.array(half) for sign in (-1, 1))
    shade = colour("model")
    traces: list[Any] = []
    if numeric and len(x) > 1 and any(half):
        band = {"x": [*x, *x[::-1]], "y": [*high.tolist(), *low[::-1].tolist()], "fill": "toself", "fillcolor": shade, "opacity": 0.18}
        traces.append(go.Scatter(**band, line={"width": 0}, hoverinfo="skip", name="95 % band of the mean", mode="lines"))
    error = None if numeric or not any(half) else {"type": "data", "array": half, "width": 6}
    hover = [f"{name} {value}<br>mean {mean:.4f} ± {wide:.4f}, {number} trials" for value, mean, wide, number in
             zip(x, means["mean"], half, means["number"], strict=True)]  # fmt: skip
    traces.append(
        go.Scatter(
            x=x, y=means["mean"].to_list(), error_y=error, mode="lines+markers" if numeric else "markers", name="mean over trials", text=hover,
            hovertemplate="%{text}<extra></extra>", line={"color": shade, "width": 2}, marker={"size": 9, "color": shade},
        )
    )  # fmt: skip
    each = rows[name].to_list() if numeric else [plain(value) for value in rows[name]]
    dots = {"size": 7, "color": colour("popularity"), "symbol": "circle-open"}
    tips = [plain(str(one)) for one in rows["trial_id"]]
    scatter = go.Scatter(x=each, y=rows[metric].to_list(), mode="markers", name="trial", marker=dots, text=tips)
    traces.append(scatter.update(hovertemplate="trial %{text}<br>%{y:.4f}<extra></extra>"))
    spread = numeric and len(x) > 2 and min(x) > 0 and max(x) / min(x) >= 20
    axis: dict[str, Any] = {"type": "log" if spread else "linear" if numeric else "category"}
    axis |= {"tickvals": x, "ticktext": [f"{value:g}" for value in x]} if numeric and len(x) <= 8 else {}
    best = means.sort("mean", descending=True).row(0, named=True)
    alt = "; ".join(f"{value}: {mean:.4f}" for value, mean in zip(x, means["mean"], strict=True))
    note = f"{metric} over all trials of a value; highest at {best[name]}. Other settings vary along: compare with the table."
    return Figure(name, note, f"{metric} by {name}: {alt}.", finish(traces, name, metric, xaxis=axis), 320)


def learning(curves: pl.DataFrame, trials: pl.DataFrame, metric: str, up: bool) -> list[Figure]:
    """Curves of the best trials."""
    best = finished_first(trials, metric, up)["trial_id"].head(MOST_CURVES).to_list()
    result = []
    for column in [name for name in ("train_loss", "ndcg@10", "hr@10") if name in curves.columns]:
        series = []
        for number, trial in enumerate(best):
            rows = curves.filter((pl.col("trial_id") == trial) & pl.col(column).is_not_null()).sort("epoch")
            tips = [f"trial {plain(str(trial))}<br>epoch {epoch}: {value:.4f}" for epoch, value in rows.select("epoch", column).rows()]
            shade = "model" if number == 0 else "popularity"
            name = f"best trial, {trial}" if number == 0 else "other trials"
            series.append(Series(name, rows["epoch"].to_list(), rows[column].to_list(), colour=shade, hover=tips))
        plot = lines(series[::-1], "epoch", column)  # the best on top
        for number, trace in enumerate(plot["data"][:-1]):
            trace |= {"opacity": 0.4, "line": trace["line"] | {"width": 1}, "showlegend": number == 0}
        result.append(
            Figure(column, "The best trial in colour, the others in grey.", f"{len(best)} curves of {column} by epoch.", plot, 280)
        )
    return result


def parallel(trials: pl.DataFrame, swept: list[str], metric: str, up: bool) -> Figure:
    """One line a trial, through its values and its metric; drawn as lines, so that it needs no WebGL."""
    columns = [*swept, metric]
    heights, ticks = {}, []
    for name in columns:
        values = trials[name]
        if values.dtype.is_numeric():
            low, high = float(values.min() or 0), float(values.max() or 0)  # type: ignore[arg-type]
            heights[name] = [0.5 if value is None or high == low else (value - low) / (high - low) for value in values]
            marks = sorted(values.drop_nulls().unique()) if values.n_unique() <= 6 and name != metric else [low, (low + high) / 2, high]
            ticks += [(name, 0.5 if high == low else (mark - low) / (high - low), f"{mark:.4g}") for mark in marks]
        else:
            names = sorted({str(value) for value in values})
            heights[name] = [names.index(str(value)) / max(len(names) - 1, 1) for value in values]
            ticks += [(name, number / max(len(names) - 1, 1), plain(one)) for number, one in enumerate(names)]
    order = np.argsort(np.array(heights[metric]) * (1 if up else -1), kind="stable")  # the best are drawn last
    share = (np.argsort(np.argsort(heights[metric])) / max(len(trials) - 1, 1)).tolist()
    traces = []
    for row in order.tolist():
        tip = "<br>".join(f"{name}: {plain(str(trials[name][row]))}" for name in ["trial_id", *columns])
        shade = sample_colorscale("Cividis", [0.08 + 0.84 * (share[row] if up else 1 - share[row])])[0]
        y = [heights[name][row] for name in columns]
        line = {"color": shade, "width": 2.2}
        traces.append(go.Scatter(x=columns, y=y, mode="lines", line=line, text=[tip] * len(y), hovertemplate="%{text}<extra></extra>"))
    plot = finish(
        traces, "", "", showlegend=False, yaxis={"visible": False, "range": [-0.08, 1.08]}, xaxis={"type": "category", "showgrid": True}
    )
    plot["layout"]["annotations"] = [
        {"x": name, "y": height, "text": text, "showarrow": False, "xanchor": "right", "xshift": -4, "font": {"size": 11}}
        for name, height, text in ticks
    ]
    alt = f"{len(trials)} lines through the values of {', '.join(swept)} to {metric}."
    return Figure("Which settings lead where?", f"A line a trial; the yellower, the better its {metric}.", alt, plot, 380)


def pareto(trials: pl.DataFrame, pair: tuple[str, str], sweep: dict[str, Any]) -> Figure:
    """Two objectives; the front are the trials that no other beats in both."""
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
    """[N] whether no other point is at least as large everywhere and larger somewhere; of points [N, 2]."""
    at_least = (points[None] >= points[:, None]).all(2)
    larger = (points[None] > points[:, None]).any(2)
    return ~(at_least & larger).any(1)
