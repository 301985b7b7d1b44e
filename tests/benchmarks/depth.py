"""Fusion whose items leave the batch when they halt, against the same model with every item in every layer.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.depth                     # random weights, gates set so that depths spread
    OMP_NUM_THREADS=1 python -m tests.benchmarks.depth --run runs/shop     # the trained model and the features of a run

Both give the same embeddings (asserted for every item). One core, batches as in fusion's pass over the catalog,
median of alternating rounds. What items bring to the layers (Eq. 3) is the same work for all, so the bar is on the layers;
the whole model is told too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from qbert_ray.config.schema import Fusion
from qbert_ray.features.item_features import ItemFeatures
from qbert_ray.fusion.model import DynamicFusion
from qbert_ray.semantic_ids.stage import BATCH
from qbert_ray.storage.directory import RunDir
from tests.benchmarks.table import Figure, main

ITEMS, ROUNDS = 3 * BATCH, 5
SHAPES = {"text": (3, 384), "image": (4, 1280)}  # J and F of the default encoders
Batch = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def made_up() -> tuple[str, DynamicFusion, list[Batch]]:
    torch.manual_seed(0)
    s = Fusion()
    widths = {name: width for name, (_, width) in SHAPES.items()}
    model = DynamicFusion(ITEMS, widths, s.width, s.num_layers, s.num_heads, s.ffn_width, s.dropout, True, s.halt_threshold, s.temperature)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):  # few halt at the first layer, most at the second, some later
            layer.gate[3].weight[-1].mul_(2)
            layer.gate[3].bias[-1] = 0.8 if number else -1.0
    batches = []
    for item in torch.arange(ITEMS).split(BATCH):
        features = {name: torch.randn(len(item), *shape) for name, shape in SHAPES.items()}
        batches.append((item, features, {name: torch.rand(len(item), shape[0]) < 0.9 for name, shape in SHAPES.items()}))
    return "random weights", model.eval(), batches


def of_a_run(folder: str) -> tuple[str, DynamicFusion, list[Batch]]:
    run = RunDir(folder)
    model = run.load_module(DynamicFusion, "fusion/model")
    pieces = [ItemFeatures(run, part).batch(slice(None), torch.device("cpu")) for part in run.parts("ingest/items")]  # type: ignore[arg-type]
    features, present = ({name: torch.cat([piece[side][name] for piece in pieces]) for name in pieces[0][side]} for side in (0, 1))
    item = torch.arange(len(next(iter(present.values()))))
    rows = [slice(int(begin), int(begin) + BATCH) for begin in item[::BATCH]]
    cut = [tuple({name: side[name][row] for name in side} for side in (features, present)) for row in rows]
    return folder, model.eval(), [(item[row].clamp(max=model.unknown), *piece) for row, piece in zip(rows, cut, strict=True)]


def prepared(model: DynamicFusion, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What the layers are given."""
    item, features, present = batch
    query = model.id_embedding(item)
    pairs = [model._align(query, name, features[name], present[name]) for name in model.project]
    return query, torch.stack([vectors for vectors, _ in pairs], 1), torch.stack([there for _, there in pairs], 1)


def everyone(model: DynamicFusion, query: Tensor, aligned: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
    """Every item through every layer; one that has halted adds nothing."""
    values, state = aligned + model.modality_embedding, query
    going, open_ = query.new_ones(len(query)), torch.ones(len(query), dtype=torch.bool)
    outputs, depth = torch.zeros_like(query), torch.zeros(len(query), dtype=torch.int32)
    for number, layer in enumerate(model.layers, start=1):
        state, gate = layer(state, values, has)
        halting = gate.mean(-1)
        left = going * (1 - halting)
        stop = (1 - left >= model.halt_threshold) | (number == len(model.layers))
        outputs += (torch.where(stop, going, going * halting) * open_)[:, None] * state
        depth[open_ & stop] = number
        going, open_ = left, open_ & ~stop
    return torch.nn.functional.layer_norm(outputs, outputs.shape[-1:]), depth


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


@torch.inference_mode()
def figures(full: bool, run: str | None = None) -> Iterator[Figure]:
    torch.set_num_threads(1)
    what, model, batches = of_a_run(run) if run else made_up()
    ready = [prepared(model, batch) for batch in batches]
    depths = []
    for batch in ready:
        fused, same = model._fuse(*batch), everyone(model, *batch)
        assert torch.equal(fused[1], same[1])
        assert torch.allclose(fused[0], same[0], atol=2e-5), float((fused[0] - same[0]).abs().max())
        depths.append(fused[1])
    depth = torch.cat(depths)
    share = float(depth.float().mean()) / len(model.layers)
    ways: dict[str, Callable[[], object]] = {
        "early": lambda: [model._fuse(*batch) for batch in ready],
        "all": lambda: [everyone(model, *batch) for batch in ready],
        "prepare": lambda: [prepared(model, batch) for batch in batches],
    }
    rounds = [{name: seconds(work) for name, work in ways.items()} for _ in range(2 * ROUNDS if full else ROUNDS)]
    early, everybody, prepare = (float(np.median([each[name] for each in rounds])) * 1e6 / len(depth) for name in ways)
    histogram = ", ".join(f"{number}: {count:.0%}" for number, count in enumerate((torch.bincount(depth) / len(depth)).tolist()) if count)
    saved = (1 - early / everybody) / (1 - share)
    yield Figure(
        f"fusion layers, items leave when they halt, {what}, {len(depth):,} items of width {model.id_embedding.embedding_dim}, depths {histogram}",
        f"{early:.0f} µs per item, {1 - early / everybody:.0%} saved", f"all layers for all: {everybody:.0f} µs; {1 - share:.0%} of depth saved",
        everybody / early, "time saved = depth saved within 15 %", abs(saved - 1) <= 0.15,
    )  # fmt: skip
    yield Figure("the same, whole model", f"{early + prepare:.0f} µs per item", f"all layers for all: {everybody + prepare:.0f} µs",
                 (everybody + prepare) / (early + prepare), "", None)  # fmt: skip


if __name__ == "__main__":
    given = sys.argv[sys.argv.index("--run") + 1] if "--run" in sys.argv else None
    main(lambda full: figures(full, given))
