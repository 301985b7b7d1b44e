"""Draws accuracy against milliseconds of the two kinds of stage 3, from the table in docs/generative-tradeoff.csv.

    pip install kaleido    # draws plotly's figures without a page; needs Chrome or Chromium
    python -m tests.benchmarks.tradeoff

The table's figures come from `configs/tables/generative.yaml`, and the milliseconds from both models of such a run in turns.
"""

from pathlib import Path

import plotly.graph_objects as go
import polars as pl

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    table = pl.read_csv(DOCS / "generative-tradeoff.csv")
    figure = go.Figure()
    for (row,), points in table.group_by("row", maintain_order=True):
        labels = [f"beam {beam}" if beam else "all items" for beam in points["beam"]]
        figure.add_scatter(
            x=points["ms per user"].to_list(),
            y=points["ndcg@10 unseen"].to_list(),
            name=row,
            text=labels,
            mode="lines+markers+text",
            textposition="bottom right",
        )
    figure.update_layout(
        template="simple_white", width=760, height=360, margin={"t": 20}, legend={"orientation": "h", "y": 1.15}, font={"size": 13}
    )
    figure.update_xaxes(type="log", title="CPU milliseconds per user, one thread", range=[-1, 1.1], tickvals=[0.1, 0.2, 0.5, 1, 2, 5, 10])
    figure.update_yaxes(title="ndcg@10, unseen items", range=[0.06, 0.072])
    figure.write_image(DOCS / "generative-tradeoff.svg")


if __name__ == "__main__":
    main()
