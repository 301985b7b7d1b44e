"""Batch scoring: every user against the whole catalog, as ScorePart does it with `Ranker.best`; top-10, seen items removed.

    python -m tests.benchmarks.scoring          # instruments' sizes, then 250,000 to 1,000,000 items
    python -m tests.benchmarks.scoring --full   # more users and rounds

Real histories where QBERT_REAL_DATA names a folder with instruments/interactions.parquet, else generated ones. Weights are random, the
blend is one that a finished run on instruments had. Two processes of one thread each, as two actors on two cores; so have the others.
Time is that of all users over their number, the median of alternating rounds.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from qbert_ray.features.structure import co_occurrence
from qbert_ray.ranking.blend import Blend, describe
from qbert_ray.ranking.item_item import ItemItem, Transitions
from qbert_ray.ranking.ranker import Ranker, batches
from qbert_ray.ranking.reranker import Reranker
from qbert_ray.ranking.score_features import SCORE_FEATURES
from qbert_ray.sequence.item_table import ItemTable
from qbert_ray.sequence.model import Sequencer
from qbert_ray.top_k import hide, top_k
from tests.benchmarks.table import Figure, main
from tests.ranking.test_blend import plainly_blended

ITEMS, USERS, LENGTH, PROCESSES, K = 6250, 17_112, 9.0, 2, 10
PAPER = {"width": 256, "num_layers": 4, "num_heads": 4, "ffn_width": 512}
RECIPE = {"width": 128, "num_layers": 2, "num_heads": 4, "ffn_width": 256, "logits": "cosine", "recall": True, "content_width": 128}
BLEND_WEIGHTS = (0.37, 1.31, 0.45, -0.33, 0.0, 0.0, -6.8)  # of SCORE_FEATURES, as a finished run on instruments had it
LEVELS, CODES = 4, 256
TOLD = "the paper, on an RTX 4090 (published, not measured): 2.66 ms"


def histories_of_instruments(rng: np.random.Generator) -> tuple[list[np.ndarray], str]:
    """Item indices of each user in time order, and where they come from."""
    file = Path(os.environ.get("QBERT_REAL_DATA", "/nowhere")) / "instruments" / "interactions.parquet"
    if not file.exists():
        lengths = np.minimum(5 + rng.geometric(1 / (LENGTH - 4), USERS) - 1, 200)
        return [zipf(rng, ITEMS, length) for length in lengths], "generated histories"
    table = pl.read_parquet(file, columns=["user_id", "item_id", "timestamp"])
    table = table.sort("user_id", "timestamp").with_columns(item=pl.col("item_id").rank("dense") - 1)
    lists = table.group_by("user_id", maintain_order=True).agg("item")["item"]
    return [np.array(items, dtype=np.int64) for items in lists.to_list()], "real histories"


def zipf(rng: np.random.Generator, num_items: int, length: int) -> np.ndarray:
    """Items of which few are popular."""
    return np.minimum(num_items ** rng.random(length), num_items - 1).astype(np.int64) * 7919 % num_items


def bare_ranker(num_items: int, settings: dict[str, Any], item_item: ItemItem | None, content: Tensor | None = None) -> Ranker:
    """A `Ranker` of random weights."""
    torch.manual_seed(0)
    model = Sequencer(LEVELS, CODES, **settings).eval()
    codes = torch.randint(CODES, (num_items, LEVELS))
    items = ItemTable(codes, content * content.shape[1] ** 0.5 if content is not None else None)
    ranker = Ranker(model, items, num_items, item_item, cold_item_bonus=0.5)
    if item_item is not None:
        weights = torch.zeros(3, 2 * len(SCORE_FEATURES) + 1)
        weights[0] = torch.tensor([*BLEND_WEIGHTS, *BLEND_WEIGHTS, -0.67])
        weights[1:, :3] = torch.tensor([[0.02, 0.1, 0.05], [-0.05, 0.2, 0.1]])
        reranker = Reranker().eval()
        torch.nn.init.normal_(reranker.layers[-1].weight)
        ranker.use(Blend(weights, torch.tensor([0.0, 1.9, 3.0]), torch.tensor([1.0, 0.5, 1.0])), reranker)
    return ranker


def item_item_of(histories: list[np.ndarray], num_items: int, content: Tensor) -> ItemItem:
    """Item-item weights with the sparsity that real ones have: the 200 strongest neighbours of each item."""
    indptr, items = np.cumsum([0, *map(len, histories)]), np.concatenate(histories)
    counts = co_occurrence(indptr, items, num_items)
    norms = np.sqrt(np.bincount(items, minlength=num_items) + 1.0)
    alike = (sparse.diags(1 / norms) @ counts @ sparse.diags(1 / norms)).tocsr().astype(np.float32)
    for row in range(num_items):
        entries = alike.data[alike.indptr[row] : alike.indptr[row + 1]]
        if len(entries) > 200:
            entries[np.argsort(-entries)[200:]] = 0
    alike.eliminate_zeros()
    transitions = Transitions(indptr, items, num_items, 5, 0.5, 5.0, 200).weights
    return ItemItem(alike, transitions, (0.85, 0.5), 0.01, 50, {"content": content})


def ours(ranker: Ranker) -> Callable[[list[np.ndarray]], None]:
    def score(histories: list[np.ndarray]) -> None:
        for rows in batches(len(histories)):
            ranker.best(histories[rows], K)

    return score


def bert(num_items: int) -> Callable[[list[np.ndarray]], None]:
    """The plain way: BERT of the paper's size, padded to 50, softmax over the catalog at all positions."""
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    model = BertModel(BertConfig(vocab_size=num_items + 2, max_position_embeddings=50, **size), add_pooling_layer=False).eval()
    head = model.embeddings.word_embeddings.weight[:num_items]

    def score(histories: list[np.ndarray]) -> None:
        for begin in range(0, len(histories), 64):
            batch = histories[begin : begin + 64]
            tokens = torch.full((len(batch), 50), num_items + 1)
            for row, history in enumerate(batch):
                tokens[row, : min(len(history), 49)] = torch.from_numpy(history[-49:])
            last = torch.tensor([min(len(history), 49) for history in batch])
            tokens[torch.arange(len(batch)), last] = num_items
            states = model(tokens, attention_mask=(tokens <= num_items).long()).last_hidden_state
            share = (states @ head.T).softmax(-1)[torch.arange(len(batch)), last]
            top_k(hide(share, batch), K)

    return score


def t5(num_items: int) -> Callable[[list[np.ndarray]], None]:
    """TIGER's way: generate the codes of the next item, a beam of 20 inside the trie of the catalog's codes."""
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 128, "d_ff": 1024, "num_heads": 6, "d_kv": 64, "num_layers": 4, "num_decoder_layers": 4}
    first = 2  # 0: padding and start, 1: end
    tokens = {"vocab_size": first + LEVELS * CODES, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    model = T5ForConditionalGeneration(T5Config(**size, **tokens)).eval()
    codes = np.random.default_rng(0).integers(0, CODES, (num_items, LEVELS)) + first + np.arange(LEVELS) * CODES
    trie: dict[tuple[int, ...], set[int]] = {}
    for row in codes.tolist():
        for level in range(LEVELS):
            trie.setdefault(tuple(row[:level]), set()).add(row[level])
    after = {prefix: sorted(found) for prefix, found in trie.items()}

    def score(histories: list[np.ndarray]) -> None:
        for begin in range(0, len(histories), 16):
            batch = histories[begin : begin + 16]
            longest = max(min(len(history), 20) for history in batch) * LEVELS
            inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, history in enumerate(batch):
                read = torch.from_numpy(codes[history[-20:]].ravel())
                inputs[row, : len(read)] = read
            model.generate(
                inputs,
                attention_mask=(inputs > 0).long(),
                num_beams=20,
                num_return_sequences=K,
                min_new_tokens=LEVELS,
                max_new_tokens=LEVELS,
                prefix_allowed_tokens_fn=lambda _, given: after.get(tuple(given.tolist()[1:]), [1]),
            )

    return score


@torch.inference_mode()
def _work(score: Callable[[list[np.ndarray]], None], histories: list[np.ndarray], barrier: Any) -> None:
    torch.set_num_threads(1)
    score(histories[:16])
    barrier.wait()
    score(histories)
    barrier.wait()


def milliseconds(score: Callable[[list[np.ndarray]], None], histories: list[np.ndarray]) -> float:
    """Per user, by two processes that share the users out."""
    context = get_context("fork")
    barrier = context.Barrier(PROCESSES + 1)
    workers = [context.Process(target=_work, args=(score, histories[number::PROCESSES], barrier)) for number in range(PROCESSES)]
    for worker in workers:
        worker.start()
    barrier.wait(120)
    started = time.perf_counter()
    barrier.wait(500)
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return seconds / len(histories) * 1e3


@torch.inference_mode()
def check(ranker: Ranker, histories: list[np.ndarray]) -> None:
    """The ranking is the naive one: dense features, whole scores, a plain sort. Where items differ, their scores do by rounding alone."""
    values, found = ranker.best(histories, K)
    expected, items = naively(ranker, histories)
    same = (items[:, :K] == found).float().mean().item()
    assert same > 0.999 and torch.allclose(values, expected[:, :K], atol=1e-3), same


def naively(ranker: Ranker, histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Scores and indices of unseen items, the best first."""
    if ranker.blend is None or ranker.item_item is None or ranker.reranker is None:
        return hide(ranker.scores(histories)["model"], histories).sort(dim=1, descending=True, stable=True)
    sequence = ranker.scores(histories)["sequencer"]
    lengths, used = torch.tensor([len(history) for history in histories]), ranker.blend.used()
    whole, last = (ranker.item_item.features(each, used).dense() for each in (histories, [history[-1:] for history in histories]))
    blended = hide(plainly_blended(ranker.blend, sequence, whole, lengths, ranker.trained), histories)
    blended, items = (each[:, : ranker.candidates] for each in blended.sort(descending=True, stable=True))
    features = torch.stack([each.gather(1, items) for each in (sequence, *whole, *last[:-1])], dim=2)
    inputs = torch.cat([blended[..., None], features, ranker.item_item.popularity[items].log1p()[..., None]], dim=2)
    order = (blended + ranker.reranker(inputs, describe(whole[0].amax(1), lengths))).argsort(dim=1, descending=True)
    return blended, items.gather(1, order)  # scores are reassigned in the new order of the items


def figures(full: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    histories, source = histories_of_instruments(rng)
    num_items = max(ITEMS, 1 + max(int(history.max()) for history in histories))
    content = F.normalize(torch.from_numpy(rng.standard_normal((num_items, 128), dtype=np.float32)), dim=-1)
    paper = bare_ranker(num_items, PAPER, None)
    recipe = bare_ranker(num_items, RECIPE, item_item_of(histories, num_items, content), content)
    for ranker in (paper, recipe):
        check(ranker, histories[:64])
    few = len(histories) if full else 4096
    sizes = {"paper": few, "recipe": few, "bert": 512 if full else 128, "t5": 64 if full else 32}
    scorers = {"paper": ours(paper), "recipe": ours(recipe), "bert": bert(num_items), "t5": t5(num_items)}
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(7 if full else 5):
        for name, score in scorers.items():
            times[name].append(milliseconds(score, histories[: sizes[name]]))
    took = {name: float(np.median(each)) for name, each in times.items()}
    what = f"{num_items:,} items, {source} of {len(histories):,} users"
    names = {"paper": "the paper's model (4 x 256)", "recipe": "recipe (2 x 128), item-item model, content, reranking"}
    for name, most in (("paper", 0.30), ("recipe", 0.15)):
        mine = f"{took[name]:.3f} ms per user"
        yield Figure(f"scoring, {names[name]}; {what}", mine, TOLD, 2.66 / took[name], f"<= {most:.2f} ms", took[name] <= most)
        for other, label, least in (
            ("bert", "transformers BERT, padded to 50", 12),
            ("t5", "transformers T5 of TIGER's size, 20 beams", 100),
        ):
            ratio = took[other] / took[name]
            yield Figure(f"scoring, {names[name]}", mine, f"{label}: {took[other]:.2f} ms", ratio, f">= {least} x", ratio >= least)
    yield from large(rng, full)


def large(rng: np.random.Generator, full: bool) -> Iterator[Figure]:
    """Catalogs up to a million items: generated vectors and generated sparse weights."""
    took = {}
    for num_items in (250_000, 500_000, 1_000_000):
        ranker = bare_ranker(num_items, RECIPE | {"content_width": 0}, generated_item_item(rng, num_items))
        histories = [zipf(rng, num_items, length) for length in 5 + rng.geometric(1 / 5, 1024 if full else 512)]
        check(ranker, histories[:4])
        took[num_items] = float(np.median([milliseconds(ours(ranker), histories) for _ in range(5 if full else 3)]))
        del ranker
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    one, quarter = took[1_000_000], took[250_000]
    sizes = ", ".join(f"{size:,}: {each:.2f} ms" for size, each in took.items())
    yield Figure("scoring, 1,000,000 items, generated, sparse item-item weights", f"{one:.2f} ms per user", "", None, "<= 4 ms", one <= 4)
    yield Figure("scoring, 1,000,000 items: peak of a process", f"{peak:.1f} GiB", "", None, "< 4 GiB", peak < 4)
    yield Figure(
        "scoring, 1,000,000 items against 250,000", f"{one / quarter:.2f} x the time", sizes, None, "linear: <= 4.4 x", one <= 4.4 * quarter
    )


def generated_item_item(rng: np.random.Generator, num_items: int, each: int = 30) -> ItemItem:
    matrices = []
    for _ in range(2):
        indices = rng.integers(0, num_items, num_items * each, dtype=np.int32)
        weights = rng.random(num_items * each, dtype=np.float32) * 0.1
        indptr = np.arange(0, num_items * each + 1, each, dtype=np.int32)
        matrices.append(sparse.csr_matrix((weights, indices, indptr), shape=(num_items, num_items)))
    return ItemItem(*matrices, (0.85, 0.5), 0.01, 50)


if __name__ == "__main__":
    main(figures)
