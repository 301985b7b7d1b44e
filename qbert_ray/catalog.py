"""What the stages know of a domain's items, in the order of `item_index`: codes, fused embeddings, which of them training may see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from qbert_ray import columns
from qbert_ray.artifacts import RunDir

NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 10, 0.1  # of a cold item among those that were trained
CHUNK = 4096  # items whose neighbours are looked up at once


def warm_items(run: RunDir, domain: str) -> int:
    """How many items training may see: the first of the catalog."""
    return int(np.count_nonzero(~run.read("ingest/items", domain, [columns.COLD])[columns.COLD].to_numpy()))


def read_warm(run: RunDir, table: str, domains: Sequence[str], names: list[str] | None = None) -> pa.Table:
    """Rows of a table over the catalog that training may see, domain after domain."""
    return pa.concat_tables([run.read(table, domain, names).slice(0, warm_items(run, domain)) for domain in domains])


def item_ids(run: RunDir, domain: str) -> pa.Array:
    """[N] item_id of a domain's items."""
    return run.read("ingest/items", domain, [columns.ITEM_ID])[columns.ITEM_ID].combine_chunks()


def catalog_codes(run: RunDir, domain: str) -> np.ndarray:
    """[N, K] codes of a domain's items."""
    table = run.read("semantic_ids", domain, [columns.ITEM_INDEX, "codes"])
    codes = table["codes"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1).astype(np.int64)
    order = np.argsort(table[columns.ITEM_INDEX].to_numpy())
    return codes[order]


def content_vectors(run: RunDir, domain: str) -> Tensor:
    """[N, D] fused embeddings, centred on those that training may see, of length sqrt(D)."""
    embedding = torch.from_numpy(columns.to_numpy(run.read("fusion/embeddings", domain, ["embedding"])["embedding"]).copy())
    centred = embedding - embedding[: warm_items(run, domain)].mean(0)
    return F.normalize(centred, dim=-1) * embedding.shape[1] ** 0.5


def nearest_known(content: Tensor, known: int) -> tuple[Tensor, Tensor]:
    """[C, n] nearest of the first `known` rows of content [N, D], by cosine, for each of the others; and their weights, summing to 1."""
    unit = F.normalize(content, dim=-1)
    cosine, nearest = zip(
        *(torch.topk(piece @ unit[:known].T, min(NEIGHBOURS, known), dim=1) for piece in unit[known:].split(CHUNK)), strict=True
    )
    return torch.cat(nearest), torch.softmax(torch.cat(cosine) / NEIGHBOUR_TEMPERATURE, dim=1)
