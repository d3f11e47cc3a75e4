"""An adapter folder to start from must hold exactly what the run trains; anything else is refused on one line."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.config import AdapterSettings, RunConfig
from comol_ds.config_parser import parse_run_config
from comol_ds.errors import UserError
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.start_adapter import check_start_adapter
from comol_ds.parallel.zero_partition import adapter_state_dict
from tests.tiny_models import FAMILIES

WRITTEN = AdapterSettings(r=4, lora_alpha=8, num_experts=2, target_modules=["q_proj", "down_proj"])
FIRST = "base_model.model.model.layers.0.mlp.down_proj.comol_"
REMEDY = "; give the adapter's own --r, --num_experts, --router and --target_modules"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = attach_adapter(AutoModelForCausalLM.from_config(FAMILIES["llama"]), WRITTEN, seed=1)
    tensors = adapter_state_dict(model, {name: p for name, p in model.named_parameters() if p.requires_grad})
    path = tmp_path_factory.mktemp("start") / "adapter"
    write_adapter(tensors, model.peft_config["default"], path)
    return path


def check(folder, **changes) -> None:
    settings = replace(WRITTEN, adapter_name_or_path=str(folder), **changes)
    with torch.device("meta"):
        model = attach_adapter(AutoModelForCausalLM.from_config(FAMILIES["llama"]), settings, seed=1)
    return check_start_adapter(model, settings)


def test_the_adapter_of_the_run_is_accepted(folder):
    assert check(folder) is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lora_alpha": 16}, " has lora_alpha 8, the run has 16; give --lora_alpha 8"),
        ({"r": 2}, f": {FIRST}A has shape [4, 48] there and [2, 48] in this run{REMEDY}"),
        ({"num_experts": 3}, f": {FIRST}cores has shape [2, 4, 4] there and [3, 4, 4] in this run{REMEDY}"),
        ({"router": "input"}, f": {FIRST}router has shape [2, 4] there and [2, 48] in this run{REMEDY}"),
        ({"target_modules": ["q_proj"]}, f": {FIRST}A has shape [4, 48] there and None in this run{REMEDY}"),
        (
            {"target_modules": ["q_proj", "down_proj", "gate_proj"]},
            f": {FIRST.replace('down', 'gate')}A has shape None there and [4, 32] in this run{REMEDY}",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_adapter_is_refused(folder, changes, fault):
    with pytest.raises(UserError) as error:
        check(folder, **changes)
    assert str(error.value) == f"--adapter_name_or_path {folder}{fault}"


@pytest.mark.parametrize(("layers", "difference"), [(1, "no Linear there"), (3, "to adapt, which it had not")])
def test_another_base_is_refused(folder, layers, difference):
    settings = replace(WRITTEN, adapter_name_or_path=str(folder))
    config = deepcopy(FAMILIES["llama"])
    config.num_hidden_layers, config.name_or_path = layers, "org/second"
    with torch.device("meta"):
        model = attach_adapter(AutoModelForCausalLM.from_config(config), settings, seed=1)
    with pytest.raises(UserError) as error:
        check_start_adapter(model, settings)
    said = f"--adapter_name_or_path {folder}: this adapter was trained on another base: "
    assert str(error.value).startswith(said) and difference in str(error.value) and "org/second has" in str(error.value)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not an adapter folder: adapter_config.json is missing"):
        check(tmp_path)


def test_modules_trained_whole_do_not_start_from_a_folder():
    words = ["--ds_config", "x.json", "--adapter_name_or_path", "a", "--modules_to_save", "lm_head"]
    with pytest.raises(UserError) as error:
        parse_run_config(words)
    assert str(error.value) == (
        "--adapter_name_or_path with --modules_to_save: modules trained whole cannot start from a folder; drop one"
    )
    assert RunConfig().adapter.adapter_name_or_path is None
