"""Float32 matrix products on CPUs, by the faster of the two libraries that come with PyTorch.

On Intel, PyTorch's own products are used: oneDNN reaches only .85 to 1.0 of their speed. On AMD, MKL, with which PyTorch multiplies
float32 matrices, leaves half of the processor unused: 90 to 110 GFLOPS, where oneDNN, which PyTorch uses for convolutions and
bfloat16, reaches 190 to 250 on the same core (`python -m tests.benchmarks.products`). But oneDNN compiles a kernel for each new
shape, which takes about .4 ms, so only large products use it. Results differ by rounding. Everything else, on GPUs, in other
types, or in a compiled model, is left to PyTorch.

Shapes: S rows, K inputs, N outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST, LEAST_IN_TRAINING = 2**25, 2**26  # multiply-adds; at inference the next layer has the same shapes again


def _onednn() -> Any:
    """oneDNN's product, which PyTorch's own compiler calls by this name; None if `F.linear` is to be used.

    That is on any processor but AMD's, if PyTorch lacks the operator (it is not public), and if PyTorch does not use MKL.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and _is_amd()):
        return None
    return getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def _is_amd() -> bool:
    """Whether this is an AMD processor according to Linux; False on other systems."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


_ONEDNN = _onednn()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., N] product of x [..., K] and weight [N, K] transposed, plus bias [N], like `torch.nn.functional.linear`."""
    if _ONEDNN is None or torch.compiler.is_compiling():  # sizes are symbols then
        return F.linear(x, weight, bias)
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
    small = x.numel() * len(weight) < (LEAST_IN_TRAINING if needed else LEAST)
    if small or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    result = _Product.apply(rows, weight, bias) if needed else _multiply(rows, weight, bias)
    return result.view(*x.shape[:-1], len(weight))


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _ONEDNN(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _multiply(gradient, weight.T) if wanted[0] else None,  # [S, K]
            _multiply(gradient.T, x.T) if wanted[1] else None,  # [N, K]
            gradient.sum(0) if wanted[2] else None,
        )


class Linear(nn.Linear):
    """A `torch.nn.Linear` that multiplies with `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def use_product(model: nn.Module) -> nn.Module:
    """The same model with its `torch.nn.Linear` layers turned into `Linear`; subclasses are left unchanged."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model
