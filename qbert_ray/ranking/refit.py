"""The stage `refit`: sequence model and item-item weights trained again, with interactions that were held out while everything was chosen.

Semantic IDs stay as they are. Epochs, settings of the ridge regression, blend and reranker are those that were chosen without these
interactions: with them there is nothing left to choose by.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from qbert_ray.config.schema import Config
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.ranking.loader import REFIT, REFIT_WEIGHTS
from qbert_ray.ranking.weights import write_weights_again
from qbert_ray.sequence.stage import finetune_again
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir


class RefitCounts(TypedDict):
    """Of a domain."""

    interactions: int  # that are trained on
    held_out: int  # of these, the ones that were held out before
    epochs: int
    weights: NotRequired[int]  # item-item weights that are not zero


def refit(config: Config, run: RunDir, executor: Executor, progress: Progress) -> dict[str, RefitCounts]:
    """Write refit/sequencer/<domain> and, where item-item weights are blended in, refit/weights; returns the counts of the manifest."""
    counts: dict[str, RefitCounts] = {}
    for domain in config.data.targets:
        progress.note(domain)
        before, now = executor.get(executor.submit(_interactions, run, domain, config.refit.include))
        epochs = finetune_again(config, run, domain, f"{REFIT}/{domain}", executor, progress)
        counts[domain] = {"interactions": now, "held_out": now - before, "epochs": epochs}
        if not config.no_blend:
            counts[domain]["weights"] = write_weights_again(config, run, domain, REFIT_WEIGHTS, executor, progress)["weights"]
    return counts


def _interactions(run: RunDir, domain: str, include: str) -> tuple[int, int]:
    """Training interactions of a domain without and with held-out ones."""
    sequences = columns.to_sequences(run.read("ingest/sequences", domain))
    return len(sequences.items), len(sequences.training_on(include).items)
