"""Stage 2 without gradients: fits the weights of an `RQVAE` without hidden layers by k-means.

Residual k-means quantizes the principal components of the embeddings level by level. Optimised product quantization (Ge et
al. 2013, "Optimized Product Quantization for Approximate Nearest Neighbor Search") rotates them so that K blocks of
dimensions can be quantized independently of each other. Its codebooks are zero outside their block: the nearest codeword to
a residual is then the nearest in the block, so everything that reads codebooks works for both.

Shapes: N items, D input width, E codebook width, K levels, M codewords per level.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qbert_ray.semantic_ids.rqvae import RQVAE, k_means, nearest, sample

ROUNDS = 10  # of improving rotation and centres in turn; the error hardly falls after a few


def fit_residual_kmeans(
    embeddings: np.ndarray | Tensor, num_levels: int = 4, codebook_size: int = 256, codebook_dim: int = 32, seed: int = 0
) -> RQVAE:
    """A quantizer whose codebooks are residual k-means of the embeddings' principal components; no gradients.

    Args:
        embeddings: [N, D] float32, one row per item.
        num_levels: K, codes per item.
        codebook_size: M, codewords per level.
        codebook_dim: E, principal components that are quantized; at most D.
        seed: seed of k-means++ and of the sample that it is fitted on.

    Returns:
        A model in evaluation mode: `model.codes(embeddings)` gives [N, K] codes, `model.quantizer.codebooks` is [K, M, E].

    Raises:
        ValueError: NaN or infinite numbers among the embeddings.
    """
    rows = torch.as_tensor(embeddings, dtype=torch.float32)
    model = RQVAE(rows.shape[1], hidden=[], num_levels=num_levels, codebook_size=codebook_size, codebook_dim=codebook_dim)
    fit_residual(model, rows, seed)
    return model.eval()


@torch.no_grad()
def fit_residual(model: RQVAE, embeddings: Tensor, seed: int) -> None:
    """Set the weights of a model without hidden layers to residual k-means of embeddings [N, D].

    Raises:
        ValueError: NaN or infinite numbers among them.
    """
    model.start(embeddings)
    rows = torch.from_numpy(sample(embeddings.numpy(), model.quantizer.codebooks.shape[1], seed))
    model.quantizer.start(model.encode(rows), seed)


@torch.no_grad()
def fit_product(model: RQVAE, embeddings: Tensor, seed: int) -> None:
    """Set the weights of a model without hidden layers to optimised product quantization of embeddings [N, D].

    Raises:
        ValueError: NaN or infinite numbers among them, or fewer dimensions than levels.
    """
    num_levels, size, dim = model.quantizer.codebooks.shape
    if dim < num_levels:
        raise ValueError(f"{num_levels} independent codes need at least as many dimensions; quantizer.codebook_dim is {dim}")
    model.start(embeddings)
    rows = torch.from_numpy(sample(embeddings.numpy(), size, seed))
    latent = model.encode(rows).numpy()
    blocks = np.array_split(np.arange(dim), num_levels)
    rotation = _balanced(latent.var(0), blocks)
    books: list[np.ndarray] = []
    for number in range(ROUNDS):
        rotated = latent @ rotation
        quantized = np.empty_like(rotated)
        for level, block in enumerate(blocks):
            book = k_means(rotated[:, block], size, seed + level, books[level] if number else None)
            books[level : level + 1] = [book]
            quantized[:, block] = book[nearest(torch.from_numpy(rotated[:, block]), torch.from_numpy(book)).numpy()]
        if number < ROUNDS - 1:
            left, _, right = np.linalg.svd(latent.T @ quantized)  # the rotation that brings latent nearest to quantized
            rotation = (left @ right).astype(np.float32)
    assert model.decoder.linear is not None, "a model without hidden layers is linear"
    model.set_axes(model.decoder.linear.weight @ torch.from_numpy(rotation))
    model.quantizer.codebooks.zero_()
    for codebook, block, book in zip(model.quantizer.codebooks, blocks, books, strict=True):
        codebook[:, torch.from_numpy(block)] = torch.from_numpy(book)


def _balanced(variance: np.ndarray, blocks: list[np.ndarray]) -> np.ndarray:
    """[E, E] permutation that assigns the principal components [E] to blocks of about equal products of variances."""
    weight = np.log(np.maximum(variance, 1e-6 * variance.max() + 1e-30) / (1e-6 * variance.max() + 1e-30))
    volume = np.zeros(len(blocks))
    assigned: list[list[int]] = [[] for _ in blocks]
    for component in np.argsort(-variance, kind="stable"):
        room = [number for number, block in enumerate(blocks) if len(assigned[number]) < len(block)]
        number = min(room, key=lambda number: volume[number])
        assigned[number].append(component)
        volume[number] += weight[component]
    return np.eye(len(variance), dtype=np.float32)[:, np.concatenate(assigned)]
