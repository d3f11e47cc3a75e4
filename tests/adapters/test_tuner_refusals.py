"""What the tuner refuses: merging, values out of range, targets that do not exist. Always on one line with a remedy."""

import json

import pytest
import torch
from peft import get_peft_model
from torch import nn

from comol_ds import CoMoLConfig
from comol_ds.adapters.adapter_folder import read_config
from comol_ds.adapters.comol_layer import CoMoLLinear
from comol_ds.errors import UserError
from tests.adapters.models import comol_config, tiny_llama, tokens


def adapted(**overrides):
    return get_peft_model(tiny_llama(), comol_config(**overrides)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def first_layer(model):
    return next(module for module in model.modules() if isinstance(module, CoMoLLinear))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: first_layer(model).merge(),
        lambda model: model.unmerge_adapter(),
    ],
    ids=["merge_and_unload", "merge_adapter", "layer.merge", "unmerge_adapter"],
)
def test_merging_is_refused_with_the_reason_and_the_way(call):
    model = adapted(modules_to_save=["embed_tokens"])  # comes before the first adapted Linear
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    expected = logits(model)
    with pytest.raises(UserError, match=r"differs from token to token.*launch/export.py --checkpoint ADAPTER"):
        call(model)
    assert torch.equal(logits(model), expected)
    assert hasattr(model.base_model.model.model.embed_tokens, "modules_to_save"), "half of the model was unloaded"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r is 0; it must be a whole number of at least 1"),
        ({"r": -3}, "r is -3"),
        ({"r": 2.5}, "r is 2.5"),
        ({"num_experts": 0}, "num_experts is 0; it must be a whole number of at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0; it must lie in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be a number above 0"),
        ({"lora_alpha": "r"}, "lora_alpha is 'r'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"router": "token"}, "router is 'token'; it must be one of core, input"),
        ({"core_init": "zeros"}, "core_init is 'zeros'; it must be one of paper, orthogonal, identity"),
        ({"dropout_scheme": "all"}, "dropout_scheme is 'all'; it must be one of input, paper"),
        ({"target_modules": "(q_proj"}, r"target_modules '\(q_proj' is not a regular expression"),
        ({"layers_pattern": "layers"}, "layers_pattern 'layers' has no effect without layers_to_transform"),
        (
            {"r": 1 << 16, "num_experts": 1},
            "r=65536 with num_experts=1: cores of 4,294,967,296 numbers for every Linear",
        ),
        ({"r": 8192, "num_experts": 5}, "num_experts . r . r must be at most 268,435,456"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; it must be a list of names"),
        ({"layers_to_transform": 1, "layers_pattern": "(("}, r"layers_pattern '\(\(' is not a regular expression"),
        ({"layers_to_transform": -1}, "layers_to_transform is -1; it must be a layer's number from 0 on, or a list"),
        ({"layers_to_transform": 1, "target_modules": ".*"}, "layers_to_transform works with a list"),
    ],
)
def test_bad_values_are_one_line_errors(values, message):
    with pytest.raises(UserError, match=message) as error:
        CoMoLConfig(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rank_pattern", "use_dora", "lora_rank"])
def test_settings_of_other_methods_are_named(name, tmp_path):
    said = f"CoMoL has no {name} (it is 8); its settings are task_type, .*, r, lora_alpha, .*, init_adapter_weights"
    said = said.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=said):
        CoMoLConfig(**{name: 8})
    file = tmp_path / "adapter_config.json"
    saved = CoMoLConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict() | {"target_modules": ["q_proj"]}
    file.write_text(json.dumps(saved | {name: 8}))
    with pytest.raises(UserError, match=said):
        read_config(tmp_path)
    # switched off, as a newer PEFT may write what it has added
    file.write_text(json.dumps(saved | {name: False}))
    with pytest.warns(UserWarning, match=name):
        assert read_config(tmp_path).target_modules == {"q_proj"}


@pytest.mark.parametrize("target_modules", [["query"], r".*\.query"])
def test_targets_that_match_nothing_list_what_exists(target_modules):
    with pytest.raises(UserError) as error:
        adapted(target_modules=target_modules)
    assert "query" in str(error.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_target_that_is_no_linear():
    with pytest.raises(UserError, match=r"'model.layers.0.mlp', a LlamaMLP; CoMoL wraps nn.Linear only"):
        adapted(target_modules=["mlp"])


def test_a_model_without_any_default_target_needs_targets():
    with pytest.raises(UserError, match=r"none of the default q_proj, .*, down_proj; its Linear modules end in: 0, 1"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), CoMoLConfig())
