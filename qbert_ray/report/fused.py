"""The report's section on stage 1: fusion depths, agreement of an item's views, and nearest neighbours.

The views of a sample of items are recomputed from the saved model on the CPU, as `fusion.stage` computes them for all.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from qbert_ray.report.catalog import Album, Catalog
from qbert_ray.report.facts import Facts
from qbert_ray.report.figures import SYMBOLS, Figure, Series, bars, by_epoch, colour, finish, plain
from qbert_ray.report.summary import curve
from qbert_ray.storage import columns
from qbert_ray.storage.columns import ITEM_INDEX
from qbert_ray.storage.directory import RunDir

MAPPED, MAPPED_PARTS = 120, 4  # items on the map, and number of parts they are read from
ASKED, KNOWN, SHOWN = 6, 300, 6  # items whose neighbours are shown, number of most popular items they are chosen from, neighbours of each
SEARCHED = 200_000  # items that can be neighbours


def gather(run: RunDir, facts: Facts, catalogs: dict[str, Catalog], album: Album) -> dict[str, Any]:
    """Content of the section, or {"missing": why}."""
    why = facts.missing("fusion")
    if why:
        return {"missing": why}
    epochs = curve(run, "fusion/metrics.jsonl")
    figures = [depths(facts.counts("fusion"))]
    figures += training(epochs) if epochs else []
    section: dict[str, Any] = {"figures": figures, "domains": []}
    for domain, catalog in catalogs.items():
        agreement, drawn = views(run, facts, catalog)
        section["domains"].append({"name": domain, "agreement": agreement, "figures": drawn, "neighbours": neighbours(catalog, album)})
    return section


def depths(counts: dict[str, Any]) -> Figure:
    """Items by the number of fusion layers that they ran through (Fig. 7 of the paper)."""
    found = {int(name[6:]): count for name, count in counts.items() if name.startswith("depth_")}
    layers = list(range(1, max(max(found), len(counts["metrics"].get("depth_histogram", []))) + 1))
    share = [found.get(layer, 0) / counts["items"] for layer in layers]
    mean = sum(layer * part for layer, part in zip(layers, share, strict=True))
    plot = bars(layers, [round(part, 4) for part in share], "fusion layers", "share of items", "fused", xaxis={"dtick": 1},
                yaxis={"tickformat": ".0%", "rangemode": "tozero"})  # fmt: skip
    plot["data"][0] |= {"text": [f"{part:.0%}" for part in share], "textposition": "outside", "cliponaxis": False}
    plot["data"][0]["hovertemplate"] = "%{x} layers: %{y:.1%} of items<extra></extra>"
    alt = "; ".join(f"{layer} layers {part:.0%}" for layer, part in zip(layers, share, strict=True))
    note = f"{mean:.2f} layers on average. One bar alone would mean that the dynamic depth collapsed."
    return Figure("How deep are items fused?", note, f"Bars: {alt}.", plot, 270)


def training(epochs: list[dict[str, Any]]) -> list[Figure]:
    """View distance and training loss by epoch."""
    x = [line["epoch"] + 1 for line in epochs]
    distance, loss = ([line[key] for line in epochs] for key in ("view_distance", "train_loss"))
    unrelated = {"line": {"color": colour("shuffled"), "width": 1.5, "dash": "dot"}, "xref": "paper", "x0": 0, "x1": 1, "y0": 2, "y1": 2}
    note = "Between the unit vectors of an item's views; the dotted line, 2, is the distance of unrelated ones. It should fall well below."
    return [
        by_epoch("Do the fused vector of an item and those of its modalities agree?", note, "mean squared distance",
                 [Series("view distance", x, distance, colour="fused")], yaxis={"range": [0, 2.2]}, shapes=[unrelated]),
        by_epoch("Is stage 1 trained to the end?", "A curve that still falls at its right end asks for more epochs.", "training loss",
                 [Series("training loss", x, loss, colour="fused")]),
    ]  # fmt: skip


def views(run: RunDir, facts: Facts, catalog: Catalog) -> tuple[list[dict[str, Any]], list[Figure]]:
    """Similarity of the views of an item, and a 2-D map of them (Fig. 6 of the paper)."""
    found = _fuse(run, facts, catalog)
    if found is None:
        return [], []
    rows, arrays, there = found
    agreement, position = [], {name: number for number, name in enumerate(arrays)}
    for a, b in combinations(arrays, 2):
        both = there[a] & there[b]
        cosine = arrays[a][both] @ arrays[b][both].T
        if len(cosine) > 1:
            others = (cosine.sum() - np.trace(cosine)) / (cosine.size - len(cosine))
            nearest = float((cosine.argmax(1) == np.arange(len(cosine))).mean())
            agreement.append(
                {
                    "a": a,
                    "b": b,
                    "views": (position[a], position[b]),
                    "own": float(np.trace(cosine) / len(cosine)),
                    "others": round(float(others), 2) + 0.0,
                    "nearest": nearest,
                }
            )
    return agreement, [_map(catalog, rows, arrays, there)] if len(rows) > 2 else []


def _fuse(run: RunDir, facts: Facts, catalog: Catalog) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]] | None:
    """Item indices, {view: [n, D] unit vectors}, {view: [n] whether the item has it} of a sample of a domain's items."""
    import torch

    from qbert_ray.features.item_features import ItemFeatures
    from qbert_ray.fusion.model import DynamicFusion
    from qbert_ray.storage.catalog import warm_items

    model = run.load_module(DynamicFusion, "fusion/model")
    modalities = list(model.project)
    parts = run.parts(f"features/{modalities[0]}", catalog.domain)
    if not parts:
        return None
    random = np.random.default_rng(0)
    parts = [parts[place] for place in np.sort(random.permutation(len(parts))[:MAPPED_PARTS])]
    names = list(facts.domains)  # their ID vectors follow each other, and only items that training may see have one
    first, warm = sum(warm_items(run, name) for name in names[: names.index(catalog.domain)]), warm_items(run, catalog.domain)
    pieces = []
    for part in parts:
        features = ItemFeatures(run, part)
        index = features.table[ITEM_INDEX].to_numpy()
        chosen = np.sort(random.permutation(len(index))[: -(-MAPPED // len(parts))])
        query = np.where(index < warm, first + index, model.unknown)[chosen]
        with torch.inference_mode():
            pieces.append((index[chosen], model(torch.from_numpy(query), *features.batch(chosen, torch.device("cpu")))))
    rows = np.concatenate([index for index, _ in pieces])
    fused = torch.cat([torch.cat([one.embedding[:, None], one.aligned], dim=1) for _, one in pieces])
    unit = torch.nn.functional.normalize(fused, dim=-1).numpy()
    has = torch.cat([one.present for _, one in pieces]).numpy()
    shown = ["fused", *modalities]
    there = np.concatenate([np.ones((len(rows), 1), bool), has], axis=1)
    return rows, {name: unit[:, n] for n, name in enumerate(shown)}, {name: there[:, n] for n, name in enumerate(shown)}


def _map(catalog: Catalog, rows: np.ndarray, arrays: dict[str, np.ndarray], there: dict[str, np.ndarray]) -> Figure:
    import plotly.graph_objects as go
    from sklearn.manifold import TSNE

    stacked = np.concatenate([array[there[name]] for name, array in arrays.items()])
    flat = TSNE(2, metric="cosine", perplexity=min(20, (len(stacked) - 1) / 3), random_state=0).fit_transform(stacked)
    ends = np.cumsum([int(there[name].sum()) for name in arrays])
    places = {name: np.zeros((len(rows), 2)) for name in arrays}
    for name, piece in zip(arrays, np.split(flat, ends[:-1]), strict=True):
        places[name][there[name]] = piece
    titles = [plain(catalog.title(row)) for row in rows]
    x: list[float | None] = []
    y: list[float | None] = []
    for name in list(arrays)[1:]:
        for row, (mine, own) in enumerate(zip(places["fused"], places[name], strict=True)):
            if there[name][row]:
                x += [float(mine[0]), float(own[0]), None]
                y += [float(mine[1]), float(own[1]), None]
    traces: list[Any] = [
        go.Scatter(x=x, y=y, mode="lines", line={"color": colour("random"), "width": 0.7}, opacity=0.55, hoverinfo="skip", showlegend=False)
    ]
    for number, (name, place) in reversed(list(enumerate(places.items()))):  # the fused view on top
        here = there[name]
        traces.append(
            go.Scatter(
                x=place[here, 0].tolist(), y=place[here, 1].tolist(), mode="markers", name=name,
                marker={"color": colour(name, number), "size": 6, "symbol": SYMBOLS[number % len(SYMBOLS)], "opacity": 0.9},
                text=[title for title, has in zip(titles, here, strict=True) if has], hovertemplate=f"%{{text}}<br>{name}<extra></extra>",
            )
        )  # fmt: skip
    blank = {"zeroline": False, "showticklabels": False}
    plot = finish(traces, "t-SNE, first dimension", "second dimension", showlegend=True, xaxis=blank, yaxis=blank)
    note = (
        f"{len(rows)} items drawn at random; lines join the views of one item. Short lines: the views agree. One cloud a view: they do not."
    )
    alt = f"Scatter plot of {len(rows)} items in {len(arrays)} views each ({', '.join(arrays)}), lines from the fused view to the others."
    return Figure("Where do an item's views lie?", note, alt, plot, 430)


def neighbours(catalog: Catalog, album: Album) -> list[dict[str, Any]]:
    """A few popular and mutually distant items, with the nearest items of each by the cosine of fused vectors."""
    parts, count = [], 0
    for part in catalog.run.parts("fusion/embeddings", catalog.domain):
        table = catalog.run.read_part("fusion/embeddings", part, [ITEM_INDEX, "embedding"])
        parts.append((table[ITEM_INDEX].to_numpy(), columns.to_numpy(table["embedding"])))
        count += table.num_rows
        if count >= SEARCHED:
            break
    if count < 2:
        return []
    rows, vectors = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    known = np.argsort(-catalog.popularity[rows], kind="stable")[:KNOWN]
    asked = [int(known[0])]
    while len(asked) < min(ASKED, len(known)):  # the one farthest from those chosen before
        asked.append(int(known[(unit[known] @ unit[asked].T).max(1).argmin()]))
    result = []
    for place in asked:
        cosine = unit @ unit[place]
        cosine[place] = -np.inf
        nearest = np.argsort(-cosine, kind="stable")[: min(SHOWN, count - 1)]
        album.want(catalog, rows[[place, *nearest]])
        near = [catalog.item(rows[other]) | {"note": f"cosine {cosine[other]:.2f}"} for other in nearest]
        result.append({"item": catalog.item(rows[place]), "nearest": near})
    return result
