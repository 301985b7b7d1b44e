"""The stages `quantizer` and `semantic_ids` (§3.4): train the quantizer, then assign every item unique codes.

Encoding the catalog is embarrassingly parallel. Collisions are then resolved by one task per domain, since uniqueness is a
property of the whole domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from qbert_ray import metrics
from qbert_ray.config.schema import Config, Workers
from qbert_ray.execution.device import own_device
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.semantic_ids.collisions import CapacityError, Resolved, resolve_collisions, resolve_given, to_tokens
from qbert_ray.semantic_ids.quantizers import EXTRA, load_quantizers
from qbert_ray.semantic_ids.task import ExtraQuantizerTask, QuantizerMetrics, QuantizerTask
from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError, RunDir, join, resolve
from qbert_ray.training import build, last_metrics, trained

BATCH = 4096  # items that are encoded at once
ENCODED = "semantic_ids/.encoded"
MOST_CODES = 1 << 16  # of a level of given IDs, in catalogs of any size: figures count each


class DomainCounts(TypedDict):
    domain: str
    items: int
    raw_collision_rate: float  # before collisions were resolved
    moved: int


class Version(TypedDict):
    """A version of the semantic IDs: those of its parts in addition to those of its parents."""

    version: int  # 0: that of the run, before anything was appended
    parent: str | None  # fingerprint
    fingerprint: str
    model: str  # fingerprint of the quantizer
    items: int  # all that have IDs
    added: int
    parts: list[str]
    changed: NotRequired[int]  # items that had IDs and have another text or image; their IDs stay the same
    unchanged: NotRequired[int]
    left_out: NotRequired[int]  # items of the files that the k-core of the ingest dropped
    gone: NotRequired[int]  # items that have IDs and are no longer in the files


class IdCounts(TypedDict):
    """Counts of the stage `semantic_ids` over all domains."""

    items: int
    moved: int
    num_levels: int
    codebook_size: int
    codebook_usage: list[float]  # per level, as is the next
    perplexity: list[float]
    domains: NotRequired[list[DomainCounts]]
    versions: NotRequired[list[Version]]


class GateError(ValueError):
    """Semantic IDs fall short of the config's gates; outputs are kept, so that a run with a lower gate resumes from them."""


def train_quantizer(config: Config, run: RunDir, executor: Executor, progress: Progress) -> dict[str, QuantizerMetrics]:
    """Train the quantizer of the semantic IDs and the extra ones; returns the counts for the manifest."""
    workers = config.compute.quantizer
    if config.quantizer.kind == "rqvae":
        figures = executor.fit(QuantizerTask, config, run, "quantizer", workers, progress)
    else:
        progress.note(config.quantizer.kind)
        figures = _build(executor, partial(QuantizerTask, config, run), workers, run, "quantizer")
    check_usage(config, figures)
    for number, kind in enumerate(config.quantizer.extra_quantizers):
        progress.note(kind)
        _build(executor, partial(ExtraQuantizerTask, config, run, number), workers, run, f"{EXTRA}/{number:02d}")
    return {"metrics": figures}


def _build(executor: Executor, make_task: Callable[[], QuantizerTask], workers: Workers, run: RunDir, folder: str) -> QuantizerMetrics:
    """Fit a quantizer without gradients in one CPU task; it writes the same files as `Executor.fit`."""
    if not trained(run, folder):
        executor.get(executor.submit(build, make_task, run, folder, workers=workers.alone()))
    return last_metrics(run, folder)


def assign_ids(config: Config, run: RunDir, executor: Executor, progress: Progress) -> IdCounts:
    """Write semantic_ids for the whole catalog; returns the counts for the manifest."""
    counts = _assign(config, run, executor, progress)
    check_collisions(config, counts)
    return counts


def check_usage(config: Config, metrics: QuantizerMetrics) -> None:
    """Raise GateError if the quantizer leaves too many codewords unused."""
    bar, usage, size = config.gates.min_usage, metrics["codebook_usage"], config.quantizer.codebook_size
    if metrics["items"] >= 4 * size and min(usage) < bar:  # with fewer items later levels have too few residuals to use all codewords
        raise GateError(
            f"the codebooks collapsed: {' '.join(f'{share:.0%}' for share in usage)} of the {size} codewords of each level are in use, "
            f"gates.min_usage asks for {bar:.0%}. Try a smaller quantizer.codebook_size or another quantizer.kind, and look whether many "
            f"items have the same texts; then redo with --from quantizer. "
            f"To continue with this model: gates.min_usage={max(0.0, min(usage) - 0.005):.2f}"
        )


def check_collisions(config: Config, counts: IdCounts) -> None:
    """Raise GateError if too many items shared their codes before collisions were resolved."""
    bar = config.gates.max_raw_collision
    short = {domain["domain"]: rate for domain in counts["domains"] if bar is not None and (rate := domain["raw_collision_rate"]) > bar}
    if short:
        figures = ", ".join(f"{rate:.2%} of {domain}" for domain, rate in short.items())
        raise GateError(
            f"too many items collide: {figures} share their codes with others before reallocation, gates.max_raw_collision allows "
            f"{bar:.2%}. Try a larger quantizer.codebook_size or quantizer.num_levels, more text_fields or modalities that distinguish items; "
            f"then redo with --from the stage that changes. To continue with these IDs: gates.max_raw_collision={max(short.values()) + 0.00005:.4f}"
        )


def _assign(config: Config, run: RunDir, executor: Executor, progress: Progress) -> IdCounts:
    if config.data.semantic_ids:
        return _use_given_ids(config, run, progress)
    return assign_parts(config, run, executor, run.parts("fusion/embeddings"), progress)


def assign_parts(config: Config, run: RunDir, executor: Executor, parts: list[str], progress: Progress) -> IdCounts:
    """Write some parts of semantic_ids; IDs in the other parts are kept and not reused. Returns the figures of all parts."""
    executor.map_parts(run, EncodePart, {"run": run}, parts, ENCODED, config.compute.semantic_ids, progress)
    mine = {domain: [part for part in run.parts("ingest/items", domain) if part in set(parts)] for domain in config.data.domains}
    counts = [
        executor.get(handle) for handle in [executor.submit(_resolve_domain, run, domain, names) for domain, names in mine.items() if names]
    ]
    run.delete(ENCODED)
    return {**count_ids(config, run, config.quantizer.codebook_size), "domains": counts}


class EncodePart:
    """Nearest codes and latents of a part of the catalog, and the codes of the extra quantizers."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.device = run, torch.device(own_device())
        self.model, *self.others = (model.to(self.device) for model in load_quantizers(run))

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, int]:
        table = self.run.read_part("fusion/embeddings", name)
        embeddings = torch.from_numpy(columns.to_numpy(table["embedding"]).copy())
        latents, codes, extra = [], [], []
        for batch in embeddings.split(BATCH):
            batch = batch.to(self.device)
            latent = self.model.encode(batch)
            latents.append(latent.cpu().numpy())
            codes.append(self.model.quantizer.codes(latent).cpu().numpy().astype(np.int32))
            if self.others:
                others = [model.quantizer.codes(model.encode(batch)) for model in self.others]
                extra.append(torch.cat(others, dim=1).cpu().numpy().astype(np.int32))
        table = table.select(columns.KEYS)
        table = table.append_column("latent", columns.to_fixed_lists(np.concatenate(latents)))
        table = table.append_column("codes", columns.to_fixed_lists(np.concatenate(codes)))
        if extra:
            table = table.append_column(columns.EXTRA_CODES, columns.to_fixed_lists(np.concatenate(extra)))
        self.run.write_part(ENCODED, name, table)
        return {"items": table.num_rows}


def _resolve_domain(run: RunDir, domain: str, parts: list[str]) -> DomainCounts:
    codes, latents = (
        np.concatenate([columns.to_numpy(run.read_part(ENCODED, part, [name])[name]) for part in parts]) for name in ("codes", "latent")
    )
    published = [run.read_part("semantic_ids", part, ["codes"]) for part in run.parts("semantic_ids", domain) if part not in parts]
    taken = columns.to_numpy(pa.concat_tables(published)["codes"]) if published else None
    codebooks = load_quantizers(run)[0].quantizer.codebooks.detach().numpy()
    extra = [run.read_part(ENCODED, part, [columns.EXTRA_CODES]) for part in parts]
    return _write_domain(run, domain, parts, codes, resolve_collisions(codes, latents, codebooks, taken), extra)


def _write_domain(
    run: RunDir, domain: str, parts: list[str], nearest: np.ndarray, resolved: Resolved, extra: Sequence[pa.Table] = ()
) -> DomainCounts:
    """Write parts of a domain, aligned with those of the catalog; rows of nearest and resolved are in the order of item_index.

    Args:
        extra: for each part, a table with the codes of the extra quantizers in its one column, or without columns.
    """
    begin = 0
    for number, name in enumerate(parts):
        keys = run.read_part("ingest/items", name, columns.KEYS)
        rows = slice(begin, begin + keys.num_rows)
        codes = resolved.codes[rows].astype(np.int32)
        arrays = [
            *keys.columns,
            columns.to_fixed_lists(codes).cast(pa.list_(pa.int32())),
            pa.array(to_tokens(codes)),
            pa.array(resolved.moved[rows]),
            columns.to_fixed_lists(nearest[rows].astype(np.int32)).cast(pa.list_(pa.int32())),
        ]
        table = pa.table(arrays, schema=columns.SEMANTIC_IDS)
        for column in extra[number].itercolumns() if extra else ():
            table = table.append_column(columns.EXTRA_CODES, column.cast(pa.list_(pa.int32())))
        run.write_part("semantic_ids", name, table)
        begin = rows.stop
    return {
        "domain": domain,
        "items": len(nearest),
        "raw_collision_rate": metrics.collision_rate(nearest),
        "moved": int(resolved.moved.sum()),
    }


def _use_given_ids(config: Config, run: RunDir, progress: Progress) -> IdCounts:
    """Check semantic IDs that the user gave, make them unique, and write them in the catalog's order."""
    source = join(config.data.root, config.data.semantic_ids or "")
    domains = list(config.data.domains)
    given = _read_given(source, domains)
    size = 1 + int(given["codes"].list.max().drop_nulls().to_numpy().max(initial=0))
    if size > (most := max(MOST_CODES, 4 * len(given))):
        raise ArtifactError(f"data.semantic_ids: {source} holds the code {size - 1:,}; codes are small numbers, from 0 to below {most:,}")
    counts = []
    for domain in domains:
        progress.note(domain)
        codes = _given_codes(run, given, domain, source)
        try:
            resolved = resolve_given(codes, size)
        except CapacityError:
            spans = f"{size}**{codes.shape[1]} = {size ** codes.shape[1]:,}"
            raise ArtifactError(
                f"data.semantic_ids: {len(codes):,} items of {domain}, and the codes in {source} span only {spans} IDs"
            ) from None
        counts.append(_write_domain(run, domain, run.parts("ingest/items", domain), codes, resolved))
    return {**count_ids(config, run, size), "domains": counts}


def _read_given(source: str, domains: list[str]) -> pl.DataFrame:
    """Domain, item_id and codes of each item; if an item has several rows, the last one counts."""
    filesystem, path = resolve(source)
    try:
        table = pq.read_table(path, filesystem=filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(f"data.semantic_ids: cannot read {source} as Parquet: {error}") from None
    lacking = {columns.ITEM_ID, "codes"} - set(table.column_names)
    if lacking:
        raise ArtifactError(f"data.semantic_ids: {source} lacks {sorted(lacking)}; it has {table.column_names}")
    given = pl.DataFrame(table.select([name for name in (columns.DOMAIN, columns.ITEM_ID, "codes") if name in table.column_names]))
    if columns.DOMAIN not in given.columns:
        if len(domains) > 1:
            raise ArtifactError(f"data.semantic_ids: {source} needs a {columns.DOMAIN} column, since the run has the domains {domains}")
        given = given.with_columns(pl.lit(domains[0]).alias(columns.DOMAIN))
    inner = getattr(given.schema["codes"], "inner", None)
    if inner is None or not (inner.is_integer() or inner == pl.Null):
        raise ArtifactError(
            f"data.semantic_ids: codes must be lists of whole numbers; in {source} they are {table.schema.field('codes').type}"
        )
    given = given.with_columns(pl.col(columns.DOMAIN, columns.ITEM_ID).cast(pl.String), pl.col("codes").cast(pl.List(pl.Int64)))
    return given.unique([columns.DOMAIN, columns.ITEM_ID], keep="last")


def _given_codes(run: RunDir, given: pl.DataFrame, domain: str, source: str) -> np.ndarray:
    """[N, K] codes of a domain's items in the catalog's order."""
    items = pl.DataFrame(run.read("ingest/items", domain, [columns.ITEM_ID]))
    given = given.filter(pl.col(columns.DOMAIN) == domain)
    codes = items.join(given, on=columns.ITEM_ID, how="left", maintain_order="left")["codes"]
    missing = items[columns.ITEM_ID].filter((codes.list.len() == 0).fill_null(True))
    if len(missing):
        raise ArtifactError(
            f"data.semantic_ids: {source} has no codes for {len(missing):,} of {len(items):,} items of {domain}, such as {missing[:3].to_list()}"
        )
    lengths, flat = codes.list.len().unique(), codes.explode()
    if len(lengths) > 1 or flat.null_count() or (flat.to_numpy() < 0).any():
        raise ArtifactError(
            f"data.semantic_ids: every item needs the same number of codes, none negative; {source} has lengths {sorted(lengths)}"
        )
    return flat.to_numpy().reshape(len(items), -1)


def count_ids(config: Config, run: RunDir, size: int) -> IdCounts:
    """Counts and codebook usage over all semantic IDs of a run, whose codebooks have `size` codewords."""
    tables = [run.read("semantic_ids", domain, ["codes", "moved"]) for domain in config.data.domains]
    codes = np.concatenate([columns.to_numpy(table["codes"]) for table in tables])
    return {
        "items": len(codes),
        "moved": sum(int(np.count_nonzero(table["moved"].to_numpy())) for table in tables),
        "num_levels": int(codes.shape[1]),
        "codebook_size": size,
        "codebook_usage": metrics.codebook_usage(codes, size),
        "perplexity": metrics.perplexity(codes),
    }
