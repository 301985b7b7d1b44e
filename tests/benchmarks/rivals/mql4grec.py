"""MQL4GRec without its pre-training on other shops, on published semantic IDs of texts and of images.

    python -m tests.benchmarks.rivals.mql4grec runs/instruments instruments results/rivals/ranks.parquet \\
        <published text codes> <published image codes> --epochs 14 --patience 14

MQL4GRec (Zhai et al., arXiv 2503.10289): one encoder-decoder over two languages, the codes of texts and those of images. Its five
tasks are trained at once: the next item by text codes and by image codes, an item's text codes from its image codes and the reverse,
and the next item in the other language, in a direction drawn for each sample; the last three start with four prompt tokens of their own.
Both languages are decoded by beam search inside the trie of the catalog's IDs; an item that both lists hold scores the mean of its two
scores + 1, which is why scores are means over tokens, and any other its own score.

One `Generator` does all of it: each level has the codes of both languages, a catalog has a row for each item and language, and a
prompt is one more row. Items that share an ID are searched for as leaves of their own: the published evaluation counts any of them as a
hit. It is smaller than the published model unless the settings say otherwise (4 layers, 6 heads of 64, MLPs of 1024).

Shapes: B histories, N items, K codes of an ID, M codewords of a level and language, R = 2 N + 3 rows of the catalog.
"""

from __future__ import annotations

import argparse

import numpy as np
import polars
import torch
from torch import Tensor

from qbert_ray.sequence.beam_search import Trie
from qbert_ray.sequence.decoder import Generator
from tests.benchmarks.peers_table import Split, table_parts
from tests.benchmarks.rivals.generative import SMALL, Sample, allowed, cut, generator, listed, prefixes, token_loss, valid_ndcg
from tests.benchmarks.rivals.training import Scores, Settings, Trained, compare, fit, parser

DEFAULTS: Settings = SMALL | {"longest": 20, "beam": 20, "learning_rate": 0.001, "weight_decay": 0.01, "batch_size": 256}
DEFAULTS |= {"schedule": "cosine", "warmup_steps": 500, "samples_per_epoch": None}  # None: all
TO_IMAGE, TO_TEXT, ACROSS = range(3)  # tasks that have a prompt


class Languages:
    """A catalog in two languages, and what is trained on it.

    Args:
        text, image: [N, K] codes of the items, below M.
    """

    def __init__(self, text: np.ndarray, image: np.ndarray) -> None:
        assert text.shape == image.shape, "both languages must have the same items and levels"
        self.num_items, self.num_levels = text.shape
        size = int(max(text.max(), image.max())) + 1
        prompts = np.repeat(2 * size + np.arange(3)[:, None], self.num_levels, axis=1)
        self.catalog = np.concatenate([text, image + size, prompts])  # [R, K]
        self.codebook_size = 2 * size + len(prompts)
        self.rows = range(self.num_items), range(self.num_items, 2 * self.num_items)  # of the texts, of the images
        self.tries = [Trie.build(torch.from_numpy(self.catalog), allowed(rows, len(self.catalog))) for rows in self.rows]

    def prompt(self, task: int) -> np.ndarray:
        """[1] row of the catalog with the prompt of a task."""
        return np.array([2 * self.num_items + task])

    def samples(self, histories: list[list[int]], longest: int, random: np.random.Generator) -> list[Sample]:
        """All samples of an epoch."""
        text, size = prefixes(histories, longest), self.num_items
        image = [Sample(read + size, target + size) for read, target in text]
        across = [
            Sample(np.concatenate([self.prompt(ACROSS), one.read]), other.target)
            for pair, turned in zip(zip(text, image, strict=True), random.random(len(text)) < 0.5, strict=True)
            for one, other in [pair[::-1] if turned else pair]
        ]
        to_image = [Sample(np.append(self.prompt(TO_IMAGE), item), item + size) for item in range(size)]
        to_text = [Sample(np.append(self.prompt(TO_TEXT), item + size), item) for item in range(size)]
        return text + image + across + to_image + to_text

    def scorer(self, model: Generator, longest: int, beam: int) -> Scores:
        """[B, N] scores of histories by both languages."""

        def scores(histories: list[list[int]]) -> Tensor:
            read = cut(histories, longest)
            text, image = (
                listed(model, self.catalog, trie, [each + rows.start for each in read], beam, rows)
                for trie, rows in zip(self.tries, self.rows, strict=True)
            )
            return merged(text, image)

        return scores


def merged(text: Tensor, image: Tensor) -> Tensor:
    """[B, N] one list of two: items that both hold get the mean + 1; minus infinity: in neither list."""
    both = (text > -torch.inf) & (image > -torch.inf)
    return torch.where(both, (text + image) / 2 + 1, torch.maximum(text, image))


def read_codes(run: str, domain: str, codes: str) -> np.ndarray:
    """[N, K] codes of a Parquet file with item_id and codes, in the order of a run's items."""
    parts = table_parts(run, "ingest/items", domain)
    items = polars.concat([polars.read_parquet(part, columns=["item_id", "item_index"]) for part in parts]).sort("item_index")
    table = items.join(polars.read_parquet(codes, columns=["item_id", "codes"]), on="item_id", how="left", maintain_order="left")
    if table["codes"].null_count():
        raise SystemExit(f"{codes} lacks {table['codes'].null_count()} items of {domain}")
    return np.array(table["codes"].to_list(), np.int64)


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    languages = Languages(*(read_codes(given.run, given.domain, codes) for codes in (given.text, given.image)))
    longest = settings["longest"]
    model = generator(languages.num_levels, languages.codebook_size, longest + 1, settings)  # with the prompt
    samples: list[Sample] = []

    def batches(epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([seed, epoch])
        samples[:] = languages.samples(split.every, longest, random)
        drawn = random.permutation(len(samples))[: settings["samples_per_epoch"]]
        return np.array_split(drawn, -(-len(drawn) // settings["batch_size"]))

    def scorer() -> Scores:
        return languages.scorer(model, longest, settings["beam"])

    return fit(
        model,
        batches,
        lambda rows: token_loss(model, languages.catalog, [samples[row] for row in rows]),
        lambda: valid_ndcg(scorer(), split),
        scorer,
        settings,
        given,
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("text", help="Parquet with item_id and codes")
    arguments.add_argument("image", help="Parquet with item_id and codes")
    compare(arguments.parse_args(), "MQL4GRec without pre-training", DEFAULTS, train)


if __name__ == "__main__":
    main()
