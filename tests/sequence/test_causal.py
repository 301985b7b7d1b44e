"""The causal sequence model: what a position may read, what it predicts, and its losses against plain ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qbert_ray.sequence.catalog_softmax import SampledItems, catalog_cross_entropy, sample_items
from qbert_ray.sequence.item_table import ItemTable
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.sequence.packing import pack

CODES = torch.from_numpy(np.random.default_rng(0).integers(0, 8, (20, 3)))
TABLE = ItemTable(CODES)
SIZES = {"num_levels": 3, "codebook_size": 8, "width": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 32, "dropout": 0.0, "max_items": 8}


def build(**changes):
    torch.manual_seed(0)
    model = Sequencer(**(SIZES | {"causal": True, "logits": "cosine", "recall": True} | changes))
    with torch.no_grad():
        for layer in model.layers:
            layer.distance_bias.normal_()
        model.code_embedding.weight.mul_(20)
    return model.eval()


def everywhere(items):
    batch, _ = pack(np.asarray(items), np.array([len(items)]), np.ones((1, len(items)), bool))
    return batch


def test_a_position_reads_what_came_before_it_and_nothing_after():
    model = build()
    whole = model(everywhere([3, 1, 4, 1, 5]), TABLE)
    for end in range(1, 6):
        assert torch.allclose(model(everywhere([3, 1, 4, 1, 5][:end]), TABLE)[-1], whole[end - 1], atol=1e-5)
    changed = model(everywhere([3, 1, 4, 1, 9]), TABLE)
    assert torch.allclose(changed[:4], whole[:4], atol=1e-6) and not torch.allclose(changed[4], whole[4], atol=1e-3)


def test_queries_of_some_positions_are_those_of_all():
    model, items, marked = build(), np.array([3, 1, 4, 1, 5]), np.array([False, True, False, False, True])
    some, _ = pack(items, np.array([5]), marked[None])
    assert torch.allclose(model(some, TABLE), model(everywhere(items), TABLE)[torch.from_numpy(marked)], atol=1e-5)


def test_a_query_after_a_history_is_that_of_its_last_position():
    model = build()
    histories = [np.array([3, 1, 4]), np.array([2]), np.arange(7)]
    found = next_item_queries(model, histories, TABLE)
    for row, history in enumerate(histories):
        assert torch.allclose(found[row], model(everywhere(history), TABLE)[-1], atol=1e-5)


def test_an_empty_history_is_ranked_by_the_biases_and_changes_no_other():
    model = build()
    with torch.no_grad():
        model.code_bias.normal_()
    queries = next_item_queries(model, [np.array([], dtype=np.int64), np.array([2, 3])], TABLE)
    vectors, bias = model.catalog_vectors(TABLE)
    assert torch.allclose(model.scores(queries, vectors, bias)[0], bias, atol=1e-6)
    assert torch.allclose(queries[1], next_item_queries(model, [np.array([2, 3])], TABLE)[0], atol=1e-5)


def test_only_the_latest_items_that_training_windows_hold_are_read():
    model = build()
    long = np.arange(15)
    assert torch.allclose(next_item_queries(model, [long], TABLE), next_item_queries(model, [long[-7:]], TABLE), atol=1e-6)


def test_distance_biases_are_what_plain_attention_adds():
    layer = build().layers[0]
    states = torch.randn(4, 16)
    query, key, value = (part.view(4, 2, 8) for part in layer.query_key_value(layer.norm_attention(states)).split(16, dim=1))
    expected = torch.zeros(4, 2, 8)
    for head in range(2):
        for place in range(4):
            logits = torch.stack(
                [query[place, head] @ key[at, head] / 8**0.5 + layer.distance_bias[head, place - at] for at in range(place + 1)]
            )
            expected[place, head] = (logits.softmax(0)[:, None] * value[: place + 1, head]).sum(0)
    got = layer._attend(layer.query_key_value(layer.norm_attention(states)), [(0, 1, 4)])
    assert torch.allclose(got, expected.reshape(4, 16), atol=1e-5)


def test_the_mean_of_the_history_ends_with_the_position_itself():
    """Weights 1, 1/2, 1/4 for steps 0, 1, 2: sigmoid(0) = 1/2 per step."""
    model = build()
    batch = everywhere([3, 1, 4])
    with_mean = model(batch, TABLE)
    weight = model.recall.data[0].item()
    model.recall = None
    without = model(batch, TABLE)
    vectors = model.compose(TABLE)[[3, 1, 4]]
    expected = F.normalize(vectors[2] + vectors[1] / 2 + vectors[0] / 4, dim=-1) * 16**0.5 * weight
    assert torch.allclose((with_mean - without)[2], expected, atol=1e-4)


@pytest.mark.parametrize("corrected", [False, True])
def test_catalog_cross_entropy_is_that_of_pytorch_with_its_gradients(corrected):
    torch.manual_seed(0)
    inputs = [torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    target, correction = torch.tensor([0, 6, 3, 3, 1]), torch.randn(5, dtype=torch.float64) if corrected else None
    found = []
    for own in (True, False):
        query, vectors, bias = (each.clone().requires_grad_() for each in inputs)
        if own:
            loss = catalog_cross_entropy(query, vectors, bias, target, correction)
        else:
            logits = query @ vectors.T + bias
            logits = logits if correction is None else logits + F.one_hot(target, 7) * correction[:, None]
            loss = F.cross_entropy(logits, target, reduction="sum")
        (3 * loss).backward()
        found.append([loss.detach(), query.grad, vectors.grad, bias.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_logits_of_any_size_have_a_finite_loss_and_gradient():
    """Rows whose largest logits are 1,000, about 0, and -1,000 at most."""
    torch.manual_seed(0)
    query, vectors = torch.tensor([[1000.0], [0.01], [-1000.0]]).requires_grad_(), torch.linspace(1, 2, 6)[:, None]
    bias, target = torch.zeros(6), torch.tensor([1, 0, 4])
    loss = catalog_cross_entropy(query, vectors, bias, target, torch.zeros(3, dtype=torch.float64))  # cast to the logits' type
    loss.backward()
    expected = F.cross_entropy(query @ vectors.T, target, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and torch.isfinite(query.grad).all()


def test_an_item_with_all_interactions_is_certain_and_one_with_none_depends_on_the_draws():
    torch.manual_seed(0)
    sampled = sample_items(torch.tensor([0, 2]), torch.tensor([1.0, 0.0, 0.0]), 3)
    probability = dict(zip(sampled.rows.tolist(), sampled.log_probability.exp().tolist(), strict=True))
    assert probability[0] == 1 and probability[2] == pytest.approx(1 - (2 / 3) ** 3)


def test_a_sample_that_holds_the_catalog_for_certain_gives_the_whole_softmax():
    model = build()
    query, target = torch.randn(6, 16), torch.tensor([0, 5, 19, 3, 3, 7])
    certain = SampledItems(torch.arange(20), torch.zeros(20))
    assert torch.allclose(model.loss(query, target, TABLE, certain), model.loss(query, target, TABLE), atol=1e-4)


def test_inclusion_probabilities_are_those_of_many_draws():
    torch.manual_seed(0)
    frequency = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0])
    counts, expected = torch.zeros(5), torch.zeros(5)
    for _ in range(4000):
        batch = torch.multinomial(frequency, 3, replacement=True)
        sampled = sample_items(batch, frequency, 2)
        counts[sampled.rows] += 1
        expected[sampled.rows] = sampled.log_probability.exp()
        assert set(batch.tolist()) <= set(sampled.rows.tolist())
    assert torch.allclose(counts / 4000, expected, atol=0.03)


def test_sampled_and_whole_softmax_have_about_equal_gradients_on_average():
    torch.manual_seed(0)
    frequency = torch.full((20,), 1 / 20)
    model = build(recall=False)
    query, target = torch.randn(40, 16), torch.randint(20, (40,))

    def gradient(sampled):
        asked = query.clone().requires_grad_()
        model.loss(asked, target, TABLE, sampled).backward()
        return asked.grad

    whole = gradient(None)
    mean = torch.stack([gradient(sample_items(target, frequency, 40)) for _ in range(30)]).mean(0)
    assert F.cosine_similarity(whole.flatten(), mean.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("width", [6, 24])
def test_item_embeddings_start_as_a_rotation_of_the_vectors(width):
    """Vectors that are wider than the model are projected on orthogonal axes of one length."""
    torch.manual_seed(0)
    model = Sequencer(**(SIZES | {"causal": True, "item_embeddings": {"shop": 40}}))
    torch.nn.init.zeros_(model.item_embedding["in_shop"].weight)
    vectors = F.normalize(torch.randn(40, width), dim=-1)
    model.start_items_from("shop", vectors)
    started = model.item_embedding["in_shop"].weight
    assert started.std().item() == pytest.approx(0.05, rel=1e-3)
    if width < 16:
        assert torch.allclose(F.normalize(started, dim=-1) @ F.normalize(started, dim=-1).T, vectors @ vectors.T, atol=1e-4)
    else:
        back = torch.linalg.lstsq(vectors, started).solution  # [E, D]
        gram = back.T @ back
        assert torch.allclose(gram / gram[0, 0], torch.eye(16), atol=1e-3)
