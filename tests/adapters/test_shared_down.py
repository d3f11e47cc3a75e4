"""Siblings that read the same tensor in one product: the same numbers, fewer products, nothing kept alive."""

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.adapters.shared_down import share_down_projections
from comol_ds.planner.counting import SavedBytes
from tests.adapters.models import comol_config, layer, tiny_llama, tokens

NAMES = ("q_proj", "k_proj", "v_proj")
# Sums of about 10 float64 products of order one, in two different orders.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Attention(nn.Module):
    """Three adapted projections of one input, or of three."""

    def __init__(self, dtype=torch.float64, **settings):
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            setattr(self, name, layer(10, 7, dtype=dtype, init_adapter_weights=False, **settings))

    def forward(self, *inputs):
        return torch.cat([getattr(self, name)(inputs[i % len(inputs)]) for i, name in enumerate(NAMES)], dim=-1)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


def both(**settings):
    """The same attention twice: each projection for itself, and together."""
    apart = Attention(**settings)
    together = copy.deepcopy(apart)
    share_down_projections(together)
    return apart, together


def run(attention, *inputs):
    """Output and all gradients."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = attention(*inputs)
    attention.zero_grad()
    y.sin().sum().backward()
    trained = {name: p.grad for name, p in attention.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in trained.values())
    return {"y": y.detach(), **{f"x{i}": x.grad for i, x in enumerate(inputs)}, **trained}


@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 3, 10)])
@pytest.mark.parametrize("router", ["core", "input"])
def test_together_as_apart(router, shape):
    apart, together = both(router=router)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(run(together, x), run(apart, x), **CLOSE)


def test_no_tokens_at_all():
    _, together = both()
    assert together(torch.empty(0, 10, dtype=torch.float64)).shape == (0, 21)


def test_the_three_products_with_the_input_are_one():
    apart, together = both()
    x = torch.randn(5, 10, dtype=torch.float64)
    counts = []
    for attention in (apart, together):
        with Products() as products:
            run(attention, x)
        counts.append(products.count)
    assert counts[0] - counts[1] == 2 * 3  # forward, the gradient of x, the gradients of A


def test_other_inputs_are_told_apart():
    apart, together = both()
    one, other = torch.randn(2, 5, 10, dtype=torch.float64)
    torch.testing.assert_close(run(together, one, other), run(apart, one, other), **CLOSE)
    torch.testing.assert_close(run(together, one, other, one), run(apart, one, other, one), **CLOSE)


def test_called_alone_or_twice_a_layer_gives_the_same():
    apart, together = both()
    x = torch.randn(5, 10, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(together.k_proj(x), apart.k_proj(x), **CLOSE)


def test_training_with_dropout_draws_the_masks_of_each_layer():
    apart, together = both(lora_dropout=0.5)
    x = torch.randn(5, 10, dtype=torch.float64)
    results = []
    for attention in (apart.train(), together.train()):
        torch.manual_seed(0)
        results.append(run(attention, x))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(run(together.eval(), x), run(apart.eval(), x), **CLOSE)


def test_several_adapters_and_a_layer_that_lacks_one():
    apart = Attention()
    for name in ("q_proj", "v_proj"):
        reader = getattr(apart, name)
        reader.add_adapter("second", r=2, lora_alpha=2, num_experts=2, router="input", init_adapter_weights=False)
    for name in NAMES:
        getattr(apart, name).set_adapter(["default", "second"])
    together = copy.deepcopy(apart)
    share_down_projections(together)
    x = torch.randn(5, 10, dtype=torch.float64)
    torch.testing.assert_close(run(together, x), run(apart, x), **CLOSE)


def test_under_autocast_dtypes_are_those_of_each_layer_alone():
    apart, together = both(dtype=torch.float32)
    x = torch.randn(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = run(apart, x), run(together, x)
    assert {name: value.dtype for name, value in got.items()} == {name: v.dtype for name, v in expected.items()}
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


def test_adapters_of_fp32_beside_a_base_of_bf16():
    apart, together = both(dtype=torch.bfloat16)
    x = torch.randn(5, 10, dtype=torch.bfloat16)
    expected, got = run(apart, x), run(together, x)
    assert {name: value.dtype for name, value in got.items()} == {name: v.dtype for name, v in expected.items()}
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


def test_nothing_more_is_kept_for_backward():
    kept = []
    for attention in both(dtype=torch.float32):
        x = torch.randn(64, 10, requires_grad=True)
        saved = SavedBytes([x, *attention.parameters()])
        with saved:
            y = attention(x)
        kept.append(sum(saved.storages))
        del y
    assert kept[1] <= kept[0]


def test_no_tensor_outlives_the_parents_forward():
    _, together = both()
    x = torch.randn(5, 10, dtype=torch.float64)
    together.v_proj.enable_adapters(False)  # so that nobody fetches what was computed for it
    together(x)
    watched = weakref.ref(x)
    del x
    gc.collect()
    assert watched() is None


def test_of_a_model_q_k_v_and_gate_up_are_siblings_and_others_are_not():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(tiny_llama(), comol_config(target_modules=targets))
    expected = model(input_ids=tokens()).logits
    share_down_projections(model)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, CoMoLLinear)}
    sharing = {name.rpartition(".")[2] for name, module in adapted.items() if module.shared_down}
    assert sharing == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    first = adapted["base_model.model.model.layers.0.self_attn.q_proj"]
    second = adapted["base_model.model.model.layers.1.self_attn.q_proj"]
    assert first.shared_down is not second.shared_down
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_sibling_without_an_adapter_is_left_alone():
    model = get_peft_model(tiny_llama(), comol_config(target_modules=["q_proj", "o_proj"]))
    share_down_projections(model)
    assert not any(module.shared_down for module in model.modules() if isinstance(module, CoMoLLinear))


def test_compiled_each_layer_reads_for_itself_in_one_graph():
    apart, together = both(dtype=torch.float32)
    x = torch.randn(5, 10)
    got = run(torch.compile(together, backend="eager", fullgraph=True), x)
    torch.testing.assert_close({name.removeprefix("_orig_mod."): value for name, value in got.items()}, run(apart, x))
