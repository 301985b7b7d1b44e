"""Stage 2, §3.4: the residual-quantized variational autoencoder that turns fused embeddings into codes.

Notable choices where the paper is silent: inputs are standardised by the catalog's mean and deviation; the autoencoder is
warmed without quantization, then the codebooks start as k-means centres, level by level on the residuals; codewords that no
item used for an epoch are re-seeded; both loss terms are summed over dimensions and averaged over the batch, since a mean
beside a sum is what collapses codebooks.

Shapes: B batch, D input width, E codebook width, K levels, M codewords per level.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    vector: Tensor  # [B, E] sum of the chosen codewords
    codes: Tensor  # [B, K]
    residuals: Tensor  # [B, K, E] r^(k-1), what level k quantized
    codewords: Tensor  # [B, K, E]


class ResidualQuantizer(nn.Module):
    """K codebooks, each quantizing what the ones before it left (Eq. 6)."""

    def __init__(self, num_levels: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(num_levels, codebook_size, codebook_dim) * 0.1)  # [K, M, E]

    def forward(self, latent: Tensor) -> Quantized:
        residual, codes, residuals, codewords = latent, [], [], []
        for codebook in self.codebooks:
            code = nearest(residual.detach(), codebook.detach())
            codeword = codebook[code]
            codes.append(code)
            residuals.append(residual)
            codewords.append(codeword)
            residual = residual - codeword.detach()
        stacked = torch.stack(codewords, dim=1)
        return Quantized(stacked.sum(1), torch.stack(codes, dim=1), torch.stack(residuals, dim=1), stacked)

    @torch.no_grad()
    def start(self, latent: Tensor, seed: int) -> None:
        """k-means++ centres of the residuals, level by level; latent is [N, E]."""
        residual = latent.cpu().numpy()
        for level, codebook in enumerate(self.codebooks):
            centres = _centres(residual, len(codebook), seed + level)
            codebook.copy_(torch.from_numpy(centres))
            residual = residual - centres[nearest(torch.from_numpy(residual), torch.from_numpy(centres)).numpy()]

    @torch.no_grad()
    def reseed(self, latent: Tensor, seed: int) -> int:
        """Move codewords that no row of latent [N, E] uses onto residuals far from their codeword; how many moved."""
        moved = 0
        generator = torch.Generator().manual_seed(seed)
        residual = latent
        for codebook in self.codebooks:
            code = nearest(residual, codebook)
            used = torch.bincount(code, minlength=len(codebook)) > 0
            dead = (~used).nonzero()[:, 0]
            if len(dead):
                error = (residual - codebook[code]).square().sum(-1)
                count = min(len(dead), int((error > 0).sum()))
                if count:
                    rows = torch.multinomial(error.cpu().double(), count, generator=generator).to(latent.device)
                    codebook[dead[:count]] = residual[rows]
                    moved += count
                code = nearest(residual, codebook)
            residual = residual - codebook[code]
        return moved


class RQVAE(nn.Module):
    """Encoder, residual quantizer and decoder (§3.4, §4.1: MLPs with ReLU)."""

    def __init__(
        self,
        width: int,
        hidden: list[int],
        num_levels: int = 4,
        codebook_size: int = 256,
        codebook_dim: int = 32,
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        widths = [width, *hidden, codebook_dim]
        self.encoder, self.decoder = _mlp(widths), _mlp(widths[::-1])
        self.quantizer = ResidualQuantizer(num_levels, codebook_size, codebook_dim)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def standardise(self, embeddings: Tensor) -> None:
        """Take mean and deviation of the inputs from the catalog's embeddings [N, D]."""
        self.mean.copy_(embeddings.mean(0))
        # Dimensions that carry next to nothing must not be blown up to unit size.
        deviation = embeddings.std(0, unbiased=False)
        self.deviation.copy_(deviation.clamp_min(0.01 * float(deviation.mean()) + 1e-8))

    def encode(self, embedding: Tensor) -> Tensor:
        """The latent [B, E] of embeddings [B, D]."""
        return self.encoder((embedding - self.mean) / self.deviation)

    def forward(self, embedding: Tensor, quantize: bool = True) -> dict[str, Tensor]:
        """Losses of Eq. 7-9 (means over the batch) under "loss", "reconstruction", "quantization"; and "codes" [B, K]."""
        target = (embedding - self.mean) / self.deviation
        latent = self.encoder(target)
        if not quantize:
            reconstruction = (self.decoder(latent) - target).square().sum(-1).mean()
            return {"loss": reconstruction, "reconstruction": reconstruction}
        quantized = self.quantizer(latent)
        through = latent + (quantized.vector - latent).detach()  # straight-through
        reconstruction = (self.decoder(through) - target).square().sum(-1).mean()
        codebook = (quantized.residuals.detach() - quantized.codewords).square().sum((1, 2)).mean()
        commitment = (quantized.residuals - quantized.codewords.detach()).square().sum((1, 2)).mean()
        quantization = codebook + self.commitment_weight * commitment
        return {
            "loss": reconstruction + quantization,
            "reconstruction": reconstruction,
            "quantization": quantization,
            "codes": quantized.codes,
        }


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """[B] index of the codeword [M, E] nearest to each vector [B, E]; the first of equally near ones."""
    return (codebook.square().sum(-1) - 2 * vectors @ codebook.T).argmin(-1)


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Linear(a, b)] + [nn.ReLU()] * (number < len(widths) - 2)
    return nn.Sequential(*layers)


def _centres(vectors: np.ndarray, size: int, seed: int) -> np.ndarray:
    """[M, E] k-means centres; where there are fewer distinct vectors than centres, the rest are slightly moved copies."""
    from sklearn.cluster import KMeans  # takes a second or two to import; who only encodes does without

    distinct = np.unique(vectors, axis=0)
    if len(distinct) > size:
        sample = vectors
        if len(vectors) > 256 * size:  # more rows than this do not move the centres
            sample = vectors[np.random.default_rng(seed).choice(len(vectors), 256 * size, replace=False)]
        return KMeans(size, n_init=1, max_iter=25, random_state=seed).fit(sample).cluster_centers_.astype(np.float32)
    noise = np.random.default_rng(seed).normal(scale=1e-3, size=(size, vectors.shape[1]))
    copies = np.resize(distinct, (size, vectors.shape[1])) + noise * (distinct.std() + 1e-3)
    copies[: len(distinct)] = distinct
    return copies.astype(np.float32)


def normalised_error(model: RQVAE, embedding: Tensor) -> Tensor:
    """Reconstruction error as a share of the inputs' variance: 0 is perfect, 1 is predicting the mean."""
    target = (embedding - model.mean) / model.deviation
    output = model.decoder(model.quantizer(model.encoder(target)).vector)
    return F.mse_loss(output, target) / target.var(unbiased=False).clamp_min(1e-12)
