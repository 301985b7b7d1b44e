"""The query of a history without items, which a causal model never reads: it is fitted to the training interactions afterwards.

Shapes: N catalog, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert_ray.sequence.item_table import ItemTable
from qbert_ray.sequence.model import Sequencer

STEPS = 60  # of L-BFGS


def query_of_popularity(model: Sequencer, table: ItemTable, counts: Tensor) -> Tensor:
    """The query whose softmax over the catalog has the smallest cross-entropy to the shares of the items in the training interactions.

    Args:
        model: a trained one.
        table: the catalog.
        counts: [N] how often each item was had.

    Returns:
        [D], on the device of the table.
    """
    share = (counts / counts.sum().clamp_min(1)).float().to(table.codes.device)
    with torch.no_grad():
        vectors, bias = model.catalog_vectors(table)
        query = share @ vectors
    query.requires_grad_()
    optimizer = torch.optim.LBFGS([query], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(model.scores(query[None], vectors, bias)[0].log_softmax(0) @ share)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return query.detach()
