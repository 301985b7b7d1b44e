"""Looks up the semantic IDs of a finished run: one item and its siblings, or the differences between two runs.

`runs/shop` names the IDs of a run directory; `runs/shop@1` those of version 1, before later items were appended.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple, TypedDict

import numpy as np
import polars as pl

from qbert_ray.semantic_ids.collisions import to_tokens
from qbert_ray.semantic_ids.quality import decode
from qbert_ray.storage.columns import ITEM_ID, ITEM_INDEX, TEXT_PREFIX, to_numpy
from qbert_ray.storage.directory import ArtifactError, Manifest, RunDir

IDS = "semantic_ids"
SHOWN = 8  # siblings per length of the shared prefix
SEARCHED = 200_000  # names whose spelling is compared with that of a missing item


class Ids(NamedTuple):
    """The IDs of a domain, in the order of item_index."""

    item_ids: pl.Series
    codes: np.ndarray  # [N, K]
    nearest: np.ndarray  # [N, K] before collisions were resolved
    moved: np.ndarray  # [N]


class Item(TypedDict):
    item_id: str
    title: str
    semantic_id: str


class Move(TypedDict):
    """Why an item has other codes than its nearest ones."""

    nearest: str  # the codes that it would have had
    kept_by: Item | None  # the item that has these
    full: str | None  # the longest prefix under which no ID was free; None: only the last code differs


class Siblings(TypedDict):
    """Items that share a prefix of one length with an item."""

    prefix: str
    items: int
    further: int  # of these, not siblings by a longer prefix
    nearest: list[Item]  # of the further ones


class Found(Item):
    domain: str
    moved: Move | None
    siblings: list[Siblings]  # by length of the prefix, the longest first


class Difference(TypedDict):
    """Differences between the semantic IDs of two runs in one domain."""

    only_first: int
    only_second: int
    same: int
    changed: int
    changed_at: list[int]  # by the first level that differs
    examples: list[dict[str, str]]  # item_id, first, second


def open_ids(name: str) -> tuple[RunDir, list[str]]:
    """Run directory and the parts of its IDs, of `runs/shop` or `runs/shop@1`.

    Raises:
        ArtifactError: there are no IDs, or no such version of them.
    """
    versioned = re.fullmatch(r"(.+)@(\d+)", name)
    run = RunDir(versioned[1] if versioned else name)
    manifest = Manifest.load(run, IDS)
    if manifest is None:
        raise ArtifactError(f"no semantic IDs in {run.uri}; make them: qbert-ray semantic-ids")
    if not versioned:
        return run, run.parts(IDS)
    versions = {int(version["version"]): version["parts"] for version in manifest.counts.get("versions", [])} or {0: run.parts(IDS)}
    if int(versioned[2]) not in versions:
        raise ArtifactError(f"{run.uri} has no version {versioned[2]} of its semantic IDs; it has {', '.join(map(str, versions))}")
    return run, [part for version, parts in versions.items() if version <= int(versioned[2]) for part in parts]


def domains(parts: list[str]) -> dict[str, list[str]]:
    """Domain -> its parts."""
    result: dict[str, list[str]] = {}
    for part in sorted(parts):
        result.setdefault(part.rsplit("-", 1)[0], []).append(part)
    return result


def read_ids(run: RunDir, parts: list[str]) -> Ids:
    """The semantic IDs of one domain, as arrays.

    Raises:
        ArtifactError: they were written before nearest_codes were.
    """
    tables = [run.read_part(IDS, part) for part in parts]
    if any("nearest_codes" not in table.column_names for table in tables):
        raise ArtifactError(f"the semantic IDs in {run.uri} are of an older format; make them again: qbert-ray semantic-ids --redo")
    item_ids = pl.concat([pl.Series(ITEM_ID, table[ITEM_ID]) for table in tables])
    arrays = (np.concatenate([to_numpy(table[name]) for table in tables]) for name in ("codes", "nearest_codes", "moved"))
    order = np.argsort(np.concatenate([table[ITEM_INDEX].to_numpy() for table in tables]), kind="stable")
    codes, nearest, moved = (array[order] for array in arrays)
    return Ids(item_ids[order], codes, nearest, moved)


def read_titles(run: RunDir, parts: list[str]) -> pl.Series:
    """Readable names of the items in the order of item_index: title or name, else the first text, else the ID."""
    texts = [name for name in run.column_names("ingest/items", parts[0]) if name.startswith(TEXT_PREFIX)]
    best = [name for name in (f"{TEXT_PREFIX}title", f"{TEXT_PREFIX}name", *texts) if name in texts][:1]
    items = pl.concat([pl.DataFrame(run.read_part("ingest/items", part, [ITEM_INDEX, ITEM_ID, *best])) for part in parts])
    return items.sort(ITEM_INDEX).select(pl.coalesce(*best, ITEM_ID).alias("title")).to_series()


def read_codebooks(run: RunDir) -> np.ndarray | None:
    """[K, M, E]; None if the IDs were made elsewhere."""
    if not run.exists("quantizer/model/model.json"):
        return None
    return run.load_model("quantizer/model")[0]["quantizer.codebooks"].float().numpy()


# one item


def show(name: str, wanted: str, only: str | None = None) -> Found:
    """An item, found by its ID or full title: its semantic ID, its siblings by length of the shared prefix, and why it moved.

    Raises:
        ArtifactError: there is no such item, or it is in several domains.
    """
    run, parts = open_ids(name)
    by_domain = domains(parts)
    if only is not None and only not in by_domain:
        raise ArtifactError(f"no domain {only} in {run.uri}; it has {', '.join(by_domain)}")
    asked = {domain: by_domain[domain] for domain in ([only] if only else by_domain)}
    catalogs = {domain: (read_ids(run, its), read_titles(run, its)) for domain, its in asked.items()}
    domain, row = _find(wanted, {domain: (ids.item_ids, titles) for domain, (ids, titles) in catalogs.items()})
    ids, titles = catalogs[domain]
    return {
        "domain": domain,
        **_item(ids, titles, row),
        "moved": _why_moved(ids, titles, row) if ids.moved[row] else None,
        "siblings": _siblings(ids, titles, row, read_codebooks(run)),
    }


def _item(ids: Ids, titles: pl.Series, row: int) -> Item:
    return {"item_id": ids.item_ids[int(row)], "title": titles[int(row)], "semantic_id": to_tokens(ids.codes[[row]])[0]}


def _find(wanted: str, catalogs: dict[str, tuple[pl.Series, pl.Series]]) -> tuple[str, int]:
    found = [(domain, int(row)) for domain, (item_ids, _) in catalogs.items() for row in (item_ids == wanted).arg_true()]
    if not found:
        lower = wanted.lower()
        found = [(domain, int(row)) for domain, (_, titles) in catalogs.items() for row in (titles.str.to_lowercase() == lower).arg_true()]
    if not found:
        raise ArtifactError(f"no item {wanted!r} in {', '.join(catalogs)}; {_near(wanted, catalogs)}")
    if len(found) > 1:
        which = ", ".join(f"{catalogs[domain][0][row]} ({domain})" for domain, row in found[:5])
        raise ArtifactError(f"{wanted!r} is {len(found):,} items: {which}; name one by its item_id, and its domain by --domain")
    return found[0]


def _near(wanted: str, catalogs: dict[str, tuple[pl.Series, pl.Series]]) -> str:
    """Suggestions for an item that was not found: titles that contain the words, and IDs or titles with a similar spelling."""
    near: list[str] = []
    for item_ids, titles in catalogs.values():
        rows = titles.str.to_lowercase().str.contains(wanted.lower(), literal=True).arg_true()[:3].to_list()
        if not rows:
            for names in (item_ids, titles):
                close = difflib.get_close_matches(wanted, names[:SEARCHED].to_list(), n=2)
                rows += [names.index_of(one) for one in close]
        near += [f"{item_ids[row]} ({titles[row]})" for row in dict.fromkeys(rows)]
    return f"near it: {', '.join(near[:5])}" if near else "nothing is spelled like it; name it by its item_id or its whole title"


def _why_moved(ids: Ids, titles: pl.Series, row: int) -> Move:
    """The item's nearest codes, the item that has them, and the longest prefix that was full, so that the item had to leave it."""
    codes, nearest = ids.codes[row], ids.nearest[row]
    keeper = np.flatnonzero((ids.codes == nearest).all(1))
    level = int((codes != nearest).argmax())
    return {
        "nearest": to_tokens(nearest[None])[0],
        "kept_by": _item(ids, titles, keeper[0]) if len(keeper) else None,
        "full": to_tokens(nearest[None, : level + 1])[0] if level + 1 < len(codes) else None,
    }


def _siblings(ids: Ids, titles: pl.Series, row: int, codebooks: np.ndarray | None) -> list[Siblings]:
    """For each prefix length, the longest first: how many other items share it, and the nearest of those not listed before."""
    codes = ids.codes[row]
    result: list[Siblings] = []
    listed = np.arange(len(ids.codes)) == row
    for length in range(len(codes) - 1, 0, -1):
        same = (ids.codes[:, :length] == codes[:length]).all(1)
        rows = np.flatnonzero(same & ~listed)
        if codebooks is not None:
            rows = rows[np.argsort(np.square(decode(ids.codes[rows], codebooks) - decode(codes[None], codebooks)).sum(1), kind="stable")]
        listed |= same
        prefix = to_tokens(codes[None, :length])[0]
        nearest = [_item(ids, titles, other) for other in rows[:SHOWN]]
        result.append({"prefix": prefix, "items": int(same.sum()) - 1, "further": len(rows), "nearest": nearest})
    return result


# two runs


def diff(first: str, second: str) -> dict[str, Difference]:
    """For each domain: number of items in only one run, number with equal IDs, and at which level the others first differ."""
    (run_a, parts_a), (run_b, parts_b) = open_ids(first), open_ids(second)
    sides = (run_a, domains(parts_a)), (run_b, domains(parts_b))
    result: dict[str, Difference] = {}
    for domain in sorted(sides[0][1].keys() | sides[1][1].keys()):
        a, b = (_frame(read_ids(run, by_domain[domain]) if domain in by_domain else None) for run, by_domain in sides)
        both = a.join(b, on=ITEM_ID, suffix="_b", maintain_order="left")
        level = _first_difference(both["codes"], both["codes_b"])
        changed = both.filter(pl.Series(level >= 0))
        result[domain] = {
            "only_first": len(a) - len(both),
            "only_second": len(b) - len(both),
            "same": int((level < 0).sum()),
            "changed": len(changed),
            "changed_at": np.bincount(level[level >= 0]).tolist(),
            "examples": [
                {ITEM_ID: item, "first": to_tokens(np.array([old]))[0], "second": to_tokens(np.array([new]))[0]}
                for item, old, new in changed.head(SHOWN).select(ITEM_ID, "codes", "codes_b").rows()
            ],
        }
    return result


def _frame(ids: Ids | None) -> pl.DataFrame:
    content = {ITEM_ID: ids.item_ids, "codes": ids.codes.tolist()} if ids else {}
    return pl.DataFrame(content, {ITEM_ID: pl.String(), "codes": pl.List(pl.Int32())})


def _first_difference(first: pl.Series, second: pl.Series) -> np.ndarray:
    """[N] first level at which the codes differ, -1 where all are equal."""
    levels = max(int(codes.list.len().to_numpy().max(initial=0)) for codes in (first, second))
    result = np.full(len(first), -1)
    for level in range(levels - 1, -1, -1):
        result[first.list.get(level, null_on_oob=True).ne_missing(second.list.get(level, null_on_oob=True)).to_numpy()] = level
    return result
