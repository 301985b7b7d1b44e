"""Codes, embeddings and IDs of a domain's items in the order of `item_index`, and how many of the items training may see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from qbert_ray.config.features_section import in_order
from qbert_ray.config.loading import read_config
from qbert_ray.config.schema import Config
from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError, RunDir


def run_config(run: RunDir) -> Config:
    """The configuration that a run was made with.

    Raises:
        ArtifactError: there is no run in that directory.
    """
    if not run.exists("config.yaml"):
        raise ArtifactError(f"no run in {run.uri}: it has no config.yaml; make one with qbert-ray run")
    return read_config(run.read_bytes("config.yaml"), f"{run.uri}/config.yaml")


def warm_items(run: RunDir, domain: str) -> int:
    """Number of items that training may see; they come first in the catalog."""
    return int(np.count_nonzero(~run.read("ingest/items", domain, [columns.COLD])[columns.COLD].to_numpy()))


def read_warm(run: RunDir, table: str, domains: Sequence[str]) -> pa.Table:
    """Rows of a table over the catalog that training may see, domain after domain."""
    return pa.concat_tables([run.read(table, domain).slice(0, warm_items(run, domain)) for domain in domains])


def item_ids(run: RunDir, domain: str) -> pa.Array:
    """[N] item_id of a domain's items."""
    return run.read("ingest/items", domain, [columns.ITEM_ID])[columns.ITEM_ID].combine_chunks()


def gone_items(run: RunDir, domain: str) -> pa.Table:
    """Rows of the items that the last append did not find in the catalog's files; `columns.GONE`."""
    parts = run.parts("ingest/gone", domain)
    return run.read_part("ingest/gone", parts[-1]) if parts else columns.GONE.empty_table()


def available_items(run: RunDir, domain: str) -> np.ndarray | None:
    """[N] booleans, False for items that are gone from the catalog's files; None where none is."""
    gone = gone_items(run, domain)[columns.ITEM_INDEX].to_numpy()
    if not len(gone):
        return None
    available = np.ones(run.read("ingest/items", domain, [columns.ITEM_INDEX]).num_rows, bool)
    available[gone] = False
    return available


def catalog_codes(run: RunDir, domain: str) -> np.ndarray:
    """[N, K + X] codes of a domain's items: the K of the semantic ID, then the X of the extra quantizers, if any."""
    table = run.read("semantic_ids", domain, [columns.ITEM_INDEX, "codes", columns.EXTRA_CODES])  # the last column is optional
    codes = [columns.to_numpy(table[name]) for name in table.column_names if name != columns.ITEM_INDEX]
    order = np.argsort(table[columns.ITEM_INDEX].to_numpy())
    return np.concatenate(codes, axis=1).astype(np.int64)[order]


def content_vectors(run: RunDir, domain: str) -> Tensor:
    """[N, D] fused embeddings, centred on those that training may see, of length sqrt(D)."""
    embedding = torch.from_numpy(columns.to_numpy(run.read("fusion/embeddings", domain, ["embedding"])["embedding"]).copy())
    centred = embedding - embedding[: warm_items(run, domain)].mean(0)
    return F.normalize(centred, dim=-1) * embedding.shape[1] ** 0.5


def modalities_there(run: RunDir, domain: str | None = None) -> list[str]:
    """The modalities that a run has vectors of, in the order in which models take them."""
    return in_order(name for name in run.folders("features") if name != "rejected" and run.parts(f"features/{name}", domain))


def content_modalities(run: RunDir, domain: str, config: Config) -> list[str]:
    """The modalities of a run that say what an item is, rather than who had it."""
    return [name for name in modalities_there(run, domain) if not config.features.is_from_interactions(name)]


def item_content(run: RunDir, domain: str, config: Config) -> Tensor | None:
    """Content vectors of a domain's items as the sequence model reads them; None if the run has none.

    Args:
        run: a run whose fusion is done.
        domain: one of its domains.
        config: of the run. Its `sequencer.content` is "modalities": the mean vectors of each item in each modality, concatenated, each
            of length 1 and zeros where it is missing (collaborative vectors alone where there is nothing else); "fused": the fused
            embeddings; "none".

    Returns:
        [N, F], of about length sqrt(width of the first modality).
    """
    kind = config.sequencer.content
    if kind == "none" or not run.parts("fusion/embeddings", domain):
        return None
    if kind == "fused":
        return content_vectors(run, domain)
    names = content_modalities(run, domain, config) or modalities_there(run, domain)
    vectors = [_zeros_if_none(run, domain, name) for name in names]
    return torch.cat(vectors, dim=1) * vectors[0].shape[1] ** 0.5


def _zeros_if_none(run: RunDir, domain: str, modality: str) -> Tensor:
    vectors = modality_vectors(run, domain, modality)
    if vectors is not None:
        return vectors
    table = run.read(f"features/{modality}", domain, ["vectors"])
    return torch.zeros(table.num_rows, table.schema.field("vectors").type.value_type.list_size)


def modality_vectors(run: RunDir, domain: str, modality: str) -> Tensor | None:
    """[N, D] mean vector of each item in one modality, centred on those that training may see, of length 1; None if no item has any.

    Without centring, the component common to all texts dominates the cosine, and the neighbours are far worse.
    """
    if not run.parts(f"features/{modality}", domain):
        return None
    table = run.read(f"features/{modality}", domain, ["vectors", "present"])
    vectors, present = (torch.from_numpy(columns.to_numpy(table[name]).copy()) for name in ("vectors", "present"))
    mean = (vectors * present[..., None]).sum(1) / present.sum(1, keepdim=True).clamp_min(1)
    has = present.any(1)
    warm = has & (torch.arange(len(mean)) < warm_items(run, domain))
    return F.normalize((mean - mean[warm].mean(0)) * has[:, None], dim=-1) if warm.any() else None
