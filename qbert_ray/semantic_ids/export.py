"""The quantizer of a run as an ONNX file: from fused embeddings to codes.

Shapes: B items, D width of an embedding, K levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray.semantic_ids.quantizers import load_quantizers
from qbert_ray.semantic_ids.rqvae import RQVAE
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir

TOKENIZER = "tokenizer.onnx"
CHECKED = 2048  # items that are compared
MOST_APART = 1e-3  # share of them that rounding may give another codeword, equally near but for the last digits


class DenseTokenizer(nn.Module):
    """Nearest codes [B, K] of embeddings [B, D], level by level on the residuals (Eq. 6)."""

    def __init__(self, model: RQVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedding: Tensor) -> Tensor:
        residual, codes = self.model.encode(embedding), []
        for codebook in self.model.quantizer.codebooks:
            code = (codebook.square().sum(-1) - 2 * residual @ codebook.T).argmin(-1)
            codes.append(code)
            residual = residual - codebook[code]
        return torch.stack(codes, dim=1)


def export_tokenizer(run: RunDir, domain: str, path: Path, onnxruntime: Any, opset: int) -> dict[str, Any] | None:
    """Write the file; its width and levels, and the share of items whose codes differ from PyTorch's. None where IDs were given."""
    if not run.exists("quantizer/model/model.json"):
        return None
    model = load_quantizers(run)[0]
    rows = run.read("fusion/embeddings", domain, ["embedding"]).slice(0, CHECKED)["embedding"]
    embedding = torch.from_numpy(columns.to_numpy(rows).copy())
    torch.onnx.export(
        DenseTokenizer(model).eval(),
        (embedding[:1].repeat(2, 1),),
        path,
        input_names=["embedding"],
        output_names=["codes"],
        opset_version=opset,
        dynamic_shapes={"embedding": {0: torch.export.Dim("batch")}},
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"embedding": embedding.numpy()})
    apart = float(np.mean((found != model.quantizer.codes(model.encode(embedding)).numpy()).any(1)))
    if apart > MOST_APART:
        raise ValueError(
            f"{apart:.1%} of the codes of {path.name} differ from PyTorch's; try the versions of torch, onnxscript and onnxruntime in constraints.txt"
        )
    return {"width": embedding.shape[1], "levels": found.shape[1], "apart": apart}
