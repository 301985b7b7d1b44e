import pytest
import torch

from qbert_ray.fusion.model import DynamicFusion, alignment_loss, geometry_loss, info_nce, view_distance

WIDTHS = {"text": 12, "image": 8}


def inputs(size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = {"text": torch.randn(size, 3, 12, generator=generator), "image": torch.randn(size, 4, 8, generator=generator)}
    present = {name: torch.rand(x.shape[:2], generator=generator) > 0.3 for name, x in features.items()}
    return torch.arange(size), features, present


def build(**changes):
    torch.manual_seed(0)
    return DynamicFusion(24, WIDTHS, **({"width": 32, "num_layers": 4, "num_heads": 2, "ffn_width": 64, "dropout": 0.0} | changes))


def test_overfits_one_batch():
    model, batch = build(num_layers=3), inputs()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = last = None
    for _ in range(150):
        optimizer.zero_grad()
        losses = alignment_loss(model(*batch), 0.1, 0.01, 1.0, 1.6)
        losses["loss"].backward()
        optimizer.step()
        last = float(losses["contrast"].detach())
        first = first or last
    assert first > 9  # about 3 pairs of log(24)
    assert last < 0.5


def slow(model, item, features, present):
    """One item at a time through every layer, its halting weights worked out by hand."""
    row = {name: x[item : item + 1] for name, x in features.items()}, {name: x[item : item + 1] for name, x in present.items()}
    query = model.id_embedding(torch.tensor([item]))
    pairs = [model._align(query, name, row[0][name], row[1][name]) for name in WIDTHS]
    values = torch.stack([vectors for vectors, _ in pairs], 1) + model.modality_embedding
    has = torch.stack([there for _, there in pairs], 1)
    state, going, output = query, 1.0, 0.0
    for depth, layer in enumerate(model.layers, start=1):
        state, gate = layer(state, values, has)
        halting = float(gate.mean())
        last = depth == len(model.layers) or 1 - going * (1 - halting) >= model.halt_threshold
        output = output + (going if last else going * halting) * state
        going *= 1 - halting
        if last:
            return torch.nn.functional.layer_norm(output, output.shape[-1:])[0], depth
    raise AssertionError


def test_halted_items_leave_the_batch_and_nothing_else_changes():
    model, batch = build(halt_threshold=0.75).eval(), inputs()
    with torch.no_grad():
        for layer in model.layers:  # spread the gates, so that depths differ
            layer.gate[3].weight[-1].mul_(4)
        fused = model(*batch)
        assert len(fused.depth.unique()) > 1
        for item in range(24):
            embedding, depth = slow(model, item, *batch[1:])
            assert depth == fused.depth[item]
            assert torch.allclose(embedding, fused.embedding[item], atol=1e-5)


def test_fixed_fusion_runs_every_layer():
    assert build(dynamic=False)(*inputs()).depth.tolist() == [4] * 24


def test_missing_vectors_are_not_read():
    model, (item, features, present) = build().eval(), inputs()
    garbage = {name: torch.where(present[name][..., None], x, 1e3) for name, x in features.items()}
    assert torch.allclose(model(item, features, present).embedding, model(item, garbage, present).embedding, atol=1e-6)


def test_an_item_with_nothing_is_finite_and_takes_no_part_in_the_contrast():
    model, (item, features, present) = build(), inputs()
    present = {name: x.clone() for name, x in present.items()}
    for x in present.values():
        x[5] = False
    fused = model(item, features, present)
    losses = alignment_loss(fused, 0.1, 0.01, 1.0, 1.6)
    losses["loss"].backward()
    assert torch.isfinite(fused.embedding).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    none = {name: torch.zeros_like(x) for name, x in present.items()}
    assert alignment_loss(model(item, features, none), 0.1, 0.0, 0.0, 1.6)["contrast"] == 0


def test_cold_items_share_the_unknown_query():
    model, (_, features, present) = build().eval(), inputs()
    fused = model(torch.full((24,), model.unknown), features, present)
    assert torch.equal(fused.query[0], fused.query[1])
    assert not torch.allclose(fused.embedding[0], fused.embedding[1])


def test_an_unread_modality_is_a_view_but_not_an_input():
    model, (item, features, present) = build().eval(), inputs()
    name = next(iter(features))
    unread = {name: torch.arange(24) < 12}
    hidden = model(item, features, present, unread)
    absent = model(item, features, present | {name: torch.zeros_like(present[name])})
    whole = model(item, features, present)
    assert torch.allclose(hidden.embedding[:12], absent.embedding[:12], atol=1e-6)
    assert torch.allclose(hidden.embedding[12:], whole.embedding[12:], atol=1e-6)
    assert torch.equal(hidden.aligned, whole.aligned) and torch.equal(hidden.present, whole.present)


def test_gradients_reach_every_gate():
    model = build()
    alignment_loss(model(*inputs()), 0.1, 0.01, 1.0, 1.6)["loss"].backward()
    assert all(layer.gate[3].weight.grad.abs().sum() > 0 for layer in model.layers[:2])


def test_info_nce_of_views_that_agree_is_near_zero():
    eye = torch.eye(8)
    assert info_nce(eye, eye, 0.05) < 1e-3
    assert info_nce(eye, eye.roll(1, 0), 0.05) > 5


def test_view_distance_is_zero_for_equal_views_and_two_for_unrelated_ones():
    model = build()
    fused = model(*inputs())
    same = fused._replace(aligned=fused.embedding[:, None].expand(-1, 2, -1), present=torch.ones(24, 2, dtype=torch.bool))
    assert float(view_distance(same).detach()) == pytest.approx(0, abs=1e-6)


def test_geometry_is_kept_where_fused_cosines_are_those_of_the_modalities():
    _, features, present = inputs()
    there = {name: torch.ones_like(x) for name, x in present.items()}
    text = features["text"].mean(1)
    fused = build()(*inputs())
    only = {"text": features["text"]}, {"text": there["text"]}
    assert geometry_loss(fused._replace(embedding=3 * (text - text.mean(0))), *only) < 1e-9
    assert geometry_loss(fused._replace(embedding=text.flip(0)), *only) > 0.01
    gone = {name: torch.zeros_like(x) for name, x in present.items()}
    assert geometry_loss(fused, features, gone) == 0


def test_geometry_averages_over_the_modalities_that_both_items_have():
    _, features, present = inputs()
    present = {"text": torch.ones(24, 3, dtype=torch.bool), "image": torch.zeros(24, 4, dtype=torch.bool)}
    present["image"][:2] = True
    fused = build()(*inputs())
    text = features["text"].mean(1)
    alone = geometry_loss(fused._replace(embedding=text), {"text": features["text"]}, {"text": present["text"]})
    both = geometry_loss(fused._replace(embedding=text), features, present)
    # Two items have images, which centred are opposite: their one pair should have the mean of the text cosine and -1.
    cosine = torch.nn.functional.normalize(text - text.mean(0), dim=-1)
    change = ((cosine[0] @ cosine[1] + 1) / 2) ** 2 * 2 / (24 * 23)
    assert both == pytest.approx(float(alone + change), rel=1e-3)


@pytest.mark.parametrize("lacking", [["image"], ["text"], ["text", "image"]])
@pytest.mark.parametrize("having", [0, 1])
def test_a_batch_in_which_nearly_no_item_has_a_modality_trains(lacking, having):
    """With 2 % of items pictured, such batches are certain."""
    model, (item, features, present) = build(), inputs()
    present = {name: there & (torch.arange(len(there)) < having)[:, None] if name in lacking else there for name, there in present.items()}
    fused = model(item, features, present)
    loss = alignment_loss(fused, 0.1, 0.01, 1.0, 1.6)["loss"] + geometry_loss(fused, features, present)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(x.grad).all() for x in model.parameters() if x.grad is not None)
    assert torch.isfinite(view_distance(fused))


@pytest.mark.parametrize(("lacking", "other"), [("image", "text"), ("text", "image")])
def test_geometry_without_a_modality_is_that_of_the_others(lacking, other):
    _, features, present = inputs()
    fused = build()(*inputs())
    gone = present | {lacking: torch.zeros_like(present[lacking])}
    alone = geometry_loss(fused, {other: features[other]}, {other: present[other]})
    assert geometry_loss(fused, features, gone) == alone > 0
