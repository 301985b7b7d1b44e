import numpy as np
import pytest
import torch

from qbert_ray.sequence.dropout import Dropout
from qbert_ray.sequence.item_table import ColdItems, ItemTable, nearest_trained_items
from qbert_ray.sequence.model import Sequencer, next_item_queries
from qbert_ray.sequence.packing import pack
from qbert_ray.sequence.recency import recency_weighted_mean
from qbert_ray.sequence.task import rank_targets

LENGTHS = np.array([3, 7, 3, 1, 5])
ITEMS = np.arange(LENGTHS.sum()) % 20
CODES = torch.from_numpy(np.random.default_rng(0).integers(0, 8, (20, 3)))
TABLE = ItemTable(CODES)
LAYOUTS = pytest.mark.parametrize("tokens", ["item", "flat"])
LOSSES = pytest.mark.parametrize("loss", ["catalog", "tokens"])


def build(**changes):
    torch.manual_seed(0)
    return Sequencer(
        **(
            {
                "num_levels": 3,
                "codebook_size": 8,
                "width": 16,
                "num_layers": 2,
                "num_heads": 2,
                "ffn_width": 32,
                "dropout": 0.0,
                "max_items": 8,
            }
            | changes
        )
    )


def last_masked(lengths):
    return np.arange(lengths.max()) == lengths[:, None] - 1


@LAYOUTS
def test_batch_mates_never_matter(tokens):
    model = build(tokens=tokens).eval()
    packed, order = pack(ITEMS, LENGTHS, last_masked(LENGTHS))
    together = model(packed, TABLE)
    ends = np.cumsum(LENGTHS)
    for place, row in enumerate(order):
        alone, _ = pack(ITEMS[ends[row] - LENGTHS[row] : ends[row]], LENGTHS[[row]], last_masked(LENGTHS[[row]]))
        assert torch.allclose(together[place], model(alone, TABLE)[0], atol=1e-6)


@LAYOUTS
def test_packing_equals_a_padded_batch_with_an_attention_mask(tokens):
    """The packed model against the obvious one: pad, mask the padding, attend over everything."""
    model = build(tokens=tokens).eval()
    masks = last_masked(LENGTHS)
    packed, order = pack(ITEMS, LENGTHS, masks)
    got = model(packed, TABLE)
    ends = np.cumsum(LENGTHS)
    repeat = 3 if tokens == "flat" else 1
    for place, row in enumerate(order):
        length = LENGTHS[row]
        codes = CODES[ITEMS[ends[row] - length : ends[row]]] + torch.arange(3) * 8
        states = model.code_embedding(codes)
        states = states.flatten(0, 1) if tokens == "flat" else states.sum(1)
        hidden = torch.from_numpy(np.repeat(masks[row, :length], repeat))
        states = torch.where(hidden[:, None], model.mask_embedding, states)
        back = torch.arange(length - 1, -1, -1)
        position = (back[:, None] * repeat + torch.arange(repeat)).flatten()
        states = states + model.position_embedding(position)
        padded = torch.nn.functional.pad(states, (0, 0, 0, 24 - len(states)))
        valid = torch.arange(24) < len(states)
        for layer in model.layers:
            q, k, v = layer.query_key_value(layer.norm_attention(padded)).view(24, 3, 2, 8).permute(1, 2, 0, 3)
            weights = ((q @ k.transpose(-1, -2)) / 8**0.5).masked_fill(~valid, -torch.inf).softmax(-1)
            padded = padded + layer.out((weights @ v).transpose(0, 1).reshape(24, 16))
            padded = padded + layer.ffn(layer.norm_ffn(padded))
        expected = model.norm(padded[: len(states)][hidden]).flatten()
        assert torch.allclose(got[place], expected, atol=1e-5)


@LAYOUTS
def test_scores_are_sums_of_level_logits(tokens):
    model = build(tokens=tokens).eval()
    packed, _ = pack(ITEMS, LENGTHS, last_masked(LENGTHS))
    query = model(packed, TABLE)
    scores = model.scores(query, *model.catalog_vectors(TABLE))
    books = model.code_embedding.weight.view(3, 8, 16)
    bias = model.code_bias.view(3, 8)
    for item in (0, 7, 19):
        expected = 0
        for level in range(3):
            state = query.view(len(query), 3, 16)[:, level] if tokens == "flat" else query
            expected = expected + state @ books[level, CODES[item, level]] + bias[level, CODES[item, level]]
        assert torch.allclose(scores[:, item], expected, atol=1e-5)


@LAYOUTS
@LOSSES
@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_every_layout_and_loss_learns_a_fixed_next_item(tokens, loss, logits):
    model = build(tokens=tokens, loss=loss, logits=logits)
    items, lengths = np.tile(np.arange(6), 16), np.full(16, 6)
    packed, _ = pack(items, lengths, last_masked(lengths))
    target = packed.items[packed.masked]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        value = model.loss(model(packed, TABLE), target, TABLE) / len(target)
        value.backward()
        optimizer.step()
    queries = next_item_queries(model.eval(), [np.arange(5)], TABLE)
    with torch.no_grad():
        assert model.scores(queries, *model.catalog_vectors(TABLE)).argmax() == 5


def test_only_the_latest_items_of_a_long_history_are_read():
    model = build().eval()
    long = np.random.default_rng(1).integers(0, 20, 30)
    queries = next_item_queries(model, [long, long[-7:]], TABLE)
    assert torch.allclose(queries[0], queries[1])


@LAYOUTS
@pytest.mark.parametrize("recall", [True, False])
def test_the_last_layer_at_the_ends_alone_gives_the_queries_of_all_places(tokens, recall):
    model = build(tokens=tokens, recall=recall and tokens == "item").eval()
    packed, _ = pack(ITEMS, LENGTHS, last_masked(LENGTHS))
    ends = model(packed._replace(ends=True), TABLE)
    torch.testing.assert_close(ends, model(packed, TABLE), atol=1e-5, rtol=0)


@LAYOUTS
def test_dropping_at_chosen_places_is_that_of_the_whole(tokens):
    """Losses under a fixed seed do not depend on how much of the last layer is computed."""
    layer = build(tokens=tokens, dropout=0.3).train().layers[-1]
    states, chosen = torch.randn(int(LENGTHS.sum()), 16), torch.from_numpy(np.arange(LENGTHS.sum()) % 3 == 0)
    groups = [(0, 1, len(states))]
    torch.manual_seed(1)
    whole = layer(states, groups)[chosen]
    torch.manual_seed(1)
    torch.testing.assert_close(layer(states, groups, chosen), whole, atol=1e-6, rtol=0)


def test_queries_come_in_the_order_of_the_histories():
    model = build().eval()
    histories = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6])]
    together = next_item_queries(model, histories, TABLE)
    for row, history in enumerate(histories):
        assert torch.allclose(together[row], next_item_queries(model, [history], TABLE)[0], atol=1e-6)


def test_a_masked_item_is_not_seen():
    model = build().eval()
    masks = last_masked(LENGTHS)
    other = ITEMS.copy()
    other[np.cumsum(LENGTHS) - 1] = 0  # what is masked
    a, _ = pack(ITEMS, LENGTHS, masks)
    b, _ = pack(other, LENGTHS, masks)
    assert torch.equal(model(a, TABLE), model(b, TABLE))


def test_items_that_are_not_known_are_composed_of_codes_alone():
    model = build(item_embeddings={"d": 20})
    table = ItemTable(CODES, known=torch.arange(20) != 3, domain="d")
    vectors, plain = model.compose(table), model.compose(TABLE)
    assert torch.equal(vectors[3], plain[3])
    assert not torch.equal(vectors[4], plain[4])
    longer = ItemTable(torch.cat([CODES, CODES[:2]]), known=table.known, domain="d")  # items that came after the training
    assert torch.equal(model.compose(longer), torch.cat([vectors, plain[:2]]))
    items = torch.tensor([21, 4, 3])
    assert torch.equal(model.compose(longer, items), model.compose(longer)[items])
    model.item_embedding["in_d"].weight.data[3] = 0  # as a saved model has it
    assert torch.equal(model.compose(table._replace(known=None)), vectors)


def test_items_are_composed_alike_where_the_embedding_has_sparse_gradients():
    model = build(item_embeddings={"d": 20})
    table = ItemTable(torch.cat([CODES, CODES[:2]]), known=torch.arange(20) != 3, domain="d")
    items, found = torch.tensor([5, 21, 3, 5, 7]), []  # 21 came after the training, 3 is not known
    for sparse in (False, True):
        model.item_embedding["in_d"].sparse = sparse
        model.zero_grad()
        with torch.no_grad():
            model.item_embedding["in_d"].weight[3] = 1.0
        vectors = model.compose(table, items)
        (vectors * torch.arange(5.0)[:, None]).sum().backward()
        gradient = model.item_embedding["in_d"].weight.grad
        assert gradient.is_sparse == sparse
        found.append((vectors, gradient.to_dense() if sparse else gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1]) and found[0][1][5].sum() == 3 * found[0][1].shape[1]
    assert not found[1][1][3].any()


@pytest.mark.parametrize("domain", ["items", "train", "to", "a-b"])
def test_a_domain_may_be_called_like_a_method(domain):
    model = build(item_embeddings={domain: 20})
    assert not torch.equal(model.compose(TABLE._replace(domain=domain)), model.compose(TABLE))


def test_content_distinguishes_items_of_equal_codes_and_is_not_saved():
    model = build(content_width=6).eval()
    codes = CODES.clone()
    codes[1] = codes[0]
    twins = ItemTable(codes, torch.randn(20, 6))
    vectors = model.compose(twins)
    assert not torch.allclose(vectors[0], vectors[1])
    assert torch.allclose(vectors[1] - vectors[0], model.content(twins.content[1] - twins.content[0]), atol=1e-6)
    items = torch.tensor([7, 1])
    assert torch.allclose(model.compose(twins, items), vectors[items], atol=1e-6)
    assert [name for name in model.state_dict() if "content" in name] == ["content.weight"]
    with pytest.raises(AssertionError, match="a table with content"):
        model.compose(TABLE)


def test_code_dropout_leaves_content_alone_and_only_in_training():
    model, table = build(content_width=6, code_dropout=1.0), ItemTable(CODES, torch.randn(20, 6))
    assert torch.allclose(model.compose(table), model.content(table.content), atol=1e-6)
    assert not torch.allclose(model.eval().compose(table), model.content(table.content), atol=1e-3)


def test_cold_items_are_the_weighted_mean_of_their_nearest_trained_items():
    model = build(logits="cosine").eval()
    vectors, bias = model.catalog_vectors(TABLE)
    cold = ColdItems(torch.tensor([18, 19]), torch.tensor([[3, 4], [5, 5]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    averaged, averaged_bias = model.catalog_vectors(TABLE._replace(cold=cold))
    assert torch.equal(averaged[:18], vectors[:18]) and torch.allclose(averaged[19], vectors[5])
    assert torch.allclose(averaged[18], torch.nn.functional.normalize(vectors[3] + vectors[4], dim=0), atol=1e-6)
    assert averaged_bias[18] == (bias[3] + bias[4]) / 2


def test_the_nearest_trained_items_are_those_of_a_plain_sort():
    content = torch.randn(30, 6)
    cold = nearest_trained_items(content, torch.tensor([29, 28]), torch.arange(25))
    cosine = torch.nn.functional.cosine_similarity(content[29], content[:25])
    assert cold.nearest[0].tolist() == cosine.argsort(descending=True)[:10].tolist()
    assert torch.allclose(cold.weights[0], (cosine[cold.nearest[0]] / 0.1).softmax(0), atol=1e-5)
    few = nearest_trained_items(content, torch.tensor([29]), torch.arange(3))
    assert few.nearest.shape == (1, 3) and few.weights.sum() == pytest.approx(1)


def test_a_table_moves_whole():
    cold = ColdItems(torch.tensor([1]), torch.tensor([[0]]), torch.ones(1, 1))
    table = ItemTable(CODES, torch.ones(20, 2), torch.ones(20, dtype=torch.bool), cold, "d").to("meta")
    assert {each.device.type for each in (table.codes, table.content, table.known, *table.cold)} == {"meta"} and table.domain == "d"
    assert TABLE.to("cpu").content is None and TABLE.to("cpu").cold is None


def test_recall_is_the_recency_weighted_mean_of_the_items_that_are_not_masked():
    model = build(recall=True).eval()
    vectors, far = torch.randn(4, 32), 0.25
    model.recall.data = torch.tensor([2.0, float(np.log(far / (1 - far)))])
    packed, _ = pack(np.arange(4), np.array([4]), np.array([[False, False, True, False]]))
    mean = vectors[0] * far**2 + vectors[1] * far + vectors[3] * far
    expected = 2 * 32**0.5 * torch.nn.functional.normalize(mean, dim=0)
    assert torch.allclose(recency_weighted_mean(vectors, packed, model.recall)[0], expected, atol=1e-5)
    alone, _ = pack(np.arange(1), np.array([1]), np.array([[True]]))
    assert not recency_weighted_mean(vectors[:1], alone, model.recall).any()


@torch.inference_mode()
def test_a_model_is_chosen_by_ranks_among_what_its_users_have_not_had():
    model = build().eval()
    histories, targets = [np.array([1, 2, 3]), np.array([4, 7]), np.array([7])], np.array([9, 4, 0])  # the second had its target before
    scores = model.scores(next_item_queries(model, histories, TABLE), *model.catalog_vectors(TABLE))
    expected = []
    for score, history, target in zip(scores.numpy(), histories, targets, strict=True):
        others = np.setdiff1d(np.arange(20), [*history, target])
        expected.append(1 + (score[others] > score[target]).sum())
    assert rank_targets(model, TABLE, histories, targets, batch_size=2).tolist() == expected


def test_code_dropout_hides_its_share_of_the_items():
    model, table = build(content_width=6, code_dropout=0.25), ItemTable(CODES.repeat(200, 1), torch.randn(4000, 6))
    hidden = torch.isclose(model.compose(table), model.content(table.content), atol=1e-6).all(1)
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_sparse_embeddings_of_a_saved_model_compose_items_as_dense_ones_do():
    model = build(item_embeddings={"d": 18})
    table, items = ItemTable(CODES, domain="d"), torch.tensor([19, 0, 17, 18])  # the last two came after the training
    dense = model.compose(table, items)
    model.item_embedding["in_d"].sparse = True
    assert torch.equal(model.compose(table, items), dense) and torch.equal(dense, model.compose(table)[items])
    assert torch.equal(dense[[0, 3]], model.compose(TABLE, items[[0, 3]]))


def test_candidates_of_a_sampled_softmax_are_no_means_of_their_neighbours():
    model = build().eval()
    cold = ColdItems(torch.tensor([18]), torch.tensor([[3, 4]]), torch.tensor([[0.5, 0.5]]))
    vectors, bias = model.catalog_vectors(TABLE)
    found, found_bias = model.catalog_vectors(TABLE._replace(cold=cold), torch.tensor([18, 2]))
    assert torch.equal(found, vectors[[18, 2]]) and torch.equal(found_bias, bias[[18, 2]])


def test_a_flat_model_has_a_place_for_every_code_and_a_causal_one_a_bias_for_every_distance():
    flat, causal = build(tokens="flat"), build(causal=True, recall=True)
    assert flat.position_embedding.weight.shape == (8 * 3, 16) and flat.mask_embedding.shape == (16,)
    assert not hasattr(causal, "position_embedding") and not hasattr(causal, "mask_embedding")
    assert all(layer.distance_bias.shape == (2, 8) and not layer.distance_bias.any() for layer in causal.layers)
    assert causal.recall.tolist() == [1, 0]  # the history's mean counts as much as the encoder, a step back half as much
    assert Sequencer(3, 8, width=1000, num_heads=2).mask_embedding.std().item() == pytest.approx(0.02, rel=0.1)


def test_hidden_units_attention_and_what_a_layer_adds_are_dropped():
    layer, groups = build(dropout=1.0).train().layers[0], [(0, 2, 3)]
    states = torch.randn(6, 16)
    assert torch.equal(layer(states, groups), states)
    layer.dropout = Dropout(0.0)  # of the hidden units alone
    torch.nn.init.normal_(layer.ffn[3].bias)
    attended = states + layer.out(layer._attend(layer.query_key_value(layer.norm_attention(states)), groups))
    torch.testing.assert_close(layer(states, groups), attended + layer.ffn[3].bias)
