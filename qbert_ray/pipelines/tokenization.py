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
from qbert_ray.pipelines.tasks import Features, warm_items
from qbert_ray.rqvae import RQVAE
from qbert_ray.semantic_ids import Resolved, resolve_collisions, resolve_given, to_tokens
from qbert_ray.sources import join

BATCH = 1024
ENCODED = "semantic_ids/.encoded"


def embed_catalog(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Write fusion/embeddings; counts of items and of items per depth."""
    known, total = {}, 0
    for domain in config.data.domains:
        known[domain] = (total, warm_items(run, domain))
        total += known[domain][1]
    arguments = {"run": run, "known": known}
    return dict(map_parts(run, EmbedPart, arguments, run.parts("ingest/items"), "fusion/embeddings", config.compute.assign, progress))


class EmbedPart:
    """Fused embeddings and depths of a part of the catalog; cold items use the query of unknown ones.

    Args:
        known: domain -> ID vector of its first item, and how many items have one.
    """

    def __init__(self, run: RunDir, known: dict[str, tuple[int, int]]) -> None:
        tensors, description = run.load_model("fusion/model")
        self.run, self.known, self.device = run, known, _device()
        self.model = DynamicFusion(**description).to(self.device).eval()
        self.model.load_state_dict(tensors)

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        features = Features(self.run, name)
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


def assign_ids(config: Config, run: RunDir, progress: Progress) -> dict[str, Any]:
    """Write semantic_ids for every item, without collisions within a domain; counts and the figures of the IDs' quality."""
    if config.data.semantic_ids:
        return _adopt_ids(config, run, progress)
    return assign_parts(config, run, run.parts("fusion/embeddings"), progress)


def assign_parts(config: Config, run: RunDir, parts: list[str], progress: Progress) -> dict[str, Any]:
    """Write some parts of semantic_ids; IDs in the other parts stay and are not given again. The figures are those of all."""
    map_parts(run, EncodePart, {"run": run}, parts, ENCODED, config.compute.assign, progress)
    mine = {domain: [part for part in run.parts("ingest/items", domain) if part in set(parts)] for domain in config.data.domains}
    counts = ray.get([_resolve_domain.remote(run, domain, names) for domain, names in mine.items() if names])
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
def _resolve_domain(run: RunDir, domain: str, parts: list[str]) -> dict[str, Any]:
    table = pa.concat_tables([run.read_part(ENCODED, part) for part in parts])
    published = [run.read_part("semantic_ids", part, ["codes"]) for part in run.parts("semantic_ids", domain) if part not in parts]
    taken = np.stack(pa.concat_tables(published)["codes"].to_pylist()) if published else None
    codes, latents = columns.to_numpy(table["codes"]), columns.to_numpy(table["latent"])
    codebooks = load_rqvae(run).quantizer.codebooks.detach().numpy()
    resolved = resolve_collisions(codes, latents, codebooks, taken)
    return _write_domain(run, domain, parts, table, codes, resolved)


def _write_domain(run: RunDir, domain: str, parts: list[str], table: pa.Table, before: np.ndarray, resolved: Resolved) -> dict[str, Any]:
    """Write parts of a domain, aligned with those of the catalog; table holds their rows in the order of item_index."""
    begin = 0
    for name in parts:
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
        counts.append(_write_domain(run, domain, run.parts("ingest/items", domain), items, codes, resolve_given(codes, size)))
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


def figures(config: Config, run: RunDir) -> dict[str, Any]:
    """Counts and use of the codes over all IDs of a run whose quantizer was trained there."""
    return _figures(config, run, config.rqvae.codebook_size)


def _summary(run: RunDir, config: Config, counts: list[dict[str, Any]], size: int) -> dict[str, Any]:
    return _figures(config, run, size) | {"domains": counts}


def _figures(config: Config, run: RunDir, size: int) -> dict[str, Any]:
    tables = [run.read("semantic_ids", domain, ["codes", "moved"]) for domain in config.data.domains]
    codes = np.concatenate([np.stack(table["codes"].to_pylist()) for table in tables])
    return {
        "items": len(codes),
        "moved": sum(int(np.count_nonzero(table["moved"].to_numpy())) for table in tables),
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
