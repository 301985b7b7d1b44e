import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qbert_ray.sequence.decoder import DecoderLayer, EncoderLayer, FeedForward, Generator, unpacked
from qbert_ray.sequence.dropout import Dropout
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


def test_histories_are_read_as_tokens_with_places_from_their_end():
    """Codes 1, 2, 3 of item 0 and 4, 0, 1 of item 1 are tokens 1, 7, 13 and 4, 5, 11; 15 starts an ID, 16 ends a history."""
    model, codes = build(max_items=2), np.array([[1, 2, 3], [4, 0, 1]])
    reading = model.read(np.array([1, 0, 1, 0]), np.array([3, 0, 1]), codes)
    assert reading.order.tolist() == [1, 2, 0] and reading.groups == [(1, 1), (1, 4), (1, 7)]
    assert reading.tokens.tolist() == [16, 1, 7, 13, 16, 1, 7, 13, 4, 5, 11, 16]
    assert reading.positions.tolist() == [2, 0, 0, 0, 2, 1, 1, 1, 0, 0, 0, 2]
    assert model.start == 15


def test_weights_of_the_next_items_scale_their_losses():
    model, lengths = build(), np.array([6, 4, 2])
    reading = model.read(np.arange(12), lengths, CODES)
    targets = torch.from_numpy(CODES[:3])
    alone = [model.loss(reading, targets, torch.eye(3)[row]).item() for row in range(3)]
    assert sum(alone) == pytest.approx(model.loss(reading, targets).item(), rel=1e-5)
    weighted = model.loss(reading, targets, torch.tensor([2.0, 0.5, 3.0])).item()
    assert weighted == pytest.approx(2 * alone[0] + 0.5 * alone[1] + 3 * alone[2], rel=1e-5)


def test_a_generator_of_which_nothing_is_said_is_that_of_tiger():
    """TIGER, section 4: four layers, six heads of width 64, an input width of 128 and an MLP of 1024, dropout of 0.1."""
    model = Generator(3, 256)
    assert model.table.weight.shape == (3 * 256 + 2, 128) and model.position_embedding.weight.shape == (21, 128)
    assert len(model.encoder) == len(model.decoder) == 4 and model.max_items == 20
    shapes = {
        (layer.num_heads, tuple(layer.query_key_value.weight.shape), layer.ffn.up.out_features)
        for layer in [*model.encoder, *model.decoder]
    }
    assert shapes == {(6, (3 * 6 * 64, 128), 1024)}
    assert {module.threshold for module in model.modules() if isinstance(module, Dropout)} == {round(0.1 * 256)}


def test_a_generator_starts_at_the_sizes_of_t5():
    torch.manual_seed(0)
    model = Generator(3, 64, width=64, num_layers=1, num_heads=2, head_width=16, ffn_width=256)
    for name in ("query_key_value", "cross_query", "cross_out", "cross_key_value"):
        weight = getattr(model.decoder[0], name).weight.detach()
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1), name
    assert model.encoder[0].ffn.down.weight.detach().std().item() == pytest.approx(1 / 16, rel=0.1)
    assert model.position_embedding.weight.detach().std().item() == pytest.approx(0.3, rel=0.1)
    assert model.table.weight.detach().std().item() == pytest.approx(1, rel=0.1)


def test_where_everything_is_dropped_layers_add_nothing():
    layer, other = EncoderLayer(8, 2, 4, 16, 1.0).train(), DecoderLayer(8, 2, 4, 16, 1.0).train()
    states = torch.randn(5, 8)
    assert torch.equal(layer(states, [(1, 2), (1, 3)]), states)
    assert torch.equal(other(states, lambda projected: projected[:, :8], torch.randn(4, 16), [(1, 4)], 5), states)
    assert not FeedForward(8, 16, 1.0).train()(states).any()
    assert not torch.equal(layer.eval()(states, [(1, 2), (1, 3)]), states)
    model = build(dropout=1.0).train()
    memory = encode(model, HISTORIES)
    assert not any(each.any() for each in memory.keys_values)
    assert not model(memory, torch.zeros(len(HISTORIES), 1, LEVELS, dtype=torch.long)).any()
