"""The training of the generative sequence model: every prefix of a history predicts the ID of the item after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray.config.schema import Config, SequenceTraining
from qbert_ray.sequence.beam_search import Trie, search
from qbert_ray.sequence.decoder import Generator
from qbert_ray.sequence.task import ValidationMetrics, mean_metrics, validation_items
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import catalog_codes, warm_items
from qbert_ray.storage.directory import RunDir
from qbert_ray.training import shuffled_batches

MOST_VALIDATED = 2000  # users whose validation item is looked for among the beams after an epoch; decoding is not cheap
VALIDATION_BEAM = 20  # whatever beam ranks later, so that another one needs no new training


class GenerativeTask:
    """Token cross-entropy of the next item's ID given every prefix of the training histories, one domain per batch."""

    criterion = ("ndcg@10", 1.0)

    def __init__(
        self, config: Config, run: RunDir, domains: list[str], settings: SequenceTraining, start: str | None = None, include: str = "none"
    ) -> None:
        self.config, self.settings, self.seed, self.run, self.start = config, settings, config.run.seed, run, start
        self.domains = domains
        counts = run.read_json("semantic_ids/manifest.json")["counts"]
        self.num_levels, self.codebook_size = counts["num_levels"], counts["codebook_size"]
        self.catalogs = {name: catalog_codes(run, name)[: warm_items(run, name), : self.num_levels] for name in domains}
        self.sequences = {name: columns.to_sequences(run.read("ingest/sequences", name)).training_on(include) for name in domains}

    def description(self) -> dict[str, Any]:
        """Arguments of the `Generator`."""
        s = self.config.sequencer
        names = ("width", "num_layers", "num_heads", "ffn_width", "dropout", "max_items")
        sizes = {"num_levels": self.num_levels, "codebook_size": self.codebook_size, "head_width": s.head_width or s.width // s.num_heads}
        return sizes | {name: getattr(s, name) for name in names}

    def build(self) -> nn.Module:
        """The model with fresh weights, or with those of the pre-training: codes mean the same in every domain."""
        model = Generator(**self.description())
        if self.start:
            model.load_state_dict(self.run.load_model(self.start)[0])
        return model

    def adjust(self, model: nn.Module, epoch: int) -> None:
        """Nothing: all weights are trained by gradients."""

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Rows of (domain, begin, end): items[begin:end] are read and items[end] is predicted."""
        batches: list[np.ndarray] = []
        for number, name in enumerate(self.domains):
            prefixes = self._prefixes(number, name)
            batches += [prefixes[rows] for rows in shuffled_batches(len(prefixes), self.settings.batch_size, self.seed + number, epoch)]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(batches))
        return [batches[place] for place in order]

    def _prefixes(self, number: int, name: str) -> np.ndarray:
        indptr = self.sequences[name].indptr
        first = np.repeat(indptr[:-1], np.diff(indptr))  # of the user of each item
        end = np.arange(len(first))
        samples = np.stack([np.full(len(end), number), np.maximum(end - self.config.sequencer.max_items, first), end], axis=1)
        return samples[end > first]

    def loss(self, model: Any, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        """Summed cross-entropy of the codes, and their number."""
        name = self.domains[samples[0, 0]]
        items, catalog = self.sequences[name].items, self.catalogs[name]
        lengths = samples[:, 2] - samples[:, 1]
        first = np.cumsum(lengths) - lengths
        read = items[np.repeat(samples[:, 1] - first, lengths) + np.arange(int(lengths.sum()))]
        reading = model.read(read, lengths, catalog)
        places, weights = samples[reading.order, 2], self.sequences[name].weights
        codes = torch.from_numpy(catalog[items[places]]).to(device)
        weight = None if weights is None else torch.from_numpy(weights[places]).to(device)
        return model.loss(reading, codes, weight), float(codes.numel() if weight is None else codes.shape[1] * weight.sum())

    def complete(self, model: Any, device: torch.device) -> None:
        """Nothing: all weights are trained."""

    def evaluate(self, model: Any, device: torch.device) -> ValidationMetrics:
        """Hit rate and NDCG of the validation items among the beams, without what their users have had; averaged over domains."""
        found = []
        for name in self.domains:
            most = min(getattr(self.settings, "validation_users", MOST_VALIDATED), MOST_VALIDATED)
            histories, targets = validation_items(self.sequences[name], most)
            if len(targets):
                seen = [history[history != item] for history, item in zip(histories, targets, strict=True)]
                trie = Trie.build(torch.from_numpy(self.catalogs[name]).to(device))
                beams = search(model, self.catalogs[name], trie, histories, VALIDATION_BEAM, seen)
                found.append(ranks_in_beams(beams.items, torch.from_numpy(targets).to(device)).cpu().numpy())
        return mean_metrics(found)


def ranks_in_beams(items: Tensor, target: Tensor) -> Tensor:
    """[B] 1-based rank of each target in its row of items [B, W]; behind all of them where it is not among them."""
    there = items == target[:, None]
    return torch.where(there.any(1), there.int().argmax(1) + 1, torch.iinfo(torch.int32).max)
