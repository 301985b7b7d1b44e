"""IDs of collaborative indexing in the generative model, on a run's sequences: CID of P5-CID without P5.

    python -m tests.benchmarks.rivals.cid runs/scientific scientific results/rivals/ranks.parquet --epochs 20 --patience 20

CID (Hua et al., arXiv 2305.06569): items that the same training histories hold are clustered spectrally, clusters that are too large
are clustered again; an ID has a code for each cluster on the way down, and a last one that counts within the smallest cluster. P5 feeds
such IDs with ten prompts to a pre-trained T5; here `Generator` learns from every prefix of a history, as it does from semantic IDs.
`--ids run` takes the run's own semantic IDs in their place, for comparison at the same size.

Only training histories are read, and items within a cluster are numbered by `item_index`, which is an order by hash: the published code
numbers items as they first appear, test items included.

Shapes: N items, K codes of an ID.
"""

from __future__ import annotations

import argparse

import numpy as np
import polars
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from qbert_ray.sequence.beam_search import Trie
from tests.benchmarks.peers_table import Split, table_parts
from tests.benchmarks.rivals.generative import SMALL, allowed, cut, generator, listed, prefixes, token_loss, valid_ndcg
from tests.benchmarks.rivals.training import Scores, Settings, Trained, compare, fit, parser

DEFAULTS: Settings = SMALL | {"longest": 20, "beam": 20, "clusters": 20, "largest": 200, "deepest": 8}
DEFAULTS |= {"learning_rate": 0.001, "weight_decay": 0.035, "batch_size": 256, "schedule": "cosine", "warmup_steps": 300}


def co_occurrence(histories: list[list[int]], num_items: int) -> csr_matrix:
    """[N, N] number of histories that hold both items; zeros on the diagonal."""
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    items = np.concatenate(histories).astype(np.int64)
    held = csr_matrix((np.ones(len(items)), (users, items)), shape=(len(histories), num_items))
    held.data[:] = 1  # a user may have had an item twice
    counts = (held.T @ held).tolil()
    counts.setdiag(0)
    return counts.tocsr()


def spectral(affinity: csr_matrix, clusters: int, seed: int) -> np.ndarray:
    """[n] cluster of each item."""
    from sklearn.cluster import SpectralClustering

    # items that occur together with no other are tied weakly to all: without it the graph falls into pieces
    dense = affinity.toarray() + 1e-4
    return SpectralClustering(clusters, affinity="precomputed", assign_labels="cluster_qr", random_state=seed).fit_predict(dense)


def collaborative_ids(affinity: csr_matrix, clusters: int, largest: int, deepest: int, seed: int) -> np.ndarray:
    """[N, K] codes: one of every cluster on the way, numbered within its level, then a count within the last cluster.

    Clusters that need no more levels repeat code 0, which stands for no cluster, until the last.
    """
    count = affinity.shape[0]
    path = np.zeros((count, deepest), np.int64)
    open_clusters, used = [np.arange(count)], 0
    for level in range(deepest):
        further, number = [], 1
        for items in open_clusters:
            found = spectral(affinity[items][:, items], clusters, seed)
            for label in np.unique(found):
                members = items[found == label]
                path[members, level] = number
                number += 1
                if largest < len(members) < len(items):
                    further.append(members)
        open_clusters, used = further, level + 1
        if not further:
            break
    path = path[:, :used]
    _, leaf = np.unique(path, axis=0, return_inverse=True)
    order = np.argsort(leaf, kind="stable")
    first = np.searchsorted(leaf[order], leaf[order])
    within = np.empty(count, np.int64)
    within[order] = np.arange(count) - first
    return np.concatenate([path, within[:, None]], axis=1)


def run_ids(run: str, domain: str) -> np.ndarray:
    """[N, K] the run's own semantic IDs."""
    parts = table_parts(run, "semantic_ids", domain)
    table = polars.concat([polars.read_parquet(part, columns=["item_index", "codes"]) for part in parts]).sort("item_index")
    return np.array(table["codes"].to_list(), np.int64)


def train(split: Split, settings: Settings, given: argparse.Namespace, seed: int) -> Trained:
    if given.ids == "run":
        codes = run_ids(given.run, given.domain)
    else:
        affinity = co_occurrence(split.every, split.num_items)
        codes = collaborative_ids(affinity, settings["clusters"], settings["largest"], settings["deepest"], seed)
    print(f"IDs of {codes.shape[1]} codes below {codes.max() + 1}", flush=True)
    rows = range(len(codes))
    trie = Trie.build(torch.from_numpy(codes), allowed(rows, len(codes)))
    model = generator(codes.shape[1], int(codes.max()) + 1, settings["longest"], settings)
    samples = prefixes(split.every, settings["longest"])

    def batches(epoch: int) -> list[np.ndarray]:
        return np.array_split(np.random.default_rng([seed, epoch]).permutation(len(samples)), -(-len(samples) // settings["batch_size"]))

    def scores(histories: list[list[int]]) -> Tensor:
        return listed(model, codes, trie, cut(histories, settings["longest"]), settings["beam"], rows)

    def scorer() -> Scores:
        return scores

    return fit(
        model,
        batches,
        lambda rows: token_loss(model, codes, [samples[row] for row in rows]),
        lambda: valid_ndcg(scores, split),
        scorer,
        settings,
        given,
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ids", choices=["cid", "run"], default="cid")
    given = arguments.parse_args()
    compare(given, {"cid": "CID IDs, generative", "run": "semantic IDs, generative, small"}[given.ids], DEFAULTS, train)


if __name__ == "__main__":
    main()
