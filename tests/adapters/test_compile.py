"""torch.compile on the adapted model: no graph breaks in our layers, and the same numbers."""

import pytest
import torch
from peft import get_peft_model
from torch._dynamo import explain

import comol_ds
from tests.adapters.models import comol_config, layer, tiny_llama, tokens

OUR_FILES = comol_ds.__path__[0]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def is_ours(frame):
    return frame.filename.startswith(OUR_FILES)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("router", ["core", "input"])
def test_a_layer_is_one_graph_with_eager_numbers(kernel, router, backend):
    torch.manual_seed(0)
    wrapped = layer(10, 7, dtype=torch.float32, router=router, init_adapter_weights=False)
    x = torch.randn(2, 5, 10)
    expected = wrapped(x)
    expected_gradients = gradients(wrapped, expected.sin().sum())
    got = torch.compile(wrapped, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert_equal(gradients(wrapped, got.sin().sum()), expected_gradients)


def test_training_with_dropout_is_one_graph_too():
    wrapped = layer(10, 7, dtype=torch.float32, lora_dropout=0.5, init_adapter_weights=False).train()
    x = torch.randn(2, 5, 10)
    torch.manual_seed(0)
    expected = wrapped(x)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(wrapped, backend="eager", fullgraph=True)(x), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_an_adapted_llama_has_no_graph_break_in_our_layers_and_eager_gradients(kernel):
    model = get_peft_model(tiny_llama(), comol_config())
    ids = tokens()
    expected = model(input_ids=ids, labels=ids).loss
    expected_gradients = gradients(model, expected)
    assert len(expected_gradients) == 2 * 5 * 4  # layers, targets, parameters
    found = explain(model)(input_ids=ids, labels=ids)
    breaks = [reason.reason for reason in found.break_reasons if any(map(is_ours, reason.user_stack))]
    assert not breaks
    calls = [str(node.target) for graph in found.graphs for node in graph.graph.nodes]
    assert calls.count("autograd_function_apply") == 2 * 5  # every layer's mixture is in a graph
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager")(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert_equal(gradients(model, got), expected_gradients)
