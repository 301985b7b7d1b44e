"""The report's section on stage 3: training curves, comparison with the baselines, and results by group of users."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from qbert_ray import metrics
from qbert_ray.report.catalog import Catalog
from qbert_ray.report.facts import Facts
from qbert_ray.report.figures import Figure, Series, bars, by_epoch, intervals, lines
from qbert_ray.report.summary import curve
from qbert_ray.sequence.masking import draw_lengths, draw_masks
from qbert_ray.storage.columns import USER_ID, label, to_sequences
from qbert_ray.storage.directory import RunDir

RANKED = 200_000  # users that are divided into groups
GROUPS = 5
MASKED_LENGTH, DRAWS = 20, 3  # items of the example history, draws of each strategy


def gather(run: RunDir, facts: Facts, ranks: dict[str, pl.DataFrame]) -> dict[str, Any]:
    """The content of the section; parts whose stage is not done say so."""
    content = run.read_json("evaluate/metrics.json") if run.exists("evaluate/metrics.json") else {}
    domains = []
    for domain in facts.targets:
        blend = facts.counts("ranking").get(domain)
        domains.append(
            {
                "name": domain,
                "curves": training("finetune", curve(run, f"finetune/{domain}/metrics.jsonl")),
                "metrics": content.get(domain),
                "figures": comparison(content[domain]) if domain in content else [],
                "groups": groups(ranks[domain]) if domain in ranks else [],
                "cold": cold(content.get(domain, {})),
                "blend": {"counts": blend, "figure": blend_weights(blend)} if blend else None,
            }
        )
    return {
        "missing": {stage: why for stage in ("pretrain", "finetune", "ranking", "evaluate") if (why := facts.missing(stage))},
        "pretraining": training("pretrain", curve(run, "pretrain/metrics.jsonl")),
        "masks": masks(facts),
        "domains": domains,
    }


def training(name: str, epochs: list[dict[str, Any]]) -> list[Figure]:
    """Training loss and validation metrics by epoch, with the best epoch marked."""
    if not epochs:
        return []
    x = [line["epoch"] + 1 for line in epochs]
    loss = [line["train_loss"] for line in epochs]
    fitted = by_epoch("Training loss", "It should fall and flatten.", "training loss", [Series(name, x, loss)])
    if "ndcg@10" not in epochs[0]:  # no user has a validation item
        return [fitted]
    ndcg, hits = ([line[key] for line in epochs] for key in ("ndcg@10", "hr@10"))
    best = int(np.argmax(ndcg))
    mark = {"x": x[best], "y": ndcg[best], "text": f"best: {ndcg[best]:.4f}", "showarrow": True, "arrowhead": 0, "ay": 26, "ax": 0}
    note = "A best epoch at the right end says that more epochs may help; far from it, that fewer do."
    both = [Series("hr@10", x, hits, colour=name, dash="dash"), Series("ndcg@10", x, ndcg, colour=name)]
    return [
        fitted,
        by_epoch("Ranking of validation items", note, "metric", both, annotations=[mark], yaxis={"rangemode": "tozero"}),
    ]


def comparison(content: dict[str, Any]) -> list[Figure]:
    """The model compared with the baselines, for both protocols; nothing where no user could be evaluated."""
    first = next(iter(next(iter(content["protocols"].values())).values()), None)
    if first is None:
        return []
    shown = [name for name in ("ndcg@10", "hr@10") if name in first] or list(first)[-2:]
    sampled = f" drawn from {content['sampled_from']:,}" if "sampled_from" in content else ""
    sampled += f", by models trained on {content['trained_on']} items too" if "trained_on" in content else ""
    result = []
    for metric in shown:
        rows = [
            (model, protocol, content["protocols"][protocol][model][metric])
            for model in next(iter(content["protocols"].values()))
            for protocol in content["protocols"]
        ]
        alt = "; ".join(
            f"{label(model)} {values['value']:.3f} ({values['low']:.3f} to {values['high']:.3f}), {protocol}"
            for model, protocol, values in rows
        )
        result.append(
            Figure(
                metric,
                f"Mean and 95 % interval over {content['users']:,} users{sampled}; right is better.",
                alt,
                intervals(rows, metric),
                320,
            )
        )
    return result


def cold(content: dict[str, Any]) -> dict[str, Any] | None:
    """The comparison for cold items; None if none were held out."""
    if "cold" not in content:
        return None
    return {"metrics": content["cold"], "figures": comparison(content["cold"])}


def read_ranks(run: RunDir, domain: str, catalog: Catalog) -> pl.DataFrame:
    """Ranks of at most RANKED users, with the length of each history and the training interactions of each target."""
    pieces, users = [], 0
    popularity = pl.DataFrame({"target": catalog.item_ids, "popularity": catalog.popularity})
    for part in run.parts("evaluate/ranks", domain):
        sequences = to_sequences(run.read_part("ingest/sequences", part))
        histories = pl.DataFrame({USER_ID: sequences.user_ids, "history": sequences.lengths()}, {USER_ID: pl.String, "history": pl.Int64})
        rows = pl.DataFrame(run.read_part("evaluate/ranks", part, [USER_ID, "model", "target", "rank_all", "rank_unseen"]))
        pieces.append(rows.join(histories, on=USER_ID, how="left").join(popularity, on="target", how="left"))
        users += len(sequences.user_ids)
        if users >= RANKED:
            break
    return pl.concat(pieces) if pieces else pl.DataFrame()


def groups(ranks: pl.DataFrame) -> list[Figure]:
    """ndcg@10 by the length of the user's history, and by the popularity of the target."""
    if ranks.is_empty():
        return []
    by_history = "Users in about equal groups by the length of their history"
    by_target = "Users in about equal groups by how often their target occurs in training"
    return [
        _group(ranks, "history", "items in the history", "For whom does it work?", by_history),
        _group(ranks, "popularity", "training interactions of the target", "For which items does it work?", by_target),
    ]


def _group(ranks: pl.DataFrame, column: str, axis: str, title: str, note: str) -> Figure:
    values = ranks.filter(pl.col("model") == "model")[column].drop_nulls().to_numpy()
    edges = np.unique(np.quantile(values, np.linspace(0, 1, GROUPS + 1)[1:], method="inverted_cdf"))  # last value of each group
    starts = np.concatenate([[values.min()], edges[:-1] + 1])
    names = [f"{first:,}" if first == last else f"{first:,}–{last:,}" for first, last in zip(starts, edges, strict=True)]
    series, alt = [], []
    for model in ranks["model"].unique(maintain_order=True):
        rows = ranks.filter((pl.col("model") == model) & pl.col(column).is_not_null())
        group = np.searchsorted(edges, rows[column].to_numpy())
        gain = metrics.ndcg(rows["rank_all"].to_numpy(), 10)
        found = [metrics.interval(gain[group == number]) for number in range(len(names))]
        y, low, high = ([one[key] for one in found] for key in ("value", "low", "high"))
        sizes = [int((group == number).sum()) for number in range(len(names))]
        hover = [
            f"{label(model)}, {axis}: {name}<br>ndcg@10 {one['value']:.4f} ({one['low']:.4f} to {one['high']:.4f})<br>{size:,} users"
            for name, one, size in zip(names, found, sizes, strict=True)
        ]
        series.append(Series(model, names, y, low, high, hover=hover))
        alt.append(f"{label(model)} " + ", ".join(f"{value:.3f}" for value in y))
    plot = lines(series, axis, "ndcg@10", markers=True, yaxis={"rangemode": "tozero"}, xaxis={"type": "category"})
    note = f"{note}; means with 95 % intervals, all items ranked."
    return Figure(title, note, f"{axis} {', '.join(names)}: " + "; ".join(alt), plot, 340)


def blend_weights(counts: dict[str, Any]) -> Figure | None:
    """The blend weight of each score feature."""
    weights = counts.get("blend_weights")
    if not weights:
        return None
    plot = bars(list(weights), [round(value, 4) for value in weights.values()], "score feature", "weight", "model")
    plot["data"][0] |= {"text": [f"{value:.2f}" for value in weights.values()], "textposition": "outside", "cliponaxis": False}
    alt = "; ".join(f"{name} {value:.2f}" for name, value in weights.items())
    note = "Blend weights for a history of average length. A negative weight of seen lowers the scores of seen items."
    return Figure("Blend weights", note, f"Bars: {alt}.", plot, 280)


def masks(facts: Facts) -> list[dict[str, Any]]:
    """Masks of every strategy that is used in training, drawn on an example history."""
    rows: list[dict[str, Any]] = []
    if facts.config["sequencer"]["kind"] == "generative":
        return rows
    seed, lengths, samples = facts.config["run"]["seed"], np.full(DRAWS, MASKED_LENGTH), np.arange(DRAWS)
    for training_name in ("pretrain", "finetune"):
        settings = facts.config[training_name]
        if settings["objective"] == "causal" or (training_name == "pretrain" and facts.left_out("pretrain")):
            continue
        total = sum(settings["masks"].values())
        for strategy, weight in settings["masks"].items():
            ratio = settings["mask_ratio"].get(strategy, 0.0)
            drawn = draw_masks(lengths, samples, seed, 0, {strategy: 1.0}, {strategy: ratio})
            share = weight / total * (1 - settings["last_item_share"])
            rows.append({"training": training_name, "strategy": strategy, "share": share, "draws": drawn.tolist()})
        if settings["last_item_share"]:
            ends = np.unique(draw_lengths(lengths, samples, seed, 0, 1.0, settings["prefix_share"])).tolist()
            draws = [[False] * (end - 1) + [True] for end in ends]
            rows.append({"training": training_name, "strategy": "last", "share": settings["last_item_share"], "draws": draws})
    return rows
