"""A small demo shop and a config that trains on it in seconds."""

from pathlib import Path

from qbert_ray.config.loading import load_config
from qbert_ray.config.schema import Config
from qbert_ray.inputs.demo_shop import generate
from tests import ROOT

SMALL = [
    "features.modalities=[text, structure]",
    "features.structure.dim=16",
    "fusion={epochs: 3, width: 32, ffn_width: 32, batch_size: 64, num_layers: 3}",
    "quantizer={kind: rqvae, epochs: 6, warmup_epochs: 2, batch_size: 64, num_levels: 3, codebook_size: 16, codebook_dim: 8, hidden: [32]}",
    "sequencer={width: 32, num_layers: 1, num_heads: 2, ffn_width: 32, max_items: 20}",
    "pretrain={epochs: 2, batch_size: 32, microbatches: 2}",
    "finetune={epochs: 3, batch_size: 32, microbatches: 2, averaging: 0.9}",
    "data.rows_per_part=40",
    "data.cold_share=0.1",
    "compute.features.max_size=1",  # starting an actor costs more than these parts
    "compute.semantic_ids.max_size=1",
    "compute.ranking.max_size=1",
    "compute.evaluate.max_size=1",
    "compute.score.max_size=1",
    "compute.fusion.cpus_per_worker=1",
    "compute.quantizer.cpus_per_worker=1",
    "compute.pretrain.cpus_per_worker=1",
    "compute.finetune.cpus_per_worker=1",
]


def make_shop(folder: Path) -> Path:
    generate(folder, seed=0, num_items=120, num_users=100)
    return folder


def make_two_shops(folder: Path) -> Path:
    """A second, smaller shop in the folder of the first: a source domain to pre-train on."""
    generate(folder / "other", seed=1, num_items=60, num_users=60)
    return make_shop(folder)


SOURCE = "data.domains.other={items: other/items.parquet, interactions: other/interactions.parquet, role: source, text_fields: [title]}"


def small_config(shop: Path, run: Path, *overrides: str) -> Config:
    return load_config([ROOT / "configs" / "demo.yaml"], [f"data.root={shop}", f"run.dir={run}", *SMALL, *overrides])
