"""Quality figures of a run's semantic IDs: `semantic_ids/report.json`."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import polars as pl

from qbert_ray import metrics
from qbert_ray.semantic_ids.collisions import to_tokens
from qbert_ray.semantic_ids.lookup import IDS, Ids, domains, open_ids, read_codebooks, read_ids, read_titles
from qbert_ray.semantic_ids.quality import NEIGHBOURS, NeighbourRecall, prefix_agreement, prefix_figures, prefixes, typical
from qbert_ray.storage.columns import ATTRIBUTE_PREFIX, ITEM_ID, ITEM_INDEX, to_numpy, to_sequences
from qbert_ray.storage.directory import Manifest, RunDir

QUERIES = 2_000  # items whose neighbours are compared
DESCRIBED = 100_000  # items whose attributes are
LARGEST, TITLES = 5, 4  # prefixes and titles that are examples
PIECE = 4096
REPORT = f"{IDS}/report.json"


class Attribute(TypedDict):
    """How well prefixes predict an attribute."""

    items: int
    values: int
    lengths: list[dict[str, float]]  # of `prefix_figures`


class Typical(TypedDict):
    """A value that items of a prefix have more often than all items do."""

    value: str
    share: float
    overall: float


class Example(TypedDict):
    """A prefix with the typical values of its items and the titles of the most popular ones."""

    prefix: str
    items: int
    typical: dict[str, Typical]  # by attribute
    titles: list[str]


class DomainQuality(TypedDict):
    """Quality of the semantic IDs of one domain."""

    items: int
    with_id: int
    coverage: float
    raw_collision_rate: float  # before collisions were resolved
    collision_rate: float
    moved: int
    moved_at: list[int]  # by the first level that differs
    levels: list[dict[str, float]]  # usage, perplexity, entropy and gini of the codes
    neighbours: dict[str, float] | None  # of `NeighbourRecall`, by how many items and neighbours
    attributes: dict[str, Attribute]
    following: list[dict[str, float]]  # of `prefix_agreement`, of training items that follow each other; empty where none do
    examples: list[Example]


class IdReport(TypedDict):
    """The content of semantic_ids/report.json."""

    num_levels: int
    codebook_size: int
    domains: dict[str, DomainQuality]


def report(name: str) -> IdReport:
    """The quality report on the semantic IDs of a run.

    That of all IDs is also written next to them, that of an earlier version (`runs/shop@0`) is not.
    """
    run, parts = open_ids(name)
    manifest = Manifest.load(run, IDS)
    assert manifest is not None
    size = manifest.counts["codebook_size"]
    result = {domain: _figures(run, domain, its, size) for domain, its in domains(parts).items()}
    content: IdReport = {"num_levels": manifest.counts["num_levels"], "codebook_size": size, "domains": result}
    if sorted(parts) == run.parts(IDS):
        run.write_json(REPORT, content)
    return content


def _figures(run: RunDir, domain: str, parts: list[str], size: int) -> DomainQuality:
    ids = read_ids(run, parts)
    items = sum(run.read_part("ingest/items", part, [ITEM_INDEX]).num_rows for part in run.parts("ingest/items", domain))
    titles = read_titles(run, parts)
    attributes = read_attributes(run, parts)
    first = (ids.codes != ids.nearest)[ids.moved].argmax(1) if ids.moved.any() else np.zeros(0, dtype=int)
    codes = ids.codes
    spread = {
        "usage": metrics.codebook_usage(codes, size),
        "perplexity": metrics.perplexity(codes),
        "entropy": metrics.entropy(codes),
        "gini": metrics.gini(codes, size),
    }
    return {
        "items": items,
        "with_id": len(codes),
        "coverage": len(codes) / items,
        "raw_collision_rate": metrics.collision_rate(ids.nearest),
        "collision_rate": metrics.collision_rate(codes),
        "moved": int(ids.moved.sum()),
        "moved_at": np.bincount(first, minlength=codes.shape[1]).tolist(),
        "levels": [dict(zip(spread, values, strict=True)) for values in zip(*spread.values(), strict=True)],
        "neighbours": _neighbours(run, parts, ids),
        "attributes": _meaning(codes, attributes),
        "following": _following(run, domain, codes),
        "examples": _examples(ids, titles, attributes, _popularity(run, domain, ids)),
    }


def _neighbours(run: RunDir, parts: list[str], ids: Ids) -> dict[str, float] | None:
    """Recall of the nearest items; None if there are no embeddings to compare with, or too few items."""
    codebooks = read_codebooks(run)
    if codebooks is None or len(ids.codes) <= NEIGHBOURS + 1 or not run.exists(f"fusion/embeddings/{parts[0]}"):
        return None
    queries = np.sort(np.random.default_rng(0).permutation(len(ids.codes))[:QUERIES])
    pieces = (to_numpy(run.read_part("fusion/embeddings", part, ["embedding"])["embedding"]) for part in parts)
    begin, sampled = 0, []
    for embedding in pieces:  # parts are in the order of item_index
        sampled.append(embedding[queries[(queries >= begin) & (queries < begin + len(embedding))] - begin])
        begin += len(embedding)
    found = NeighbourRecall(queries, np.concatenate(sampled), ids.codes[queries], codebooks)
    begin = 0
    for part in parts:
        embedding = to_numpy(run.read_part("fusion/embeddings", part, ["embedding"])["embedding"])
        for start in range(0, len(embedding), PIECE):
            rows = embedding[start : start + PIECE]
            found.add(rows, ids.codes[begin + start : begin + start + len(rows)])
        begin += len(embedding)
    return {"sampled": len(queries), "k": NEIGHBOURS} | found.result()


def read_attributes(run: RunDir, parts: list[str]) -> pl.DataFrame:
    """A column for each attribute, in the order of item_index; only the first of an item's values counts."""
    names = [name for name in run.column_names("ingest/items", parts[0]) if name.startswith(ATTRIBUTE_PREFIX)]
    rows = pl.concat([pl.DataFrame(run.read_part("ingest/items", part, [ITEM_INDEX, *names])) for part in parts]).sort(ITEM_INDEX)
    return rows.select(pl.col(name).str.split(", ").list.first().alias(name.removeprefix(ATTRIBUTE_PREFIX)) for name in names)


def _meaning(codes: np.ndarray, attributes: pl.DataFrame) -> dict[str, Attribute]:
    """How well prefixes predict each attribute, over items whose value another item has too."""
    sample = np.sort(np.random.default_rng(0).permutation(len(codes))[:DESCRIBED])
    result: dict[str, Attribute] = {}
    for column in (column.gather(sample) for column in attributes):  # a domain may have none
        rows = (column.is_not_null() & column.is_duplicated()).to_numpy()
        values = column.filter(rows).rank("dense").to_numpy().astype(np.int64) - 1
        if len(values) and values.max() > 0:
            figures = prefix_figures(codes[sample][rows], values)
            result[column.name] = {"items": len(values), "values": int(values.max()) + 1, "lengths": figures}
    return result


def _following(run: RunDir, domain: str, codes: np.ndarray) -> list[dict[str, float]]:
    """Agreement of prefixes between different training items that follow each other in a history."""
    if not run.parts("ingest/sequences", domain):
        return []
    sequences = to_sequences(run.read("ingest/sequences", domain))
    user = np.repeat(np.arange(len(sequences.indptr) - 1), np.diff(sequences.indptr))
    first, second = sequences.items[:-1], sequences.items[1:]
    kept = (user[:-1] == user[1:]) & (first != second)
    return prefix_agreement(codes, first[kept], second[kept]) if kept.any() else []


def _popularity(run: RunDir, domain: str, ids: Ids) -> np.ndarray:
    """[N] interactions of each item, so that examples are well-known items."""
    counted = [
        pl.DataFrame(run.read_part("ingest/interactions", part, [ITEM_ID])).group_by(ITEM_ID).len()
        for part in run.parts("ingest/interactions", domain)
    ]
    if not counted:
        return np.zeros(len(ids.codes), dtype=int)
    total = pl.concat(counted).group_by(ITEM_ID).agg(pl.col("len").sum())
    return pl.DataFrame({ITEM_ID: ids.item_ids}).join(total, on=ITEM_ID, how="left", maintain_order="left")["len"].fill_null(0).to_numpy()


def _examples(ids: Ids, titles: pl.Series, attributes: pl.DataFrame, popularity: np.ndarray) -> list[Example]:
    """The largest prefixes of length one, with the most typical attribute values and the most popular titles of their items."""
    first = next(iter(prefixes(ids.codes)))
    result: list[Example] = []
    for number in np.argsort(-np.bincount(first), kind="stable")[:LARGEST]:
        rows = np.flatnonzero(first == number)
        known = rows[np.argsort(-popularity[rows], kind="stable")][:TITLES]
        result.append(
            {
                "prefix": to_tokens(ids.codes[rows[:1], :1])[0],
                "items": len(rows),
                "typical": {column.name: value for column in attributes if (value := typical_value(column, rows))},
                "titles": titles[known].to_list(),
            }
        )
    return result


def typical_value(column: pl.Series, rows: np.ndarray) -> Typical | None:
    """The most over-represented value of an attribute in some rows, with its share there and overall; None if none is."""
    names = column.drop_nulls().unique().sort()
    if not len(names):
        return None
    values = column.replace_strict(names, np.arange(len(names)), default=None)
    found = typical(values.drop_nulls().to_numpy(), values[rows].drop_nulls().to_numpy())
    return None if found is None else {"value": names[int(found["value"])], "share": found["share"], "overall": found["overall"]}
