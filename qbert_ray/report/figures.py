"""Figures of the report: a plotly figure with the question it answers and an alternative text.

Colours mean the same everywhere: a model, a view of an item, a training. Each has a shade for the light and the dark theme; a
figure is drawn with the light one, and the page swaps them. No information is in colour alone: symbols and dashes differ too.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from qbert_ray.config.loading import merge
from qbert_ray.storage.columns import label

# name -> light theme, dark theme: Okabe and Ito's hues, safe for the colour-blind, at a contrast of 3 : 1 to the background
BLUE, GREEN, ORANGE, PURPLE, AMBER, BROWN, GREY = (
    ("#0072B2", "#5CB3F0"), ("#00875F", "#2CC295"), ("#D55E00", "#FF9359"), ("#A9518A", "#E39AC7"),
    ("#A87000", "#EDB43C"), ("#7A5240", "#C79F8C"), ("#6B7280", "#9AA4B2"),
)  # fmt: skip
SHADES = {
    "model": BLUE, "sequencer": GREEN, "ridge": ORANGE, "co_occurrence": PURPLE, "popularity": GREY,
    "transitions": AMBER, "item_item_text": BROWN,
    "text_nearest": AMBER, "text_mean": BROWN, "random": GREY,
    "fused": BLUE,  # the other views of an item take theirs by position
    "pretrain": AMBER, "finetune": BLUE, "items": BLUE, "shuffled": GREY,
}  # fmt: skip
OTHERS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, BROWN, GREY)
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star", "cross", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
LONGEST = 60  # characters of a name in a figure


class Figure(NamedTuple):
    title: str
    note: str  # how to read it, or which values would be bad
    alt: str  # alternative text: what the figure shows
    plot: dict[str, Any]
    height: int = 300


class Series(NamedTuple):
    """One line of a figure."""

    name: str
    x: Sequence[Any]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None  # of an interval around each point
    high: Sequence[float | None] | None = None
    colour: str | None = None  # the name whose colour it takes
    dash: str = "solid"
    hover: Sequence[str] | None = None


def dark_shades() -> dict[str, str]:
    """Light colour -> dark colour, for the page."""
    return {light.lower(): dark for light, dark in SHADES.values()} | {light.lower(): dark for light, dark in OTHERS}


def colour(name: str, number: int = 0) -> str:
    return (SHADES.get(name) or OTHERS[number % len(OTHERS)])[0]


def plain(text: str) -> str:
    """A user's text escaped for plotly, which would interpret its tags."""
    return escape(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…", quote=False)


def finish(traces: list[Any], x: str, y: str, **layout: Any) -> dict[str, Any]:
    """The figure as JSON with its axes named; `layout` is plotly's."""
    axes = {name: {"title": {"text": title, "standoff": 8}, "automargin": True} for name, title in (("xaxis", x), ("yaxis", y))}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    base = {"margin": {"l": 10, "r": 14, "t": 12, "b": 10}, "showlegend": len(traces) > 1, "legend": legend, "hovermode": "closest", **axes}
    return {"data": [trace.to_plotly_json() for trace in traces], "layout": merge(base, layout)}


def bars(x: Sequence[Any], y: Sequence[float], x_title: str, y_title: str, name: str = "items", **layout: Any) -> dict[str, Any]:
    hover = f"{x_title} %{{x}}<br>{y_title} %{{y:,}}<extra></extra>"
    trace = go.Bar(x=list(x), y=list(y), marker_color=colour(name), marker_line_width=0, hovertemplate=hover)
    return finish([trace], x_title, y_title, bargap=layout.pop("bargap", 0.25), **layout)


def lines(series: list[Series], x_title: str, y_title: str, markers: bool = False, **layout: Any) -> dict[str, Any]:
    """Lines, with error bars where a series has an interval."""
    traces = []
    for number, one in enumerate(series):
        shade = colour(one.colour or one.name, number)
        error = None
        if one.low is not None and one.high is not None:
            above, below = _distances(one.y, one.high), _distances(one.y, one.low)
            error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.4, "width": 4}
        traces.append(
            go.Scatter(
                x=list(one.x), y=list(one.y), name=plain(label(one.name)), error_y=error,
                mode="lines+markers" if markers or len(one.x) < 3 else "lines",
                line={"color": shade, "width": 2, "dash": one.dash},
                marker={"size": 8, "symbol": SYMBOLS[number % len(SYMBOLS)]},
                text=list(one.hover) if one.hover else None,
                hovertemplate=("%{text}" if one.hover else f"%{{fullData.name}}<br>{x_title} %{{x}}: %{{y:.4g}}") + "<extra></extra>",
            )
        )  # fmt: skip
    return finish(traces, x_title, y_title, **layout)


def by_epoch(title: str, note: str, y_title: str, series: list[Series], **layout: Any) -> Figure:
    """Values by training epoch; the alternative text gives the first and last ones."""
    alt = "; ".join(f"{one.name} from {one.y[0]:.4g} to {one.y[-1]:.4g} in epoch {one.x[-1]}" for one in series)
    return Figure(title, note, f"{alt}.", lines(series, "epoch", y_title, **layout), 260)


def intervals(rows: list[tuple[str, str, dict[str, float]]], x_title: str) -> dict[str, Any]:
    """Means with their 95 % intervals, one below the other.

    Args:
        rows: model, protocol, {value, low, high}.
    """
    models = list(dict.fromkeys(model for model, _, _ in rows))
    protocols = list(dict.fromkeys(protocol for _, protocol, _ in rows))
    traces = []
    for number, (model, protocol, values) in enumerate(rows):
        shift = (protocols.index(protocol) - (len(protocols) - 1) / 2) * 0.34
        height = len(models) - 1 - models.index(model) - shift
        error = {"type": "data", "symmetric": False, "array": _distances([values["value"]], [values["high"]]), "width": 6, "thickness": 2}
        error["arrayminus"] = _distances([values["value"]], [values["low"]])
        hover = f"{label(model)}, {protocol} items<br>{values['value']:.4f} ({values['low']:.4f} to {values['high']:.4f})<extra></extra>"
        filled = "" if protocols.index(protocol) == 0 else "-open"
        symbol = ("circle", "diamond")[min(protocols.index(protocol), 1)] + filled
        traces.append(
            go.Scatter(
                x=[values["value"]], y=[height], error_x=error, mode="markers", hovertemplate=hover,
                marker={"color": colour(model, number), "size": 11, "symbol": symbol, "line_width": 2},
                name=f"{protocol} items ranked", showlegend=model == models[0], legendgroup=protocol,
            )
        )  # fmt: skip
    ticks = {"tickvals": list(range(len(models))), "ticktext": [label(model) for model in reversed(models)]}
    axis = {"range": [-0.6, len(models) - 0.4], "zeroline": False, **ticks}
    return finish(traces, x_title, "", xaxis={"rangemode": "tozero"}, yaxis=axis, showlegend=True)


def _distances(middle: Sequence[float | None], end: Sequence[float | None]) -> list[float]:
    return [0.0 if a is None or b is None else float(abs(np.float64(b) - a)) for a, b in zip(middle, end, strict=True)]
