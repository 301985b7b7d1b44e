"""The causal sequence model: what a position may read, what it predicts, and its losses against plain ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qbert_ray.sequence.catalog_softmax import Correction, SampledItems, catalog_cross_entropy, own_items, sample_items
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


def test_an_empty_history_has_a_query_of_its_own_and_changes_no_other():
    model = build()
    with torch.no_grad():
        model.empty_query.normal_()
    queries = next_item_queries(model, [np.array([], dtype=np.int64), np.array([2, 3])], TABLE)
    assert torch.equal(queries[0], model.empty_query)
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
    target, correction, added = torch.tensor([0, 6, 3, 3, 1]), None, torch.zeros(5, 7, dtype=torch.float64)
    if corrected:
        queries, rows = torch.tensor([0, 0, 4, 2, 0, 3]), torch.tensor([0, 6, 2, 5, 6, 0])  # the last but one repeats the second
        added[queries, rows] = torch.tensor([0.3, -1.0, 2.0, 0.7, -1.0, -torch.inf], dtype=torch.float64)
        correction = Correction(queries, rows, added[queries, rows])
    found = []
    for own in (True, False):
        query, vectors, bias = (each.clone().requires_grad_() for each in inputs)
        if own:
            loss = catalog_cross_entropy(query, vectors, bias, target, correction)
        else:
            logits = query @ vectors.T + bias + added
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
    correction = Correction(torch.arange(3), target, torch.zeros(3, dtype=torch.float64))  # cast to the logits' type
    loss = catalog_cross_entropy(query, vectors, bias, target, correction)
    loss.backward()
    expected = F.cross_entropy(query @ vectors.T, target, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and torch.isfinite(query.grad).all()


def test_an_item_with_all_interactions_is_certain_and_one_with_none_depends_on_the_draws():
    torch.manual_seed(0)
    sampled = sample_items(torch.tensor([0, 0]), torch.tensor([2, 2]), [(0, 2, 1)], torch.tensor([1.0, 0.0, 0.0]), 3)
    probability = dict(zip(sampled.rows.tolist(), sampled.log_probability.exp().tolist(), strict=True))
    assert probability[0] == 1 and probability[2] == pytest.approx(1 - (2 / 3) ** 3)


@pytest.mark.parametrize("left_out", [False, True])
def test_a_sample_that_holds_the_catalog_for_certain_gives_the_whole_softmax(left_out):
    model = build()
    items, target = torch.tensor([8, 0, 5, 19, 3, 3]), torch.tensor([0, 5, 19, 3, 3, 7])
    query, own = torch.randn(6, 16), own_items(items, target, [(0, 2, 3)], left_out)
    certain = SampledItems(torch.arange(20), torch.zeros(20))
    assert torch.allclose(model.loss(query, target, TABLE, own, certain), model.loss(query, target, TABLE, own), atol=1e-4)


def test_every_query_is_certain_of_all_items_of_its_own_sequence():
    """Sequences 7 and 8; 1, 2 and 3; 4, 5 and 5."""
    items, target = torch.tensor([7, 1, 2, 4, 5]), torch.tensor([8, 2, 3, 5, 5])
    own = own_items(items, target, [(0, 1, 1), (1, 2, 2)], left_out=True)
    found = {query: set() for query in range(5)}
    for query, item in zip(own.query.tolist(), own.item.tolist(), strict=True):
        found[query].add(item)
    assert found == {0: {7, 8}, 1: {1, 2, 3}, 2: {1, 2, 3}, 3: {4, 5}, 4: {4, 5}}


@pytest.mark.parametrize("sampled", [False, True])
def test_items_of_the_own_sequence_are_left_out_of_the_softmax_but_for_the_target(sampled):
    """Sequence 1, 2, 1: after 1 comes 2, after 2 comes 1, which was there before and is a target all the same."""
    model, query = build(), torch.randn(2, 16)
    items, target = torch.tensor([1, 2]), torch.tensor([2, 1])
    own = own_items(items, target, [(0, 1, 2)], left_out=True)
    vectors, bias = model.catalog_vectors(TABLE)
    logits = model.scaled(query) @ vectors.T + bias
    chosen = None
    if sampled:
        chosen = SampledItems(torch.tensor([1, 2, 7, 9]), torch.tensor([-0.5, -1.0, -0.25, -2.0]))
        logits = logits[:, chosen.rows] - chosen.log_probability
        logits[0, 1], logits[1, 0] = logits[0, 1] - 1.0, logits[1, 0] - 0.5  # targets are no draws
        logits[0, 0], logits[1, 1] = -torch.inf, -torch.inf
    else:
        logits[0, 1], logits[1, 2] = -torch.inf, -torch.inf
    expected = F.cross_entropy(logits, torch.tensor([1, 0]) if sampled else target, reduction="sum")
    loss = model.loss(query, target, TABLE, own, chosen)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


FREQUENCY = torch.tensor([0.5, 0.3, 0.08, 0.06, 0.06, 0.0])


def drawn_batch():
    """Four sequences of three queries and of independent items: items, targets and groups."""
    drawn = torch.multinomial(FREQUENCY, 16, replacement=True).view(4, 4)
    return drawn[:, :-1].flatten(), drawn[:, 1:].flatten(), [(0, 4, 3)]


def test_the_sum_over_a_sample_is_on_average_that_over_the_catalog():
    """Of what a query's logits are to sum, its own items count once and others by what they weigh where they are drawn."""
    torch.manual_seed(0)
    weights, expected, found = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 1.0]), 19.0, []
    for _ in range(4000):
        items, target, groups = drawn_batch()
        sampled = sample_items(items, target, groups, FREQUENCY, 2)
        each = (weights[sampled.rows] / sampled.log_probability.exp()).expand(len(items), -1).clone()
        certain = own_items(items, target, groups, left_out=False).correction(target, sampled)
        each[certain.query, certain.row] *= certain.added.exp()
        found.append(each.sum(1).mean().item())
    assert sum(found) / 4000 == pytest.approx(expected, rel=0.01)


def test_sampled_and_whole_softmax_have_about_equal_gradients_on_average():
    torch.manual_seed(0)
    frequency = torch.full((20,), 1 / 20)
    model = build(recall=False)
    query, items, target = torch.randn(40, 16), torch.randint(20, (40,)), torch.randint(20, (40,))

    def gradient(sampled):
        asked = query.clone().requires_grad_()
        own = None if sampled is None else own_items(items, target, [(0, 40, 1)], left_out=False)
        model.loss(asked, target, TABLE, own, sampled).backward()
        return asked.grad

    whole = gradient(None)
    mean = torch.stack([gradient(sample_items(items, target, [(0, 40, 1)], frequency, 40)) for _ in range(30)]).mean(0)
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
