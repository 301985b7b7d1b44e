"""The report's first section: verdict, warnings, rejected rows, time per stage, and data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from qbert_ray.metrics import NORMAL_95, ndcg
from qbert_ray.report.facts import Facts
from qbert_ray.storage.columns import label
from qbert_ray.storage.directory import RunDir
from qbert_ray.storage.stages import BY_NAME

OWN = ("model", "sequencer")  # all other rankings are baselines
PROTOCOLS = ("unseen", "all")
LEVELS = ("bad", "unclear", "good")
MANY_REJECTED = 0.05
EXAMPLE = 160  # characters of a rejected row


def verdicts(facts: Facts, ranks: dict[str, pl.DataFrame]) -> list[dict[str, Any]]:
    """For each target domain, whether the model beats the best baseline in ndcg@10, under both protocols."""
    result = []
    for domain in facts.targets:
        users = ranks.get(domain, pl.DataFrame())
        rows = [row for protocol in PROTOCOLS if not users.is_empty() and (row := _compare(users, protocol))]
        if rows:
            level = min((row["level"] for row in rows), key=LEVELS.index)  # the harder protocol decides
            worst = next(row for row in rows if row["level"] == level)
            says = {
                "good": "The model beats every baseline, whether all items are ranked or unseen ones alone.",
                "unclear": f"The model does not clearly beat {worst['best']}, which needs no sequence model ({worst['protocol']} items ranked).",
                "bad": f"The model is worse than {worst['best']}, which needs no sequence model ({worst['protocol']} items ranked).",
            }[level]
            result.append({"domain": domain, "level": level, "says": says, "rows": rows})
    return result


def _compare(users: pl.DataFrame, protocol: str) -> dict[str, Any] | None:
    """ndcg@10 of the model and the best baseline under one protocol, and their paired difference over users; None if one is missing."""
    gains = users.with_columns(gain=ndcg(users[f"rank_{protocol}"].to_numpy(), 10)).pivot("model", index="user_id", values="gain")
    means = {name: float(np.mean(gains[name].to_numpy())) for name in gains.columns if name != "user_id"}
    best = max((name for name in means if name not in OWN), key=lambda name: means[name], default=None)
    if best is None or "model" not in means:
        return None
    difference = (gains["model"] - gains[best]).to_numpy()
    mean = float(difference.mean())
    half = NORMAL_95 * float(difference.std(ddof=1)) / len(difference) ** 0.5 if len(difference) > 1 else float("inf")
    level = "good" if mean > half else "bad" if mean < -half else "unclear"
    return {
        "protocol": protocol, "level": level, "model": means["model"], "best": label(best), "baseline": means[best],
        "difference": mean, "half": half, "users": len(gains),
    }  # fmt: skip


def warnings(run: RunDir, facts: Facts, judged: list[dict[str, Any]]) -> list[str]:
    """Warnings that the page shows first."""
    found = [f"{one['domain']}: {one['says']}" for one in judged if one["level"] != "good"]
    for stage in BY_NAME:
        found += [f"{stage}: {warning}" for warning in facts.counts(stage).get("warnings", [])]
    undone = [stage for stage in BY_NAME if stage not in facts.manifests and not facts.left_out(stage)]
    if undone:
        found.append(f"The run is not finished; still to do: {', '.join(undone)}. Run the same qbert-ray run to resume.")
    for row in rejected(facts):
        if row["share"] is not None and row["share"] > MANY_REJECTED:
            found.append(
                f"{row['domain']}: {row['rows']:,} {row['table']} ({row['share']:.0%} of those read) were rejected: {row['reason']}."
            )
    for domain in facts.targets:
        epochs = [line.get("ndcg@10", 0.0) for line in curve(run, f"finetune/{domain}/metrics.jsonl")]
        if len(epochs) > 1 and int(np.argmax(epochs)) == len(epochs) - 1:
            found.append(f"{domain}: fine-tuning was best in its last epoch; more finetune.epochs may help.")
    return found


def rejected(facts: Facts) -> list[dict[str, Any]]:
    """Number of rejected rows per domain, table and reason, from the manifests."""
    rows = []
    for domain, counts in facts.counts("ingest").items():
        for table in ("items", "interactions", "images") if isinstance(counts, dict) else ():
            read = counts.get(f"{table}_read")
            for reason, number in (counts.get(f"{table}_rejected") or {}).items():
                rows.append(_rejected(domain, table, reason, number, read))
    for modality, counts in facts.counts("features").items():
        if isinstance(counts, dict):
            for name, number in counts.items():
                table, marker, reason = name.partition("_rejected.")
                if marker:
                    read = counts.get(table, 0) + counts.get(f"{table}_rejected", 0)
                    files = f"{table}_missing" in counts
                    rows.append(_rejected("all", table if files else f"{modality} {table}", reason, number, read or None))
    return rows


def _rejected(domain: str, table: str, reason: str, number: int, read: int | None) -> dict[str, Any]:
    return {"domain": domain, "table": table, "reason": reason, "rows": number, "share": number / read if read else None}


def examples(run: RunDir) -> list[dict[str, str]]:
    """One rejected row for each reason, as an example."""
    found: dict[tuple[str, str, str], str] = {}
    for table in ("ingest/rejected", "features/rejected"):
        for part in run.parts(table)[:50]:
            for row in pl.DataFrame(run.read_part(table, part)).unique(["domain", "table", "reason"], maintain_order=True).rows(named=True):
                found.setdefault((row["domain"], row["table"], row["reason"]), str(row["row"])[:EXAMPLE])
    return [{"domain": key[0], "table": key[1], "reason": key[2], "row": row} for key, row in found.items()]


def datasets(facts: Facts) -> list[dict[str, Any]]:
    rows = []
    for domain, counts in facts.counts("ingest").items():
        if isinstance(counts, dict):
            cells = counts["items"] * counts["users"]
            mean = counts["interactions"] / max(counts["users"], 1)
            role = "target" if domain in facts.targets else "source"
            rows.append(counts | {"domain": domain, "role": role, "mean": mean, "density": counts["interactions"] / max(cells, 1)})
    return rows


def stages(facts: Facts) -> list[dict[str, Any]]:
    """State, seconds and throughput of every stage."""
    longest = max([manifest.seconds for manifest in facts.manifests.values()], default=0.0)
    rows = []
    for stage in BY_NAME:
        manifest = facts.manifests.get(stage)
        row: dict[str, Any] = {"name": stage, "seconds": None, "work": "", "rate": "", "share": 0.0}
        if manifest is None:
            row["state"] = (facts.missing(stage) or "").partition(":")[0].rstrip(".").lower()
            row["work"] = facts.left_out(stage) or ""
        else:
            amount, unit = _work(facts, stage)
            row |= {"state": "done", "seconds": manifest.seconds, "share": manifest.seconds / max(longest, 1e-9)}
            row["work"] = f"{amount:,} {unit}" if amount else ""
            row["rate"] = f"{amount / manifest.seconds:,.0f} / s" if amount and manifest.seconds else ""
        rows.append(row)
    return rows


def _work(facts: Facts, stage: str) -> tuple[int, str]:
    """Amount and unit of what a stage processed, from which its throughput follows."""
    counts = facts.counts(stage)
    per_domain = [figures for figures in counts.values() if isinstance(figures, dict)]
    users = {row["domain"]: row["users"] for row in datasets(facts)}
    match stage:
        case "ingest":
            return sum(figures.get("interactions_read", 0) for figures in per_domain), "interactions"
        case "features":
            units = [name.removesuffix("_missing") for figures in per_domain for name in figures if name.endswith("_missing")]
            made = [count for figures in per_domain for name, count in figures.items() if name in units or name.endswith("_vectors")]
            return sum(made), "files and vectors"
        case "fusion":
            return counts["items"] * (counts["metrics"]["epoch"] + 1), "items × epochs"
        case "quantizer":
            return counts["metrics"]["items"], "items"
        case "semantic_ids":
            return counts["items"], "items"
        case "pretrain":
            return sum(users.get(name, 0) for name in counts["domains"]) * (counts["metrics"]["epoch"] + 1), "histories × epochs"
        case "finetune":
            return sum(users.get(name, 0) * (one["epoch"] + 1) for name, one in counts["metrics"].items()), "histories × epochs"
        case "refit":
            return sum(one["interactions"] * one["epochs"] for one in per_domain), "interactions × epochs"
        case "ranking":
            return sum(figures.get("weights", 0) for figures in per_domain), "item-item weights"
    return sum(figures.get("users", 0) for figures in per_domain), "users"


def curve(run: RunDir, name: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, the last one of each epoch; none if there is no such file."""
    return [line for _, line in sorted({line["epoch"]: line for line in run.read_lines(name)}.items())]
