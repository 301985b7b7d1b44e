"""Quantizers and their options on the fused embeddings of finished runs: how good the IDs are, and what they cost.

    python -m tests.benchmarks.quantizers runs/movielens runs/scientific runs/games

Each row is trained in this process by `training.Loop`, means over seeds are printed. usage: share of codewords in use at the
worst level. collide: 1 - distinct IDs / items before reallocation, compared with what identical inputs force. recall@10: share of
the 10 nearest items by fused embedding that are among the 10 nearest by semantic ID, of up to 2,000 items; the distance of two
IDs is that of the sums of their codewords (latent), or of what the decoder makes of these sums (decoded). error: of the
decoded embeddings, as a share of their variance. seconds: of one core.

`Options` holds what was tried for the RQ-VAE and is not in the package, since it does not pay.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qbert_ray import metrics
from qbert_ray.config.loading import load_config
from qbert_ray.semantic_ids.rqvae import RQVAE, Quantized, ResidualQuantizer
from qbert_ray.semantic_ids.task import QuantizerTask
from qbert_ray.storage.directory import RunDir
from qbert_ray.training import Loop

QUERIES, NEIGHBOURS = 2000, 10
ARMS: dict[str, tuple[list[str], dict[str, bool]]] = {  # name -> overrides of the config, options of the model
    "kmeans": (["quantizer.kind=kmeans"], {}),
    "opq": (["quantizer.kind=opq"], {}),
    "rqvae": (["quantizer.kind=rqvae"], {}),
    "rqvae, MLPs alone": (["quantizer.kind=rqvae", "quantizer.shortcut=false", "quantizer.warmup_epochs=10"], {}),
    "rqvae, sinkhorn": (["quantizer.kind=rqvae"], {"sinkhorn": True}),
    "rqvae, ema": (["quantizer.kind=rqvae"], {"ema": True}),
    "rqvae, rotation": (["quantizer.kind=rqvae"], {"rotation": True}),
}


class Options(RQVAE):
    """RQ-VAE with what others do differently in training: balanced codes, averaged codebooks, rotated gradients."""

    def __init__(self, sinkhorn: bool = False, ema: bool = False, rotation: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.sinkhorn, self.ema, self.rotation = sinkhorn, ema, rotation
        self.sums: list[Tensor] = []  # of the residuals of each codeword, decayed; and their number
        self.counts: list[Tensor] = []

    def forward(self, embedding: Tensor, quantize: bool = True) -> dict[str, Tensor]:
        if not quantize:
            return super().forward(embedding, quantize)
        target = (embedding - self.mean) / self.deviation
        latent = self.encoder(target)
        quantized = balanced(self.quantizer, latent) if self.sinkhorn else self.quantizer(latent)
        through = rotate(latent, quantized.vector.detach()) if self.rotation else latent + (quantized.vector - latent).detach()
        reconstruction = (self.decoder(through) - target).square().sum(-1).mean()
        commitment = (quantized.residuals - quantized.codewords.detach()).square().sum((1, 2)).mean()
        loss = reconstruction + self.commitment_weight * commitment
        if self.ema:
            self._average(quantized)
        else:
            loss = loss + (quantized.residuals.detach() - quantized.codewords).square().sum((1, 2)).mean()
        return {"loss": loss, "reconstruction": reconstruction, "codes": quantized.codes}

    @torch.no_grad()
    def _average(self, quantized: Quantized, decay: float = 0.99) -> None:
        """Codewords as decayed means of the residuals that chose them (VQ-VAE, van den Oord et al. 2017, appendix)."""
        books, size = self.quantizer.codebooks, self.quantizer.codebooks.shape[1]
        if not self.sums:
            share = len(quantized.codes) / size
            self.counts = [torch.full((size,), share) for _ in books]
            self.sums = [book.clone() * share for book in books]
            self.last = books.clone()
        for level, book in enumerate(books):
            moved = (book != self.last[level]).any(1)  # re-seeded between epochs: their means start over
            self.sums[level][moved], self.counts[level][moved] = book[moved], 1.0
            chosen = F.one_hot(quantized.codes[:, level], size).to(book)
            self.counts[level].mul_(decay).add_(chosen.sum(0), alpha=1 - decay)
            self.sums[level].mul_(decay).add_(chosen.T @ quantized.residuals[:, level], alpha=1 - decay)
            used = self.counts[level] > 1e-2
            book[used] = self.sums[level][used] / self.counts[level][used, None]
        self.last = books.clone()


def balanced(quantizer: ResidualQuantizer, latent: Tensor, epsilon: float = 0.05, rounds: int = 30) -> Quantized:
    """Codes by Sinkhorn's algorithm, so that a batch uses all codewords about equally (LC-Rec, Zheng et al. 2024)."""
    residual, codes, residuals, codewords = latent, [], [], []
    for codebook in quantizer.codebooks:
        with torch.no_grad():
            distance = torch.cdist(residual, codebook).square()
            distance = (distance - distance.min()) / (distance.max() - distance.min()).clamp_min(1e-12)
            log = -distance / epsilon
            for _ in range(rounds):
                log = log - log.logsumexp(0, keepdim=True) - np.log(log.shape[1])
                log = log - log.logsumexp(1, keepdim=True) - np.log(log.shape[0])
            code = log.argmax(1)
        codeword = codebook[code]
        codes.append(code)
        residuals.append(residual)
        codewords.append(codeword)
        residual = residual - codeword.detach()
    stacked = torch.stack(codewords, dim=1)
    return Quantized(stacked.sum(1), torch.stack(codes, dim=1), torch.stack(residuals, dim=1), stacked)


def rotate(latent: Tensor, vector: Tensor) -> Tensor:
    """The quantized vectors, with gradients rotated and scaled as latent is onto them (Fifty et al. 2024)."""
    e, q = latent.detach(), vector
    norm_e, norm_q = e.norm(dim=-1, keepdim=True).clamp_min(1e-6), q.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    e_hat, q_hat = e / norm_e, q / norm_q
    r = F.normalize(e_hat + q_hat, dim=-1)
    turned = latent - 2 * (latent * r).sum(-1, keepdim=True) * r + 2 * (latent * e_hat).sum(-1, keepdim=True) * q_hat
    return turned * norm_q / norm_e


class OptionsTask(QuantizerTask):
    """`QuantizerTask` with a model that has options."""

    options: dict[str, bool] = {}

    def build(self) -> RQVAE:
        if not self.options:
            return super().build()
        model = Options(**self.options, **self.description())
        model.start(self.embeddings)
        return model


def neighbours(vectors: Tensor, queries: Tensor) -> list[set[int]]:
    """The nearest items of each query, itself left out."""
    distance = torch.cdist(vectors[queries], vectors)
    distance[torch.arange(len(queries)), queries] = torch.inf
    return [set(row) for row in distance.topk(NEIGHBOURS, largest=False).indices.tolist()]


@torch.inference_mode()
def figures(model: RQVAE, embeddings: Tensor) -> dict[str, float]:
    latent = model.encode(embeddings)
    quantized = model.quantizer(latent)
    codes = quantized.codes.numpy()
    queries = torch.from_numpy(np.random.default_rng(0).permutation(len(embeddings))[:QUERIES])
    true = neighbours(embeddings, queries)
    decoded = model.decode(quantized.vector)
    found = {"latent": neighbours(quantized.vector, queries), "decoded": neighbours(decoded, queries)}
    return {
        "usage": min(metrics.codebook_usage(codes, model.quantizer.codebooks.shape[1])),
        "collide": metrics.collision_rate(codes),
        **{
            f"recall {name}": float(np.mean([len(a & b) / NEIGHBOURS for a, b in zip(true, sets, strict=True)]))
            for name, sets in found.items()
        },
        "error": float((decoded - embeddings).square().sum() / (embeddings - embeddings.mean(0)).square().sum()),
    }


def forced(run: RunDir) -> str:
    """Collisions that identical inputs force, whatever quantizes them."""
    embeddings = run.read("fusion/embeddings", columns=["embedding"])["embedding"].combine_chunks().flatten().to_numpy()
    items = run.read("ingest/items")
    texts = list(zip(*(items[name].to_pylist() for name in items.column_names if name.startswith("text.")), strict=True))
    same = metrics.collision_rate(embeddings.reshape(len(items), -1))
    return f"{len(items):,} items; identical embeddings {same:.2%}, identical texts {1 - len(set(texts)) / len(texts):.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="section.field=value of the config")
    arguments = parser.parse_args()
    for directory in arguments.runs:
        run = RunDir(directory)
        print(f"\n{directory}: {forced(run)}; means of {arguments.seeds} seeds")
        print(f"{'':<20} {'usage':>7} {'collide':>8} {'recall latent':>14} {'recall decoded':>15} {'error':>7} {'seconds':>8}", flush=True)
        for name in arguments.arms:
            overrides, options = ARMS[name]
            domains = {part.rsplit("-", 1)[0]: {} for part in run.parts("fusion/embeddings")}
            rows = []
            for seed in range(arguments.seeds):
                task = OptionsTask(load_config([], [*overrides, *arguments.overrides, f"run.seed={seed}", f"data.domains={domains}"]), run)
                task.options = options
                started = time.process_time()
                loop = Loop(task, torch.device("cpu"))
                while task.settings.kind == "rqvae" and not loop.finished:
                    loop.run_epoch()
                rows.append({"seconds": time.process_time() - started} | figures(loop.model.eval(), task.embeddings))
            mean = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
            print(
                f"{name:<20} {mean['usage']:>7.1%} {mean['collide']:>8.2%} {mean['recall latent']:>14.3f} {mean['recall decoded']:>15.3f} "
                f"{mean['error']:>7.3f} {mean['seconds']:>8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
