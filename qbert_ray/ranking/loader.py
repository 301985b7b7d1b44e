"""Builds the ranker of a domain from a run directory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from qbert_ray.config.schema import Config, Ranking
from qbert_ray.ranking.blend import Blend
from qbert_ray.ranking.item_item import ItemItem
from qbert_ray.ranking.ranker import Ranker
from qbert_ray.ranking.reranker import Reranker
from qbert_ray.ranking.score_features import score_features
from qbert_ray.sequence.item_table import ColdItems, ItemTable, nearest_trained_items
from qbert_ray.sequence.model import Sequencer
from qbert_ray.storage.catalog import (
    catalog_codes,
    content_modalities,
    content_vectors,
    item_content,
    modalities_there,
    modality_vectors,
    run_config,
    warm_items,
)
from qbert_ray.storage.directory import ArtifactError, RunDir

WEIGHTS, BLEND, RERANKER = "ranking/weights", "ranking/blend", "ranking/reranker"
ITEM_ITEM_TEXT = "ranking/item_item_text"  # blend of a baseline
RIDGE = "ranking/ridge"  # settings that were chosen
REFIT, REFIT_WEIGHTS = "refit/sequencer", "refit/weights"  # trained again with interactions that were held out


def load_ranker(
    run: RunDir,
    domain: str,
    settings: Ranking,
    device: str = "cpu",
    blended: bool = True,
    baselines: bool = False,
    refit: bool = False,
) -> Ranker:
    """The fine-tuned sequence model of a domain with its item-item model, blend and reranker, where they are enabled.

    Args:
        run: a run whose stages up to `ranking` are done, or up to `finetune` where ranking is disabled.
        domain: one that was fine-tuned.
        settings: the config's section `ranking`.
        device: where the models compute.
        blended: false: without the blend and the reranker, which are still to be fitted.
        baselines: with the blend of the baseline, which needs the vectors of texts even where the blend does not.
        refit: the sequence model and the item-item weights that the stage `refit` trained, in place of those they were chosen with.

    Raises:
        ArtifactError: a model or table is not there.
    """
    fused = content_vectors(run, domain) if run.parts("fusion/embeddings", domain) else None  # none: semantic IDs were given
    trained = warm_items(run, domain)
    cold = None
    if fused is not None and trained < len(fused):
        cold = nearest_trained_items(fused, torch.arange(trained, len(fused)), torch.arange(trained))
    model = run.load_module(Sequencer, model_folder(domain, refit)).to(device)
    config = run_config(run)
    content = item_content(run, domain, config) if model.content is not None else None
    items = _item_table(run, domain, model, content, cold).to(device)
    if not settings.enabled:
        return Ranker(model, items, trained)
    names = score_features(content_modalities(run, domain, config))
    blend = _load_blend(run, domain, names) if blended else None
    without_network = baselines and run.exists(f"{ITEM_ITEM_TEXT}/{domain}/model.json")
    baseline = _load_blend(run, domain, names, ITEM_ITEM_TEXT) if without_network else None
    reranker = _load_reranker(run, domain) if settings.rerank and blended else None  # it reads all score features
    used = names if blend is None or reranker else [name for each in (blend, baseline) if each is not None for name in each.used(names)]
    contents = {name: vectors.to(device) for name, vectors in _contents(run, domain, fused, used).items()}
    table = run.read(REFIT_WEIGHTS if refit else WEIGHTS, domain)
    item_item = _load_item_item(run, domain, table, settings, model.max_items, contents, cold, len(items.codes), names)
    ranker = Ranker(model, items, trained, item_item, settings.rerank, settings.new_item_bonus)
    if not settings.sequence_scores:
        ranker.vectors, ranker.bias = torch.zeros_like(ranker.vectors), torch.zeros_like(ranker.bias)
    if blend is not None:
        ranker.use(blend, reranker, baseline)
    return ranker


def ranks_by_refit(run: RunDir, config: Config) -> bool:
    """Whether recommendations come from models that were trained again: the config asks for them, and the stage `refit` is done."""
    return config.refit.include != "none" and run.exists("refit/manifest.json")


def model_folder(domain: str, refit: bool) -> str:
    """Folder of a domain's sequence model: of the stage `refit`, or of `finetune`."""
    return f"{REFIT}/{domain}/model" if refit else f"finetune/{domain}/model"


def _item_table(run: RunDir, domain: str, model: Sequencer, content: Tensor | None, cold: ColdItems | None) -> ItemTable:
    """The catalog as a model reads it; where it reads codes alone, they also place cold items. Words place none."""
    codes = torch.from_numpy(catalog_codes(run, domain)[:, : model.num_levels])
    if model.content is None:
        return ItemTable(codes, cold=None if model.num_levels else cold, domain=domain)
    assert content is not None, "a model that reads content was trained on features"
    return ItemTable(codes, content, cold=cold, domain=domain)


def _contents(run: RunDir, domain: str, content: Tensor | None, used: list[str] | tuple[str, ...]) -> dict[str, Tensor]:
    """[N, D] vectors of length 1 of the kinds of content that are used and there."""
    vectors = {name: modality_vectors(run, domain, name) for name in modalities_there(run, domain) if name in used}
    if "content" in used:
        vectors["content"] = F.normalize(content, dim=-1) if content is not None else None
    return {name: each for name, each in vectors.items() if each is not None}


def _load_item_item(
    run: RunDir,
    domain: str,
    table: pa.Table,
    settings: Ranking,
    latest: int,
    contents: dict[str, Tensor],
    cold: ColdItems | None,
    num_items: int,
    names: tuple[str, ...],
) -> ItemItem:
    """The item-item model of a domain; items that came after the stage have no weights in its table."""
    ridge, transitions = (read_matrix(table, name, num_items) for name in ("ridge", "following"))
    popularity = torch.zeros(num_items)
    popularity[: table.num_rows] = torch.from_numpy(table["popularity"].to_numpy().copy())
    decay = run.read_json(f"{RIDGE}/{domain}.json")["decay"] if settings.decay == "auto" else settings.decay
    decays = (float(decay), settings.following_decay)
    return ItemItem(ridge, transitions, decays, settings.scale, latest, contents, popularity, cold, names)


def _load_blend(run: RunDir, domain: str, names: tuple[str, ...], folder: str = BLEND) -> Blend:
    blend = Blend(**run.load_model(f"{folder}/{domain}")[0])
    if blend.num_features != len(names):
        raise ArtifactError(f"the blend in {run.uri}/{folder}/{domain} has other score features; fit it again: qbert-ray ranking --redo")
    return blend


def _load_reranker(run: RunDir, domain: str) -> Reranker | None:
    """None where it did not help."""
    folder = f"{RERANKER}/{domain}"
    return run.load_module(Reranker, folder) if run.exists(f"{folder}/model.json") else None


def read_matrix(table: pa.Table, name: str, num_items: int) -> sparse.csr_matrix:
    """[N, N] item-item weights of a ranking/weights table, "ridge" or "following", a row per target."""
    items, weights = (table[f"{name}_{part}"].combine_chunks() for part in ("items", "weights"))
    indptr = items.offsets.to_numpy().astype(np.int64)
    matrix = sparse.csr_matrix(
        (weights.flatten().to_numpy(), items.flatten().to_numpy(), indptr - indptr[0]), shape=(len(items), num_items)
    )
    matrix.resize(num_items, num_items)
    return matrix
