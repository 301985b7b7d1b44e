"""Fused embeddings and semantic IDs for the whole catalog, part by part on Ray Data.

The two passes over the catalog are embarrassingly parallel. Collisions are then resolved by one task per domain, since
uniqueness is a property of the whole domain.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from qbert_ray import columns, metrics
from qbert_ray.artifacts import ArtifactError, RunDir, resolve
from qbert_ray.config import Config
from qbert_ray.fusion import DynamicFusion
from qbert_ray.pipelines.session import Progress
from qbert_ray.pipelines.sharding import map_parts
from qbert_ray.pipelines.tasks import Features
from qbert_ray.rqvae import RQVAE
from qbert_ray.semantic_ids import Resolved, resolve_collisions, resolve_given, to_tokens
from qbert_ray.sources import join

BATCH = 1024
ENCODED = "semantic_ids/.encoded"


def embed_catalog(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Write fusion/embeddings; counts of items and of items per depth."""
    parts = run.parts("ingest/items")
    offsets = {}
    total = 0
    for domain in config.data.domains:
        offsets[domain] = total
        total += sum(run.read_part("ingest/items", part, [columns.ITEM_INDEX]).num_rows for part in run.parts("ingest/items", domain))
    arguments = {"run": run, "offsets": offsets}
    return dict(map_parts(run, EmbedPart, arguments, parts, "fusion/embeddings", config.compute.assign, progress))


class EmbedPart:
    """Fused embeddings and depths of a part of the catalog."""

    def __init__(self, run: RunDir, offsets: dict[str, int]) -> None:
        tensors, description = run.load_model("fusion/model")
        self.run, self.offsets, self.device = run, offsets, _device()
        self.model = DynamicFusion(**description).to(self.device).eval()
        self.model.load_state_dict(tensors)

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        features = Features(self.run, name)
        table = features.table
        rows = np.arange(table.num_rows)
        item = table[columns.ITEM_INDEX].to_numpy() + self.offsets[name.rsplit("-", 1)[0]]
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


def assign_ids(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Write semantic_ids for every item, without collisions within a domain; counts and the figures of the IDs' quality."""
    if config.data.semantic_ids:
        return _adopt_ids(config, run, progress)
    map_parts(run, EncodePart, {"run": run}, run.parts("fusion/embeddings"), ENCODED, config.compute.assign, progress)
    counts = ray.get([_resolve_domain.remote(run, domain) for domain in config.data.domains])
    run.delete(ENCODED)
    return _summary(run, config, counts, config.rqvae.codebook_size)


class EncodePart:
    """Nearest codes and latents of a part of the catalog."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.device = run, _device()
        self.model = load_rqvae(run).to(self.device)

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        table = self.run.read_part("fusion/embeddings", name)
        embeddings = torch.from_numpy(columns.to_numpy(table["embedding"]).copy())
        latents, codes = [], []
        for batch in embeddings.split(BATCH):
            latent = self.model.encode(batch.to(self.device))
            latents.append(latent.cpu().numpy())
            codes.append(self.model.quantizer(latent).codes.cpu().numpy().astype(np.int32))
        table = table.select([columns.DOMAIN, columns.ITEM_ID, columns.ITEM_INDEX])
        table = table.append_column("latent", columns.to_fixed_lists(np.concatenate(latents)))
        table = table.append_column("codes", columns.to_fixed_lists(np.concatenate(codes)))
        self.run.write_part(ENCODED, name, table)
        return {"items": table.num_rows}


@ray.remote
def _resolve_domain(run: RunDir, domain: str) -> dict[str, Any]:
    table = run.read(ENCODED, domain)
    codes, latents = columns.to_numpy(table["codes"]), columns.to_numpy(table["latent"])
    codebooks = load_rqvae(run).quantizer.codebooks.detach().numpy()
    resolved = resolve_collisions(codes, latents, codebooks)
    return _write_domain(run, domain, table, codes, resolved)


def _write_domain(run: RunDir, domain: str, table: pa.Table, before: np.ndarray, resolved: Resolved) -> dict[str, Any]:
    """Write a domain's parts, aligned with those of the catalog; table is in the order of item_index."""
    begin = 0
    for name in run.parts("ingest/items", domain):
        size = run.read_part("ingest/items", name, [columns.ITEM_INDEX]).num_rows
        rows = slice(begin, begin + size)
        piece = table.slice(begin, size)
        codes = resolved.codes[rows]
        arrays = [
            *(piece[column] for column in (columns.DOMAIN, columns.ITEM_ID, columns.ITEM_INDEX)),
            pa.array(list(codes.astype(np.int32)), pa.list_(pa.int32())),
            pa.array(to_tokens(codes)),
            pa.array(resolved.moved[rows]),
        ]
        run.write_part("semantic_ids", name, pa.table(arrays, schema=columns.SEMANTIC_IDS))
        begin += size
    return {
        "domain": domain,
        "items": len(before),
        "raw_collision_rate": metrics.collision_rate(before),
        "moved": int(resolved.moved.sum()),
    }


def _adopt_ids(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Semantic IDs made elsewhere: checked, made unique, and written in the catalog's order."""
    source = join(config.data.root, config.data.semantic_ids or "")
    filesystem, path = resolve(source)
    try:
        given = pq.read_table(path, filesystem=filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(f"data.semantic_ids: cannot read {source} as Parquet: {error}") from None
    lacking = {columns.ITEM_ID, "codes"} - set(given.column_names)
    if lacking:
        raise ArtifactError(f"data.semantic_ids: {source} lacks {sorted(lacking)}; it has {given.column_names}")
    domains = list(config.data.domains)
    if columns.DOMAIN not in given.column_names:
        if len(domains) > 1:
            raise ArtifactError(f"data.semantic_ids: {source} needs a {columns.DOMAIN} column, since the run has the domains {domains}")
        given = given.append_column(columns.DOMAIN, pa.array([domains[0]] * given.num_rows))
    table = {}
    for domain, item, codes in zip(
        given[columns.DOMAIN].to_pylist(), given[columns.ITEM_ID].to_pylist(), given["codes"].to_pylist(), strict=True
    ):
        table[domain, str(item)] = codes
    size = 1 + max((max(codes) for codes in table.values() if codes), default=0)
    counts = []
    for domain in domains:
        progress.note(domain)
        items = run.read("ingest/items", domain, [columns.DOMAIN, columns.ITEM_ID, columns.ITEM_INDEX])
        codes = _given_codes(items, table, domain, source)
        counts.append(_write_domain(run, domain, items, codes, resolve_given(codes, size)))
    return _summary(run, config, counts, size)


def _given_codes(items: pa.Table, table: dict[tuple[str, str], list[int]], domain: str, source: str) -> np.ndarray:
    ids = items[columns.ITEM_ID].to_pylist()
    missing = [item for item in ids if not table.get((domain, item))]
    if missing:
        raise ArtifactError(
            f"data.semantic_ids: {source} has no codes for {len(missing):,} of {len(ids):,} items of {domain}, such as {missing[:3]}"
        )
    rows = [table[domain, item] for item in ids]
    widths = {len(row) for row in rows}
    if len(widths) > 1 or any(code is None or code < 0 for row in rows for code in row):
        raise ArtifactError(
            f"data.semantic_ids: every item needs the same number of codes, none negative; {source} has lengths {sorted(widths)}"
        )
    return np.array(rows, dtype=np.int64)


def _summary(run: RunDir, config: Config, counts: list[dict[str, Any]], size: int) -> dict[str, Any]:
    codes = np.concatenate([np.stack(run.read("semantic_ids", domain)["codes"].to_pylist()) for domain in config.data.domains])
    return {
        "items": len(codes),
        "moved": sum(count["moved"] for count in counts),
        "domains": counts,
        "num_levels": int(codes.shape[1]),
        "codebook_size": size,
        "codebook_usage": metrics.codebook_usage(codes, size),
        "perplexity": metrics.perplexity(codes, size),
    }


def load_rqvae(run: RunDir) -> RQVAE:
    """The trained RQ-VAE, ready to encode."""
    tensors, description = run.load_model("rqvae/model")
    model = RQVAE(**description)
    model.load_state_dict(tensors)
    return model.eval()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
