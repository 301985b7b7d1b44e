"""A run directory with the tables and models that ranking needs, made by hand in a second and without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from qbert_ray.config.schema import Config
from qbert_ray.ranking.blend import fit_blend, no_candidates
from qbert_ray.ranking.item_item import RidgeRegression, Transitions, popularity
from qbert_ray.ranking.loader import BLEND, RERANKER, WEIGHTS
from qbert_ray.ranking.reranker import Reranker
from qbert_ray.semantic_ids.collisions import to_tokens
from qbert_ray.sequence.model import Sequencer
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir

ITEMS, COLD, USERS, LEVELS, SIZE, WIDTH, PART = 40, 4, 12, 3, 8, 16, 25


def make_run(folder: Path, domains: tuple[str, ...] = ("shop",), **sequencer: Any) -> RunDir:
    """A run whose sequence model has random weights; `sequencer` are arguments of it."""
    run, rng = RunDir(str(folder)), np.random.default_rng(0)
    torch.manual_seed(0)
    settings = {"run": {"dir": run.uri}, "data": {"domains": {name: {} for name in domains}}, "sequencer": {"content": "fused"}}
    config = Config.model_validate(settings)
    run.write_bytes("config.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    for domain in domains:
        codes = _write_catalog(run, domain, rng)
        histories = [rng.integers(0, ITEMS - COLD, rng.integers(4, 30)) for _ in range(USERS)]
        _write_sequences(run, domain, histories)
        _write_ranking(run, domain, config.ranking, histories)
        description = {"num_levels": LEVELS, "codebook_size": SIZE, "width": WIDTH, "num_layers": 2, "num_heads": 2, "ffn_width": 32}
        description |= {"max_items": 20, "content_width": WIDTH, "recall": True, "logits": "cosine"} | sequencer
        model = Sequencer(**description)
        with torch.no_grad():
            model.code_embedding.weight.mul_(20)  # far from zero, so that scores differ
            model.code_bias.normal_()
        run.save_model(f"finetune/{domain}/model", model.state_dict(), description)
        assert len(codes) == ITEMS
    return run


def _write_catalog(run: RunDir, domain: str, rng: np.random.Generator) -> np.ndarray:
    codes = np.unique(rng.integers(0, SIZE, (10 * ITEMS, LEVELS)), axis=0)
    codes = rng.permutation(codes)[:ITEMS].astype(np.int32)
    embeddings = rng.standard_normal((ITEMS, WIDTH)).astype(np.float32)
    for number, begin in enumerate(range(0, ITEMS, PART)):
        rows = np.arange(begin, min(begin + PART, ITEMS))
        keys = [pa.array([domain] * len(rows)), pa.array([f"{domain}-item-{row}" for row in rows]), pa.array(rows, pa.int32())]
        items = [*keys, pa.nulls(len(rows), pa.string()), pa.nulls(len(rows), pa.binary()), pa.array(rows >= ITEMS - COLD)]
        items = pa.table(items, schema=columns.ITEMS).append_column("text.title", pa.array([f"Title {row}" for row in rows]))
        part = f"{domain}-{number:05d}.parquet"
        run.write_part("ingest/items", part, items)
        nested = pa.array(codes[rows].tolist(), pa.list_(pa.int32()))
        ids = [*keys, nested, to_tokens(codes[rows]), pa.array([False] * len(rows)), nested]
        run.write_part("semantic_ids", part, pa.table(ids, schema=columns.SEMANTIC_IDS))
        fused = [*keys, columns.to_fixed_lists(embeddings[rows]), pa.array([1] * len(rows), pa.int32())]
        run.write_part("fusion/embeddings", part, pa.table(fused, schema=columns.embeddings_schema(WIDTH)))
        run.write_json(f"fusion/embeddings/.counts/{part}.json", {"items": len(rows)})
    run.write_json("semantic_ids/manifest.json", {"stage": "semantic_ids", "counts": {"codebook_size": SIZE, "num_levels": LEVELS}})
    return codes


def _write_sequences(run: RunDir, domain: str, histories: list[np.ndarray]) -> None:
    arrays = [
        pa.array([domain] * USERS),
        pa.array([f"user-{number}" for number in range(USERS)]),
        pa.array([history[:-2].tolist() for history in histories], pa.list_(pa.int32())),
        pa.array([int(history[-2]) for history in histories], pa.int32()),
        pa.array([int(history[-1]) for history in histories], pa.int32()),
    ]
    run.write_part("ingest/sequences", f"{domain}-00000.parquet", pa.table(arrays, schema=columns.SEQUENCES))


def _write_ranking(run: RunDir, domain: str, settings: Any, histories: list[np.ndarray]) -> None:
    indptr = np.cumsum([0, *(len(history) for history in histories)])
    items = np.concatenate(histories)
    ridge = RidgeRegression(indptr, items, ITEMS, 1.0, settings.neighbours).rows(np.arange(ITEMS - COLD))
    transitions = Transitions(indptr, items, ITEMS, 3, 0.5, 1.0, settings.neighbours).rows(np.arange(ITEMS - COLD))
    lists = [
        pa.ListArray.from_arrays(matrix.indptr.astype(np.int32), pa.array(values))
        for matrix in (ridge, transitions)
        for values in (matrix.indices.astype(np.int32), matrix.data.astype(np.float32))
    ]
    names = pa.array([f"{domain}-item-{row}" for row in range(ITEMS - COLD)])
    keys = [pa.array([domain] * (ITEMS - COLD)), names, pa.array(np.arange(ITEMS - COLD), pa.int32())]
    popular = pa.array(popularity(indptr, items, ITEMS)[: ITEMS - COLD])
    run.write_part(WEIGHTS, f"{domain}-00000.parquet", pa.table([*keys, *lists, popular], schema=columns.ITEM_ITEM))
    run.save_model(f"{BLEND}/{domain}", fit_blend(no_candidates())._asdict(), {})
    reranker = Reranker()
    torch.nn.init.normal_(reranker.layers[-1].weight)
    run.save_model(f"{RERANKER}/{domain}", reranker.state_dict(), {})
