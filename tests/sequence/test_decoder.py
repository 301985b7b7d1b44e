import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qbert_ray.sequence.decoder import Generator, unpacked
from tests.sequence.t5 import t5_of

LEVELS, SIZE, ITEMS = 3, 5, 40
RNG = np.random.default_rng(0)
CODES = RNG.permutation(np.unique(RNG.integers(0, SIZE, (400, LEVELS)), axis=0))[:ITEMS]
HISTORIES = [RNG.integers(0, ITEMS, length) for length in (4, 0, 9, 1, 4, 2, 7)]


def build(**changes):
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 2, "num_heads": 3, "head_width": 8, "ffn_width": 24, "dropout": 0.0, "max_items": 6}
    return Generator(LEVELS, SIZE, **(sizes | changes)).eval()


def encode(model, histories, codes=CODES):
    items = np.concatenate([np.zeros(0, int), *histories]).astype(int)
    return model.encode(model.read(items, np.array([len(history) for history in histories]), codes))


def all_logits(model, histories, codes):
    """[B, n, K, M] in the order of the batch, of the same code sequences [n, K] for every history."""
    memory = encode(model, histories)
    return unpacked(model(memory, torch.from_numpy(codes).expand(len(histories), -1, -1)), memory.order)


def test_batch_mates_never_matter():
    model = build()
    together = all_logits(model, HISTORIES, CODES)
    for history, logits in zip(HISTORIES, together, strict=True):
        assert torch.allclose(all_logits(model, [history], CODES)[0], logits, atol=1e-5)


def test_items_before_the_latest_are_not_read():
    model = build()
    assert torch.allclose(all_logits(model, [HISTORIES[2]], CODES), all_logits(model, [HISTORIES[2][-6:]], CODES))
    assert not torch.allclose(all_logits(model, [HISTORIES[2]], CODES), all_logits(model, [HISTORIES[2][-5:]], CODES))


def test_the_order_of_a_history_matters():
    model = build()
    assert not torch.allclose(all_logits(model, [HISTORIES[0]], CODES), all_logits(model, [HISTORIES[0][::-1]], CODES), atol=1e-3)


def test_a_code_sees_only_those_before_it():
    model = build()
    first = all_logits(model, HISTORIES, CODES[:1])
    for level in range(LEVELS):
        other = CODES[:1].copy()
        other[0, level] = (other[0, level] + 1) % SIZE
        changed = (all_logits(model, HISTORIES, other) - first).abs().amax((0, 1, 3)) > 1e-6  # [K]
        assert changed.tolist() == [place > level for place in range(LEVELS)]


def test_a_t5_with_the_same_weights_gives_the_same_scores():
    model = build()
    with torch.no_grad():
        model.position_embedding.weight.zero_()
    twin = t5_of(model)
    histories = [history[-6:] for history in HISTORIES]
    longest = max(map(len, histories)) * LEVELS + 1
    tokens, there = torch.full((len(histories), longest), model.start), torch.zeros(len(histories), longest, dtype=torch.long)
    for row, history in enumerate(histories):
        flat = (CODES[history] + np.arange(LEVELS) * SIZE).ravel().tolist() + [model.start + 1]
        tokens[row, : len(flat)], there[row, : len(flat)] = torch.tensor(flat), 1
    labels = torch.from_numpy(CODES[: len(histories)] + np.arange(LEVELS) * SIZE)
    expected = twin(input_ids=tokens, attention_mask=there, labels=labels).logits.log_softmax(-1)
    memory = encode(model, histories)
    found = unpacked(model(memory, torch.from_numpy(CODES[memory.order])[:, None]), memory.order)[:, 0].log_softmax(-1)
    for level in range(LEVELS):
        assert torch.allclose(found[:, level], expected[:, level, level * SIZE : (level + 1) * SIZE], atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_every_code():
    model = build()
    lengths, items = np.array([len(history) for history in HISTORIES]), np.concatenate(HISTORIES).astype(int)
    targets = torch.from_numpy(CODES[: len(HISTORIES)])
    reading = model.read(items, lengths, CODES)
    loss = model.loss(reading, targets[reading.order])
    logits = torch.stack([all_logits(model, [h], CODES[[row]])[0, 0] for row, h in enumerate(HISTORIES)])  # [B, K, M]
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item(), rel=1e-5)


def test_training_on_a_few_histories_learns_them():
    model = build(width=32, dropout=0.1).train()
    lengths, items = np.array([len(history) for history in HISTORIES]), np.concatenate(HISTORIES).astype(int)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        reading = model.read(items, lengths, CODES)
        loss = model.loss(reading, torch.from_numpy(CODES[reading.order])) / (LEVELS * len(HISTORIES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    memory = encode(model, HISTORIES)
    assert model.score_all(memory, torch.from_numpy(CODES)).argmax(1).tolist() == list(range(len(HISTORIES)))


def test_every_weight_gets_a_gradient():
    model = build()
    reading = model.read(np.arange(12), np.array([6, 4, 2]), CODES)
    model.loss(reading, torch.from_numpy(CODES[:3])).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_scores_of_all_items_are_sums_of_their_codes(monkeypatch):
    model = build()
    logp = all_logits(model, HISTORIES, CODES).log_softmax(-1)
    expected = logp.gather(3, torch.from_numpy(CODES)[None, :, :, None].expand(len(HISTORIES), -1, -1, -1)).sum((2, 3))
    memory = encode(model, HISTORIES)
    assert torch.allclose(model.score_all(memory, torch.from_numpy(CODES)), expected, atol=1e-5)
    monkeypatch.setattr("qbert_ray.sequence.decoder.MOST_ROWS", 30)  # in many pieces
    assert torch.allclose(model.score_all(memory, torch.from_numpy(CODES)), expected, atol=1e-5)


def test_probabilities_of_all_codes_sum_to_one():
    model = build()
    every = np.stack(np.meshgrid(*[np.arange(SIZE)] * LEVELS, indexing="ij"), axis=-1).reshape(-1, LEVELS)
    total = model.score_all(encode(model, HISTORIES), torch.from_numpy(every)).exp().sum(1)
    assert torch.allclose(total, torch.ones(len(HISTORIES)), atol=1e-5)
