"""The parameter table: shapes, placement, and the exact parameter counts of published model geometries."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from comol_ds.adapters.comol_layer import comol_table
from comol_ds.adapters.table import (
    AxisSizes,
    count_adapter_parameters,
    count_over_linears,
    infer_sizes,
    parameter_names,
    parameter_shapes,
)
from comol_ds.errors import UserError
from tests.adapters.models import comol_config

FIVE = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
LLAMA_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
# geometry, targets, S = sum of in + out over a layer's targets, CoMoL and LoRA in millions as published
CASES = [
    pytest.param(LLAMA_8B, FIVE, 45056, 23.42, 23.07, id="llama-8b"),
    pytest.param(LLAMA_8B, [*FIVE, "up_proj"], 63488, 32.92, 32.51, id="llama-8b-up"),
    pytest.param(QWEN3_8B, FIVE, 43008, 25.16, 24.77, id="qwen3-8b"),
    pytest.param(QWEN3_8B, [*FIVE, "up_proj"], 59392, 34.68, 34.21, id="qwen3-8b-up"),
    pytest.param(LLAMA_70B, FIVE, 88064, 113.59, 112.72, id="llama-70b"),
    pytest.param(LLAMA_70B, [*FIVE, "up_proj"], 124928, 160.95, 159.91, id="llama-70b-up"),
]


def meta_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def trainable(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("geometry", "targets", "s", "millions", "lora_millions"), CASES)
def test_counts_of_published_geometries(geometry, targets, s, millions, lora_millions):
    r, experts, layers, n = 16, 8, geometry.num_hidden_layers, len(targets)
    expected = layers * (r * s + n * experts * (r**2 + r))
    base = meta_model(geometry)
    linears = [
        (module.in_features, module.out_features)
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in targets
    ]
    assert count_over_linears(comol_table(), linears, r, experts) == expected
    model = get_peft_model(base, comol_config(r=r, num_experts=experts, target_modules=targets))
    assert trainable(model) == expected
    assert round(expected / 1e6, 2) == millions
    lora = get_peft_model(meta_model(geometry), LoraConfig(r=r, target_modules=targets))
    assert trainable(lora) == layers * r * s
    assert round(layers * r * s / 1e6, 2) == lora_millions


def test_shapes_and_names():
    sizes = AxisSizes(I=12, O=20, R=4, E=3)
    assert parameter_shapes(comol_table("core"), sizes) == {
        "comol_A": (4, 12),
        "comol_B": (20, 4),
        "comol_cores": (3, 4, 4),
        "comol_router": (3, 4),
    }
    assert parameter_shapes(comol_table("input"), sizes)["comol_router"] == (3, 12)
    assert count_adapter_parameters(comol_table("core"), sizes) == 4 * 32 + 3 * 20
    assert count_adapter_parameters(comol_table("input"), sizes) == 4 * 32 + 3 * 16 + 3 * 12
    assert parameter_names(comol_table()) == ("comol_A", "comol_B", "comol_cores", "comol_router")


def test_placement_follows_from_the_letters():
    def placement(router, base):
        return {parameter.name: parameter.sharded_dim(base) for parameter in comol_table(router)}

    replicated = {"comol_A": None, "comol_B": None, "comol_cores": None, "comol_router": None}
    assert placement("core", "column") == {**replicated, "comol_B": 0}
    assert placement("input", "column") == {**replicated, "comol_B": 0}
    assert placement("core", "row") == {**replicated, "comol_A": 1}
    assert placement("input", "row") == {**replicated, "comol_A": 1, "comol_router": 1}


def test_sizes_are_inferred_and_contradictions_refused():
    sizes = AxisSizes(I=12, O=20, R=4, E=3)
    shapes = parameter_shapes(comol_table("input"), sizes)
    assert infer_sizes(comol_table("input"), shapes) == sizes
    with pytest.raises(UserError, match=r"comol_router has I=11, .* has 12"):
        infer_sizes(comol_table("input"), {**shapes, "comol_router": (3, 11)})
    with pytest.raises(UserError, match="comol_cores is missing"):
        infer_sizes(comol_table(), {name: shape for name, shape in shapes.items() if name != "comol_cores"})
    with pytest.raises(UserError, match=r"comol_A has shape \[48\], expected axes \[R, I\]"):
        infer_sizes(comol_table(), {**shapes, "comol_A": (48,)})
