"""Content of items for rivals that read it: the vectors that the stage `features` wrote."""

from __future__ import annotations

import numpy as np
import polars

from tests.benchmarks.peers_table import table_parts


def content_vectors(run: str, domain: str, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, E] mean of each item's vectors, zeros where it has none; and [N] whether it has one."""
    parts = table_parts(run, f"features/{modality}", domain)
    if not parts:
        raise SystemExit(f"{run} has no vectors of {modality} of {domain}: run the stage features first")
    table = polars.concat([polars.read_parquet(part) for part in parts]).sort("item_index")
    vectors, present = (np.array(table[name].to_list(), np.float32) for name in ("vectors", "present"))  # [N, J, E], [N, J]
    return (vectors * present[:, :, None]).sum(1) / np.maximum(present.sum(1), 1)[:, None], present.any(1)
