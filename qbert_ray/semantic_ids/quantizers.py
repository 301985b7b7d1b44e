"""Loads the trained quantizers of a run."""

from __future__ import annotations

from qbert_ray.semantic_ids.rqvae import RQVAE
from qbert_ray.storage.directory import RunDir

EXTRA = "quantizer/extra"  # folder of a numbered folder for each quantizer in addition to the first


def load_quantizers(run: RunDir) -> list[RQVAE]:
    """The quantizer of the semantic IDs, then the extra quantizers, in the order of `catalog_codes` and in evaluation mode."""
    folders = ["quantizer/model", *(f"{EXTRA}/{name}/model" for name in run.folders(EXTRA))]
    return [run.load_module(RQVAE, folder) for folder in folders]
