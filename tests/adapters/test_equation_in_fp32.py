"""Layer and model in fp32 against the literal equation in float64, with every kernel that mixes.

In float64, where errors cannot hide behind rounding, torch mixes whatever the kernel: see test_comol_equation.py.
"""

import copy

import pytest
import torch
from peft import get_peft_model

from comol_ds.adapters.comol_layer import CoMoLLinear, comol_table
from comol_ds.adapters.table import AxisSizes
from tests.adapters.comparison import FixedMasks, dropout_masks, layer_and_oracle, parameters_of, set_parameters
from tests.adapters.models import comol_config, layer, tiny_llama, tokens
from tests.adapters.oracle import comol_update, random_parameters

I, O, R, E = 10, 7, 4, 3  # noqa: E741 - axis letters
# no number of tokens fills the kernels' blocks of 16 or 32
SHAPES = [(I,), (33, I), (2, 35, I)]
TOLERANCE = 1e-6  # of a result's norm; fp32 has 24 bits, and sums over tokens lose a few
MODEL_TOLERANCE = 1e-5  # transformers' norms and rotary embeddings compute in fp32 in a float64 model too


def assert_within(tolerance, found, exact):
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        error = (found[name].detach().double() - value.detach()).norm() / value.detach().norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


def compare(wrapped, x, router, masks=None):
    mine, exact = layer_and_oracle(wrapped, x, router, masks)
    assert {value.dtype for value in mine.values()} == {torch.float32}
    assert_within(TOLERANCE, mine, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("router", ["core", "input"])
def test_layer_is_the_equation_for_any_number_of_tokens(kernel, router, shape):
    wrapped = layer(I, O, dtype=torch.float32, router=router, bias=True)
    set_parameters(wrapped, random_parameters(comol_table(router), AxisSizes(I, O, R, E)))
    compare(wrapped, torch.randn(shape, generator=torch.Generator().manual_seed(1)), router)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("scheme", ["input", "paper"])
@pytest.mark.parametrize("router", ["core", "input"])
def test_layer_is_the_equation_with_dropout(kernel, router, scheme, training):
    wrapped = layer(I, O, dtype=torch.float32, router=router, lora_dropout=0.25, dropout_scheme=scheme)
    set_parameters(wrapped, random_parameters(comol_table(router), AxisSizes(I, O, R, E), seed=2))
    wrapped.train(training)
    masks = None
    if training:
        masks = dropout_masks(scheme, 18, I, R)
        wrapped.dropout["default"] = FixedMasks(masks.values())
    compare(wrapped, torch.randn(2, 9, I, generator=torch.Generator().manual_seed(1)), router, masks)
    assert not training or wrapped.dropout["default"].masks == []


def literal(model):
    """The model in float64, its adapted layers replaced by the equation; parameters keep their names."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if isinstance(module, CoMoLLinear):
            router, scale = module.router["default"], module.scaling["default"]

            def forward(x, module=module, router=router, scale=scale):
                return module.base_layer(x) + comol_update(x, parameters_of(module), scale, router)

            module.forward = forward
    return exact


def loss_logits_and_gradients(model, ids):
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return {"loss": output.loss, "logits": output.logits, **gradients}


@pytest.mark.parametrize("router", ["core", "input"])
def test_an_adapted_llama_is_the_equation_in_every_layer(kernel, router):
    model = get_peft_model(tiny_llama(), comol_config(router=router))
    exact = literal(model)
    ids = tokens(3, 11)
    assert_within(MODEL_TOLERANCE, loss_logits_and_gradients(model, ids), loss_logits_and_gradients(exact, ids))
