"""The stage `fusion`: train stage 1 (§3.3), then write the fused embedding of every item."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from qbert_ray.config.schema import Config
from qbert_ray.execution.device import own_device
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.features.item_features import ItemFeatures
from qbert_ray.fusion.model import DynamicFusion
from qbert_ray.fusion.task import FusionMetrics, FusionTask
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import warm_items
from qbert_ray.storage.directory import Counts, RunDir

BATCH = 4096  # items encoded at once: large enough that the few that run through many layers still fill a batch


def train_fusion(config: Config, run: RunDir, executor: Executor, progress: Progress) -> Counts:
    """Train stage 1 and write the fused embeddings of the catalog; returns the counts for the manifest."""
    metrics = executor.fit(FusionTask, config, run, "fusion", config.compute.fusion, progress)
    counts = embed_catalog(config, run, executor, progress)
    return {**counts, "metrics": metrics, "warnings": fusion_warnings(config, counts, metrics)}


def fusion_warnings(config: Config, counts: dict[str, int], metrics: FusionMetrics) -> list[str]:
    """Warnings about a stage 1 that went wrong: one depth for all items, or modalities that did not align."""
    warnings = []
    depth, most = max(((name, count) for name, count in counts.items() if name.startswith("depth_")), key=lambda pair: pair[1])
    if config.fusion.dynamic and counts["items"] > 20 and most > 0.98 * counts["items"]:
        warnings.append(
            f"the fusion depth collapsed: {most:,} of {counts['items']:,} items halt at {depth}; try another fusion.ponder_target"
        )
    if metrics["view_distance"] > 1.6:  # unrelated unit vectors have 2
        warnings.append(
            f"modalities hardly align: mean squared distance {metrics['view_distance']:.2f}, 2 if unrelated; try more fusion.epochs"
        )
    return warnings


def embed_catalog(config: Config, run: RunDir, executor: Executor, progress: Progress) -> dict[str, int]:
    """Write fusion/embeddings; returns the number of items, and of items per depth."""
    known, total = {}, 0
    for domain in config.data.domains:
        known[domain] = (total, warm_items(run, domain))
        total += known[domain][1]
    arguments, parts = {"run": run, "known": known}, run.parts("ingest/items")
    return dict(executor.map_parts(run, EmbedPart, arguments, parts, "fusion/embeddings", config.compute.semantic_ids, progress))


class EmbedPart:
    """Writes the fused embeddings and depths of one part of the catalog; cold items use the unknown query.

    Args:
        known: domain -> ID vector of its first item, and how many items have one.
    """

    def __init__(self, run: RunDir, known: dict[str, tuple[int, int]]) -> None:
        self.run, self.known, self.device = run, known, torch.device(own_device())
        self.model = run.load_module(DynamicFusion, "fusion/model").to(self.device)

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        features = ItemFeatures(self.run, name)
        table = features.table
        rows = np.arange(table.num_rows)
        first, count = self.known[name.rsplit("-", 1)[0]]
        index = table[columns.ITEM_INDEX].to_numpy()
        item = np.where(index < count, first + index, self.model.unknown)
        embeddings, depths = [], []
        for begin in range(0, len(rows), BATCH):
            batch = rows[begin : begin + BATCH]
            fused = self.model(torch.from_numpy(item[batch]).to(self.device), *features.batch(batch, self.device))
            embeddings.append(fused.embedding.float().cpu().numpy())
            depths.append(fused.depth.cpu().numpy())
        embedding, depth = np.concatenate(embeddings), np.concatenate(depths)
        arrays = [
            table[columns.DOMAIN],
            table[columns.ITEM_ID],
            table[columns.ITEM_INDEX],
            columns.to_fixed_lists(embedding),
            pa.array(depth),
        ]
        self.run.write_part("fusion/embeddings", name, pa.table(arrays, schema=columns.embeddings_schema(embedding.shape[1])))
        return {"items": len(rows)} | {f"depth_{number}": int(count) for number, count in enumerate(np.bincount(depth)) if count}
