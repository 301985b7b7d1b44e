"""The stage `ranking`: item-item weights part by part, then the blend and the reranker, fitted on validation items."""

from __future__ import annotations

from typing import NamedTuple, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from qbert_ray import metrics
from qbert_ray.config.schema import Config, Ranking, Workers
from qbert_ray.execution.device import own_device
from qbert_ray.execution.executor import Executor
from qbert_ray.execution.progress import Progress
from qbert_ray.random_streams import COLD_STREAM, SAMPLE_STREAM, uniform
from qbert_ray.ranking.blend import (
    WITHOUT_NETWORK,
    Blend,
    Candidates,
    Shrinkage,
    candidates,
    choose_shrinkage,
    fit_blend,
    join_candidates,
    no_candidates,
    sequence_alone,
    without_network,
)
from qbert_ray.ranking.loader import BLEND, ITEM_ITEM_TEXT, RERANKER, load_ranker
from qbert_ray.ranking.ranker import Ranker, batches
from qbert_ray.ranking.reranker import CandidateLists, Reranker, fit_reranker
from qbert_ray.ranking.weights import write_weights
from qbert_ray.storage import columns
from qbert_ray.storage.directory import RunDir
from qbert_ray.top_k import add_to_seen, ranks

ALONE = "alone"  # the sequence model by itself, as the blend is compared with it
COLD_SHARE = 0.1  # of the trained items that are treated as cold while the blend is fitted


class Gain(TypedDict):
    """ndcg@10 of validation items among unseen ones, each half of the users ranked by the blend of the other half."""

    kept: bool
    alone: float  # of the sequence model
    blended: float
    error: float  # standard error over users of their difference


class ValidationUsers(NamedTuple):
    """Validation users: their histories and targets."""

    histories: list[np.ndarray]
    target: Tensor  # [V] item_index

    @classmethod
    def of(cls, sequences: columns.Sequences, users: np.ndarray) -> ValidationUsers:
        return cls([sequences.history(user, "valid") for user in users], torch.from_numpy(sequences.valid[users]))


RankingCounts = TypedDict(
    "RankingCounts",
    {
        "items": int,
        "weights": int,  # item-item weights that are not zero
        "ridge": NotRequired[dict[str, object]],  # settings of the ridge regression that were chosen, where one is "auto"
        "users": int,
        "fitted_on": int,  # validation histories whose target is among the candidates
        "shrinkage": dict[str, float],  # the penalties of the blend that were chosen
        "blend_weights": dict[str, float],  # score feature -> weight, for a history of average description
        "blend_weights_of_cold_items": dict[str, float],
        "model_ndcg@10": float,  # of validation items among unseen ones, by the blend of users of the other half, if it is kept
        "sequencer_ndcg@10": float,
        "ridge_ndcg@10": float,
        "transitions_ndcg@10": float,
        "item_item_text_ndcg@10": NotRequired[float],
        "blending": Gain,
        "reranking": NotRequired[dict[str, float]],  # kept; blended and reranked: ndcg@10 by cross-fitting; error
    },
)


def fit_ranking(config: Config, run: RunDir, executor: Executor, progress: Progress) -> dict[str, RankingCounts]:
    """Write ranking/weights, ranking/blend/<domain> and ranking/reranker/<domain>; returns the counts of the manifest."""
    counts: dict[str, RankingCounts] = {}
    for domain in config.data.targets:
        progress.note(domain)
        done = write_weights(config, run, domain, executor, progress)
        counts[domain] = cast(RankingCounts, done | executor.get(executor.submit(_fit, run, domain, config.ranking, workers=Workers())))
    return counts


def _fit(run: RunDir, domain: str, settings: Ranking) -> dict[str, object]:
    """Fit the blend on validation items, then the reranker, and save both; returns what they gain on validation items.

    The blend is kept where it ranks better by cross-fitting than the sequence model alone, each half of the users ranked by the blend of
    the other half. Otherwise the blend that is saved ranks as the sequence model does.
    """
    ranker = load_ranker(run, domain, settings, own_device(), blended=False)
    sequences = columns.to_sequences(run.read("ingest/sequences", domain))
    everybody = np.flatnonzero(sequences.valid >= 0)
    everybody = everybody[np.argsort(uniform(SAMPLE_STREAM, 0, everybody, 1)[:, 0])]
    users = everybody[: settings.validation_users]
    halves = [ValidationUsers.of(sequences, users[part::2]) for part in (0, 1)]
    simulating, cold = _simulating(ranker)
    found = [_candidates(simulating, cold, *half, settings.candidates) for half in halves]
    own, without = [both[0] for both in found], [both[1] for both in found if both[1] is not None]
    shrinkages = choose_shrinkage(own), choose_shrinkage(without)
    ndcg = _cross_fitted(ranker, halves, found, shrinkages)
    blending = _blend_gain(ndcg, settings)
    everything = join_candidates(own)
    assert ranker.item_item is not None
    names = ranker.item_item.names
    blend = fit_blend(everything, shrinkages[0]) if blending["kept"] else sequence_alone(len(names), ranker.repeats("sequencer"))
    baseline = fit_blend(join_candidates(without), shrinkages[1]) if without else None
    for folder, each in ((BLEND, blend), (ITEM_ITEM_TEXT, baseline)):
        if each is not None:
            run.save_model(f"{folder}/{domain}", each._asdict(), {"score_features": list(names)})
    ranker.use(blend, item_item_text=baseline)
    result: dict[str, object] = {
        "users": len(users),
        "fitted_on": len(everything.target),
        "shrinkage": shrinkages[0]._asdict(),
        **_average_weights(blend, names),
    }
    result |= {f"{name}_ndcg@10": metrics.interval(values)["value"] for name, values in ndcg.items() if name != ALONE}
    result |= {"model_ndcg@10": blending["blended" if blending["kept"] else "alone"], "blending": blending}
    if settings.rerank:
        reranker, gain = _fit_reranker(ranker, sequences, everybody[: settings.rerank_users])
        if reranker is not None:
            run.save_model(f"{RERANKER}/{domain}", reranker.state_dict(), {"num_features": reranker.num_features})
        result["reranking"] = {"kept": reranker is not None} | gain
    return result


def _simulating(ranker: Ranker) -> tuple[Ranker, Tensor]:
    """A copy that scores a share of the trained items as cold items are scored, so that the blend learns weights for these; and [N] which."""
    assert ranker.item_item is not None
    cold = torch.zeros(ranker.trained, dtype=torch.bool)
    if "content" in ranker.item_item.contents:
        drawn = torch.from_numpy(uniform(COLD_STREAM, 0, np.arange(ranker.trained), 1)[:, 0] < COLD_SHARE)
        cold = drawn & ~drawn.all()  # a catalog of a few items: some must stay trained to be neighbours
    return ranker.with_simulated_cold_items(cold.nonzero()[:, 0]) if cold.any() else ranker, cold


def _candidates(
    simulating: Ranker, cold: Tensor, histories: list[np.ndarray], target: Tensor, count: int
) -> tuple[Candidates, Candidates | None]:
    """What the blend is fitted on; real cold items are left out.

    Args:
        simulating: as `_simulating` makes it.
        cold: [trained] which items it treats as cold.
        histories: of the validation users.
        target: [V] their validation items.
        count: candidates by each score feature.

    Returns:
        The candidates by all score features; and those of the baseline, by features without a network; None where there are no texts.
    """
    assert simulating.item_item is not None
    trained, available, names = simulating.trained, simulating.item_item.available, simulating.item_item.names
    kinds = [available]
    if "text" in simulating.item_item.contents:
        kinds.append([number for number in available if names[number] in WITHOUT_NETWORK])
    samples: list[list[Candidates]] = [[] for _ in kinds]
    with torch.inference_mode():
        for rows in batches(len(histories), simulating.num_features * simulating.num_items):
            sequence, features, lengths = simulating.score_features(histories[rows])
            warm = sequence[:, :trained], features[:, :, :trained]
            for found, scores in zip(samples, kinds, strict=True):
                found.append(candidates(*warm, lengths, target[rows], cold, scores, count))
    everything, *others = (
        Candidates(*(torch.cat(pieces).clone() for pieces in zip(*found, strict=True))) if found else no_candidates(len(names))
        for found in samples
    )
    return everything, without_network(others[0], names) if others else None


def _average_weights(blend: Blend, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Blend weights for a history of average description, by score feature."""
    weights = blend.weights_for(blend.centre[None] + torch.tensor([[1.0, 0, 0]]))[0].tolist()
    return {
        "blend_weights": dict(zip(names, weights, strict=False)),
        "blend_weights_of_cold_items": dict(zip((*names, "cold"), weights[len(names) :], strict=True)),
    }


def _cross_fitted(
    ranker: Ranker,
    halves: list[ValidationUsers],
    found: list[tuple[Candidates, Candidates | None]],
    shrinkages: tuple[Shrinkage, Shrinkage],
) -> dict[str, np.ndarray]:
    """Ranking -> [V] ndcg@10 of validation items among unseen ones, as fine-tuning is judged, each half ranked by blends of the other half.

    `ALONE` is the sequence model with what it adds to repeats, which a blend weighs too: a target that its user had before costs both alike.

    Args:
        ranker: without a blend; it has one afterwards.
        halves: the validation users.
        found: candidates of either half, as `_candidates` gives them.
        shrinkages: of the blend and of the baseline.
    """
    gained: dict[str, list[np.ndarray]] = {"model": [np.zeros(0)], ALONE: [np.zeros(0)]}
    for (own, without), (histories, target) in zip(found[::-1], halves, strict=True):
        baseline = fit_blend(without, shrinkages[1]) if without is not None else None
        ranker.use(fit_blend(own, shrinkages[0]), item_item_text=baseline)
        with torch.inference_mode():
            for rows in batches(len(histories), ranker.num_features * ranker.num_items):
                each = ranker.scores(histories[rows])
                each[ALONE] = add_to_seen(each["sequencer"], histories[rows], ranker.repeats("sequencer"))
                for name, scores in each.items():
                    values = metrics.ndcg(ranks(scores, target[rows], histories[rows]).numpy(), 10)
                    gained.setdefault(name, []).append(values)
    return {name: np.concatenate(pieces) for name, pieces in gained.items()}


def _blend_gain(ndcg: dict[str, np.ndarray], settings: Ranking) -> Gain:
    """What the blend gains by cross-fitting, and whether it is kept: where there is nothing to compare, it is."""
    blended, alone = ndcg["model"], ndcg[ALONE]
    users = len(alone)
    means = [float(each.mean()) if users else 0.0 for each in (alone, blended)]
    error = float((blended - alone).std(ddof=1) / users**0.5) if users > 1 else 0.0
    kept = means[1] > means[0] or not users or not settings.sequence_scores
    return {"kept": kept, "alone": means[0], "blended": means[1], "error": error}


def _fit_reranker(ranker: Ranker, sequences: columns.Sequences, users: np.ndarray) -> tuple[Reranker | None, dict[str, float]]:
    """As `fit_reranker`, on the validation items of some users."""
    lists = []
    with torch.inference_mode():
        for rows in batches(len(users)):
            histories = [sequences.history(user, "valid") for user in users[rows]]
            lists.append(ranker.candidate_lists(histories, torch.from_numpy(sequences.valid[users[rows]])))
    joined = [torch.cat(pieces).clone() for pieces in zip(*lists, strict=True)]
    return fit_reranker(CandidateLists(*joined), seed=0) if lists else (None, {})
