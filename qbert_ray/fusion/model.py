"""Stage 1, §3.3: dynamic cross-modal semantic injection.

An item's ID vector q queries its modalities: Eq. 3 picks among the J vectors of each modality, a transformer of at most L
layers fuses what was picked (Eq. 4), and a gate decides after each layer how much of it to take and whether the item
continues. Items that halt leave the batch, in training as at inference, so both compute the same function.

Notable choices where the paper is silent: the gate mixes per dimension and its mean is the halting probability; an item's
output is the mean of its layers' states weighted by their halting probabilities (adaptive computation time); a modality an
item lacks is masked out of the attention and of the contrast pair by pair.

Shapes: B batch, J vectors per modality, F feature width, D model width, V modalities, H heads.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbert_ray.products import Linear


class Fused(NamedTuple):
    embedding: Tensor  # [B, D] fused_embedding h
    aligned: Tensor  # [B, V, D] what each modality gave, Eq. 3
    present: Tensor  # [B, V] whether the item has the modality
    query: Tensor  # [B, D] id_embedding q
    depth: Tensor  # [B] layers the item ran through
    ponder: Tensor  # [B] expected number of layers, differentiable
    gate: Tensor  # [B] mean gate of the item's last layer


class DynamicFusion(nn.Module):
    """Fuses an item's modalities into its ID vector.

    Args:
        num_items: items with an ID vector of their own; any other uses the shared unknown query.
        feature_widths: modality -> F, in the order the inputs come.
        dynamic: false runs every item through all layers.
        halt_threshold: accumulated halting probability at which an item stops.
        temperature: tau of Eq. 3.
    """

    def __init__(
        self,
        num_items: int,
        feature_widths: dict[str, int],
        width: int = 256,
        num_layers: int = 5,
        num_heads: int = 4,
        ffn_width: int = 512,
        dropout: float = 0.1,
        dynamic: bool = True,
        halt_threshold: float = 0.75,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.dynamic, self.halt_threshold, self.temperature = dynamic, halt_threshold, temperature
        self.id_embedding = nn.Embedding(num_items + 1, width)  # the last row is the unknown query
        # Small, so that content and not the random start decides where an item lies.
        nn.init.normal_(self.id_embedding.weight, std=0.02)
        self.project = nn.ModuleDict({name: Linear(size, width) for name, size in feature_widths.items()})
        self.modality_embedding = nn.Parameter(torch.randn(len(feature_widths), width) * 0.02)
        self.layers = nn.ModuleList(FusionLayer(width, num_heads, ffn_width, dropout) for _ in range(num_layers))

    @property
    def unknown(self) -> int:
        """Index of the shared query of items without an ID vector."""
        return self.id_embedding.num_embeddings - 1

    def forward(
        self, item: Tensor, features: dict[str, Tensor], present: dict[str, Tensor], unread: dict[str, Tensor] | None = None
    ) -> Fused:
        """The fused embedding of a batch of items.

        Args:
            item: [B] row of the ID vector; `unknown` for a cold item.
            features: modality -> [B, J, F].
            present: modality -> [B, J] whether the vector is there.
            unread: modality -> [B] items that are fused without it; it stays a view of them in the contrast.
        """
        query = self.id_embedding(item)  # [B, D]
        pairs = [self._align(query, name, features[name], present[name]) for name in self.project]
        aligned = torch.stack([vectors for vectors, _ in pairs], dim=1)  # [B, V, D]
        has = torch.stack([there for _, there in pairs], dim=1)  # [B, V]
        left_out = unread or {}
        read = torch.stack([has[:, n] & ~left_out[name] if name in left_out else has[:, n] for n, name in enumerate(self.project)], dim=1)
        embedding, depth, ponder, gate = self._fuse(query, aligned, read)
        return Fused(embedding, aligned, has, query, depth, ponder, gate)

    def _align(self, query: Tensor, name: str, features: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 3: [B, D] similarity-weighted vector of one modality, and [B] whether there is any."""
        vectors = F.normalize(self.project[name](F.normalize(features, dim=-1)), dim=-1)  # [B, J, D]
        similarity = torch.einsum("bd,bjd->bj", F.normalize(query, dim=-1), vectors) / self.temperature
        weights = similarity.masked_fill(~present, -torch.inf).softmax(-1).nan_to_num()  # no vector: all weights 0
        return torch.einsum("bj,bjd->bd", weights, vectors), present.any(-1)

    def _fuse(self, query: Tensor, aligned: Tensor, has: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = aligned + self.modality_embedding  # [B, V, D]
        num_items = len(query)
        active = torch.arange(num_items, device=query.device)  # rows still in the batch
        state, going = query, query.new_ones(num_items)  # going: probability of not having halted
        outputs = torch.zeros_like(query)
        ponder, gates = query.new_zeros(num_items), query.new_zeros(num_items)
        depth = torch.zeros(num_items, dtype=torch.int32, device=query.device)
        for number, layer in enumerate(self.layers, start=1):
            state, gate = layer(state, values, has)
            halting = gate.mean(-1)
            ponder.index_add_(0, active, going)
            left = going * (1 - halting) if self.dynamic else going
            stop = torch.full_like(left, number == len(self.layers), dtype=torch.bool)
            if self.dynamic:
                stop = stop | (1 - left >= self.halt_threshold)
                share = torch.where(stop, going, going * halting)  # the last layer takes what is left
            else:
                share = stop.to(going.dtype)
            outputs.index_add_(0, active, share[:, None] * state)
            stopped, going = stop.nonzero()[:, 0], left
            if len(stopped):
                gone = active[stopped]
                depth[gone] = number
                gates.index_copy_(0, gone, halting[stopped])
                stay = (~stop).nonzero()[:, 0]
                if not len(stay):
                    break
                active, state, values, has, going = (tensor[stay] for tensor in (active, state, values, has, left))
        return F.layer_norm(outputs, outputs.shape[-1:]), depth, ponder, gates


class FusionLayer(nn.Module):
    """Eq. 4: cross-attention of the item's state on its modalities, a feed-forward net, and the gate."""

    def __init__(self, width: int, num_heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm_query, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = Linear(width, width), Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.ffn = nn.Sequential(Linear(width, ffn_width), nn.GELU(), nn.Dropout(dropout), Linear(ffn_width, width))
        # One output more than dimensions is added to all of them: a mean over many independent gates hardly differs
        # between items, so without it every item would halt at the same depth.
        last = Linear(width // 4, width + 1)
        self.gate = nn.Sequential(nn.LayerNorm(width), Linear(width, width // 4), nn.ReLU(), last)
        with torch.no_grad():
            last.weight[-1].mul_(4)  # items differ from the start

    def forward(self, state: Tensor, values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """New state [B, D] and gate [B, D], from state [B, D], values [B, V, D], present [B, V]."""
        size, width = state.shape
        query = self.query(self.norm_query(state)).view(size, 1, self.num_heads, -1).transpose(1, 2)  # [B, H, 1, D/H]
        key, value = (
            x.view(size, -1, self.num_heads, width // self.num_heads).transpose(1, 2) for x in self.key_value(values).chunk(2, -1)
        )
        scores = (query @ key.transpose(-1, -2)) / (width // self.num_heads) ** 0.5  # [B, H, 1, V]
        weights = scores.masked_fill(~present[:, None, None], -torch.inf).softmax(-1).nan_to_num()
        attended = (weights @ value).transpose(1, 2).reshape(size, width)
        update = state + F.dropout(self.out(attended), self.dropout, self.training)
        update = update + F.dropout(self.ffn(self.norm_ffn(update)), self.dropout, self.training)
        own, shared = self.gate(update).split([self.norm_query.normalized_shape[0], 1], dim=-1)
        gate = torch.sigmoid(own + shared)
        return state + gate * (update - state), gate


def alignment_loss(
    fused: Fused, temperature: float, consistency_weight: float, ponder_weight: float, ponder_target: float
) -> dict[str, Tensor]:
    """Eq. 5 and the ponder cost, each a mean over the batch; their sum under "loss".

    Every pair of views (fused and each modality) is contrasted over the items that have both. The ponder cost holds the
    batch's mean depth at a target and leaves items free to differ: a cost per layer drives all of them to the same depth.
    """
    views = torch.cat([fused.embedding[:, None], fused.aligned], dim=1)  # [B, 1 + V, D]
    views = F.normalize(views, dim=-1)
    there = torch.cat([torch.ones_like(fused.present[:, :1]), fused.present], dim=1)
    contrast = torch.stack([
        info_nce(views[both, a], views[both, b], temperature)
        for a, b in combinations(range(views.shape[1]), 2)
        if len(both := (there[:, a] & there[:, b]).nonzero()[:, 0]) > 1
    ] or [views.new_zeros(())]).sum()  # fmt: skip
    consistency = (fused.embedding - fused.query.detach()).square().mean(-1).mean()
    ponder = (fused.ponder.mean() - ponder_target).square()
    loss = contrast + consistency_weight * consistency + ponder_weight * ponder
    return {"loss": loss, "contrast": contrast, "consistency": consistency, "ponder": ponder}


def geometry_loss(fused: Fused, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
    """Mean squared difference between the cosine of two fused embeddings and the mean cosine of the items' input features.

    Not in the paper. Eq. 5 alone pushes all items of a batch apart, near ones too, until every neighbourhood is lost.

    Args:
        features: modality -> [B, J, F] as they came; present: modality -> [B, J].
    """
    size, device = len(fused.embedding), fused.embedding.device
    wanted, pairs = torch.zeros(size, size, device=device), torch.zeros(size, size, device=device)
    for name, vectors in features.items():
        has = present[name].any(1)  # [B]
        if not has.any():  # no item of the batch has this modality; the mean of none is not a number
            continue
        mean = (vectors * present[name][..., None]).sum(1) / present[name].sum(1, keepdim=True).clamp_min(1)
        centred = (mean - mean[has].mean(0)) * has[:, None]  # what all items share does not distinguish two of them
        unit = F.normalize(centred, dim=-1)
        both = (has[:, None] & has).to(unit.dtype)
        wanted, pairs = wanted + unit @ unit.T, pairs + both
    there = (pairs > 0).fill_diagonal_(False)
    if not there.any():
        return fused.embedding.new_zeros(())
    unit = F.normalize(fused.embedding - fused.embedding.mean(0), dim=-1)
    return (unit @ unit.T - wanted / pairs.clamp_min(1))[there].square().mean()


def info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of two views [B, D] of unit length; row i of one belongs to row i of the other."""
    logits = a @ b.T / temperature
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def view_distance(fused: Fused) -> Tensor:
    """Mean squared distance of the unit vectors of fused, text, image, ... over the pairs an item has (Fig. 6); 0 to 4."""
    views = F.normalize(torch.cat([fused.embedding[:, None], fused.aligned], dim=1), dim=-1)
    there = torch.cat([torch.ones_like(fused.present[:, :1]), fused.present], dim=1)
    distances = [(views[:, a] - views[:, b]).square().sum(-1)[there[:, a] & there[:, b]] for a, b in combinations(range(views.shape[1]), 2)]
    joined = torch.cat(distances)
    return joined.mean() if len(joined) else views.new_zeros(())
