"""The three stages of Q-BERT4Rec in plain calls, on a small catalog in memory: no run directory, no files, no Ray.

python examples/quickstart.py    # about ten seconds on one core
"""

from __future__ import annotations

import numpy as np
import torch

import qbert_ray as qb
from qbert_ray.fusion.model import alignment_loss, geometry_loss
from qbert_ray.sequence.item_table import ItemTable
from qbert_ray.sequence.model import next_item_queries
from qbert_ray.sequence.packing import pack
from qbert_ray.top_k import hide, top_k

ITEMS, USERS, LEVELS, CODEWORDS, WIDTH = 200, 300, 3, 16, 64
RATIOS = {"span": 0.3, "multi_region": 0.15, "tail": 0.1}  # share of a history that each masking strategy hides
KINDS = ["headphones", "tents", "novels", "kettles"]
rng = np.random.default_rng(0)
torch.manual_seed(0)

# A catalog: each item has a title vector and two image vectors, near those of its kind. A user buys mostly items of one kind.
kind = rng.integers(len(KINDS), size=ITEMS)
text, image = (rng.normal(size=(len(KINDS), 1, 32))[kind] + rng.normal(size=(ITEMS, parts, 32)) for parts in (1, 2))
features = {"text": torch.tensor(text).float(), "image": torch.tensor(image).float()}  # [N, J, F]
present = {name: torch.ones(vectors.shape[:2], dtype=torch.bool) for name, vectors in features.items()}  # [N, J]
liked = rng.integers(len(KINDS), size=USERS)
chance = np.where(kind == liked[:, None], 20.0, 1.0)
histories = np.array([rng.choice(ITEMS, 8, replace=False, p=row / row.sum()) for row in chance])

# Stage 1 (section 3.3): fuse the modalities of each item into its ID embedding, through as many layers as it needs.
fusion = qb.DynamicFusion(ITEMS, {"text": 32, "image": 32}, width=WIDTH, num_layers=3, ffn_width=128)
optimizer = torch.optim.AdamW(fusion.parameters(), 1e-3)
for _ in range(20):
    fused = fusion(torch.arange(ITEMS), features, present)
    loss = alignment_loss(fused, 0.07, 0.01, 1.0, ponder_target=1.6)["loss"] + 30 * geometry_loss(fused, features, present)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
embeddings = fused.embedding.detach()  # [N, D]
print(f"stage 1: {fused.depth.float().mean():.1f} fusion layers per item on average")

# Stage 2 (section 3.4): quantize the fused embeddings to codes, then resolve collisions so that every item has its own.
quantizer = qb.fit_residual_kmeans(embeddings, num_levels=LEVELS, codebook_size=CODEWORDS, codebook_dim=16)
with torch.no_grad():
    nearest, latents = quantizer.codes(embeddings).numpy(), quantizer.encode(embeddings).numpy()
codes, moved = qb.resolve_collisions(nearest, latents, quantizer.quantizer.codebooks.detach().numpy())  # [N, K], [N]
tokens = qb.to_tokens(codes)
print(f"stage 2: {moved.sum()} of {ITEMS} items moved; item 0, one of the {KINDS[kind[0]]}, is {tokens[0]}")

# Stage 3 (sections 3.5 and 3.6): a bidirectional encoder learns to fill in masked items of the histories.
table, lengths = ItemTable(torch.from_numpy(codes)), np.full(USERS, 8)
model = qb.Sequencer(LEVELS, CODEWORDS, width=WIDTH, num_layers=2, ffn_width=128, max_items=10)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for epoch in range(20):
    masks = qb.draw_masks(lengths, np.arange(USERS), 0, epoch, weights={name: 1.0 for name in RATIOS}, ratios=RATIOS)  # [B, T]
    batch, _ = pack(histories.ravel(), lengths, masks)
    loss = model.loss(model(batch, table), batch.items[batch.masked], table) / int(masks.sum())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()

# Recommend: append a mask to each history and rank the whole catalog by one matrix product.
with torch.inference_mode():
    queries = next_item_queries(model, list(histories), table)
    scores = model.scores(queries, *model.catalog_vectors(table))  # [B, N]
best = top_k(hide(scores, list(histories)), 5)[1].numpy()
for user in range(3):
    print(f"user {user} likes {KINDS[liked[user]]}: " + ", ".join(f"{KINDS[kind[item]]} {tokens[item]}" for item in best[user]))
print(f"stage 3: {(kind[best] == liked[:, None]).mean():.0%} of the recommended items are of the kind a user likes, 25% by chance")
