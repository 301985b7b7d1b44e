"""Run and sweep directories written by hand, for the tests of the report: small, with what users' data may hold."""

import io
import json

import numpy as np
import polars as pl
import pyarrow as pa
import torch
import yaml
from PIL import Image

from qbert_ray.config.loading import load_config
from qbert_ray.fusion.model import DynamicFusion
from qbert_ray.semantic_ids.collisions import to_tokens
from qbert_ray.storage import columns
from qbert_ray.storage.directory import Manifest, RunDir
from qbert_ray.storage.stages import BY_NAME

ITEMS, USERS, WIDTH = 24, 12, 8
EVIL = "<script>alert(1)</script>"
TITLES = [EVIL, "</script><img src=x onerror=alert(2)>", '"quoted" & {{ 7 * 7 }}', *(f"Film {row}" for row in range(3, ITEMS))]
NAME = "shop-00000.parquet"
COUNTS = {
    "ingest": {"shop": {"items": ITEMS, "users": USERS, "interactions": 72, "items_read": ITEMS + 2, "interactions_read": 72,
                        "items_rejected": {"no item_id": 2}, "interactions_rejected": {}, "images_rejected": {}}},
    "features": {"text": {"items": ITEMS, "text_vectors": ITEMS, "items_without_text": 0}},
    "fusion": {"items": ITEMS, "depth_1": 20, "depth_2": 4, "metrics": {"epoch": 1, "depth_histogram": [20, 4]}, "warnings": [f"odd: {EVIL}"]},
    "quantizer": {"metrics": {"epoch": 0, "items": ITEMS}},
    "semantic_ids": {"items": ITEMS, "num_levels": 2, "codebook_size": 8},
    "pretrain": {"domains": ["shop"], "metrics": {"epoch": 1, "hr@10": 0.1}},
    "finetune": {"metrics": {"shop": {"epoch": 2}}},
    "ranking": {"shop": {"users": USERS, "fitted_on": 5, "weights": 50, "blend_weights": {"sequencer": 0.5, "seen": -2.0},
                              "sequencer_ndcg@10": 0.1, "model_ndcg@10": 0.2,
                              "blending": {"kept": True, "alone": 0.1, "blended": 0.2, "error": 0.01},
                              "reranking": {"kept": True, "blended": 0.2, "reranked": 0.25, "error": 0.01}}},
    "refit": {"shop": {"interactions": 72, "held_out": 24, "epochs": 3, "weights": 50}},
    "evaluate": {"shop": {"users": USERS}},
    "score": {"shop": {"users": USERS, "rows": 60}},
}  # fmt: skip


def write_run(folder, stages=tuple(BY_NAME), model_rank=1, baseline_rank=9, **config):
    """A run of which these stages are done; in the evaluation the model ranks every target here, and the baseline there."""
    run = RunDir(str(folder))
    settings = load_config([], [f"run.dir={folder}", "data.domains={shop: {attributes: [genre]}}"]).model_dump(mode="json")
    for path, value in config.items():
        section, key = path.split("__")
        settings[section][key] = value
    run.write_bytes("config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
    random = np.random.default_rng(0)
    for stage in stages:
        WRITERS.get(stage, lambda *_: None)(run, random)
        Manifest(stage, {}, {}, "0", 2.0, COUNTS[stage]).save(run, stage)
    if "evaluate" in stages:
        _evaluation(run, {"model": model_rank, "sequencer": 5, "ridge": baseline_rank, "popularity": 12, "co_occurrence": 11})
    return run


def _keys(row):
    return {"domain": "shop", "item_id": f"i{row}", "item_index": row}


def _image(row):
    kept = io.BytesIO()
    Image.new("RGB", (300, 200), (row * 10, 90, 120)).save(kept, "PNG")
    return kept.getvalue() if row != 5 else b"not a picture"


def _ingest(run, random):
    schema = pa.unify_schemas([columns.ITEMS, pa.schema([("text.title", pa.string()), ("attribute.genre", pa.string())])])
    extra = [
        {
            "image_bytes": _image(row) if row % 4 else None,
            "cold": False,
            "text.title": title,
            "attribute.genre": ("Drama", "War")[row % 2],
        }
        for row, title in enumerate(TITLES)
    ]
    run.write_part("ingest/items", NAME, pa.Table.from_pylist([_keys(row) | one for row, one in enumerate(extra)], schema))
    users = [random.permutation(ITEMS)[:6].tolist() for _ in range(USERS)]
    rows = [
        {"domain": "shop", "user_id": f"u{n}", "train": items[:4], "valid": items[4], "test": items[5]} for n, items in enumerate(users)
    ]
    run.write_part("ingest/sequences", NAME, pa.Table.from_pylist(rows, columns.SEQUENCES))
    flat = [
        {"domain": "shop", "user_id": f"u{n}", "item_id": f"i{item}", "timestamp": 0, "rating": None, "split": "train"}
        for n, items in enumerate(users)
        for item in items
    ]
    run.write_part("ingest/interactions", NAME, pa.Table.from_pylist(flat, columns.INTERACTIONS))
    lost = [{"domain": "shop", "table": "items", "reason": "no item_id", "row": json.dumps({"title": EVIL})}]
    run.write_part("ingest/rejected", NAME, pa.Table.from_pylist(lost, columns.REJECTED))


def _features(run, random):
    for name in ("text", "structure"):
        table = [
            _keys(row) | {"vectors": random.normal(size=(2, 4)).astype(np.float32).tolist(), "present": [True, row % 3 > 0]}
            for row in range(ITEMS)
        ]
        run.write_part(f"features/{name}", NAME, pa.Table.from_pylist(table, columns.features_schema(2, 4)))


def _fusion(run, random):
    torch.manual_seed(0)
    description = {
        "num_items": ITEMS,
        "feature_widths": {"text": 4, "structure": 4},
        "width": WIDTH,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_width": 8,
    }
    model = DynamicFusion(**description).eval()
    run.save_model("fusion/model", model.state_dict(), description)
    tables = {name: run.read("features/" + name) for name in ("text", "structure")}
    given = [
        {name: torch.from_numpy(columns.to_numpy(table[column]).copy()) for name, table in tables.items()}
        for column in ("vectors", "present")
    ]
    with torch.inference_mode():
        fused = model(torch.arange(ITEMS), *given)
    rows = [_keys(row) | {"embedding": fused.embedding[row].tolist(), "depth": int(fused.depth[row])} for row in range(ITEMS)]
    run.write_part("fusion/embeddings", NAME, pa.Table.from_pylist(rows, columns.embeddings_schema(WIDTH)))
    _write_lines(run, "fusion/metrics.jsonl", [{"epoch": n, "train_loss": 3 - n, "view_distance": 2 - n / 2} for n in range(2)])


def _rqvae(run, random):
    run.save_model("quantizer/model", {"quantizer.codebooks": torch.randn(2, 8, 4)}, {})


def _ids(run, random):
    rows = [
        _keys(row)
        | {
            "codes": (codes := [row % 6, row // 6]),
            "semantic_id": to_tokens(np.array([codes]))[0],
            "moved": row == 3,
            "nearest_codes": [0, 0],
        }
        for row in range(ITEMS)
    ]
    run.write_part("semantic_ids", NAME, pa.Table.from_pylist(rows, columns.SEMANTIC_IDS))


def _pretrain(run, random):
    _write_lines(run, "pretrain/metrics.jsonl", [{"epoch": n, "train_loss": 6 - n, "hr@10": 0.1, "ndcg@10": 0.05} for n in range(2)])


def _finetune(run, random):
    curve = [{"epoch": n, "train_loss": 5 - n, "hr@10": 0.1, "ndcg@10": value} for n, value in enumerate([0.05, 0.07, 0.06])]
    _write_lines(run, "finetune/shop/metrics.jsonl", curve)


def _score(run, random):
    rows = [
        {"domain": "shop", "user_id": f"u{n}", "rank": place + 1, "item_id": f"i{item}", "score": 1.0}
        for n in range(USERS)
        for place, item in enumerate([0, 1, 2, 3, 4])
    ]
    run.write_part("score", NAME, pa.Table.from_pylist(rows, columns.RECOMMENDATIONS))


def _evaluation(run, ranked):
    from qbert_ray.metrics import summarise

    sequences = run.read("ingest/sequences")
    rows = [
        {"domain": "shop", "user_id": user, "model": model, "target": f"i{test}", "rank_all": rank + n % 2, "rank_unseen": rank + n % 2}
        for model, rank in ranked.items()
        for n, (user, test) in enumerate(zip(sequences["user_id"].to_pylist(), sequences["test"].to_pylist(), strict=True))
    ]
    run.write_part("evaluate/ranks", NAME, pa.Table.from_pylist(rows, columns.RANKS))
    models = {model: summarise(np.array([row["rank_all"] for row in rows if row["model"] == model]), [1, 5, 10]) for model in ranked}
    run.write_json("evaluate/metrics.json", {"shop": {"users": USERS, "protocols": {"all": models, "unseen": models}}})


def _write_lines(run, name, lines):
    run.write_bytes(name, "".join(json.dumps(line) + "\n" for line in lines).encode())


WRITERS = {"ingest": _ingest, "features": _features, "fusion": _fusion, "quantizer": _rqvae, "semantic_ids": _ids,
           "pretrain": _pretrain, "finetune": _finetune, "score": _score}  # fmt: skip


def write_sweep(folder, seeds=(0, 1, 2)):
    """A sweep over a number, a word and a flag, with a failed trial and two objectives."""
    run = RunDir(str(folder))
    parameters = ["finetune.learning_rate", "sequencer.num_layers", "sequencer.logits", "sequencer.recall"]
    objectives = {"ndcg@10": "max", "ms_per_user": "min"}
    run.write_json("sweep.json", {"metric": "ndcg@10", "mode": "max", "stage": "finetune", "objectives": objectives, "parameters": parameters,
                                  "seeds": list(seeds)})  # fmt: skip
    random = np.random.default_rng(0)
    rows, curves = [], []
    for rate in (0.0001, 0.001, 0.01):
        for layers, logits, recall in ((1, "dot", True), (2, "cosine", True), (4, EVIL, False)):
            for seed in seeds:
                trial = f"t{len(rows):03}"
                failed = rate == 0.01 and layers == 4 and seed == 0
                value = None if failed else 0.1 - abs(np.log10(rate) + 3) * 0.02 + 0.005 * layers + random.normal() * 0.002
                price = None if failed else layers * 0.4 + random.random() * 0.05
                rows.append(dict(zip(parameters, (rate, layers, logits, recall), strict=True)) | {
                    "trial_id": trial, "status": "failed" if failed else "stopped" if rate == 0.0001 else "done", "seed": seed, "epochs": 5,
                    "seconds": 30.0 * layers, "error": f"ValueError: {EVIL}" if failed else None, "ndcg@10": value, "ms_per_user": price})  # fmt: skip
                if not failed:
                    curves += [
                        {"trial_id": trial, "epoch": n, "train_loss": 6 - n * 0.3, "hr@10": None, "ndcg@10": value * (1 - 0.5**n)}
                        for n in range(5)
                    ]
    for name, table in (("trials", rows), ("curves", curves)):
        kept = io.BytesIO()
        pl.DataFrame(table, infer_schema_length=None).write_parquet(kept)
        run.write_bytes(f"{name}.parquet", kept.getvalue())
    run.write_bytes("best.yaml", b"finetune: {learning_rate: 0.001}\n")
    return run
