"""Adam and averaged weights for embeddings of which a step reads a few rows: its cost does not grow with the catalog.

AdamW moves every row of an embedding in every step, by what is left of earlier gradients and by weight decay; for a million items that
takes longer than the rest of the step. An `nn.Embedding` with `sparse=True` has gradients for the rows that were read alone, and
`torch.optim.SparseAdam` updates those: moments of a row decay when it is read, and there is no weight decay. Weights differ from AdamW's,
so it is for catalogs of more than `ROWS_ALONE` items. The average of weights is the same as if it were taken over all rows in every step.

Shapes: N rows of an embedding, R of them that a step reads, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS_ALONE = 32_768  # items up to which all rows are updated in every step


class RowUpdates:
    """The optimizer and the average of weights of a model's embeddings with sparse gradients; of none, it does nothing.

    Args:
        model: with `nn.Embedding` modules of which some are sparse.
        learning_rate: of the first step.
        average: name of a weight -> its exponential average, which is updated in place; None: there is none.
    """

    def __init__(self, model: nn.Module, learning_rate: float, average: dict[str, Tensor] | None) -> None:
        sparse = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Embedding) and module.sparse}
        self.weights = {name: module.weight for name, module in sparse.items()}
        self.optimizer = torch.optim.SparseAdam(list(self.weights.values()), learning_rate) if sparse else None
        self.average = average
        self.decayed = 0.0  # logarithm of the product of the average's decays so far
        self.current = {
            name: torch.zeros(len(weight), dtype=torch.float64) for name, weight in self.weights.items()
        }  # and at each row's last

    def others(self, model: nn.Module) -> list[nn.Parameter]:
        """All other parameters of the model, in its order."""
        own = {id(weight) for weight in self.weights.values()}
        return [parameter for parameter in model.parameters() if id(parameter) not in own]

    def clear(self) -> None:
        """Forget gradients."""
        for weight in self.weights.values():
            weight.grad = None

    def gradients(self, sum_over_workers: Callable[[Tensor], None] | None) -> list[Tensor]:
        """Values [R, D] of the gradients, which can be changed in place.

        Args:
            sum_over_workers: adds up a tensor of the same size on all workers, in place; None: there is one worker.
        """
        for weight in self.weights.values():
            gradient = weight.grad
            if gradient is None:  # a batch of another domain
                rows = torch.zeros(1, 0, dtype=torch.int64, device=weight.device)
                gradient = torch.sparse_coo_tensor(rows, weight.new_zeros(0, weight.shape[1]), weight.shape, check_invariants=False)
            gradient = gradient.coalesce()
            weight.grad = gradient if sum_over_workers is None else _summed(gradient, sum_over_workers)
        return [weight.grad._values() for weight in self.weights.values() if weight.grad is not None]

    @torch.no_grad()
    def step(self, rate: float, decay: float | None) -> None:
        """Update the rows that have a gradient.

        Args:
            rate: learning rate.
            decay: of the average of weights; None: there is none.
        """
        if self.optimizer is None:
            return
        rows = {name: weight.grad._indices()[0] for name, weight in self.weights.items() if weight.grad is not None}
        for name, chosen in rows.items() if decay is not None else ():
            self._catch_up(name, chosen)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if decay is None or self.average is None:
            return
        self.decayed += math.log(decay)
        for name, chosen in rows.items():
            average = self.average[name]
            average[chosen] = torch.lerp(average[chosen], self.weights[name][chosen], 1 - decay)
            self.current[name][chosen.cpu()] = self.decayed

    @torch.no_grad()
    def finish(self) -> None:
        """Bring the average of all rows up to date."""
        for name, weight in self.weights.items() if self.average is not None else ():
            for rows in torch.arange(len(weight), device=weight.device).split(2**16):
                self._catch_up(name, rows)
            self.current[name].zero_()
        self.decayed = 0.0

    def _catch_up(self, name: str, rows: Tensor) -> None:
        """The average of rows after the steps that did not change their weights."""
        assert self.average is not None
        average, weight = self.average[name], self.weights[name][rows]
        kept = torch.exp(self.decayed - self.current[name][rows.cpu()]).to(weight)
        average[rows] = weight + kept[:, None] * (average[rows] - weight)
        self.current[name][rows.cpu()] = self.decayed


def _summed(gradient: Tensor, sum_over_workers: Callable[[Tensor], None]) -> Tensor:
    """The sum of a coalesced gradient over all workers, equal on each."""
    rows = gradient._indices()[0]
    found = torch.zeros(gradient.shape[0], dtype=torch.uint8, device=rows.device)
    found[rows] = 1
    sum_over_workers(found)
    everybody = found.nonzero()[:, 0]
    values = gradient.new_zeros(len(everybody), gradient.shape[1], layout=torch.strided)
    values[torch.searchsorted(everybody, rows)] = gradient._values()
    sum_over_workers(values)
    return torch.sparse_coo_tensor(everybody[None], values, gradient.shape, is_coalesced=True, check_invariants=False)
