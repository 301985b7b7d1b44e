"""Vectors of items of which only published semantic IDs are known: each code a dimension, later levels smaller.

    python -m tests.benchmarks.code_vectors published_text_semantic_ids.parquet text.parquet

`codes` (K per item) become `vector`, whose products count the codes that two items share, level k by WEIGHTS[k]; for
`data.domains.<name>.vectors`.
"""

from __future__ import annotations

import argparse

import numpy as np
import polars as pl

WEIGHTS = (1.0, 0.7, 0.5, 0.35)  # residuals become smaller from level to level


def vectors(codes: np.ndarray) -> np.ndarray:
    """[N, K * M] of codes [N, K] below M."""
    size = int(codes.max()) + 1
    result = np.zeros((*codes.shape, size), np.float32)
    np.put_along_axis(result, codes[:, :, None], np.sqrt(WEIGHTS[: codes.shape[1]], dtype=np.float32)[:, None], axis=2)
    return result.reshape(len(codes), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", help="Parquet with item_id and codes")
    parser.add_argument("vectors", help="Parquet to write")
    given = parser.parse_args()
    table = pl.read_parquet(given.codes, columns=["item_id", "codes"])
    levels = table["codes"].list.len().unique().to_list()
    if len(levels) != 1 or not levels[0] or levels[0] > len(WEIGHTS):
        parser.error(f"{given.codes}: every item must have the same number of codes, 1 to {len(WEIGHTS)}; there are {levels}")
    table.select("item_id", vector=pl.Series(vectors(np.array(table["codes"].to_list())))).write_parquet(given.vectors)


if __name__ == "__main__":
    main()
