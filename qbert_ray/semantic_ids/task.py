"""The training task of stage 2: an RQ-VAE trained by gradients, or a quantizer fitted without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray import metrics
from qbert_ray.config.schema import Config
from qbert_ray.semantic_ids import kmeans
from qbert_ray.semantic_ids.rqvae import RQVAE, normalised_error
from qbert_ray.storage import columns
from qbert_ray.storage.directory import ArtifactError, RunDir
from qbert_ray.training import EpochMetrics, shuffled_batches

SAMPLE = 4096  # items that are encoded at once


class QuantizerMetrics(EpochMetrics):
    items: int
    reconstruction_error: float  # share of the variance of the inputs
    collision_rate: float
    codebook_usage: list[float]  # per level, as is the next
    perplexity: list[float]


class QuantizerTask:
    """Training task of the quantizer (stage 2, Eq. 6-9); a quantizer without gradients is complete once it is built."""

    criterion = None

    def __init__(self, config: Config, run: RunDir) -> None:
        self.settings, self.seed = config.quantizer, config.run.seed
        self.embeddings = torch.from_numpy(sample_embeddings(run, list(config.data.domains), self.settings.max_items, self.seed))

    def description(self) -> dict[str, Any]:
        names = ("num_levels", "codebook_size", "codebook_dim")
        description = {"width": self.embeddings.shape[1], "hidden": []} | {name: getattr(self.settings, name) for name in names}
        if self.settings.kind == "rqvae":
            description |= {name: getattr(self.settings, name) for name in ("hidden", "shortcut", "commitment_weight")}
        return description

    def build(self) -> nn.Module:
        model = RQVAE(**self.description())
        match self.settings.kind:
            case "kmeans":
                kmeans.fit_residual(model, self.embeddings, self.seed)
            case "opq":
                kmeans.fit_product(model, self.embeddings, self.seed)
            case _:
                model.start(self.embeddings)
        return model

    @property
    def warmup_epochs(self) -> int:
        """Epochs before the codebooks start, all where the training is as short."""
        return min(self.settings.warmup_epochs, self.settings.epochs)

    def adjust(self, model: Any, epoch: int) -> None:
        if epoch < self.warmup_epochs:
            return
        latent = torch.cat([model.encode(piece.to(model.mean.device)) for piece in self.embeddings.split(SAMPLE)])
        if epoch == self.warmup_epochs:
            model.quantizer.start(latent, self.seed)
        else:
            last = epoch == self.settings.epochs  # moving a codeword can leave another one without items
            for attempt in range(5 if last else 1):
                if not model.quantizer.reseed(latent, self.seed + epoch + attempt):
                    break

    def batches(self, epoch: int) -> list[np.ndarray]:
        return shuffled_batches(len(self.embeddings), self.settings.batch_size, self.seed, epoch)

    def loss(self, model: Any, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        batch = self.embeddings[torch.from_numpy(samples)].to(device)
        return model(batch, quantize=epoch >= self.warmup_epochs)["loss"] * len(samples), float(len(samples))

    def complete(self, model: Any, device: torch.device) -> None:
        """Nothing: all weights are trained."""

    def evaluate(self, model: Any, device: torch.device) -> QuantizerMetrics:
        pieces = [piece.to(device) for piece in self.embeddings.split(SAMPLE)]
        codes = torch.cat([model.quantizer.codes(model.encode(piece)) for piece in pieces]).cpu().numpy()
        return {
            "items": len(codes),
            "reconstruction_error": normalised_error(model, pieces),
            "collision_rate": metrics.collision_rate(codes),
            "codebook_usage": metrics.codebook_usage(codes, self.settings.codebook_size),
            "perplexity": metrics.perplexity(codes),
        }


class ExtraQuantizerTask(QuantizerTask):
    """One of `quantizer.extra_quantizers`: further codes of the same embeddings, quantized differently."""

    def __init__(self, config: Config, run: RunDir, number: int) -> None:
        quantizer, settings = config.quantizer.extra_quantizers[number], config.quantizer
        levels = min(settings.num_levels, settings.codebook_dim) if quantizer == "opq" else settings.num_levels
        settings = settings.model_copy(update={"kind": quantizer, "num_levels": levels})
        super().__init__(config.model_copy(update={"quantizer": settings}), run)
        self.seed += 1 + number  # residual k-means with the same seed would give the same codes


def sample_embeddings(run: RunDir, domains: list[str], most: int, seed: int) -> np.ndarray:
    """[N, D] fused embeddings of all items that training may see, or of a sample of `most`; needs memory for twice as many.

    The sample depends on seed, number of items and their order, not on the parts.
    """
    names = [name for domain in domains for name in run.parts("fusion/embeddings", domain)]
    if not names:
        raise ArtifactError(f"no table fusion/embeddings in {run.uri}; run the stage that makes it: qbert-ray fusion")
    sizes = [run.read_part("fusion/embeddings", name, [columns.ITEM_INDEX]).num_rows for name in names]
    rows = np.flatnonzero(np.concatenate([~run.read_part("ingest/items", name, [columns.COLD])[columns.COLD].to_numpy() for name in names]))
    if len(rows) > most:
        rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))]
    pieces = np.split(rows, np.searchsorted(rows, np.cumsum(sizes)[:-1]))
    chosen = []
    begin = 0
    for name, size, piece in zip(names, sizes, pieces, strict=True):
        chosen.append(columns.to_numpy(run.read_part("fusion/embeddings", name, ["embedding"])["embedding"])[piece - begin])
        begin += size
    return np.concatenate(chosen)
