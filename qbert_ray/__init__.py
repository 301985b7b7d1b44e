"""Multimodal sequential recommendation with semantic IDs on Ray, after Q-BERT4Rec.

    import qbert_ray as qb

    run = qb.run(qb.load_config("shop.yaml"))
    run.recommender().recommend([["item-1", "item-7"]], k=10)

The names below are the public API. They are loaded when they are first used: importing the package loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qbert_ray import metrics
    from qbert_ray.api import FinishedRun, load_config, open_run, run
    from qbert_ray.config.loading import ConfigError
    from qbert_ray.config.schema import Config
    from qbert_ray.fusion.model import DynamicFusion
    from qbert_ray.ranking.item_item import ItemItem
    from qbert_ray.ranking.recommender import Recommendation, Recommender
    from qbert_ray.semantic_ids.collisions import resolve_collisions, to_tokens
    from qbert_ray.semantic_ids.kmeans import fit_residual_kmeans
    from qbert_ray.semantic_ids.rqvae import RQVAE
    from qbert_ray.sequence.masking import draw_masks
    from qbert_ray.sequence.model import Sequencer
    from qbert_ray.storage.directory import ArtifactError

__version__ = "0.1.0"

_MODULES = {
    "api": ("FinishedRun", "load_config", "open_run", "run"),
    "config.loading": ("ConfigError",),
    "config.schema": ("Config",),
    "fusion.model": ("DynamicFusion",),
    "ranking.item_item": ("ItemItem",),
    "ranking.recommender": ("Recommendation", "Recommender"),
    "semantic_ids.collisions": ("resolve_collisions", "to_tokens"),
    "semantic_ids.kmeans": ("fit_residual_kmeans",),
    "semantic_ids.rqvae": ("RQVAE",),
    "sequence.masking": ("draw_masks",),
    "sequence.model": ("Sequencer",),
    "storage.directory": ("ArtifactError",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ArtifactError",
    "Config",
    "ConfigError",
    "DynamicFusion",
    "FinishedRun",
    "ItemItem",
    "RQVAE",
    "Recommendation",
    "Recommender",
    "Sequencer",
    "draw_masks",
    "fit_residual_kmeans",
    "load_config",
    "metrics",
    "open_run",
    "resolve_collisions",
    "run",
    "to_tokens",
]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module("qbert_ray.metrics")
    if name not in _HOME:
        raise AttributeError(f"module 'qbert_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qbert_ray.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
