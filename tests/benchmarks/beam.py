"""The generative sequence model against the T5 of `transformers` with the same weights: beams of 20, and training.

    python -m tests.benchmarks.beam

4 + 4 layers of width 128, 6 heads of 64, MLPs of 1024, at most 20 items of 4 codes. T5 decodes with `prefix_allowed_tokens_fn`
over a dictionary of prefixes; its histories are padded to the longest of a batch of similar length, which is kind to it. Both give
the same beams, or the benchmark fails. One thread: seconds of CPU, which others' work disturbs least; two threads: seconds.
Rounds take turns. Training: forward, backward and AdamW of batches of prefixes in random order; only tokens of histories and targets count.
Real histories where QBERT_REAL_DATA names a folder with instruments/interactions.parquet, else generated ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from qbert_ray.sequence.beam_search import Trie, beam_search, encode
from qbert_ray.sequence.decoder import Generator
from tests.benchmarks.scoring import histories_of_instruments
from tests.benchmarks.table import Figure, main
from tests.sequence.t5 import LevelT5, t5_of

LEVELS, SIZE, BEAM, MOST, USERS, AT_ONCE, ROUNDS = 4, 256, 20, 20, 128, 32, 3
TRAINED, STEPS = 128, 3  # samples of a batch
LARGE = 1_000_000  # items
TOLERANCE = 1e-3  # between the sums of four log-probabilities


def catalog(num_items: int) -> np.ndarray:
    """[N, K] different codes at random."""
    rng = np.random.default_rng(1)
    numbers = np.unique(rng.integers(0, SIZE**LEVELS, num_items + num_items // 50 + 8))
    return rng.permutation(numbers)[:num_items, None] // SIZE ** np.arange(LEVELS)[::-1] % SIZE


def model() -> Generator:
    """Weights at random, without position embeddings, which T5 has not."""
    torch.manual_seed(0)
    made = Generator(LEVELS, SIZE, max_items=MOST).eval()
    with torch.no_grad():
        made.position_embedding.weight.zero_()
    return made


def ours(made: Generator, codes: np.ndarray, trie: Trie, histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Codes [B, W, K] and scores [B, W] of the beams."""
    with torch.inference_mode():
        found = beam_search(made, encode(made, histories, codes), trie, BEAM)
    return found.codes, found.scores


def padded(made: Generator, codes: np.ndarray, histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Tokens of histories as T5 reads them, and which are there."""
    rows = [[*(codes[history[-MOST:]] + np.arange(LEVELS) * SIZE).ravel().tolist(), made.start + 1] for history in histories]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [made.start] * (longest - len(row)) for row in rows])
    return tokens, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def theirs(made: Generator, twin: LevelT5, codes: np.ndarray) -> Callable[[list[np.ndarray]], tuple[Tensor, Tensor]]:
    """As `ours`, by T5's `generate`."""
    offset, after = np.arange(LEVELS) * SIZE, dict[tuple[int, ...], set[int]]()
    for row in (codes + offset).tolist():
        for level in range(LEVELS):
            after.setdefault(tuple(row[:level]), set()).add(row[level])
    allowed = {prefix: sorted(found) for prefix, found in after.items()}

    def generate(histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        tokens, there = padded(made, codes, histories)
        made_by = twin.generate(
            tokens,
            attention_mask=there,
            num_beams=BEAM,
            num_return_sequences=BEAM,
            max_new_tokens=LEVELS,
            eos_token_id=None,
            length_penalty=0.0,
            prefix_allowed_tokens_fn=lambda _, given: allowed[tuple(given.tolist()[1:])],
            return_dict_in_generate=True,
            output_scores=True,
        )
        sequences = made_by.sequences[:, 1:].view(len(histories), BEAM, LEVELS) - torch.from_numpy(offset)
        return sequences, made_by.sequences_scores.view(len(histories), BEAM)

    return generate


def check(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    """Both ways give the same beams, but where two scores are equal."""
    assert torch.allclose(first[1], second[1], atol=TOLERANCE), (first[1] - second[1]).abs().max()
    differing = (first[0] != second[0]).any(2)
    tied = torch.zeros_like(differing)
    near = first[1].diff(dim=1).abs() < TOLERANCE
    tied[:, 1:] |= near
    tied[:, :-1] |= near
    tied[:, -1] = True  # of the beams that tie for the last place either may be kept
    assert not (differing & ~tied).any()


def milliseconds(work: Callable[[], object], users: int) -> float:
    """Of a user: CPU with one thread, elapsed with more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    work()
    return (clock() - started) * 1e3 / users


def decoding(histories: list[np.ndarray], num_items: int, source: str, full: bool) -> Iterator[Figure]:
    """Beams of 20 on one thread and two."""
    made, codes = model(), catalog(num_items)
    trie, twin = Trie.build(torch.from_numpy(codes)), t5_of(made)
    generate = theirs(made, twin, codes)
    check(ours(made, codes, trie, histories[:AT_ONCE]), generate(histories[:AT_ONCE]))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        took: dict[str, list[float]] = {"ours": [], "t5": []}
        for number in range(ROUNDS * (2 if full else 1)):
            users = histories[(number * USERS) % len(histories) :][:USERS]
            similar = sorted(users[:AT_ONCE], key=len)
            took["ours"].append(milliseconds(lambda users=users: ours(made, codes, trie, users), len(users)))
            took["t5"].append(milliseconds(lambda users=similar: generate(users), len(similar)))
        mine, other = (float(np.median(each)) for each in took.values())
        what = f"beams of {BEAM}, {num_items:,} items, {source}, {threads} thread{'s' if threads > 1 else ''}"
        yield Figure(what, f"{mine:.2f} ms per user", f"transformers T5: {other:.2f} ms", other / mine, ">= 4 x", other >= 4 * mine)
    torch.set_num_threads(1)


def growth(histories: list[np.ndarray], num_items: int) -> Iterator[Figure]:
    """A catalog of a million items against that of the histories."""
    made, small, large = model(), catalog(num_items), catalog(LARGE)
    tries = {len(codes): (codes, Trie.build(torch.from_numpy(codes))) for codes in (small, large)}
    took: dict[int, list[float]] = {size: [] for size in tries}
    for _ in range(2 * ROUNDS):
        for size, (codes, trie) in tries.items():
            took[size].append(milliseconds(lambda codes=codes, trie=trie: ours(made, codes, trie, histories[:USERS]), USERS))
    mine, other = (float(np.median(each)) for each in took.values())
    ratio = other / mine
    yield Figure(
        f"beams of {BEAM}, {LARGE:,} items against {num_items:,}",
        f"{other:.2f} ms per user",
        f"{mine:.2f} ms",
        ratio,
        "<= 1.3 x",
        ratio <= 1.3,
    )


def training(histories: list[np.ndarray], num_items: int, source: str) -> Iterator[Figure]:
    """Tokens a second of optimizer steps."""
    made, codes, rng = model(), catalog(num_items), np.random.default_rng(0)
    twin = t5_of(made)
    prefixes = [history[:end] for history in histories[:4000] for end in range(1, len(history))]
    following = [history[end] for history in histories[:4000] for end in range(1, len(history))]
    rates: dict[str, list[float]] = {"ours": [], "t5": []}
    optimizers = [torch.optim.AdamW(each.train().parameters(), lr=1e-4, fused=True) for each in (made, twin)]

    def own(chosen: np.ndarray) -> Tensor:
        read = [prefixes[row][-MOST:] for row in chosen]
        reading = made.read(np.concatenate(read), np.array([len(each) for each in read]), codes)
        targets = codes[[following[chosen[place]] for place in reading.order]]
        return made.loss(reading, torch.from_numpy(targets)) / targets.size

    def other(chosen: np.ndarray) -> Tensor:
        tokens, there = padded(made, codes, [prefixes[row] for row in chosen])
        labels = torch.from_numpy(codes[[following[row] for row in chosen]] + np.arange(LEVELS) * SIZE)
        return twin(input_ids=tokens, attention_mask=there, labels=labels).loss

    for number in range(ROUNDS + 1):
        for name, loss, each, optimizer in zip(rates, (own, other), (made, twin), optimizers, strict=True):
            batches = [rng.choice(len(prefixes), TRAINED, replace=False) for _ in range(STEPS if name == "ours" else 1)]
            tokens = sum((min(len(prefixes[row]), MOST) + 1) * LEVELS + 1 for batch in batches for row in batch)
            took = milliseconds(lambda loss=loss, each=each, o=optimizer, batches=batches: [step(loss(b), each, o) for b in batches], 1)
            if number:  # the first is for warming up
                rates[name].append(tokens / took * 1e3)
    mine, theirs = (float(np.median(each)) for each in rates.values())
    against = f"transformers T5, padded to the longest of a batch: {theirs:,.0f}"
    yield Figure(f"training the generative model, {source}", f"{mine:,.0f} tokens/s", against, mine / theirs, ">= 2 x", mine >= 2 * theirs)


def step(loss: Tensor, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One update."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()


def figures(full: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    histories, source = histories_of_instruments(np.random.default_rng(0))
    num_items = 1 + max(int(history.max()) for history in histories)
    yield from decoding(histories, num_items, source, full)
    yield from growth(histories, num_items)
    yield from training(histories, num_items, source)


if __name__ == "__main__":
    main(figures)
