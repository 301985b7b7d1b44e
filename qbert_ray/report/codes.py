"""The report's section on stage 2: codebook usage, collisions, agreement of prefixes with attributes, and a tree of prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np

from qbert_ray.report.catalog import Album, Catalog
from qbert_ray.report.facts import Facts
from qbert_ray.report.figures import Figure, Series, bars, lines
from qbert_ray.semantic_ids import id_report
from qbert_ray.semantic_ids.lookup import IDS
from qbert_ray.storage.directory import RunDir

BROWSED = 8_000  # items in the tree of a domain; in larger domains, those with the most training interactions
HINTED = 20_000  # larger catalogs are browsed without the typical values of each code
MOST_ATTRIBUTES = 6


def gather(run: RunDir, facts: Facts, catalogs: dict[str, Catalog], album: Album) -> dict[str, Any]:
    """Content of the section, or {"missing": why}."""
    why = facts.missing("semantic_ids")
    if why:
        return {"missing": why}
    found = id_report.report(run.uri)
    section: dict[str, Any] = {"size": found["codebook_size"], "given": bool(facts.config["data"]["semantic_ids"]), "domains": []}
    for domain, figures in found["domains"].items():
        catalog = catalogs[domain]
        assert catalog.ids is not None
        section["domains"].append(
            {
                "name": domain,
                "figures": figures,
                "usage": usage(catalog.ids.codes, found["codebook_size"], figures["levels"]),
                "purity": [purity(name, content["lengths"]) for name, content in list(figures["attributes"].items())[:MOST_ATTRIBUTES]],
                "tree": tree(catalog, album),
            }
        )
    return section


def usage(codes: np.ndarray, size: int, levels: list[dict[str, float]]) -> list[Figure]:
    """A figure per level: number of items of each code, the most used code first."""
    counts = [np.sort(np.bincount(level, minlength=size))[::-1] for level in codes.T]
    most = max(int(count[0]) for count in counts)
    result = []
    for letter, count, level in zip("abcdefghijklmnopqrstuvwxyz", counts, levels, strict=False):
        plot = bars(list(range(1, size + 1)), count.tolist(), "codes, most used first", "items", bargap=0)
        plot["layout"]["yaxis"] |= {"type": "log", "range": [-0.3, float(np.log10(most)) + 0.15], "dtick": 1}  # 10 ** -0.3: one item shows
        plot["data"][0]["hovertemplate"] = "code in place %{x}: %{y:,} items<extra></extra>"
        note = f"{level['usage']:.0%} of {size} codes in use; perplexity {level['perplexity']:.0f}"
        alt = f"Falling bars: {count[0]:,} items have the most used code, {count[size // 2]:,} the one in the middle; {note}."
        result.append(Figure(f"Level <{letter}_…>", note, alt, plot, 190))
    return result


def purity(name: str, lengths: list[dict[str, float]]) -> Figure:
    """Share of items that have the most common value of their prefix, by prefix length, compared with shuffled values."""
    kept = [(length, row) for length, row in enumerate(lengths, 1) if row["items"]]
    x = ["".join(f"<{letter}>" for letter in "abcdefghijklmnopqrstuvwxyz"[:length]).replace("<", "&lt;") for length, _ in kept]
    found, chance = [row["purity"] for _, row in kept], [row["purity_shuffled"] for _, row in kept]
    hover = [f"{row['purity']:.1%} of {row['items']:,} items that share their prefix" for _, row in kept]
    series = [Series("semantic IDs", x, found, colour="items", hover=hover), Series("shuffled", x, chance, colour="shuffled", dash="dot")]
    plot = lines(series, "shared prefix", "purity", markers=True, yaxis={"range": [0, 1.05], "tickformat": ".0%"})
    alt = "; ".join(f"prefix of {length}: {row['purity']:.0%}, shuffled {row['purity_shuffled']:.0%}" for length, row in kept)
    return Figure(
        name, f"{kept[0][1]['items']:,} items share their first code with another." if kept else "No prefix is shared.", alt, plot, 240
    )


def tree(catalog: Catalog, album: Album) -> dict[str, Any]:
    """Data for browsing prefixes: items with their codes, and the typical values of each first code."""
    ids = catalog.ids
    assert ids is not None
    rows = np.arange(len(ids.codes))
    if len(rows) > BROWSED:
        rows = np.sort(np.argsort(-catalog.popularity[: len(rows)], kind="stable")[:BROWSED])
    album.want(catalog, rows[np.argsort(-catalog.popularity[rows], kind="stable")])
    attributes = id_report.read_attributes(catalog.run, catalog.run.parts(IDS, catalog.domain))[: len(ids.codes)]
    first, hints = ids.codes[:, 0], {}
    for code in np.unique(first[rows]) if len(attributes) <= HINTED else ():
        members = np.flatnonzero(first == code)
        found = [value for column in attributes if (value := id_report.typical_value(column, members))]
        hints[str(int(code))] = [str(value["value"])[:40] for value in found if value["share"] >= 0.3]
    return {
        "domain": catalog.domain,
        "total": len(ids.codes),
        "rows": rows.tolist(),
        "titles": [catalog.title(int(row)) for row in rows],
        "ids": [str(one) for one in ids.item_ids.gather(rows)],
        "codes": ids.codes[rows].tolist(),
        "hints": hints,
    }
