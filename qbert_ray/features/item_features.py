"""The feature vectors of items, one array per modality, as stage 1 reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qbert_ray.storage import columns
from qbert_ray.storage.catalog import modalities_there, read_warm
from qbert_ray.storage.directory import RunDir


class ItemFeatures:
    """Vectors of the items of one part of the catalog, or of all items that training may see.

    N items, J vectors per item, F width of a modality.
    """

    def __init__(self, run: RunDir, part: str | None = None, domains: Sequence[str] = ()) -> None:
        self.vectors: dict[str, np.ndarray] = {}  # modality -> [N, J, F]
        self.present: dict[str, np.ndarray] = {}  # modality -> [N, J]
        for modality in modalities_there(run):
            table = run.read_part(f"features/{modality}", part) if part else read_warm(run, f"features/{modality}", domains)
            self.vectors[modality] = columns.to_numpy(table["vectors"])
            self.present[modality] = columns.to_numpy(table["present"])
            self.table = table.select(columns.KEYS)

    @property
    def widths(self) -> dict[str, int]:
        return {name: vectors.shape[-1] for name, vectors in self.vectors.items()}

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Vectors [B, J, F] of each modality for some rows, and which of them are there [B, J]."""
        vectors = {name: torch.from_numpy(array[rows]).to(device) for name, array in self.vectors.items()}
        return vectors, {name: torch.from_numpy(array[rows]).to(device) for name, array in self.present.items()}
