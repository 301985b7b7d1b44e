"""Reproduces tables of the paper: variants of a config over seeds, ranks of each user's target, and significance of the differences.

A table is a YAML file that names its variants (overlays on a data set's config), its reference, and the published figures.
"""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import numpy as np
import polars as pl
from pydantic import Field, ValidationError, model_validator
from scipy import stats

from qbert_ray import metrics
from qbert_ray.config.loading import ConfigError, read_layer, settings_of, with_values
from qbert_ray.config.schema import Config
from qbert_ray.config.section import Section, Seeds, Tree
from qbert_ray.storage.columns import label
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import BY_NAME

RANKS, SKIPPED, MARKDOWN = "ranks.parquet", "skipped.json", "table.md"
ALONE = ", sequencer"  # suffix of the row of a variant whose sequence model ranks without the blend
PROTOCOLS = {"all": "rank_all", "unseen": "rank_unseen"}
RESAMPLES, BATCH = 2000, 50
SECONDS = "training_seconds"  # column of the ranks; they may lack it
TRAINED = (
    "fusion",
    "quantizer",
    "pretrain",
    "finetune",
    "refit",
)  # stages whose time the sequence model takes, and `ranking` the full ranking


class Table(Section):
    """The definition of a table: its variants, reference, metrics and published figures."""

    title: str
    reference: str = Field(description="row that the others are compared with")
    variants: dict[str, Tree] = Field(description="row -> overlay, or the path of one next to the table's file")
    rankings: list[Literal["sequencer", "ridge", "transitions", "item_item_text", "co_occurrence", "popularity"]] = Field(
        [], description="further rows: rankings of the reference in addition to its model; item_item_text only where there are texts"
    )
    sequencers: bool = Field(False, description="rows also for the sequence model alone of every variant, compared with the reference's")
    seeds: Seeds = [0, 1, 2, 3, 4]
    metrics: list[Annotated[str, Field(pattern=r"^(hr|ndcg)@[1-9]\d*$")]] = ["hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10"]
    paper: dict[str, dict[str, dict[str, float]]] = Field(
        {}, description="domain -> row -> metric -> published value; rows that are not run show it alone"
    )

    @model_validator(mode="after")
    def _known(self) -> Table:
        if self.reference not in self.variants:
            raise ValueError(f"reference {self.reference!r} is none of the variants {list(self.variants)}")
        if self.sequencers and ("sequencer" in self.rankings or any(name.endswith(ALONE) for name in self.variants)):
            raise ValueError(
                f"with sequencers, rankings cannot hold 'sequencer', nor a variant's name end with {ALONE!r}: those rows are made"
            )
        return self


def load_table(file: Path) -> Table:
    """The table definition in a YAML file.

    Raises:
        ConfigError: there is no such file, or it is not a table.
    """
    content = read_layer(file)
    given = content.get("variants")
    variants = given if isinstance(given, dict) else {}
    content["variants"] = {name: read_layer(file.parent / layer) if isinstance(layer, str) else layer for name, layer in variants.items()}
    try:
        return Table.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'table'}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"{file}: {problems}") from None


def impossible_rows(config: Config, table: Table) -> dict[str, str]:
    """Row -> why a data set cannot have it: stage 1 is asked for modalities that no domain has input for.

    Args:
        config: of the data set.
        table: whose variants are overlays on it.

    Raises:
        ConfigError: the data set can have no row, or not the reference.
    """
    found = {}
    for name, overlay in table.variants.items():
        varied = with_values(config, settings_of(overlay))
        if BY_NAME["features"].skipped(varied):
            continue
        domains, features = varied.data.domains.values(), varied.features
        if not any(features.is_from_interactions(each) or any(domain.describes(each) for domain in domains) for each in varied.modalities):
            found[name] = f"no domain has input for features.modalities={varied.modalities}"
    if table.reference in found:
        raise ConfigError(
            f"the table compares with the row {table.reference!r}, which these data cannot have: {found[table.reference]}; "
            "set data.domains.<name>.text_fields, image_column, inputs or vectors, or reproduce it on other data"
        )
    return found


def ranks_of(evaluated: pl.DataFrame, variant: str, seed: int, table: Table, seconds: dict[str, float] | None = None) -> pl.DataFrame:
    """Ranks of a table from evaluate/ranks of one run: one row per user for the model and for each further ranking in the table.

    Args:
        seconds: stage of the run -> seconds that it took.

    Returns:
        domain, row, seed, user_id, rank_all, rank_unseen (1 is best), training_seconds (null of what is counted, not trained).
    """
    trained = {}
    if seconds:
        trained["sequencer"] = sum(seconds.get(stage, 0.0) for stage in TRAINED)
        trained["model"] = trained["sequencer"] + seconds.get("ranking", 0.0)
    wanted = {"model": variant} | ({name: name for name in table.rankings} if variant == table.reference else {})
    if table.sequencers:
        wanted["sequencer"] = variant + ALONE
    kept = evaluated.filter(pl.col("model").is_in(list(wanted)))
    return kept.select(
        "domain",
        pl.col("model").replace_strict(wanted, return_dtype=pl.String).alias("row"),
        pl.lit(seed).alias("seed"),
        "user_id",
        *PROTOCOLS.values(),
        pl.col("model").replace_strict(trained, default=None, return_dtype=pl.Float64).alias(SECONDS),
    )


class Line(TypedDict):
    """One metric of one row, compared with the reference."""

    domain: str
    row: str
    protocol: str
    metric: str
    seeds: int
    users: int
    mean: float  # over seeds, of the mean over users
    half: float  # of its 95 % interval: over seeds (Student's t), with one seed over users
    difference: float | None  # to the reference, with its 95 % interval by bootstrap over users, each with the mean over seeds
    low: float | None
    high: float | None
    seconds: float | None  # of training, mean over seeds


def summarise(ranks: pl.DataFrame, table: Table) -> list[Line]:
    """Mean, interval and difference to the reference for each domain, row, protocol and metric."""
    found: list[Line] = []
    for (domain,), rows in ranks.group_by("domain", maintain_order=True):
        seconds = dict(rows.group_by("row").agg(pl.col(SECONDS).mean()).iter_rows()) if SECONDS in rows.columns else {}
        for protocol, column in PROTOCOLS.items():
            for metric in table.metrics:
                values = {
                    name: _per_user(rows.filter(pl.col("row") == name), column, metric) for name in rows["row"].unique(maintain_order=True)
                }
                for name, (users, by_seed) in values.items():
                    against = table.reference + ALONE * name.endswith(ALONE)
                    reference = None if name == against else values.get(against)  # all of its trials may have failed
                    difference, low, high = _difference(users, reference[0] if reference else None)
                    found.append(
                        {
                            "domain": domain,
                            "row": name,
                            "protocol": protocol,
                            "metric": metric,
                            "seeds": len(by_seed),
                            "users": len(users),
                            "mean": float(np.mean(by_seed)),
                            "half": _half(by_seed, users["value"].to_numpy()),
                            "difference": difference,
                            "low": low,
                            "high": high,
                            "seconds": seconds.get(name),
                        }
                    )
    return found


def _per_user(rows: pl.DataFrame, column: str, metric: str) -> tuple[pl.DataFrame, np.ndarray]:
    """Mean over seeds of each user (user_id, value), and the mean over users of each seed."""
    kind, _, cutoff = metric.partition("@")
    gain = {"hr": metrics.hit_rate, "ndcg": metrics.ndcg}[kind]
    valued = rows.select("seed", "user_id", pl.Series("value", gain(rows[column].to_numpy(), int(cutoff))))
    users = valued.group_by("user_id").agg(pl.col("value").mean()).sort("user_id")
    return users, valued.group_by("seed").agg(pl.col("value").mean())["value"].to_numpy()


def _half(by_seed: np.ndarray, by_user: np.ndarray) -> float:
    if len(by_seed) > 1:
        return metrics.half_over_seeds(float(by_seed.std(ddof=1)), len(by_seed)) or 0.0
    return float(metrics.NORMAL_95 * by_user.std(ddof=1) / len(by_user) ** 0.5) if len(by_user) > 1 else 0.0


def _difference(users: pl.DataFrame, reference: pl.DataFrame | None) -> tuple[float | None, float | None, float | None]:
    """Mean difference of the users' values and the ends of its 95 % interval; None without a reference."""
    if reference is None:
        return None, None, None
    paired = users.join(reference, on="user_id", suffix="_reference", maintain_order="left")
    apart = (paired["value"] - paired["value_reference"]).to_numpy()
    if len(apart) < 2 or not apart.any():
        return (float(apart.mean()) if len(apart) else None,) * 3
    drawn = stats.bootstrap((apart,), np.mean, n_resamples=RESAMPLES, batch=BATCH, method="percentile", rng=0).confidence_interval
    return float(apart.mean()), float(drawn.low), float(drawn.high)


def markdown(summary: list[Line], table: Table, skipped: dict[str, dict[str, str]] | None = None) -> str:
    """The table as Markdown: one line for each row, per domain and protocol.

    Args:
        skipped: domain -> row that it cannot have -> why.
    """
    lines = [f"# {table.title}", ""]
    for domain in dict.fromkeys(line["domain"] for line in summary):
        for protocol in PROTOCOLS:
            chosen = [line for line in summary if (line["domain"], line["protocol"]) == (domain, protocol)]
            paper = table.paper.get(domain, {}) if protocol == "all" else {}
            heads = [head for metric in table.metrics for head in (metric, f"against {table.reference}", *(["paper"] if paper else []))]
            timed = ["seconds of training"] if any(line["seconds"] is not None for line in chosen) else []
            most = max(line["seeds"] for line in chosen)
            lines += [f"## {domain}, {protocol} items ranked: {chosen[0]['users']:,} users, {most} seed{'s' * (most > 1)}", ""]
            lines += ["| " + " | ".join(["", *heads, *timed]) + " |", "|" + "---|" * (len(heads) + len(timed) + 1)]
            for name in dict.fromkeys(line["row"] for line in chosen):
                published = [paper.get(name, {})] if paper else []
                own = [line for line in chosen if line["row"] == name]
                cells = [cell for line in own for cell in _cells(line, *published)]
                cells += ["" if own[0]["seconds"] is None else f"{own[0]['seconds']:,.0f}" for _ in timed]
                lines.append("| " + " | ".join([f"**{name}**" if name == table.reference else label(name), *cells]) + " |")
            for name, values in paper.items():
                if all(line["row"] != name for line in chosen):
                    cells = [cell for metric in table.metrics for cell in ("", "", _printed(values, metric))] + [""] * len(timed)
                    lines.append("| " + " | ".join([label(name), *cells]) + " |")
            lines.append("")
            if any(impossible(values) for values in paper.values()):
                lines += ["‡ cannot be right for one target per user, given hr@k.", ""]
            lines += [f"Not run, {label(row)}: {label(why)}.\n" for row, why in (skipped or {}).get(domain, {}).items()]
    lines += [
        "±: half of the 95 % interval of the mean, over seeds (Student's t) or, with one seed, over users. Against the reference: the difference of",
        f"means with its 95 % interval by a bootstrap over users, {RESAMPLES:,} times; bold where it does not hold 0.",
    ]
    return "\n".join(lines) + "\n"


def _cells(line: Line, *published: dict[str, float]) -> list[str]:
    difference, low, high = line["difference"], line["low"], line["high"]
    apart = ""
    if difference is not None and low is not None and high is not None:
        apart = f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"
        apart = f"**{apart}**" if low > 0 or high < 0 else apart
    return [f"{line['mean']:.4f} ± {line['half']:.4f}", apart, *(_printed(values, line["metric"]) for values in published)]


def _printed(values: dict[str, float], metric: str) -> str:
    return f"{values[metric]:.4f}{' ‡' * (metric in impossible(values))}" if metric in values else ""


def impossible(values: dict[str, float], rounding: float = 0.5e-4) -> set[str]:
    """Which ndcg@k of published figures cannot be right for one target per user, given hr@k.

    Targets that rank between two cutoffs a < b add between 1 / log2(b + 1) and 1 / log2(a + 2) each to ndcg; ndcg@1 is hr@1.

    Args:
        values: metric -> figure.
        rounding: by how much each may have been rounded.
    """
    hits = {int(name.partition("@")[2]): value for name, value in values.items() if name.startswith("hr@")}
    gains = {k: hits[1] if k == 1 else values[f"ndcg@{k}"] for k in sorted(hits) if k == 1 or f"ndcg@{k}" in values}
    steps, found = list(itertools.pairwise(sorted(hits))), set()
    for low, high in itertools.combinations(gains, 2):
        slack = 2 * rounding * (1 + 1 / math.log2(low + 2))  # of two gains and two weighted hits
        between = [(a, b, hits[b] - hits[a]) for a, b in steps if low <= a and b <= high]
        least = sum(more / math.log2(b + 1) for _, b, more in between)
        most = sum(more / math.log2(a + 2) for a, _, more in between)
        if not least - slack <= gains[high] - gains[low] <= most + slack:
            found.add(f"ndcg@{high}")
    return found


def collect(folder: RunDir, ranks: pl.DataFrame, table: Table, skipped: dict[str, str] | None = None) -> None:
    """Add ranks to those of other domains and rows in a folder, and write the table of all of them.

    Args:
        skipped: row that the domains of the ranks cannot have -> why.
    """
    left_out = folder.read_json(SKIPPED) if folder.exists(SKIPPED) else {}
    left_out |= dict.fromkeys(ranks["domain"].unique(maintain_order=True), skipped or {})
    folder.write_json(SKIPPED, left_out)
    if folder.exists(RANKS):
        before = pl.read_parquet(folder.read_bytes(RANKS))
        kept = before.join(ranks.select("domain", "row").unique(), on=["domain", "row"], how="anti")
        ranks = pl.concat([kept, ranks], how="diagonal_relaxed")  # ranks of other systems may lack the seconds
    content = io.BytesIO()
    ranks.write_parquet(content)
    folder.write_bytes(RANKS, content.getvalue())
    folder.write_bytes(MARKDOWN, markdown(summarise(ranks, table), table, left_out).encode())
