"""A layer beside the literal equation: its output and all gradients, of both."""

import torch
import torch.nn.functional as F
from torch import nn

from comol_ds.adapters.comol_layer import CoMoLLinear
from tests.adapters.oracle import comol_update

Results = dict[str, torch.Tensor]


class FixedMasks(nn.Module):
    """Stands in for the layer's dropout: gives back prepared masks in the order of the calls."""

    def __init__(self, masks):
        super().__init__()
        self.masks = list(masks)

    def forward(self, tensor):
        mask = self.masks.pop(0)
        return tensor * mask.reshape(tensor.shape).to(tensor)


def dropout_masks(scheme: str, n: int, in_features: int, r: int) -> dict[str, torch.Tensor]:
    """The masks of n tokens that a dropout scheme needs, in the order in which the layer asks for them."""
    generator = torch.Generator().manual_seed(4)
    sizes = {"x": (n, in_features)} if scheme == "input" else {"x": (n, in_features), "core": (n, r, r), "r": (n, r)}
    return {
        name: (torch.rand(size, generator=generator, dtype=torch.float64) > 0.25) / 0.75 for name, size in sizes.items()
    }


def set_parameters(wrapped: CoMoLLinear, values: Results) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(wrapped, name)["default"].copy_(value)


def parameters_of(wrapped: CoMoLLinear) -> Results:
    return {name: getattr(wrapped, name)["default"] for name in wrapped.adapter_layer_names}


def layer_and_oracle(
    wrapped: CoMoLLinear, x: torch.Tensor, router: str, masks: Results | None = None
) -> tuple[Results, Results]:
    """Of the layer, and of the equation in float64: the output, called y, and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    mine = {"x": x, **parameters_of(wrapped)}
    exact = {name: value.detach().double().requires_grad_() for name, value in mine.items()}
    y = wrapped(x)
    base = wrapped.base_layer
    expected = F.linear(exact["x"], base.weight.double(), None if base.bias is None else base.bias.double())
    if x.numel():
        expected = expected + comol_update(exact["x"], exact, wrapped.scaling["default"], router, masks)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    gradients = torch.autograd.grad(y, list(mine.values()), upstream)
    if x.numel():
        exact_gradients = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    else:
        exact_gradients = [torch.zeros_like(value) for value in exact.values()]
    return (
        {"y": y, **dict(zip(mine, gradients, strict=True))},
        {"y": expected, **dict(zip(mine, exact_gradients, strict=True))},
    )
