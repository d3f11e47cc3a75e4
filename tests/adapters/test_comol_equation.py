"""The layer against the literal equation in float64: forward, every gradient, routers, initializations, dropout."""

import pytest
import torch
from torch import nn

from comol_ds.adapters.comol_layer import comol_table
from comol_ds.adapters.table import AxisSizes
from tests.adapters.comparison import FixedMasks, dropout_masks, layer_and_oracle, parameters_of, set_parameters
from tests.adapters.models import layer
from tests.adapters.oracle import comol_update, random_parameters

I, O, R, E, ALPHA = 10, 7, 4, 3, 6  # noqa: E741 - axis letters
SHAPES = [(I,), (5, I), (2, 3, I), (2, 3, 2, I), (0, I)]
# Sums of about 50 float64 products of order one, in two different orders.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def compare(wrapped, x, router, masks=None):
    """Output and all gradients (x included) of the layer and of the oracle."""
    mine, exact = layer_and_oracle(wrapped, x, router, masks)
    for name, value in exact.items():
        torch.testing.assert_close(mine[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        assert not x.numel() or value.abs().max() > 0, f"the oracle's {name} is zero and proves nothing"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("router", ["core", "input"])
def test_layer_is_the_equation_for_any_leading_shape(router, bias, shape):
    wrapped = layer(I, O, router=router, bias=bias)
    set_parameters(wrapped, random_parameters(comol_table(router), AxisSizes(I, O, R, E)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    compare(wrapped, x, router)


@pytest.mark.parametrize("core_init", ["paper", "orthogonal", "identity"])
@pytest.mark.parametrize("router", ["core", "input"])
def test_layer_is_the_equation_with_every_initialization(router, core_init):
    torch.manual_seed(5)
    wrapped = layer(I, O, router=router, core_init=core_init, init_adapter_weights=False)
    compare(wrapped, torch.randn(2, 6, I, dtype=torch.float64), router)


@pytest.mark.parametrize("scheme", ["input", "paper"])
@pytest.mark.parametrize("router", ["core", "input"])
def test_layer_is_the_equation_with_fixed_dropout_masks(router, scheme):
    wrapped = layer(I, O, router=router, lora_dropout=0.25, dropout_scheme=scheme)
    set_parameters(wrapped, random_parameters(comol_table(router), AxisSizes(I, O, R, E), seed=2))
    wrapped.train()
    masks = dropout_masks(scheme, 6, I, R)
    wrapped.dropout["default"] = FixedMasks(masks.values())
    compare(wrapped, torch.randn(2, 3, I, dtype=torch.float64), router, masks)
    assert wrapped.dropout["default"].masks == [], "the layer dropped fewer tensors than the scheme says"


@pytest.mark.parametrize("scheme", ["input", "paper"])
def test_dropout_is_off_in_eval_and_random_in_training(scheme):
    wrapped = layer(I, O, lora_dropout=0.5, dropout_scheme=scheme, init_adapter_weights=False)
    x = torch.randn(4, I, dtype=torch.float64)
    expected = wrapped.base_layer(x) + comol_update(x, parameters_of(wrapped), ALPHA / R)
    torch.testing.assert_close(wrapped.eval()(x), expected, **CLOSE)
    wrapped.train()
    assert not torch.allclose(wrapped(x), wrapped(x))


@pytest.mark.parametrize("router", ["core", "input"])
def test_gradcheck_of_the_layer(router):
    wrapped = layer(5, 6, router=router, r=3, init_adapter_weights=False)
    names = wrapped.adapter_layer_names

    def function(x, *values):
        return torch.func.functional_call(
            wrapped, {f"{name}.default": value for name, value in zip(names, values, strict=True)}, (x,)
        )

    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    values = [parameter.detach().clone().requires_grad_() for parameter in parameters_of(wrapped).values()]
    assert torch.autograd.gradcheck(function, (x, *values))


def test_two_active_adapters_add_up():
    wrapped = layer(I, O, init_adapter_weights=False)
    wrapped.add_adapter("other", r=2, lora_alpha=5, num_experts=4, router="input", init_adapter_weights=False)
    wrapped.set_adapter(["default", "other"])
    x = torch.randn(3, I, dtype=torch.float64)
    other = {name: getattr(wrapped, name)["other"] for name in wrapped.adapter_layer_names}
    expected = wrapped.base_layer(x)
    expected = expected + comol_update(x, parameters_of(wrapped), ALPHA / R) + comol_update(x, other, 5 / 2, "input")
    torch.testing.assert_close(wrapped(x), expected, **CLOSE)


def test_seams_and_gates_see_what_tensor_parallelism_and_statistics_need():
    wrapped = layer(I, O, router="input", init_adapter_weights=False)
    seen = {}
    wrapped.partial_sums.register_forward_hook(lambda _, args, out: seen.update(partial=args))
    wrapped.gates.register_forward_hook(lambda _, args, out: seen.update(gates=out))
    x = torch.randn(2, 3, I, dtype=torch.float64)
    y = wrapped(x)
    values = parameters_of(wrapped)
    of_the_base, [(h, logits)] = seen["partial"]
    torch.testing.assert_close(of_the_base, wrapped.base_layer(x))
    torch.testing.assert_close(h, x @ values["comol_A"].T)
    torch.testing.assert_close(logits, x @ values["comol_router"].T)
    torch.testing.assert_close(seen["gates"], torch.softmax(x @ values["comol_router"].T, -1))
    torch.testing.assert_close(y, wrapped.base_layer(x) + comol_update(x, values, ALPHA / R, "input"))
    assert sorted(wrapped.state_dict()) == sorted(
        ["base_layer.weight", *(f"{name}.default" for name in wrapped.adapter_layer_names)]
    )


def test_core_router_logits_come_from_the_summed_h():
    """The seam's h, not the partial one before it, is what the router and the cores read."""
    wrapped = layer(I, O, init_adapter_weights=False)
    x = torch.randn(3, I, dtype=torch.float64)
    expected = 3 * wrapped.base_layer(x) + comol_update(2 * x, parameters_of(wrapped), ALPHA / R)

    class Summed(nn.Module):
        def forward(self, y, routed):
            [(h, logits)] = routed
            assert logits is None
            return 3 * y, [(2 * h, None)]

    wrapped.partial_sums = Summed()
    torch.testing.assert_close(wrapped(x), expected, **CLOSE)
