"""The order of the best candidates, refined by a small network: what a weighted sum of signals cannot say.

Beyond the paper. The mix of `memory.py` adds signals up; how far one is to be trusted also depends on the others, on how popular an
item is, and on what the last item of the history says by itself. So the best C items by the mix get a correction each, fitted like
the mix on validation items. All others keep their order behind them, and so does every item where corrections did not help: what was
fitted on four fifths of the users is held against the mix on the last fifth.

Shapes: B histories, C candidates, R numbers that are read of each, P numbers that describe a history.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import Linear
from qbert_ray.ranking.score_features import SIGNALS, Said

# of a candidate: its mixed score, the sequencer's, what the whole history says, what its last item says. Nothing of the other candidates:
# the order of two items must not depend on a third.
READ = ("mixed", *SIGNALS, *(f"last {name}" for name in SIGNALS[1:-1]), "popularity")
DESCRIBED = 2  # of a history: the logarithm of its length, the strongest thing the regression says
BATCH, EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 64, 16, 5e-3, 1e-2
FEWEST = 100  # histories below which nothing can be said of a gain


class Reranker(nn.Module):
    """Corrections of the mixed scores of candidates.

    Args:
        width: of both hidden layers.
    """

    def __init__(self, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        inputs = len(READ) + DESCRIBED
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        hidden = [Linear(inputs, width), nn.GELU(), nn.Dropout(dropout), Linear(width, width), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*hidden, Linear(width, 1))
        nn.init.zeros_(self.layers[-1].weight)  # it starts as the mix alone
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, read: Tensor, description: Tensor) -> Tensor:
        """[B, C] of candidates: read is [B, C, R] of `read`, description [B, P] of `memory.describe`."""
        return self.layers((_inputs(read, description) - self.centre) / self.spread)[..., 0]


class Lists(NamedTuple):
    """What a reranker is fitted on: the candidates of V validation histories."""

    mixed: Tensor  # [V, C] scores by the mix
    read: Tensor  # [V, C, R]
    description: Tensor  # [V, P]
    is_target: Tensor  # [V, C]
    seen: Tensor  # [V, C] whether the history holds the item
    moved: Tensor  # [V, C] whether it may change its place: new items do not


def read(mixed: Tensor, sequencer: Tensor, said: Said, last: Said, popularity: Tensor, items: Tensor) -> Tensor:
    """[B, C, R] what a reranker reads of candidates.

    Args:
        mixed: [B, C] scores by the mix, sequencer: [B, C] by the sequencer, items: [B, C] item_index.
        said: what the memory says of the histories, last: of their last items alone.
        popularity: [N] training interactions of each item.
    """
    finite = mixed.masked_fill(mixed.isinf(), 0)  # hidden items, which stay hidden
    memory = torch.cat([said.at(items), last.at(items)[..., :-1]], dim=2).to(mixed.device)
    return torch.cat([torch.stack([finite, sequencer], dim=2), memory, popularity[items].log1p()[..., None]], dim=2)


def deal(values: Tensor, corrected: Tensor, moved: Tensor) -> Tensor:
    """[B, C] `values`, which fall along a row, dealt out anew: those of the items that are moved, to these, in the order of `corrected`.

    Ranks change, and scores stay comparable with those of items that are no candidates.
    """
    moved = moved & values.isfinite()  # hidden items stay hidden
    by_correction = corrected.masked_fill(~moved, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = (~moved).long().argsort(dim=1, stable=True)  # those of moved items first, from the best on; then the others, as above
    return torch.empty_like(values).scatter_(1, by_correction, values.gather(1, places))


def fit_reranker(lists: Lists, seed: int) -> tuple[Reranker | None, dict[str, float]]:
    """The corrections under which targets come first, by softmax among the candidates; None where they do not help.

    Returns:
        The reranker; and, each half of the histories ranked by what was fitted on the other, ndcg@10 among unseen items: "mixed",
        "reranked", and the "error" of their difference, its standard error over histories.
    """
    users = len(lists.mixed)
    if users < FEWEST:
        return None, {}
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        halves = [Lists(*(tensor[part::2] for tensor in lists)) for part in (0, 1)]
        gains = [_gains(_fit(own), other) for own, other in (halves, halves[::-1])]
        mixed, reranked = (torch.cat(pieces) for pieces in zip(*gains, strict=True))
        error = float((reranked - mixed).std() / users**0.5)
        found = {"mixed": float(mixed.mean()), "reranked": float(reranked.mean()), "error": error}
        return (_fit(lists) if found["reranked"] - found["mixed"] > error else None), found


def _fit(lists: Lists) -> Reranker:
    lists = Lists(*(tensor[lists.is_target.any(1)] for tensor in lists))
    place = lists.is_target.int().argmax(1)
    model = Reranker()
    if not len(place):
        return model.eval()
    inputs = _inputs(lists.read, lists.description)
    model.centre.copy_(inputs.mean((0, 1)))
    spread = inputs.std((0, 1))
    model.spread.copy_(torch.where(spread > 1e-6, spread, 1))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(place) // BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(place)).split(BATCH):
            scores = (lists.mixed[rows] + model(lists.read[rows], lists.description[rows])).masked_fill(~lists.moved[rows], -torch.inf)
            optimizer.zero_grad()
            F.cross_entropy(scores, place[rows]).backward()
            optimizer.step()
            rate.step()
    return model.eval()


def _inputs(read: Tensor, description: Tensor) -> Tensor:
    described = description[:, None, -DESCRIBED:].expand(-1, read.shape[1], -1)
    return torch.cat([read, described], dim=2)


@torch.no_grad()
def _gains(model: Reranker, lists: Lists) -> tuple[Tensor, Tensor]:
    """[V] ndcg@10 of each history by the mix, and with corrections."""
    return _ndcg(lists.mixed, lists), _ndcg(lists.mixed + model(lists.read, lists.description), lists)


def _ndcg(scores: Tensor, lists: Lists) -> Tensor:
    """[V] among unseen items; a target that is no candidate counts as missed, as it does for both."""
    own = scores.masked_fill(~lists.is_target, -torch.inf).amax(1, keepdim=True)
    rank = 1 + ((scores > own) & ~lists.seen & lists.moved).sum(1)
    return torch.where(lists.is_target.any(1) & (rank <= 10), 1 / torch.log2(1.0 + rank), 0.0)
