"""The training of stage 3: windows of histories, masks, the loss of Eq. 11, and ranks of validation items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from qbert_ray import metrics
from qbert_ray.config.schema import Config, Finetune, MaskStrategy, SequenceTraining
from qbert_ray.features.structure import co_occurrence, collaborative_vectors
from qbert_ray.random_streams import VALIDATION_STREAM, WINDOW_STREAM, uniform
from qbert_ray.semantic_ids.quantizers import load_quantizers
from qbert_ray.sequence.catalog_softmax import own_items, sample_items
from qbert_ray.sequence.empty_history import query_of_popularity
from qbert_ray.sequence.item_table import ItemTable
from qbert_ray.sequence.masking import draw_lengths, draw_masks
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.sequence.packing import pack, to_device
from qbert_ray.storage import columns
from qbert_ray.storage.catalog import catalog_codes, item_content, warm_items
from qbert_ray.storage.directory import RunDir
from qbert_ray.top_k import pairs, ranks
from qbert_ray.training import shuffled_batches

MOST_REPEATS = 1000.0  # largest number added to repeats, and with a minus the smallest
MOST_SCORES = 2**23  # of a batch of histories over the catalog
MOST_FOR_REPEATS = 2048  # users whose validation items the number added to repeats is chosen by
BUYING_AGAIN = 0.05  # share of repeats from which on a model has to know which items are bought again
SAMPLE = 4096  # users whose validation items are ranked, where the settings name no number


ValidationMetrics = TypedDict(  # of validation items among unseen ones; `EpochMetrics` with names that are no identifiers
    "ValidationMetrics",
    {"epoch": NotRequired[int], "train_loss": NotRequired[float], "hr@10": NotRequired[float], "ndcg@10": NotRequired[float]},
)


class SequencerTask:
    """Stage 3, Eq. 11: pre-training over several domains, or fine-tuning on one."""

    criterion = ("ndcg@10", 1.0)

    def __init__(
        self, config: Config, run: RunDir, domains: list[str], settings: SequenceTraining, start: str | None = None, include: str = "none"
    ) -> None:
        self.config, self.settings, self.seed, self.run, self.start = config, settings, config.run.seed, run, start
        self.include = include  # of `Sequences.training_on`
        self.domains = domains
        self.causal = settings.objective == "causal"
        counts = run.read_json("semantic_ids/manifest.json")["counts"]
        self.codebook_size = counts["codebook_size"]
        # codes that are read: all of an item's, the ID's alone where each has a position, none where the whole ID is a word
        levels = {"item": None, "flat": counts["num_levels"], "word": 0}[config.sequencer.tokens]
        chosen_on = {name: columns.to_sequences(run.read("ingest/sequences", name)) for name in domains}
        self.repeated = {name: repeated_share(each.indptr, each.items) for name, each in chosen_on.items()}
        self.sequences = {name: each.training_on(include) for name, each in chosen_on.items()}
        self.frequency: dict[str, Tensor] = {}  # [N] share of each item in a domain's training interactions
        self.tables = {name: self._table(name, levels) for name in domains}  # of the items that training may see

    def _table(self, name: str, levels: int | None) -> ItemTable:
        codes = torch.from_numpy(catalog_codes(self.run, name)[: warm_items(self.run, name), :levels])
        content = item_content(self.run, name, self.config) if self.config.sequencer.tokens != "flat" else None
        content = None if content is None else content[: len(codes)]
        counts = torch.from_numpy(np.bincount(self.sequences[name].items, minlength=len(codes)))
        self.frequency[name] = counts / max(int(counts.sum()), 1)
        return ItemTable(codes, content, counts > 0, domain=name)

    def description(self) -> dict[str, Any]:
        s = self.config.sequencer
        names = [
            "width",
            "num_layers",
            "num_heads",
            "ffn_width",
            "dropout",
            "max_items",
            "tokens",
            "loss",
            "token_weight",
            "logits",
            "temperature",
        ]
        names.append("code_dropout")
        codes, content = self.tables[self.domains[0]][:2]
        return {
            "causal": self.causal,
            "recall": s.recall and s.tokens != "flat",
            "repeats": s.repeats and s.loss == "catalog",
            "content_width": content.shape[1] if content is not None else 0,
            "num_levels": codes.shape[1],
            "codebook_size": self.codebook_size,
            "item_embeddings": {name: len(table.codes) for name, table in self.tables.items()} if s.embeds_items else {},
        } | {name: getattr(s, name) for name in names}

    def build(self) -> nn.Module:
        model = Sequencer(**self.description())
        if self.config.sequencer.tokens == "word":
            for name in self.domains:
                model.start_items_from(name, self._code_sums(name))
        elif self.config.sequencer.start == "codebooks" and not self.config.data.semantic_ids:
            books = torch.cat([each.quantizer.codebooks for each in load_quantizers(self.run)])
            model.start_from(books[: model.num_levels])
        if self.config.sequencer.item_start == "collaborative":
            for name in self.domains if model.item_embedding else []:
                model.start_items_from(name, self._collaborative(name))
        if self.start:
            tensors, _ = self.run.load_model(self.start)
            wanted = model.state_dict()
            model.load_state_dict({name: each for name, each in tensors.items() if name in wanted and self._takes(name)}, strict=False)
        for name in self.domains if model.item_embedding else []:
            known = self.tables[name].known
            assert known is not None
            model.item_embedding[f"in_{name}"].get_parameter("weight").data[~known.cpu()] = (
                0  # they get no gradient: the saved model ignores them
            )
            embedding = cast(nn.Embedding, model.item_embedding[f"in_{name}"])
            embedding.sparse = self._samples(name)  # then a step updates the rows that it reads alone
        return model

    def _collaborative(self, name: str) -> Tensor:
        """[N, E] collaborative vectors of a domain's training interactions."""
        sequences = self.sequences[name]
        size, window = len(self.tables[name].codes), self.config.features.structure.window
        together = co_occurrence(sequences.indptr, sequences.items, size, window, sequences.weights)
        return torch.from_numpy(collaborative_vectors(together, self.config.features.structure.dim, self.seed))

    def _code_sums(self, name: str) -> Tensor:
        """[N, E] sum of the codewords of each semantic ID; of random ones where the IDs were given."""
        codes = torch.from_numpy(catalog_codes(self.run, name)[: len(self.tables[name].codes)])
        if self.config.sequencer.start == "codebooks" and not self.config.data.semantic_ids:
            books: Tensor = load_quantizers(self.run)[0].quantizer.codebooks
        else:
            levels = self.run.read_json("semantic_ids/manifest.json")["counts"]["num_levels"]
            books = torch.randn(levels, self.codebook_size, self.config.sequencer.width)
        return books[torch.arange(len(books)), codes[:, : len(books)]].sum(1)

    def _takes(self, name: str) -> bool:
        """Whether training starts from a pre-trained tensor: the layers transfer to other domains, embeddings of codes and items do not."""
        seen = set(self.domains) <= set(self.config.pretrained)
        return seen or self.config.finetune.transfer == "all" or name.startswith("layers.")

    def adjust(self, model: nn.Module, epoch: int) -> None:
        pass

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Rows of (domain, user, begin, end, sample): each batch of one domain, the domains' batches shuffled together."""
        batches: list[np.ndarray] = []
        for number, name in enumerate(self.domains):
            windows = self._windows(number, name, epoch)
            batches += [windows[rows] for rows in shuffled_batches(len(windows), self.settings.batch_size, self.seed + number, epoch)]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(batches))
        return [batches[place] for place in order]

    def _windows(self, number: int, name: str, epoch: int) -> np.ndarray:
        """Windows of at most `max_items` training items: the latest of each user, and earlier ones at places that vary by epoch."""
        indptr, size = self.sequences[name].indptr, self.config.sequencer.max_items
        lengths = np.diff(indptr)
        users = np.repeat(np.arange(len(lengths)), np.where(lengths > 1, -(-lengths // size), 0))
        place = np.arange(len(users)) - np.searchsorted(users, users)
        sample = users * 1024 + np.minimum(place, 1023) + number * 2**40
        shift = np.floor(uniform(self.seed + WINDOW_STREAM, epoch, sample, 1)[:, 0] * size).astype(np.int64)
        end = np.where(place == 0, lengths[users], np.maximum(lengths[users] - place * size + shift, np.minimum(lengths[users], size)))
        begin = np.maximum(end - size, 0)
        return np.stack([np.full(len(users), number), users, indptr[users] + begin, indptr[users] + end, sample], axis=1)

    def loss(self, model: Any, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        return (self._next_items if self.causal else self._masked_items)(model, samples, epoch, device)

    def _next_items(self, model: Sequencer, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        """Every position of a window predicts the item after it."""
        name = self.domains[samples[0, 0]]
        begin, lengths = samples[:, 2], samples[:, 3] - samples[:, 2] - 1
        first = np.cumsum(lengths) - lengths
        places = np.repeat(begin - first, lengths) + np.arange(int(lengths.sum()))
        items, everywhere = self.sequences[name].items, np.arange(lengths.max()) < lengths[:, None]
        batch, _ = pack(items[places], lengths, everywhere)
        following = pack(places + 1, lengths, everywhere)[0].items.numpy()
        batch, table, target = to_device(batch, device), self._table_on(name, device), torch.from_numpy(items[following]).to(device)
        weight = self._weights(name, following, device)
        own, sampled, left_out = None, None, self._leaves_out(name)
        if self.settings.sampled_items and self._samples(name):
            sampled = sample_items(batch.items, target, batch.groups, self.frequency[name].to(device), self.settings.sampled_items)
        if left_out or sampled is not None:
            own = own_items(batch.items, target, batch.groups, left_out)
        return model.loss(model(batch, table), target, table, own, sampled, weight), _size(target, weight)

    def _leaves_out(self, name: str) -> bool:
        """Whether the softmax of a query leaves out the other items of its sequence."""
        given = self.settings.exclude_own_items
        return self.repeated[name] < BUYING_AGAIN if given is None else given

    def _samples(self, name: str) -> bool:
        """Whether the softmax of a domain runs over a sample of its items."""
        return self.causal and 2 * (self.settings.sampled_items or len(self.tables[name].codes)) < len(self.tables[name].codes)

    def _masked_items(self, model: Sequencer, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        name = self.domains[samples[0, 0]]
        s, begin = self.settings, samples[:, 2]
        lengths = draw_lengths(samples[:, 3] - begin, samples[:, 4], self.seed, epoch, s.last_item_share, s.prefix_share)
        first = np.cumsum(lengths) - lengths
        places = np.repeat(begin - first, lengths) + np.arange(int(lengths.sum()))
        masks = draw_masks(lengths, samples[:, 4], self.seed, epoch, _plain(s.masks), _plain(s.mask_ratio), s.last_item_share)
        packed, _ = pack(places, lengths, masks)
        wanted = packed.items[packed.masked].numpy()
        batch = packed._replace(items=torch.from_numpy(self.sequences[name].items[packed.items.numpy()]))
        batch, table, weight = to_device(batch, device), self._table_on(name, device), self._weights(name, wanted, device)
        target = batch.items[batch.masked]
        return model.loss(model(batch, table), target, table, weight=weight), _size(target, weight)

    def _weights(self, name: str, places: np.ndarray, device: torch.device) -> Tensor | None:
        """[P] weights of the training items at some places of a domain; None where all are 1."""
        weights = self.sequences[name].weights
        return None if weights is None else torch.from_numpy(weights[places]).to(device)

    def evaluate(self, model: Any, device: torch.device) -> ValidationMetrics:
        """Ranks of the validation items among all that their users have not had, averaged over domains."""
        found = []
        for name in self.domains:
            histories, targets = validation_items(self.sequences[name], getattr(self.settings, "validation_users", SAMPLE))
            if len(targets):
                found.append(rank_targets(model, self._table_on(name, device), histories, targets))
        return mean_metrics(found)

    def complete(self, model: Sequencer, device: torch.device) -> None:
        """Fit what a fine-tuned model asks for after an empty history, and what it adds to the scores of items of the history.

        The second by validation items; where these are trained on, it is what the model has that was trained without them.
        """
        if not isinstance(self.settings, Finetune):
            return
        (name,) = self.domains
        table = self._table_on(name, device)
        if model.empty_query is not None:
            counts = np.bincount(self.sequences[name].items, self.sequences[name].weights, minlength=len(table.codes))
            model.empty_query.copy_(query_of_popularity(model, table, torch.from_numpy(counts)))
        histories, targets = validation_items(self.sequences[name], MOST_FOR_REPEATS)
        if model.repeats is not None and self.include != "none":
            model.repeats.copy_(self.run.load_model(f"finetune/{name}/model")[0]["repeats"])
        elif model.repeats is not None and len(targets):
            model.repeats.fill_(calibrated_repeats(*repeat_odds(model, table, histories, targets)))

    def _table_on(self, name: str, device: torch.device) -> ItemTable:
        """A domain's table on a device, where it stays."""
        self.tables[name] = self.tables[name].to(device)
        return self.tables[name]


def repeated_share(indptr: np.ndarray, items: np.ndarray) -> float:
    """Share of the training items [S] of users, who begin at indptr [U + 1], that their user has had before."""
    if not len(items):
        return 0.0
    users = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return 1 - len(np.unique(users * (int(items.max()) + 1) + items)) / len(items)


def _size(target: Tensor, weight: Tensor | None) -> float:
    """What a loss that is summed over the targets is divided by."""
    return float(len(target)) if weight is None else float(weight.sum())


def _plain(values: Mapping[MaskStrategy, float]) -> dict[str, float]:
    return {str(name): value for name, value in values.items()}


def validation_items(sequences: columns.Sequences, most: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Histories and validation items [V] of at most `most` users, chosen by hash."""
    users = np.flatnonzero(sequences.valid >= 0)
    users = users[np.argsort(uniform(VALIDATION_STREAM, 0, users, 1)[:, 0])[:most]]
    return [sequences.history(int(user), "valid") for user in users], sequences.valid[users]


def mean_metrics(ranks_of_domains: list[np.ndarray]) -> ValidationMetrics:
    """Metrics of ranks, averaged over domains; none without a domain, so that a training keeps its last epoch."""
    values = [[metrics.hit_rate(rank, 10).mean(), metrics.ndcg(rank, 10).mean()] for rank in ranks_of_domains]
    if not values:
        return {}
    hit_rate, ndcg = np.mean(values, axis=0)
    return {"hr@10": float(hit_rate), "ndcg@10": float(ndcg)}


def rank_targets(model: Sequencer, table: ItemTable, histories: list[np.ndarray], targets: np.ndarray, batch_size: int = 512) -> np.ndarray:
    """[B] rank of each target after its history, among all items that are not in the history.

    A sequence model is not chosen by how it ranks items of the history: the blend has a weight for those, and `score` leaves them out.
    """
    vectors, bias = model.catalog_vectors(table)
    result = []
    for begin in range(0, len(histories), batch_size):
        rows = slice(begin, begin + batch_size)
        queries = next_item_queries(model, histories[rows], table)
        target = torch.from_numpy(targets[rows]).to(table.codes.device)
        result.append(ranks(model.scores(queries, vectors, bias), target, histories[rows]).cpu().numpy())
    return np.concatenate(result)


def repeat_odds(
    model: Sequencer, table: ItemTable, histories: list[np.ndarray], targets: np.ndarray, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """What the model gives the items of a history together, against all others.

    Returns:
        [B] logarithm of the odds that the next item is one of the history, by a softmax over the catalog, and [B] booleans, whether it is.
    """
    vectors, bias = model.catalog_vectors(table)
    batch_size = max(1, min(batch_size, MOST_SCORES // len(vectors)))  # several arrays of float64 are held at once
    odds, repeated = [], []
    for begin in range(0, len(histories), batch_size):
        rows = slice(begin, begin + batch_size)
        scores = model.scores(next_item_queries(model, histories[rows], table), vectors, bias).double()
        seen = torch.zeros_like(scores, dtype=torch.bool)
        seen[tuple(torch.from_numpy(each) for each in pairs(histories[rows], scores.shape[1]))] = True
        odds.append(scores.masked_fill(~seen, -torch.inf).logsumexp(1) - scores.masked_fill(seen, -torch.inf).logsumexp(1))
        repeated.append(seen.gather(1, torch.from_numpy(targets[rows]).to(seen.device)[:, None])[:, 0])
    return torch.cat(odds).cpu(), torch.cat(repeated).cpu()


def calibrated_repeats(odds: Tensor, repeated: Tensor) -> float:
    """What has to be added to the scores of items of the history so that as many repeats are expected as there are.

    Args:
        odds: [B] logarithm of the odds of a repeat without it.
        repeated: [B] booleans; half a repeat is added, so that none at all does not give minus infinity.

    Returns:
        0 where there is no history with an item, or none without one.
    """
    odds, repeated = odds[odds.isfinite()], repeated[odds.isfinite()]
    if not len(odds):
        return 0.0
    share = (float(repeated.sum()) + 0.5) / (len(repeated) + 1)
    return float(optimize.brentq(lambda added: float(torch.sigmoid(odds + added).mean()) - share, -MOST_REPEATS, MOST_REPEATS))
