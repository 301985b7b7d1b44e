"""The training task of stage 1: batches of items, the losses of Eq. 5, and the metrics after each epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray.config.schema import Config
from qbert_ray.features.item_features import ItemFeatures
from qbert_ray.fusion.model import DynamicFusion, alignment_loss, geometry_loss, view_distance
from qbert_ray.random_streams import ID_DROPOUT_STREAM, uniform
from qbert_ray.row_updates import ROWS_ALONE
from qbert_ray.storage.directory import RunDir
from qbert_ray.training import EpochMetrics, shuffled_batches

SAMPLE = 4096  # items over which the metrics are computed


class FusionMetrics(EpochMetrics):
    view_distance: float  # 0 to 4
    mean_depth: float
    mean_gate: float
    depth_histogram: list[int]  # items that halt at layer 1, 2, ...


class FusionTask:
    """Training task of the fusion model (stage 1, Eq. 5)."""

    criterion = None

    def __init__(self, config: Config, run: RunDir) -> None:
        self.settings, self.seed, self.is_from_interactions = config.fusion, config.run.seed, config.features.is_from_interactions
        self.features = ItemFeatures(run, domains=list(config.data.domains))
        self.num_items = self.features.table.num_rows

    def description(self) -> dict[str, Any]:
        s = self.settings
        names = ("width", "num_layers", "num_heads", "ffn_width", "dropout", "dynamic", "halt_threshold", "temperature")
        return {"num_items": self.num_items, "feature_widths": self.features.widths} | {name: getattr(s, name) for name in names}

    def build(self) -> nn.Module:
        model = DynamicFusion(**self.description())
        model.id_embedding.sparse = self.num_items > ROWS_ALONE
        return model

    def adjust(self, model: nn.Module, epoch: int) -> None:
        pass

    def batches(self, epoch: int) -> list[np.ndarray]:
        return shuffled_batches(self.num_items, self.settings.batch_size, self.seed, epoch)

    def loss(self, model: Any, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        hidden = uniform(self.seed + ID_DROPOUT_STREAM, epoch, samples, 1)[:, 0] < self.settings.id_dropout
        item = torch.from_numpy(np.where(hidden, model.unknown, samples)).to(device)
        features, present = self.features.batch(samples, device)
        fused = model(item, features, present, unread=self._unread(hidden, samples, device))
        s = self.settings
        loss = alignment_loss(fused, s.contrast_temperature, s.consistency_weight, s.ponder_weight, s.ponder_target)["loss"]
        if s.geometry_weight:
            loss = loss + s.geometry_weight * geometry_loss(fused, features, present)
        return loss * len(samples), float(len(samples))

    def _unread(self, hidden: np.ndarray, samples: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Modality -> [B] samples fused without it: those trained as unknown items lose what comes from interactions, as cold items lack it."""
        learnt = [name for name in self.features.present if self.is_from_interactions(name)]
        others = [there[samples].any(1) for name, there in self.features.present.items() if name not in learnt]
        return dict.fromkeys(learnt, torch.from_numpy(hidden & np.any(others, axis=0)).to(device)) if others else {}

    def complete(self, model: Any, device: torch.device) -> None:
        """Nothing: all weights are trained."""

    def evaluate(self, model: Any, device: torch.device) -> FusionMetrics:
        rows = np.arange(0, self.num_items, -(-self.num_items // SAMPLE))  # of all domains
        fused = model(torch.from_numpy(rows).to(device), *self.features.batch(rows, device))
        histogram = torch.bincount(fused.depth, minlength=self.settings.num_layers + 1)[1:].tolist()
        return {
            "view_distance": float(view_distance(fused)),
            "mean_depth": float(fused.depth.float().mean()),
            "mean_gate": float(fused.gate.mean()),
            "depth_histogram": histogram,
        }
