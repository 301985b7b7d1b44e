"""What differs between the three trainings; `training.Loop` does the rest.

Each task is built in the worker from the run directory and a `Config`, holds its inputs in memory, and makes its batches
from (seed, epoch) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray import columns, kmeans, metrics
from qbert_ray.artifacts import ArtifactError, RunDir
from qbert_ray.catalog import catalog_codes, content_vectors, load_quantizers, read_warm, warm_items
from qbert_ray.config import Config, SequenceTraining
from qbert_ray.fusion import DynamicFusion, alignment_loss, geometry_loss, view_distance
from qbert_ray.masking import draw_lengths, draw_masks, uniform
from qbert_ray.ranking import ranks
from qbert_ray.rqvae import RQVAE, normalised_error
from qbert_ray.sequencer import Sequencer, next_item_queries, pack, to_device

SAMPLE = 4096  # items that the metrics of stage 1 are taken over
ID_DROPOUT_STREAM, WINDOW_STREAM, VALIDATION_STREAM = 1, 2, 3  # keep draws for different purposes apart


class Features:
    """features/<modality>: the vectors of the items of a part, or of all that training may see."""

    def __init__(self, run: RunDir, part: str | None = None, domains: Sequence[str] = ()) -> None:
        self.vectors: dict[str, np.ndarray] = {}  # modality -> [N, J, F]
        self.present: dict[str, np.ndarray] = {}  # modality -> [N, J]
        for modality in ("text", "image", "structure"):
            if not run.parts(f"features/{modality}"):
                continue
            table = run.read_part(f"features/{modality}", part) if part else read_warm(run, f"features/{modality}", domains)
            self.vectors[modality] = columns.to_numpy(table["vectors"])
            self.present[modality] = columns.to_numpy(table["present"])
            self.table = table.select(columns.KEYS)

    @property
    def widths(self) -> dict[str, int]:
        return {name: vectors.shape[-1] for name, vectors in self.vectors.items()}

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return tuple(
            {name: torch.from_numpy(array[rows]).to(device) for name, array in source.items()} for source in (self.vectors, self.present)
        )


class FusionTask:
    """Stage 1, Eq. 5."""

    criterion = None

    def __init__(self, config: Config, run: RunDir) -> None:
        self.settings, self.seed = config.fusion, config.run.seed
        self.features = Features(run, domains=list(config.data.domains))
        self.num_items = self.features.table.num_rows

    def description(self) -> dict[str, Any]:
        s = self.settings
        names = ("width", "num_layers", "num_heads", "ffn_width", "dropout", "dynamic", "halt_threshold", "temperature")
        return {"num_items": self.num_items, "feature_widths": self.features.widths} | {name: getattr(s, name) for name in names}

    def build(self) -> nn.Module:
        return DynamicFusion(**self.description())

    def adjust(self, model: nn.Module, epoch: int) -> None:
        pass

    def batches(self, epoch: int) -> list[np.ndarray]:
        return shuffled_batches(self.num_items, self.settings.batch_size, self.seed, epoch)

    def loss(self, model: Any, samples: np.ndarray, epoch: int, device: torch.device) -> tuple[Tensor, float]:
        hidden = uniform(self.seed + ID_DROPOUT_STREAM, epoch, samples, 1)[:, 0] < self.settings.id_dropout
        item = torch.from_numpy(np.where(hidden, model.unknown, samples)).to(device)
        features, present = self.features.batch(samples, device)
        fused = model(item, features, present, unread=self._unread(hidden, samples, device))
        s = self.settings
        loss = alignment_loss(fused, s.contrast_temperature, s.consistency_weight, s.ponder_weight, s.ponder_target)["loss"]
        if s.geometry_weight:
            loss = loss + s.geometry_weight * geometry_loss(fused, features, present)
        return loss * len(samples), float(len(samples))

    def _unread(self, hidden: np.ndarray, samples: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """A cold item has no structure either: what trains with the unknown query is fused without, and learns to foretell it."""
        if "structure" not in self.features.present:
            return {}
        others = [there[samples].any(1) for name, there in self.features.present.items() if name != "structure"]
        return {"structure": torch.from_numpy(hidden & np.any(others, axis=0)).to(device)} if others else {}

    def evaluate(self, model: Any, device: torch.device) -> dict[str, Any]:
        rows = np.arange(min(self.num_items, SAMPLE))
        fused = model(torch.from_numpy(rows).to(device), *self.features.batch(rows, device))
        histogram = torch.bincount(fused.depth, minlength=self.settings.num_layers + 1)[1:].tolist()
        return {
            "view_distance": float(view_distance(fused)),
            "mean_depth": float(fused.depth.float().mean()),
            "mean_gate": float(fused.gate.mean()),
            "depth_histogram": histogram,
        }


class RqvaeTask:
    """Stage 2, Eq. 6-9; what is built is done already where the quantizer needs no gradients."""

    criterion = None

    def __init__(self, config: Config, run: RunDir) -> None:
        self.settings, self.seed = config.rqvae, config.run.seed
        self.embeddings = torch.from_numpy(sample_embeddings(run, list(config.data.domains), self.settings.max_items, self.seed))

    def description(self) -> dict[str, Any]:
        names = ("num_levels", "codebook_size", "codebook_dim")
        description = {"width": self.embeddings.shape[1], "hidden": []} | {name: getattr(self.settings, name) for name in names}
        if self.settings.quantizer == "rqvae":
            description |= {name: getattr(self.settings, name) for name in ("hidden", "shortcut", "commitment_weight")}
        return description

    def build(self) -> nn.Module:
        model = RQVAE(**self.description())
        match self.settings.quantizer:
            case "kmeans":
                kmeans.fit_residual(model, self.embeddings, self.seed)
            case "opq":
                kmeans.fit_product(model, self.embeddings, self.seed)
            case _:
                model.start(self.embeddings)
        return model

    def adjust(self, model: Any, epoch: int) -> None:
        if epoch < self.settings.warmup_epochs:
            return
        latent = torch.cat([model.encode(piece.to(model.mean.device)) for piece in self.embeddings.split(SAMPLE)])
        if epoch == self.settings.warmup_epochs:
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
        return model(batch, quantize=epoch >= self.settings.warmup_epochs)["loss"] * len(samples), float(len(samples))

    def evaluate(self, model: Any, device: torch.device) -> dict[str, Any]:
        pieces = [piece.to(device) for piece in self.embeddings.split(SAMPLE)]
        codes = torch.cat([model.quantizer.codes(model.encode(piece)) for piece in pieces]).cpu().numpy()
        return {
            "items": len(codes),
            "reconstruction_error": float(normalised_error(model, pieces[0])),
            "collision_rate": metrics.collision_rate(codes),
            "codebook_usage": metrics.codebook_usage(codes, self.settings.codebook_size),
            "perplexity": metrics.perplexity(codes, self.settings.codebook_size),
        }


class ExtraQuantizerTask(RqvaeTask):
    """One of `rqvae.extra_quantizers`: as many codes of the same embeddings, cut otherwise."""

    def __init__(self, config: Config, run: RunDir, number: int) -> None:
        quantizer, settings = config.rqvae.extra_quantizers[number], config.rqvae
        levels = min(settings.num_levels, settings.codebook_dim) if quantizer == "opq" else settings.num_levels
        settings = settings.model_copy(update={"quantizer": quantizer, "num_levels": levels})
        super().__init__(config.model_copy(update={"rqvae": settings}), run)
        self.seed += 1 + number  # residual k-means of the same seed would be the same codes


def sample_embeddings(run: RunDir, domains: list[str], most: int, seed: int) -> np.ndarray:
    """[N, D] fused embeddings of all items that training may see, or of `most` of them; needs memory for twice those.

    Which items depends on seed, number of items and their order, not on the parts.
    """
    names = [name for domain in domains for name in run.parts("fusion/embeddings", domain)]
    if not names:
        raise ArtifactError(f"no table fusion/embeddings in {run.uri}; run the stage that makes it: qbert-ray train-fusion")
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


class SequencerTask:
    """Stage 3, Eq. 11: pre-training over several domains, or fine-tuning on one."""

    criterion = ("ndcg@10", 1.0)

    def __init__(self, config: Config, run: RunDir, domains: list[str], settings: SequenceTraining, start: str | None = None) -> None:
        self.config, self.settings, self.seed, self.run, self.start = config, settings, config.run.seed, run, start
        self.domains = domains
        counts = run.read_json("semantic_ids/manifest.json")["counts"]
        self.codebook_size = counts["codebook_size"]
        levels = None if config.sequencer.tokens == "item" else counts["num_levels"]  # flat: a position for each code of the ID alone
        self.catalogs = {name: catalog_codes(run, name)[: warm_items(run, name), :levels] for name in domains}
        self.sequences = {name: columns.to_sequences(run.read("ingest/sequences", name)) for name in domains}
        self.contents = {name: content_vectors(run, name)[: len(self.catalogs[name])] for name in domains} if self._reads_content() else {}

    def description(self) -> dict[str, Any]:
        s = self.config.sequencer
        names = ("width", "num_layers", "num_heads", "ffn_width", "dropout", "max_items", "tokens", "loss", "logits", "temperature")
        names += ("code_dropout",)
        return {
            "recall": s.recall and s.tokens == "item",
            "content_width": next(iter(self.contents.values())).shape[1] if self.contents else 0,
            "num_levels": int(self.catalogs[self.domains[0]].shape[1]),
            "codebook_size": self.codebook_size,
            "warm_items": {name: len(self.catalogs[name]) for name in self.domains} if s.embeds_items else {},
        } | {name: getattr(s, name) for name in names}

    def build(self) -> nn.Module:
        model = Sequencer(**self.description())
        for name, content in self.contents.items():
            model.hold_content(name, content)
        for name in self.domains if self.config.sequencer.embeds_items else []:
            counts = np.bincount(self.sequences[name].items, minlength=len(self.catalogs[name]))
            getattr(model, f"warm_{name}").copy_(torch.from_numpy(counts > 0)[:, None])
        if self.config.sequencer.start == "codebooks" and not self.config.data.semantic_ids:
            books = torch.cat([each.quantizer.codebooks for each in load_quantizers(self.run)])
            model.start_from(books[: model.num_levels])
        if self.start:
            tensors, _ = self.run.load_model(self.start)
            known = model.state_dict()
            model.load_state_dict({name: each for name, each in tensors.items() if name in known and self._takes(name)}, strict=False)
        return model

    def _takes(self, name: str) -> bool:
        """Whether a pre-trained tensor is the start: how histories are read holds in other domains, what their items mean does not."""
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

    def _reads_content(self) -> bool:
        s = self.config.sequencer
        return s.content and s.tokens == "item" and bool(self.run.parts("fusion/embeddings"))

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
        name = self.domains[samples[0, 0]]
        s, begin = self.settings, samples[:, 2]
        lengths = draw_lengths(samples[:, 3] - begin, samples[:, 4], self.seed, epoch, s.last_item_share, s.prefix_share)
        first = np.cumsum(lengths) - lengths
        items = self.sequences[name].items[np.repeat(begin - first, lengths) + np.arange(int(lengths.sum()))]
        masks = draw_masks(lengths, samples[:, 4], self.seed, epoch, dict(s.masks), dict(s.mask_ratio), s.last_item_share)
        batch, _ = pack(items, lengths, masks)
        batch, catalog = to_device(batch, device), self._catalog(name, device)
        query = model(batch, catalog, name)
        return model.loss(query, batch.items[batch.masked], catalog, name), float(len(query))

    def evaluate(self, model: Any, device: torch.device) -> dict[str, Any]:
        """Ranks of the validation items among all that their users have not had, averaged over domains."""
        values = []
        for name in self.domains:
            sequences = self.sequences[name]
            users = np.flatnonzero(sequences.valid >= 0)
            most = getattr(self.settings, "validation_users", SAMPLE)
            users = users[np.argsort(uniform(VALIDATION_STREAM, 0, users, 1)[:, 0])[:most]]
            if len(users):
                rank = rank_targets(
                    model, self._catalog(name, device), name, [sequences.history(u, "valid") for u in users], sequences.valid[users]
                )
                values.append([metrics.hit_rate(rank, 10).mean(), metrics.ndcg(rank, 10).mean()])
        hit_rate, ndcg = np.mean(values, axis=0) if values else (0.0, 0.0)
        return {"hr@10": float(hit_rate), "ndcg@10": float(ndcg)}

    def _catalog(self, name: str, device: torch.device) -> Tensor:
        return torch.from_numpy(self.catalogs[name]).to(device)


def rank_targets(
    model: Sequencer, catalog: Tensor, domain: str, histories: list[np.ndarray], targets: np.ndarray, batch_size: int = 512
) -> np.ndarray:
    """[B] rank of each target after its history, among all that is not in it.

    What a sequence model thinks of items that were had already is not what it is chosen by: the memory's mix knows them, and
    `score` leaves them out.
    """
    vectors, bias = model.catalog_vectors(catalog, domain)
    result = []
    for begin in range(0, len(histories), batch_size):
        rows = slice(begin, begin + batch_size)
        queries = next_item_queries(model, histories[rows], catalog, domain)
        target = torch.from_numpy(targets[rows]).to(catalog.device)
        result.append(ranks(model.scores(queries, vectors, bias), target, histories[rows]).cpu().numpy())
    return np.concatenate(result)


def shuffled_batches(size: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of about equal size, at most batch_size, in an order that follows from seed and epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(size)
    return np.array_split(order, max(1, -(-size // batch_size)))
