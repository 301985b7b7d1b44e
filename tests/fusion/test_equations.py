"""Eq. 3 to 5 of the paper, worked out one number at a time; gradients against finite differences, and what must have none."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from qbert_ray.fusion.model import DynamicFusion, Fused, FusionLayer, alignment_loss, geometry_loss, info_nce, view_distance

B, D, V = 4, 6, 2


def normalised(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def fused(dtype=torch.float64, **changes):
    """Views of four items; the last has no second modality."""
    generator = torch.Generator().manual_seed(3)
    made = {name: torch.randn(B, D, generator=generator, dtype=dtype) for name in ("embedding", "query")}
    made["aligned"] = torch.randn(B, V, D, generator=generator, dtype=dtype)
    made["present"] = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    made["depth"], made["gate"] = torch.ones(B, dtype=torch.int32), torch.ones(B, dtype=dtype)
    made["ponder"] = torch.tensor([1.0, 2.0, 1.5, 3.0], dtype=dtype)
    return Fused(**(made | changes))


def model_with_two_vectors(**changes):
    """A model of width 3 whose projection is the identity, one ID vector and two vectors of one modality."""
    model = DynamicFusion(2, {"text": 3}, **({"width": 4, "num_heads": 2, "ffn_width": 8, "num_layers": 1, "dropout": 0.0} | changes))
    return model.eval()


def test_eq_3_weighs_vectors_by_their_cosine_to_the_query_over_the_temperature():
    torch.manual_seed(0)
    model = model_with_two_vectors(temperature=0.5)
    with torch.no_grad():
        model.project["text"].weight.copy_(torch.eye(4)[:, :3])
        model.project["text"].bias.zero_()
        model.id_embedding.weight[1].copy_(torch.tensor([3.0, 4.0, 0.0, 0.0]))  # cosines .6 and .8 to the first two axes
        features = torch.tensor([[[2.0, 0, 0], [0, 7.0, 0], [0, 0, 5.0]]])
        found = model(torch.tensor([1]), {"text": features}, {"text": torch.tensor([[True, True, False]])})
    first, second = math.exp(0.6 / 0.5), math.exp(0.8 / 0.5)  # the third vector is not there
    expected = [first / (first + second), second / (first + second), 0, 0]
    assert found.aligned[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert found.present.tolist() == [[True]]


def test_eq_3_normalises_before_and_after_the_projection():
    torch.manual_seed(0)
    model = model_with_two_vectors(temperature=0.1)
    features = torch.randn(1, 2, 3)
    with torch.no_grad():
        for parameter in (model.id_embedding.weight, model.project["text"].weight):
            parameter.normal_()
        found = model(torch.tensor([0]), {"text": features}, {"text": torch.ones(1, 2, dtype=torch.bool)})
    weight, bias = model.project["text"].weight.tolist(), model.project["text"].bias.tolist()
    query = normalised(model.id_embedding.weight[0].tolist())
    vectors = []
    for vector in features[0].tolist():
        unit = normalised(vector)
        vectors.append(normalised([dot(row, unit) + b for row, b in zip(weight, bias, strict=True)]))
    strengths = [math.exp(dot(query, vector) / 0.1) for vector in vectors]
    expected = [sum(s * vector[d] for s, vector in zip(strengths, vectors, strict=True)) / sum(strengths) for d in range(4)]
    assert found.aligned[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert max(strengths) / sum(strengths) > 0.6  # else equal weights would pass too


def layer_norm(vector, norm):
    mean = sum(vector) / len(vector)
    variance = sum((x - mean) ** 2 for x in vector) / len(vector)
    scale = [(x - mean) / math.sqrt(variance + norm.eps) for x in vector]
    return [x * w + b for x, w, b in zip(scale, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


def linear(vector, module):
    return [dot(row, vector) + b for row, b in zip(module.weight.tolist(), module.bias.tolist(), strict=True)]


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def plain_layer(layer, state, values, heads):
    """Eq. 4 and the gate of one item, in lists: cross-attention, feed-forward net, and how much of it is taken."""
    width = len(state)
    size = width // heads
    query = linear(layer_norm(state, layer.norm_query), layer.query)
    pairs = [linear(value, layer.key_value) for value in values]
    attended = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = [math.exp(dot(query[part], pair[:width][part]) / math.sqrt(size)) for pair in pairs]
        attended += [sum(s * pair[width:][part][d] for s, pair in zip(scores, pairs, strict=True)) / sum(scores) for d in range(size)]
    update = [x + y for x, y in zip(state, linear(attended, layer.out), strict=True)]
    hidden = [gelu(x) for x in linear(layer_norm(update, layer.norm_ffn), layer.ffn[0])]
    update = [x + y for x, y in zip(update, linear(hidden, layer.ffn[3]), strict=True)]
    *own, shared = linear([max(x, 0.0) for x in linear(layer_norm(update, layer.gate[0]), layer.gate[1])], layer.gate[3])
    gate = [sigmoid(x + shared) for x in own]
    return [x + g * (y - x) for x, g, y in zip(state, gate, update, strict=True)], gate


def test_eq_4_is_cross_attention_a_feed_forward_net_and_a_gate_per_dimension():
    torch.manual_seed(1)
    layer = FusionLayer(8, 2, 12, 0.0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    state, values = torch.randn(2, 8), torch.randn(2, 3, 8)
    present = torch.tensor([[True, True, False], [True, True, True]])
    new, gate = layer(state, values, present)
    for row, count in enumerate((2, 3)):
        expected, expected_gate = plain_layer(layer, state[row].tolist(), values[row, :count].tolist(), heads=2)
        assert new[row].tolist() == pytest.approx(expected, abs=1e-4)
        assert gate[row].tolist() == pytest.approx(expected_gate, abs=1e-5)


def test_the_shared_gate_starts_four_times_as_large():
    torch.manual_seed(0)
    wide = FusionLayer(256, 4, 8, 0.0).gate[3].weight.detach()
    assert float(wide[-1].std() / wide[:-1].std()) == pytest.approx(4, rel=0.2)


def constant_gates(model, probabilities):
    """Every item halts with the same probability in each layer, whatever its state."""
    with torch.no_grad():
        for layer, probability in zip(model.layers, probabilities, strict=True):
            layer.gate[3].weight.zero_()
            layer.gate[3].bias.zero_()
            layer.gate[3].bias[-1] = math.log(probability / (1 - probability))
    return model


@pytest.mark.parametrize(
    ("threshold", "depth", "shares"),
    [(0.15, 1, [1.0]), (0.5, 2, [0.2, 0.8]), (0.8, 3, [0.2, 0.4, 0.4]), (0.99, 3, [0.2, 0.4, 0.4])],
)
def test_an_item_halts_at_the_threshold_and_its_last_layer_takes_what_is_left(threshold, depth, shares):
    """Probabilities .2, .5, .5 to halt: accumulated .2, .6, .8."""
    torch.manual_seed(0)
    model = DynamicFusion(
        3, {"text": 5}, width=8, num_layers=3, num_heads=2, ffn_width=8, dropout=0.0, halt_threshold=threshold - 1e-6
    ).eval()
    constant_gates(model, [0.2, 0.5, 0.5])
    features, present = {"text": torch.randn(3, 2, 5)}, {"text": torch.ones(3, 2, dtype=torch.bool)}
    with torch.no_grad():
        found = model(torch.arange(3), features, present)
        values = found.aligned + model.modality_embedding
        state, output = found.query, torch.zeros(3, 8)
        for layer, share in zip(model.layers, shares, strict=False):
            state, _ = layer(state, values, found.present)
            output = output + share * state
    assert found.depth.tolist() == [depth] * 3
    assert found.ponder.tolist() == pytest.approx([sum([1, 0.8, 0.4][:depth])] * 3, abs=1e-5)
    assert found.gate.tolist() == pytest.approx([[0.2, 0.5, 0.5][depth - 1]] * 3, abs=1e-5)
    assert torch.allclose(found.embedding, torch.nn.functional.layer_norm(output, (8,)), atol=1e-5)


def test_fixed_fusion_takes_the_last_layers_state_alone():
    torch.manual_seed(0)
    model = DynamicFusion(3, {"text": 5}, width=8, num_layers=2, num_heads=2, ffn_width=8, dropout=0.0, dynamic=False).eval()
    features, present = {"text": torch.randn(3, 2, 5)}, {"text": torch.ones(3, 2, dtype=torch.bool)}
    with torch.no_grad():
        found = model(torch.arange(3), features, present)
        state = found.query
        for layer in model.layers:
            state, gate = layer(state, found.aligned + model.modality_embedding, found.present)
    assert torch.allclose(found.embedding, torch.nn.functional.layer_norm(state, (8,)), atol=1e-5)
    assert torch.allclose(found.gate, gate.mean(1), atol=1e-6)
    assert found.ponder.tolist() == found.depth.tolist() == [2] * 3 and not model(torch.arange(3), features, present).ponder.requires_grad
    assert model.unknown == 3 and len(model.id_embedding.weight) == 4


def test_an_id_vector_starts_small():
    weight = DynamicFusion(2000, {"text": 5}, width=16, num_layers=1, num_heads=2, ffn_width=8).id_embedding.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)


def plain_info_nce(a, b, temperature):
    """Both directions of InfoNCE, each the mean over rows, halved."""
    total = 0.0
    for views, others in ((a, b), (b, a)):
        for row, view in enumerate(views):
            logits = [dot(view, other) / temperature for other in others]
            total += math.log(sum(map(math.exp, logits))) - logits[row]
    return total / len(a) / 2


def test_info_nce_is_the_mean_of_both_directions():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    forth = (math.log(math.e**2 + math.e**1.6) - 2 + math.log(1 + math.e**1.2) - 1.2) / 2
    back = (math.log(math.e**2 + 1) - 2 + math.log(math.e**1.6 + math.e**1.2) - 1.2) / 2
    assert abs(forth - back) > 0.05  # one direction alone would be noticed
    assert float(info_nce(a, b, 0.5)) == pytest.approx((forth + back) / 2, abs=1e-6)
    assert plain_info_nce(a.tolist(), b.tolist(), 0.5) == pytest.approx((forth + back) / 2, abs=1e-6)


def plain_contrast(found, temperature):
    total = 0.0
    for one, other in combinations(range(1 + V), 2):
        rows = [r for r in range(B) if all(view == 0 or bool(found.present[r, view - 1]) for view in (one, other))]
        views = [[normalised((found.embedding[r] if v == 0 else found.aligned[r, v - 1]).tolist()) for r in rows] for v in (one, other)]
        total += plain_info_nce(*views, temperature)
    return total


def test_eq_5_is_contrast_plus_consistency_and_the_distance_from_the_target_depth():
    found = fused()
    losses = alignment_loss(found, 0.4, 0.3, 0.7, 1.5)
    contrast = plain_contrast(found, 0.4)
    consistency = sum((h - q) ** 2 for h, q in zip(found.embedding.flatten().tolist(), found.query.flatten().tolist(), strict=True)) / B / D
    ponder = ((1 + 2 + 1.5 + 3) / 4 - 1.5) ** 2
    assert float(losses["contrast"]) == pytest.approx(contrast)
    assert float(losses["consistency"]) == pytest.approx(consistency)
    assert float(losses["ponder"]) == pytest.approx(ponder)
    assert float(losses["loss"]) == pytest.approx(contrast + 0.3 * consistency + 0.7 * ponder)


def test_a_pair_of_views_of_a_single_item_is_not_contrasted():
    alone = fused(present=torch.tensor([[True, False], [False, False], [False, False], [False, True]]))
    assert float(alignment_loss(alone, 0.4, 0.0, 0.0, 1.5)["contrast"]) == 0
    two = fused(present=torch.tensor([[True, False], [True, False], [False, False], [False, False]]))
    views = [[normalised(v) for v in rows.tolist()] for rows in (two.embedding[:2], two.aligned[:2, 0])]
    assert float(alignment_loss(two, 0.4, 0.0, 0.0, 1.5)["contrast"]) == pytest.approx(plain_info_nce(*views, 0.4))


def test_eq_5_pulls_the_fused_embedding_to_the_query_and_never_the_query():
    found = fused()
    embedding, query = found.embedding.clone().requires_grad_(), found.query.clone().requires_grad_()
    one, other = (alignment_loss(found._replace(embedding=embedding, query=query), 0.4, weight, 0.0, 1.5)["loss"] for weight in (1.0, 0.0))
    to_embedding, to_query = torch.autograd.grad(one - other, [embedding, query], allow_unused=True)
    assert torch.allclose(to_embedding, 2 * (found.embedding - found.query) / (B * D))
    assert to_query is None or not to_query.any()


def test_eq_5_pulls_the_mean_depth_to_its_target():
    found = fused()
    ponder = found.ponder.clone().requires_grad_()
    for target, sign in ((1.0, 1), (3.0, -1)):
        loss = alignment_loss(found._replace(ponder=ponder), 0.4, 0.0, 1.0, target)["loss"]
        (gradient,) = torch.autograd.grad(loss, ponder)
        assert torch.allclose(gradient, torch.full((B,), sign * 2 * abs(1.875 - target) / B, dtype=torch.float64))


def test_gradients_of_eq_5_are_those_of_finite_differences():
    found = fused()

    def loss(embedding, aligned, ponder):
        return alignment_loss(found._replace(embedding=embedding, aligned=aligned, ponder=ponder), 0.4, 0.3, 0.7, 1.5)["loss"]

    inputs = [each.clone().requires_grad_() for each in (found.embedding, found.aligned, found.ponder)]
    assert torch.autograd.gradcheck(loss, inputs)


def plain_geometry(found, features, present):
    """Mean over ordered pairs of different items that share a modality: (cosine of fused - mean cosine of modalities) squared."""
    centred = {}
    for name, vectors in features.items():
        means = {}
        for item in range(B):
            rows = [vectors[item, j].tolist() for j in range(vectors.shape[1]) if present[name][item, j]]
            if rows:
                means[item] = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        middle = [sum(column) / len(means) for column in zip(*means.values(), strict=True)]
        centred[name] = {item: normalised([x - m for x, m in zip(mean, middle, strict=True)]) for item, mean in means.items()}
    middle = found.embedding.mean(0).tolist()
    unit = [normalised([x - m for x, m in zip(row, middle, strict=True)]) for row in found.embedding.tolist()]
    errors = []
    for one, other in ((a, b) for a in range(B) for b in range(B) if a != b):
        wanted = [dot(views[one], views[other]) for views in centred.values() if one in views and other in views]
        if wanted:
            errors.append((dot(unit[one], unit[other]) - sum(wanted) / len(wanted)) ** 2)
    return sum(errors) / len(errors)


def test_geometry_is_that_of_plain_loops_and_its_gradient_that_of_finite_differences():
    generator = torch.Generator().manual_seed(5)
    features = {"text": torch.randn(B, 3, 5, generator=generator, dtype=torch.float64)}
    features["image"] = torch.randn(B, 2, 4, generator=generator, dtype=torch.float64)
    present = {"text": torch.ones(B, 3, dtype=torch.bool), "image": torch.ones(B, 2, dtype=torch.bool)}
    present["text"][0] = torch.tensor([True, False, True])
    present["text"][1] = torch.tensor([False, True, False])
    present["text"][3] = False
    present["image"][1:3] = False  # 3 has nothing in common with 1 and 2
    found = fused()
    expected = plain_geometry(found, features, present)
    assert float(geometry_loss(found, features, present)) == pytest.approx(expected)
    embedding = found.embedding.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda e: geometry_loss(found._replace(embedding=e), features, present), [embedding])


def test_view_distance_is_the_mean_over_the_pairs_an_item_has():
    found = fused()
    expected = []
    for row in range(B):
        views = [found.embedding[row].tolist()] + [found.aligned[row, v].tolist() for v in range(V) if found.present[row, v]]
        expected += [2 - 2 * dot(normalised(a), normalised(b)) for a, b in combinations(views, 2)]
    assert len(expected) == 3 * 3 + 1
    assert float(view_distance(found)) == pytest.approx(sum(expected) / len(expected))
    nothing = fused(present=torch.zeros(B, V, dtype=torch.bool))
    assert float(view_distance(nothing)) == 0


def test_a_model_of_which_nothing_is_said_is_that_of_the_paper():
    model = DynamicFusion(2, {"text": 3})
    assert len(model.layers) == 5 and model.dynamic and (model.halt_threshold, model.temperature) == (0.75, 0.1)
    assert {(layer.num_heads, layer.ffn[0].out_features, layer.query.in_features, layer.dropout) for layer in model.layers} == {
        (4, 512, 256, 0.1)
    }


def test_dropout_is_of_attention_and_feed_forward_net_and_in_training_alone():
    """Where everything is dropped, a layer has nothing to add; an evaluated one adds as if nothing ever was."""
    torch.manual_seed(1)
    layer, plain = FusionLayer(8, 2, 12, 1.0), FusionLayer(8, 2, 12, 0.0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    plain.load_state_dict(layer.state_dict())
    given = torch.randn(3, 8), torch.randn(3, 2, 8), torch.ones(3, 2, dtype=torch.bool)
    assert torch.equal(layer.train()(*given)[0], given[0])
    assert torch.equal(layer.eval()(*given)[0], plain.train()(*given)[0])
    half = FusionLayer(8, 2, 12, 0.5).train()
    half.load_state_dict(layer.state_dict())
    spread = torch.stack([half(*given)[0] for _ in range(10)]).std(0)
    assert (spread > 0).all()  # other draws each time


def test_an_item_without_vectors_of_a_modality_gets_zeros_of_it():
    model = model_with_two_vectors()
    features = torch.randn(2, 2, 3)
    with torch.no_grad():
        found = model(torch.tensor([0, 1]), {"text": features}, {"text": torch.tensor([[False, False], [False, True]])})
    assert found.aligned[0, 0].tolist() == [0] * 4 and found.present.tolist() == [[False], [True]]
    assert torch.linalg.vector_norm(found.aligned[1, 0]).item() == pytest.approx(1)  # of one vector, and that has length 1
