"""Stage 2, §3.4: the residual-quantized variational autoencoder that turns fused embeddings into codes.

Notable choices where the paper is silent: a linear shortcut parallel to the MLPs starts as the catalog's principal axes, so that
training begins where residual k-means ends; the codebooks start as k-means centres, level by level on the residuals; codewords
that no item used for an epoch are re-seeded; both loss terms are summed over dimensions and averaged over the batch, since
averaging one of them over dimensions and summing the other collapses codebooks.

Every quantizer of the project is this model. `kmeans.py` sets the weights of one without hidden layers and never trains it.

Shapes: B batch, D input width, E codebook width, K levels, M codewords per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray.products import Linear, product

CACHED = 512  # rows whose distances from a codebook stay in a core's cache
PIECE = 65536  # rows of the catalog processed at a time, since all at once would take a multiple of their memory


class Quantized(NamedTuple):
    vector: Tensor  # [B, E] sum of the chosen codewords
    codes: Tensor  # [B, K]
    residuals: Tensor  # [B, K, E] r^(k-1), what level k quantized
    codewords: Tensor  # [B, K, E]


class ResidualQuantizer(nn.Module):
    """K codebooks, each quantizing the residual of the ones before it (Eq. 6)."""

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
    def codes(self, latent: Tensor) -> Tensor:
        """[B, K] codes as `forward` gives them, without its other outputs."""
        found = latent.new_empty(len(latent), len(self.codebooks), dtype=torch.int64)
        for rows, codes in zip(latent.split(CACHED), found.split(CACHED), strict=True):
            residual = rows
            for level, codebook in enumerate(self.codebooks):
                codes[:, level] = code = nearest(residual, codebook)
                residual = residual - codebook[code]
        return found

    @torch.no_grad()
    def start(self, latent: Tensor, seed: int) -> None:
        """Initialise the codebooks as k-means centres of the residuals, level by level; latent is [N, E]."""
        residual = sample(latent.cpu().numpy(), len(self.codebooks[0]), seed)
        for level, codebook in enumerate(self.codebooks):
            centres = k_means(residual, len(codebook), seed + level)
            codebook.copy_(torch.from_numpy(centres))
            residual = residual - centres[nearest(torch.from_numpy(residual), torch.from_numpy(centres)).numpy()]

    @torch.no_grad()
    def reseed(self, latent: Tensor, seed: int) -> int:
        """Move codewords that no row of latent [N, E] uses onto residuals far from their codeword; returns how many moved."""
        moved = 0
        generator = torch.Generator().manual_seed(seed)
        residual = latent
        for codebook in self.codebooks:
            code = _nearest_of_many(residual, codebook)
            used = torch.bincount(code, minlength=len(codebook)) > 0
            dead = (~used).nonzero()[:, 0]
            if len(dead):
                error = (residual - codebook[code]).square().sum(-1)
                count = min(len(dead), int((error > 0).sum()))
                if count:
                    rows = torch.multinomial(error.cpu().double(), count, generator=generator).to(latent.device)
                    codebook[dead[:count]] = residual[rows]
                    moved += count
                code = _nearest_of_many(residual, codebook)
            residual = residual - codebook[code]
        return moved


class Coder(nn.Module):
    """An MLP with ReLU, a linear shortcut, or the sum of both.

    Args:
        widths: of the input, the hidden layers and the output; without hidden layers there is only the shortcut.
        shortcut: false leaves the MLP alone.
    """

    def __init__(self, widths: list[int], shortcut: bool) -> None:
        super().__init__()
        self.linear = Linear(widths[0], widths[-1], bias=False) if shortcut or len(widths) == 2 else None
        self.mlp = _mlp(widths) if len(widths) > 2 else None
        if self.linear and self.mlp:  # the MLP starts at zero, so that the coder starts as the shortcut
            for parameter in self.mlp[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, vectors: Tensor) -> Tensor:
        return sum(path(vectors) for path in (self.linear, self.mlp) if path is not None)


class RQVAE(nn.Module):
    """Encoder, residual quantizer and decoder (§3.4; §4.1: MLPs with ReLU).

    Args:
        width: D.
        hidden: widths of the encoder's hidden layers, the decoder mirrors them; none: linear both ways.
        num_levels: K.
        codebook_size: M.
        codebook_dim: E.
        commitment_weight: beta of Eq. 8.
        shortcut: a linear path parallel to the MLPs; the paper has none.
    """

    mean: Tensor  # [D]
    deviation: Tensor  # scalar

    def __init__(
        self,
        width: int,
        hidden: list[int],
        num_levels: int = 4,
        codebook_size: int = 256,
        codebook_dim: int = 32,
        commitment_weight: float = 0.25,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        widths = [width, *hidden, codebook_dim]
        self.encoder, self.decoder = Coder(widths, shortcut), Coder(widths[::-1], shortcut)
        self.quantizer = ResidualQuantizer(num_levels, codebook_size, codebook_dim)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(()))

    @torch.no_grad()
    def start(self, embeddings: Tensor) -> None:
        """Centre and scale the inputs by the catalog's embeddings [N, D], and start the shortcut as their principal axes.

        One scale for all dimensions, so that near embeddings stay near.

        Raises:
            ValueError: NaN or infinite numbers among them.
        """
        if not torch.isfinite(embeddings).all():
            raise ValueError("the fused embeddings hold NaN or infinite numbers: look for them in the input vectors")
        self.mean.copy_(embeddings.mean(0, dtype=torch.float64))
        covariance = torch.zeros(embeddings.shape[1], embeddings.shape[1], dtype=torch.float64)
        for piece in embeddings.split(PIECE):
            centred = piece.double() - self.mean
            covariance += centred.T @ centred / len(embeddings)
        self.deviation.copy_(covariance.trace().div(len(covariance)).sqrt().clamp_min(1e-6))
        if self.encoder.linear is not None:
            axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : len(self.encoder.linear.weight)].float()  # [D, E]
            self.set_axes(axes)

    @torch.no_grad()
    def set_axes(self, axes: Tensor) -> None:
        """Set the encoder's shortcut to orthonormal axes [D, at most E], and the decoder's to their transpose."""
        assert self.encoder.linear is not None and self.decoder.linear is not None, "the model has no shortcut"
        for weight, given in ((self.encoder.linear.weight, axes.T), (self.decoder.linear.weight, axes)):
            weight.zero_()
            weight[: given.shape[0], : given.shape[1]] = given

    @torch.no_grad()
    def codes(self, embeddings: Tensor) -> Tensor:
        """[N, K] nearest codes of embeddings [N, D]; two items may share them until `resolve_collisions`."""
        return self.quantizer.codes(self.encode(embeddings))

    def encode(self, embedding: Tensor) -> Tensor:
        """The latent [B, E] of embeddings [B, D]."""
        return self.encoder((embedding - self.mean) / self.deviation)

    def decode(self, latent: Tensor) -> Tensor:
        """Embeddings [B, D] reconstructed from sums of codewords [B, E]."""
        return self.decoder(latent) * self.deviation + self.mean

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
    """[B] index of the codeword [M, E] nearest to each vector [B, E]; the first of equally near ones. Without gradients."""
    distance = product(vectors, -2 * codebook, codebook.square().sum(-1))  # up to a constant of the row
    if distance.device.type == "cpu":  # where PyTorch's argmin takes ten times as long as NumPy's
        return torch.from_numpy(distance.detach().numpy().argmin(-1))
    return distance.argmin(-1)


def _nearest_of_many(vectors: Tensor, codebook: Tensor) -> Tensor:
    return torch.cat([nearest(piece, codebook) for piece in vectors.split(PIECE)])


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [Linear(a, b)] + [nn.ReLU()] * (number < len(widths) - 2)
    return nn.Sequential(*layers)


def k_means(vectors: np.ndarray, size: int, seed: int, start: np.ndarray | None = None) -> np.ndarray:
    """[M, E] k-means centres; where there are fewer distinct vectors than centres, the rest are slightly moved copies.

    Args:
        vectors: [N, E].
        start: [M, E] centres to improve in a few rounds; None: k-means++.
    """
    from sklearn.cluster import KMeans  # takes a second or two to import, and encoding does not need it

    distinct = np.unique(vectors, axis=0)
    if len(distinct) > size:
        how = {"init": "k-means++", "max_iter": 25} if start is None else {"init": start, "max_iter": 4}
        return KMeans(size, n_init=1, random_state=seed, **how).fit(vectors).cluster_centers_.astype(np.float32)
    noise = np.random.default_rng(seed).normal(scale=1e-3, size=(size, vectors.shape[1]))
    copies = np.resize(distinct, (size, vectors.shape[1])) + noise * (distinct.std() + 1e-3)
    copies[: len(distinct)] = distinct
    return copies.astype(np.float32)


def sample(vectors: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A random sample of at most 256 M of the vectors [N, E]; more rows than this do not change the centres."""
    if len(vectors) <= 256 * size:
        return vectors
    return vectors[np.random.default_rng(seed).choice(len(vectors), 256 * size, replace=False)]


@torch.no_grad()
def normalised_error(model: RQVAE, embeddings: Sequence[Tensor]) -> float:
    """Reconstruction error of pieces [n, D] as a share of their common variance: 0 is perfect, 1 is predicting the mean."""
    error = square = total = count = 0.0
    for embedding in embeddings:
        target = (embedding - model.mean) / model.deviation
        output = model.decoder(model.quantizer(model.encoder(target)).vector)
        error += float((output - target).square().sum())
        square, total, count = square + float(target.square().sum()), total + float(target.sum()), count + target.numel()
    variance = square / count - (total / count) ** 2
    return error / count / max(variance, 1e-12)
