import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qbert_ray import products
from qbert_ray.products import Linear, product, use_product


@pytest.fixture(autouse=True, params=[1, None], ids=["onednn", "by size"])
def _threshold(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(products, "LEAST", request.param)
        monkeypatch.setattr(products, "LEAST_IN_TRAINING", request.param)


@pytest.mark.parametrize("shape", [(64, 12), (1, 12), (0, 12), (4, 5, 12), (2, 0, 12)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_what_pytorch_gives_with_gradients(shape, biased):
    torch.manual_seed(0)
    given = [torch.randn(shape), torch.randn(7, 12), torch.randn(7) if biased else None]
    found = []
    for multiply in (product, F.linear):
        x, weight, bias = (None if tensor is None else tensor.clone().requires_grad_() for tensor in given)
        result = multiply(x, weight, bias)
        (result * torch.linspace(0, 1, 7)).sum().backward()
        found.append([result.detach(), x.grad, weight.grad, *([bias.grad] if biased else [])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(product(*given), F.linear(*given), atol=1e-5, rtol=1e-5)


def test_views_and_frozen_weights():
    torch.manual_seed(0)
    x, weight = torch.randn(20, 40)[:, ::2], torch.randn(20, 9).T
    torch.testing.assert_close(product(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)
    x = torch.randn(20, 20, requires_grad=True)
    product(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(20, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(dtype):
    x, weight = torch.randn(16, 4).to(dtype), torch.randn(3, 4).to(dtype)
    assert torch.equal(product(x, weight), F.linear(x, weight)) and product(x, weight).dtype == dtype


def test_autocast_is_respected():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(torch.randn(16, 4), torch.randn(3, 4)).dtype == torch.bfloat16


def test_without_onednn_it_is_pytorchs(monkeypatch):
    monkeypatch.setattr(products, "_ONEDNN", None)
    x, weight = torch.randn(16, 4), torch.randn(3, 4)
    assert torch.equal(product(x, weight), F.linear(x, weight))


def test_only_linear_layers_change():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Own(4, 4), nn.Sequential(nn.Linear(4, 2)))
    x, names = torch.randn(16, 4), list(model.state_dict())
    before = model(x)
    assert use_product(model) is model and [type(model[0]), type(model[2]), type(model[3][0])] == [Linear, Own, Linear]
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
