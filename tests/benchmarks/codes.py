"""Code assignment against faiss's residual quantizer, and collisions against the rule in plain loops, on one core.

    make peers                            # .venv-peers with faiss; or PEERS=/path/to/python
    python -m tests.benchmarks.codes
    python -m tests.benchmarks.codes --full

Made-up embeddings of width 256 in clusters. Ours is the quantizer `kmeans` with its defaults; faiss gets the same latents (32
dimensions, 4 levels of 256) to train on and to encode, with a beam of 1 as ours, and with its default beam. Times are of CPU, rounds alternate.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from qbert_ray.config.schema import Quantizer
from qbert_ray.semantic_ids import kmeans
from qbert_ray.semantic_ids.collisions import Resolved, resolve_collisions
from qbert_ray.semantic_ids.rqvae import RQVAE
from tests.benchmarks.collisions import PLAIN, SIZE, catalog
from tests.benchmarks.plain_rule import plain_rule
from tests.benchmarks.table import Figure, main

WIDTH, TRAINED, BATCH, ROUNDS = 256, 65_536, 4096, 5
PEERS = Path(os.environ.get("PEERS") or ".venv-peers/bin/python")


def embeddings(items: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, WIDTH)).astype(np.float32)
    return torch.from_numpy(centres[rng.integers(0, len(centres), items)] + 0.5 * rng.standard_normal((items, WIDTH), dtype=np.float32))


def assignment(items: int) -> Iterator[Figure]:
    data, defaults = embeddings(items), Quantizer()
    model = RQVAE(WIDTH, [], defaults.num_levels, defaults.codebook_size, defaults.codebook_dim).eval()
    kmeans.fit_residual(model, data[:TRAINED], 0)
    with torch.inference_mode():
        latent = torch.cat([model.encode(piece) for piece in data.split(BATCH)])
        codes = model.quantizer.codes(latent)
        decoded = sum(book[code] for book, code in zip(model.quantizer.codebooks, codes.T, strict=True))
        error = float((latent - decoded).square().sum(1).mean())
        rounds: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder, faiss(Path(folder), latent, defaults) as peer:
            about = json.loads(peer.stdout.readline())
            beams = {"1": 1, "default": about["beam"]}
            for _ in range(ROUNDS):
                found, seconds = {}, time.process_time()
                for piece in latent.split(BATCH):
                    model.quantizer.codes(piece)
                rounds.setdefault("ours", []).append(time.process_time() - seconds)
                for name, beam in beams.items():
                    peer.stdin.write(f"{beam}\n")
                    peer.stdin.flush()
                    found[name] = json.loads(peer.stdout.readline())
                    rounds.setdefault(name, []).append(found[name]["seconds"])
    ours = float(np.median(rounds["ours"]))
    for name, beam in beams.items():
        theirs = float(np.median(rounds[name]))
        fine = error <= found[name]["error"]
        yield Figure(
            f"codes of {items:,} latents (4 x 256, width {defaults.codebook_dim}), one core",
            f"{items / ours:,.0f} items/s, squared error {error:.3f}",
            f"faiss {about['version']}, beam {beam}: {items / theirs:,.0f} items/s, {found[name]['error']:.3f}",
            theirs / ours, ">= 1 x, error no higher", theirs >= ours and fine,
        )  # fmt: skip


def faiss(folder: Path, latent: torch.Tensor, settings: Quantizer) -> subprocess.Popen[str]:
    """faiss in the peers' interpreter, waiting for beams."""
    np.save(folder / "train.npy", latent[:TRAINED].numpy())
    np.save(folder / "items.npy", latent.numpy())
    script = Path(__file__).with_name("peers_faiss.py")
    bits = settings.codebook_size.bit_length() - 1
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [str(PEERS), str(script), str(folder), str(settings.num_levels), str(bits)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def fastest(codes: np.ndarray, latents: np.ndarray, codebooks: np.ndarray) -> tuple[float, Resolved]:
    """Median seconds of CPU, and the IDs."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        resolved = resolve_collisions(codes, latents, codebooks)
        seconds.append(time.process_time() - started)
    return float(np.median(seconds)), resolved


def collisions(num_items: int) -> Iterator[Figure]:
    codes, latents, codebooks = catalog(num_items)
    single, resolved = fastest(codes, latents, codebooks)
    held = np.cumsum(np.bincount(codes[:, 0], minlength=SIZE)) <= PLAIN  # all items under some first codes
    rows = np.flatnonzero(held[codes[:, 0]])
    ours, found = fastest(codes[rows], latents[rows], codebooks)
    started = time.process_time()
    plain = plain_rule(codes[rows], latents[rows], codebooks, codes[:0])
    theirs = time.process_time() - started
    assert plain == found.codes.tolist()
    yield Figure(f"collisions of {len(rows):,} of {num_items:,} items", f"{ours * 1e3:.0f} ms", f"plain loops: {theirs:.1f} s",
                 theirs / ours, ">= 100 x", theirs >= 100 * ours)  # fmt: skip
    double, twice = fastest(*catalog(2 * num_items))
    growth = np.count_nonzero(twice.moved) / np.count_nonzero(resolved.moved)
    yield Figure(f"collisions of {2 * num_items:,} items", f"{double:.2f} s", f"{num_items:,} items: {single:.2f} s; {growth:.2f} x as many move",
                 double / single, "<= 2.3 x time", double <= 2.3 * single)  # fmt: skip


def figures(full: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    if PEERS.exists():
        yield from assignment(500_000 if full else 100_000)
    else:
        yield Figure("codes against faiss", "not measured", f"no {PEERS}: make peers", None, ">= 1 x", None)
    yield from collisions(1_000_000 if full else 500_000)


if __name__ == "__main__":
    main(figures)
