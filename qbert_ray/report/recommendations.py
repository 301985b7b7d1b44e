"""The report's section on example users: history, recommendations, and reasons for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from scipy import sparse

from qbert_ray.report.catalog import Album, Catalog
from qbert_ray.report.facts import Facts
from qbert_ray.semantic_ids.collisions import to_tokens
from qbert_ray.storage.columns import ITEM_ID, USER_ID, Sequences, to_histories, to_sequences
from qbert_ray.storage.directory import RunDir

USERS, LATEST, TOP = 6, 10, 10
HISTORIES = "score/histories"


def gather(run: RunDir, facts: Facts, catalogs: dict[str, Catalog], ranks: dict[str, pl.DataFrame], album: Album) -> dict[str, Any]:
    """Content of the section, or {"missing": why}."""
    why = facts.missing("score")
    if why:
        return {"missing": why}
    domains = [{"name": name, "users": users(run, catalogs[name], ranks.get(name), album)} for name in facts.targets if name in catalogs]
    return {"domains": domains}


def users(run: RunDir, catalog: Catalog, ranks: pl.DataFrame | None, album: Album) -> list[dict[str, Any]]:
    """Users of the domain's first part, drawn at random."""
    parts = run.parts("score", catalog.domain)
    if not parts:
        return []
    newer = run.parts(HISTORIES, catalog.domain)  # users were scored with newer interactions
    sequences = None if newer else to_sequences(run.read_part("ingest/sequences", parts[0]))
    everybody, whole = to_histories(run.read_part(HISTORIES if newer else "ingest/sequences", parts[0]))
    best = pl.DataFrame(run.read_part("score", parts[0], [USER_ID, "rank", ITEM_ID])).filter(pl.col("rank") <= TOP)
    chosen = np.sort(np.random.default_rng(0).permutation(len(everybody))[:USERS])
    names = [everybody[user] for user in chosen]
    row_of = pl.DataFrame({ITEM_ID: catalog.item_ids}).with_row_index("row")
    best = best.filter(pl.col(USER_ID).is_in(names)).join(row_of, on=ITEM_ID, how="left").drop_nulls("row").sort("rank")
    recommended = {name: best.filter(pl.col(USER_ID) == name)["row"].to_list() for name in names}
    histories = {name: whole[user] for name, user in zip(names, chosen, strict=True)}
    needed = np.unique(np.concatenate([*histories.values(), np.array(sum(recommended.values(), []), dtype=np.int64)]))
    together = co_occurrence(run, catalog, needed)
    place = {int(row): number for number, row in enumerate(needed)}
    result = []
    for name, user in zip(names, chosen, strict=True):
        history, rows = histories[name], recommended[name]
        album.want(catalog, [*rows, *history[-LATEST:]])
        counts = together[[place[row] for row in rows]][:, [place[int(row)] for row in history]]
        result.append(
            {
                "user_id": name,
                "length": len(history),
                "history": [catalog.item(row) for row in history[-LATEST:][::-1]],
                "best": [catalog.item(row) | {"why": reasons(catalog, row, history, counts[number])} for number, row in enumerate(rows)],
                "test": _test(catalog, sequences, int(user), name, ranks) if sequences is not None else None,
            }
        )
    return result


def _test(catalog: Catalog, sequences: Sequences, user: int, name: str, ranks: pl.DataFrame | None) -> dict[str, Any] | None:
    """The user's test item and the rank that the model gave it."""
    if ranks is None or ranks.is_empty() or sequences.test[user] < 0:
        return None
    found = ranks.filter((pl.col(USER_ID) == name) & (pl.col("model") == "model"))["rank_all"].to_list()
    return {"title": catalog.title(sequences.test[user]), "rank": found[0], "among": len(catalog)} if found else None


def co_occurrence(run: RunDir, catalog: Catalog, rows: np.ndarray) -> np.ndarray:
    """[n, n] number of users who have both among their training items, for some rows of the catalog."""
    total = np.zeros((len(rows), len(rows)), dtype=np.int64)
    number = np.full(len(catalog), -1)
    number[rows] = np.arange(len(rows))
    for part in run.parts("ingest/sequences", catalog.domain):
        sequences = to_sequences(run.read_part("ingest/sequences", part))
        user = np.repeat(np.arange(len(sequences.user_ids)), np.diff(sequences.indptr))
        column = number[sequences.items]
        kept = column >= 0
        shape = (len(sequences.user_ids), len(rows))
        had = sparse.csr_matrix((np.ones(int(kept.sum()), dtype=np.int64), (user[kept], column[kept])), shape).minimum(1)
        total += (had.T @ had).toarray()
    return total


def reasons(catalog: Catalog, row: int, history: np.ndarray, together: np.ndarray) -> list[str]:
    """Reasons to recommend an item: history items with the longest shared prefix of codes, and with the most common users."""
    found = []
    latest = np.arange(len(history))  # among equally good reasons, the latest item
    if catalog.ids is not None and len(history):
        codes = catalog.ids.codes
        shared = np.cumprod(codes[history] == codes[row], axis=1).sum(1)
        best = int(np.lexsort((latest, shared))[-1])
        if shared[best]:
            prefix = to_tokens(codes[[row], : int(shared[best])])[0]
            found.append(f"shares {prefix} with {catalog.title(history[best])}")
    if len(history) and together.max(initial=0):
        best = int(np.lexsort((latest, together))[-1])
        found.append(f"{together[best]:,} user{'s' * int(together[best] != 1)} had it and {catalog.title(history[best])}")
    return found or ["no shared code or common user; only the order of the history explains it"]
