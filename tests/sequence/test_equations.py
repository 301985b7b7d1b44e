"""Eq. 1, 2 and 11 of the paper and what an item's vector is made of, worked out one number at a time."""

import math

import numpy as np
import pytest
import torch

from qbert_ray.sequence.catalog_softmax import OwnItems, SampledItems
from qbert_ray.sequence.dropout import Dropout
from qbert_ray.sequence.item_table import ColdItems, ItemTable
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.sequence.packing import pack

K, M, D, N, F = 3, 4, 6, 9, 5
CODES = torch.from_numpy(np.random.default_rng(0).permutation(M**K)[:N, None] // np.array([M**2, M, 1]) % M)


def build(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    arguments = {"width": D, "num_layers": 1, "num_heads": 2, "ffn_width": 8, "dropout": 0.0, "max_items": 6}
    model = Sequencer(K, M, **arguments | changes).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter is model.code_bias:
                parameter.normal_(std=0.5)
    return model


def vector_of(model, item):
    """Sum of the embeddings of the item's codes."""
    return [sum(model.code_embedding.weight[level * M + int(CODES[item, level]), d].item() for level in range(K)) for d in range(D)]


def bias_of(model, item):
    return sum(model.code_bias[level * M + int(CODES[item, level])].item() for level in range(K))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(vector):
    return [x / math.sqrt(dot(vector, vector)) for x in vector]


def log_softmax(logits, place):
    return logits[place] - math.log(sum(map(math.exp, logits)))


def queries(count=2, width=D):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_eq_11_over_the_catalog_is_the_log_probability_of_the_masked_items(logits):
    model, query, target = build(logits=logits, temperature=0.3), queries(), [7, 2]
    expected = 0.0
    for row, item in zip(query.tolist(), target, strict=True):
        if logits == "cosine":
            scores = [dot(unit(row), unit(vector_of(model, other))) / 0.3 + bias_of(model, other) for other in range(N)]
        else:
            scores = [dot(row, vector_of(model, other)) + bias_of(model, other) for other in range(N)]
        expected -= log_softmax(scores, item)
    assert model.loss(query, torch.tensor(target), ItemTable(CODES)).item() == pytest.approx(expected)


@pytest.mark.parametrize("logits", ["dot", "cosine"])
@pytest.mark.parametrize("tokens", ["item", "flat"])
def test_eq_11_over_tokens_is_the_mean_log_probability_of_the_codes(tokens, logits):
    model = build(loss="tokens", tokens=tokens, logits=logits, temperature=0.3)
    query, target = queries(width=K * D if tokens == "flat" else D), [7, 2]
    expected = 0.0
    for row, item in zip(query.tolist(), target, strict=True):
        for level in range(K):
            own = row[level * D : (level + 1) * D] if tokens == "flat" else row
            book = model.code_embedding.weight[level * M : (level + 1) * M].tolist()
            products = [dot(unit(own), unit(word)) / 0.3 for word in book] if logits == "cosine" else [dot(own, word) for word in book]
            products = [x + b for x, b in zip(products, model.code_bias[level * M : (level + 1) * M].tolist(), strict=True)]
            expected -= log_softmax(products, int(CODES[item, level])) / K
    assert model.loss(query, torch.tensor(target), ItemTable(CODES)).item() == pytest.approx(expected)


@pytest.mark.parametrize("logits", ["dot", "cosine"])
@pytest.mark.parametrize(
    "sampled", [None, SampledItems(torch.tensor([1, 2, 5, 7]), torch.full((4,), -1.0, dtype=torch.float64))], ids=["all", "sampled"]
)
def test_the_loss_over_tokens_is_added_with_its_weight_and_without_biases(sampled, logits):
    query, target, table = queries(), torch.tensor([7, 2]), ItemTable(CODES)
    own = None if sampled is None else OwnItems(torch.arange(2), target, left_out=False)
    alone, both, tokens = (build(logits=logits, temperature=0.3, **more) for more in ({}, {"token_weight": 0.25}, {"loss": "tokens"}))
    with torch.no_grad():
        tokens.code_bias.zero_()
    expected = alone.loss(query, target, table, own, sampled) + 0.25 * tokens.loss(query, target, table)
    assert both.loss(query, target, table, own, sampled).item() == pytest.approx(expected.item())
    weight = torch.tensor([3.0, 0.5], dtype=torch.float64)
    expected = alone.loss(query, target, table, own, sampled, weight) + 0.25 * tokens.loss(query, target, table, weight=weight)
    assert both.loss(query, target, table, own, sampled, weight).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("tokens", "content_width"), [("item", 0), ("item", F), ("flat", 0)])
@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_items_are_ranked_by_what_the_loss_over_tokens_trains(tokens, logits, content_width):
    """The log-probabilities of an item's codes add up to its score, less what is the same for all items."""
    model = build(tokens=tokens, logits=logits, temperature=0.3, loss="tokens", content_width=content_width)
    content = torch.randn(N, F, dtype=torch.float64)
    cold = ColdItems(torch.tensor([8]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    table = ItemTable(CODES, content if content_width else None, cold=cold)
    query = torch.randn(2, D * (K if tokens == "flat" else 1), dtype=torch.float64)
    scores = model.scores(query, *model.catalog_vectors(table))
    with torch.no_grad():
        trained = [[-K * model.loss(query[[row]], torch.tensor([item]), table).item() for item in range(N)] for row in range(2)]
    apart = scores.detach() - torch.tensor(trained, dtype=torch.float64)
    torch.testing.assert_close(apart, apart[:, :1].expand_as(apart))
    assert scores.std() > 0.1


def test_a_model_of_words_has_no_loss_over_tokens():
    words = Sequencer(0, M, width=D, num_layers=1, num_heads=2, tokens="word", item_embeddings={"items": N}, token_weight=1.0)
    assert words.token_weight == 0


@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_a_sampled_softmax_takes_the_log_probability_of_being_sampled_off_every_item_but_those_it_is_sure_to_hold(logits):
    """The first query's target is item 7 and its sequence holds item 2 too; the second's is 2."""
    model, query, target = build(logits=logits, temperature=0.3), queries(), [7, 2]
    rows, logp = [1, 2, 5, 7], [-0.5, -1.0, -0.25, -2.0]
    expected = 0.0
    for row, item, sure in zip(query.tolist(), target, ({7, 2}, {2}), strict=True):
        scores = []
        for other, probability in zip(rows, logp, strict=True):
            product = dot(unit(row), unit(vector_of(model, other))) / 0.3 if logits == "cosine" else dot(row, vector_of(model, other))
            scores.append(product + bias_of(model, other) - (0 if other in sure else probability))
        expected -= log_softmax(scores, rows.index(item))
    sampled = SampledItems(torch.tensor(rows), torch.tensor(logp, dtype=torch.float64))
    own = OwnItems(torch.tensor([0, 0, 1]), torch.tensor([7, 2, 2]), left_out=False)
    assert model.loss(query, torch.tensor(target), ItemTable(CODES), own, sampled).item() == pytest.approx(expected)


@pytest.mark.parametrize(("loss", "token_weight"), [("catalog", 0.0), ("tokens", 0.0), ("catalog", 0.5)])
def test_gradients_of_eq_11_are_those_of_finite_differences(loss, token_weight):
    model, target, table = build(loss=loss, token_weight=token_weight), torch.tensor([7, 2]), ItemTable(CODES)
    names = ["code_embedding.weight", "code_bias"]

    def value(query, *parameters):
        return torch.func.functional_call(
            Losses(model), dict(zip([f"model.{n}" for n in names], parameters, strict=True)), (query, target, table)
        )

    inputs = [queries().requires_grad_(), *(dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names)]
    assert torch.autograd.gradcheck(value, inputs)


class Losses(torch.nn.Module):
    """The loss as a module's forward pass, as `functional_call` needs it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments):
        return self.model.loss(*arguments)


def test_gradients_through_the_encoder_are_those_of_finite_differences():
    model, table = build(loss="catalog", recall=True), ItemTable(CODES)
    items, lengths = np.array([1, 2, 3, 4, 5]), np.array([2, 3])
    masks = np.array([[False, True, False], [True, False, True]])
    packed, _ = pack(items, lengths, masks)
    value = model.loss(model(packed, table), packed.items[packed.masked], table)
    value.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for place in {0, len(flat) // 2, len(flat) - 1}:
                sides = []
                for step in (1e-6, -1e-6):
                    flat[place] += step
                    sides.append(model.loss(model(packed, table), packed.items[packed.masked], table).item())
                    flat[place] -= step
                found = 0.0 if parameter.grad is None else parameter.grad.view(-1)[place].item()
                assert found == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-6), name


def test_eq_1_the_next_item_is_that_of_the_largest_score_given_the_codes_of_the_history():
    """Items of equal codes would be one item to the model (Eq. 2): its scores depend on codes alone."""
    model, history = build(), np.array([3, 1, 4])
    twins = CODES.clone()
    twins[8] = twins[3]
    with torch.no_grad():
        query = next_item_queries(model, [history], ItemTable(twins))
        scores = model.scores(query, *model.catalog_vectors(ItemTable(twins)))[0]
        other = next_item_queries(model, [np.array([8, 1, 4])], ItemTable(twins))
    by_hand = [dot(query[0].tolist(), vector_of(model, item)) + bias_of(model, item) for item in range(8)]
    assert scores[:8].tolist() == pytest.approx(by_hand)
    assert int(scores[:8].argmax()) == by_hand.index(max(by_hand))
    assert scores[8] == scores[3] and torch.equal(query, other)


def test_an_items_vector_is_the_sum_of_its_codes_its_content_and_its_own_embedding():
    model = build(content_width=F, item_embeddings={"shop": 7})
    content = torch.randn(N, F, dtype=torch.float64)
    known = torch.tensor([True] * 6 + [False])
    table = ItemTable(CODES, content, known, domain="shop")
    with torch.no_grad():
        found = model.compose(table)
        for item in range(N):
            expected = vector_of(model, item)
            for d in range(D):
                expected[d] += dot(model.content.weight[d].tolist(), content[item].tolist())
                if item < 6:
                    expected[d] += model.item_embedding["in_shop"].weight[item, d].item()
            assert found[item].tolist() == pytest.approx(expected)
        some = torch.tensor([8, 0, 6, 3])
        assert torch.allclose(model.compose(table, some), found[some])


def test_a_cold_item_scores_as_the_weighted_mean_of_its_neighbours():
    model, query = build(), queries()
    cold = ColdItems(torch.tensor([8, 5]), torch.tensor([[0, 3], [1, 2]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64))
    with torch.no_grad():
        plain = model.scores(query, *model.catalog_vectors(ItemTable(CODES)))
        found = model.scores(query, *model.catalog_vectors(ItemTable(CODES, cold=cold)))
    assert torch.allclose(found[:, 8], 0.25 * plain[:, 0] + 0.75 * plain[:, 3])
    assert torch.allclose(found[:, 5], (plain[:, 1] + plain[:, 2]) / 2)
    assert torch.equal(found[:, [0, 1, 2, 3, 4, 6, 7]], plain[:, [0, 1, 2, 3, 4, 6, 7]])


@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_candidates_of_each_query_score_as_in_the_whole_catalog(logits):
    model, query = build(logits=logits), queries()
    with torch.no_grad():
        vectors, bias = model.catalog_vectors(ItemTable(CODES))
        whole = model.scores(query, vectors, bias)
        chosen = torch.tensor([[4, 0, 8], [1, 1, 7]])
        assert torch.allclose(model.scores(query, vectors[chosen], bias[chosen]), whole.gather(1, chosen))


def test_codes_start_as_a_rotation_of_the_codewords_of_their_level():
    model = build(dtype=torch.float32)
    books = torch.randn(K, M, 2) + 5 * torch.arange(1, K + 1)[:, None, None]  # what all words of a level share says nothing
    with torch.no_grad():
        model.code_embedding.weight.zero_()
    model.start_from(books)
    found, centred = model.code_embedding.weight.detach(), (books - books.mean(1, keepdim=True)).flatten(0, 1)
    scale = 0.02 / float((centred @ torch.linalg.pinv(centred) @ found / found.std()).std() or 1) * float(found.std())
    assert float(found.std()) == pytest.approx(0.02, rel=1e-4) and scale > 0
    before, after = torch.pdist(centred), torch.pdist(found)
    assert torch.allclose(after / before, (after / before).mean(), rtol=1e-3)
    noisy = build(dtype=torch.float32)
    start = noisy.code_embedding.weight.detach().clone()
    torch.manual_seed(7)
    noisy.start_from(books)
    rest = noisy.code_embedding.weight.detach() - 0.3 * start
    assert float(rest.std()) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_its_rate_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    layer, x = Dropout(rate).train(), torch.ones(400, 50)
    found = layer(x)
    dropped = round(rate * 256) / 256
    assert (found == 0).float().mean().item() == pytest.approx(dropped, abs=0.01)
    assert found[found > 0].unique().item() == pytest.approx(1 / (1 - dropped))
    assert layer.eval()(x) is x and Dropout(0.0).train()(x) is x
    assert not Dropout(1.0).train()(x).any()


def test_packing_lays_sequences_end_to_end_shortest_first():
    items, lengths = np.array([10, 11, 12, 20, 30, 31, 32]), np.array([3, 1, 3])
    masks = np.array([[False, True, False], [True, False, False], [False, False, True]])
    packed, order = pack(items, lengths, masks)
    assert order.tolist() == [1, 0, 2]
    assert packed.items.tolist() == [20, 10, 11, 12, 30, 31, 32]
    assert packed.masked.tolist() == [True, False, True, False, False, False, True]
    assert packed.position.tolist() == [0, 2, 1, 0, 2, 1, 0]  # counted from the end
    assert packed.groups == [(0, 1, 1), (1, 2, 3)] and not packed.ends


def test_an_embedding_starts_small_and_content_at_about_the_size_of_codes():
    torch.manual_seed(0)
    model = Sequencer(4, 64, width=64, num_layers=1, content_width=100, item_embeddings={"shop": 500})
    for embedding in (model.code_embedding, model.position_embedding, model.item_embedding["in_shop"]):
        assert embedding.weight.detach().std().item() == pytest.approx(0.02, rel=0.1)
    content = torch.nn.functional.normalize(torch.randn(50, 100), dim=-1) * 10  # length sqrt(F)
    assert model.content(content).detach().std().item() == pytest.approx(0.1, rel=0.1)
    assert model.code_bias.tolist() == [0] * 256


def test_a_model_of_which_nothing_is_said_is_that_of_the_paper():
    model = Sequencer(4, 256)
    assert len(model.layers) == 4 and model.max_items == 50 and len(model.position_embedding.weight) == 50
    assert {(layer.num_heads, layer.ffn[0].out_features, layer.out.in_features) for layer in model.layers} == {(4, 512, 256)}
    assert (model.tokens, model.loss_kind, model.logits_kind) == ("item", "catalog", "dot")
    assert model.recall is None and not model.causal and model.content is None and not model.item_embedding
    assert {each.threshold for each in model.modules() if isinstance(each, Dropout)} == {round(0.2 * 256)}
    assert all(layer.distance_bias is None for layer in model.layers)
