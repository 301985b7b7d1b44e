"""The sequence model of one domain as an ONNX file, with the table that translates between item_id and item_index.

Training packs sequences of different lengths without padding; here all have the same length, padded at the front, so that a
batch is one dense tensor. The numbers are the same but for rounding, which `export` measures on real histories.

Shapes: B batch, T items of a history (one fewer than the model reads: the last place is the masked item), N catalog, K levels, D width.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.ranking.loader import load_ranker
from qbert_ray.ranking.ranker import Ranker
from qbert_ray.ranking.recommender import run_config, target_domain
from qbert_ray.semantic_ids.export import TOKENIZER, export_tokenizer
from qbert_ray.sequence.model import EncoderLayer
from qbert_ray.sequence.recency import at_query_size, recency_weights
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir

MODEL, ITEMS, ABOUT, README = "sequencer.onnx", "items.parquet", "export.json", "README.md"
TOLERANCE = 1e-4  # largest difference between scores, in units of their standard deviation
CHECKED = 64  # histories that are compared
OPSET = 20
MOST_BYTES = 1 << 30  # of weights in the ONNX file itself; larger ones go to a separate file, since 2 GiB is the format's limit


class ExportError(ValueError):
    """An export that cannot be made; the message says what to do."""


class DenseSequencer(nn.Module):
    """Scores of every item of a domain's catalog, from histories of one length, padded at the front."""

    inputs: Tensor  # [N, K or 1, D] vectors with which an item enters a history
    vectors: Tensor
    bias: Tensor

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        model = ranker.model
        self.model, self.history = model, model.max_items - 1
        with torch.no_grad():
            if model.tokens == "flat":
                first = torch.arange(model.num_levels, device=ranker.device) * model.codebook_size
                inputs = model.code_embedding(ranker.items.codes + first)  # [N, K, D]
            else:
                inputs = model.compose(ranker.items)[:, None]  # [N, 1, D]
        self.register_buffer("inputs", inputs)
        self.register_buffer("vectors", ranker.vectors.clone())
        self.register_buffer("bias", ranker.bias.clone())

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        """Scores of the whole catalog as the next item of each history.

        Args:
            items: [B, T] item_index in time order, the latest last; anything from 0 to N - 1 where there is none.
            mask: [B, T] true where there is an item.

        Returns:
            [B, N].
        """
        model, places = self.model, self.inputs.shape[1]
        vectors = self.inputs[items]  # [B, T, K or 1, D]
        masked = model.mask_embedding.expand(items.shape[0], 1, places, -1)
        states = torch.cat([vectors, masked], dim=1).flatten(1, 2)
        steps = torch.arange(self.history, -1, -1, device=items.device)
        position = (steps[:, None] * places + torch.arange(places, device=items.device)).flatten()
        states = states + model.position_embedding(position)
        there = F.pad(mask, (0, 1), value=True)[:, :, None].expand(-1, -1, places).flatten(1)[:, None, None]
        for layer in model.layers:
            states = _layer(layer, states, there)
        query = model.norm(states[:, -places:]).flatten(1)
        if model.recall is not None:
            weights = recency_weights(steps[:-1], model.recall) * mask  # [B, T]
            query = query + at_query_size((weights[:, None] @ vectors[:, :, 0])[:, 0], model.recall)
        return model.scores(query, self.vectors, self.bias)


def _layer(layer: EncoderLayer, states: Tensor, there: Tensor) -> Tensor:
    """An encoder layer on padded sequences [B, T', D]; `there` [B, 1, 1, T'] is false at the padding."""
    batch, length, width = states.shape
    projected = layer.query_key_value(layer.norm_attention(states)).view(batch, length, 3, layer.num_heads, -1)
    query, key, value = projected.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=there).transpose(1, 2).reshape(batch, length, width)
    states = states + layer.out(attended)
    return states + layer.ffn(layer.norm_ffn(states))


def export(run_dir: str, folder: Path, domain: str | None = None) -> dict[str, Any]:
    """Write a domain's sequence model as an ONNX file with its table of items; returns the content of export.json.

    Raises:
        ArtifactError: there is no such run or domain.
        ExportError: the packages for it are missing, or ONNX and PyTorch differ by more than rounding.
    """
    onnxruntime = _packages()
    run = RunDir(run_dir)
    config = run_config(run)
    domain = target_domain(run, config, domain)
    ranker = load_ranker(run, domain, config.ranking.model_copy(update={"enabled": False}))
    dense = DenseSequencer(ranker).eval()
    folder.mkdir(parents=True, exist_ok=True)
    _write_onnx(dense, folder / MODEL)
    session = onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
    about = {
        "run": run.uri,
        "domain": domain,
        "items": len(ranker.items.codes),
        "levels": ranker.items.codes.shape[1],
        "history": dense.history,
        "blended": config.ranking.enabled,
        "note": _note(config.ranking.enabled),
        "inputs": {"items": ["batch", dense.history, "int64"], "mask": ["batch", dense.history, "bool"]},
        "outputs": {"scores": ["batch", len(ranker.items.codes), "float32"]},
        "largest_difference": _difference(session, ranker, dense.history, run, domain),
        "tokenizer": export_tokenizer(run, domain, folder / TOKENIZER, onnxruntime, OPSET),
    }
    table = run.read("semantic_ids", domain, [*columns.KEYS[1:], "codes", "semantic_id"]).sort_by(columns.ITEM_INDEX)
    pq.write_table(table, folder / ITEMS)
    (folder / README).write_text(_readme(about))
    (folder / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return about


def _packages() -> Any:
    try:
        import onnx  # noqa: F401 - the exporter brings these in deep inside
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ExportError(f"exporting needs the package {error.name}; install it: pip install 'qbert-ray[export]'") from None
    return onnxruntime


def _write_onnx(dense: DenseSequencer, path: Path) -> None:
    items = torch.zeros(2, dense.history, dtype=torch.int64)
    batch = {0: torch.export.Dim("batch")}
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two inputs that share an axis
        torch.onnx.export(
            dense,
            (items, items == 0),
            path,
            input_names=["items", "mask"],
            output_names=["scores"],
            opset_version=OPSET,
            dynamic_shapes={"items": batch, "mask": batch},
            external_data=sum(tensor.nbytes for tensor in dense.state_dict().values()) > MOST_BYTES,
            verbose=False,
        )


def _difference(session: Any, ranker: Ranker, length: int, run: RunDir, domain: str) -> float:
    """Largest difference between the scores of the file and of PyTorch on real histories, in units of their standard deviation."""
    sequences = columns.to_sequences(run.read("ingest/sequences", domain))
    histories = [np.zeros(0, np.int64), *(sequences.history(user, "end") for user in range(min(CHECKED, len(sequences.user_ids))))]
    with torch.inference_mode():
        expected = ranker.model_scores(histories).cpu().numpy()
    items, mask = padded(histories, length)
    found = session.run(None, {"items": items, "mask": mask})[0]
    difference = float(np.abs(found - expected).max() / max(expected.std(), 1e-12))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"scores of the ONNX file differ from PyTorch by {difference:.2g} standard deviations, {TOLERANCE:g} is allowed; "
            "try other versions of torch, onnxscript and onnxruntime (constraints.txt has those this was tested with)"
        )
    return difference


def padded(histories: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The latest `length` items of each history as [B, T] item_index and mask, padded at the front."""
    items = np.zeros((len(histories), length), dtype=np.int64)
    mask = np.zeros((len(histories), length), dtype=bool)
    for row, history in enumerate(histories):
        count = min(len(history), length)
        items[row, length - count :] = history[len(history) - count :]
        mask[row, length - count :] = True
    return items, mask


def _note(blended: bool) -> str:
    if not blended:
        return "The whole ranking of the run: it ranks by the sequence model alone."
    return (
        "The sequence model alone. The run blends its scores with item-item weights (ranking.enabled), which this file does not hold: "
        "its rankings are those called sequencer in evaluate/metrics.json, not those of qbert-ray score."
    )


def _tokenizer_row(tokenizer: dict[str, Any] | None) -> str:
    if tokenizer is None:
        return ""
    return (
        f"| `{TOKENIZER}` | `embedding` [batch, {tokenizer['width']}] of float32, as in fusion/embeddings of a run -> `codes` [batch, {tokenizer['levels']}] "
        "of int64: the nearest ones, before collisions are resolved (column nearest_codes of semantic_ids) |\n"
    )


def _readme(about: dict[str, Any]) -> str:
    return f"""# Sequence model of {about["domain"]}

{about["note"]}

| file | what |
|---|---|
| `{MODEL}` | `items` [batch, {about["history"]}] of int64 and `mask` [batch, {about["history"]}] of bool -> `scores` [batch, {about["items"]}] of float32 |
{_tokenizer_row(about["tokenizer"])}| `{ITEMS}` | `item_id`, `item_index` (column of `scores`), `codes`, `semantic_id` |
| `{ABOUT}` | all this for programs |

Histories are the latest {about["history"]} items in time order, padded at the front; `mask` is true where there is an item. On histories of the
run the scores differ from PyTorch by at most {about["largest_difference"]:.1e} standard deviations.

```python
import numpy as np
import onnxruntime
import polars as pl

ids = pl.read_parquet("{ITEMS}").sort("item_index")["item_id"].to_list()
index = {{item: number for number, item in enumerate(ids)}}
session = onnxruntime.InferenceSession("{MODEL}")

history = [index[item] for item in ids[:3]][-{about["history"]}:]  # your item_id here
items, mask = np.zeros((1, {about["history"]}), np.int64), np.zeros((1, {about["history"]}), bool)
items[0, {about["history"]} - len(history) :], mask[0, {about["history"]} - len(history) :] = history, True
scores = session.run(None, {{"items": items, "mask": mask}})[0][0]
scores[history] = -np.inf  # leave out what was seen
best = [ids[number] for number in np.argsort(-scores, kind="stable")[:10]]
```
"""
