"""An adapter on another base: its Linears are compared by path and size, and the base it was trained on is named."""

import pytest
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict

from comol_ds import load_for_inference
from comol_ds.adapters.adapter_folder import write_adapter
from comol_ds.adapters.base_fit import check_base, linear_sizes
from comol_ds.errors import UserError
from comol_ds.serving.command import export, parse
from tests.adapters.models import comol_config, tiny_llama


def trained(layers=2, **changes):
    """(configuration, tensors) of an adapter on that many layers."""
    model = get_peft_model(tiny_llama(num_hidden_layers=layers), comol_config(**changes))
    config = model.peft_config["default"]
    config.base_model_name_or_path = "org/first"
    return config, get_peft_model_state_dict(model)


def refusal(adapter, base, name="org/second"):
    with pytest.raises(UserError) as error:
        check_base(*adapter, linear_sizes(base), "FOLDER", name)
    return str(error.value)


SAID = "FOLDER: this adapter was trained on org/first: "
REMEDY = "; give the base that it was trained on"


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", r".*\.mlp\.up_proj"], ids=str)
def test_the_base_it_was_trained_on_is_accepted(targets):
    check_base(*trained(target_modules=targets), linear_sizes(tiny_llama()), "FOLDER", "moved/elsewhere")


def test_another_size():
    assert refusal(trained(target_modules=["down_proj"]), tiny_llama(intermediate_size=64)) == (
        f"{SAID}its model.layers.0.mlp.down_proj is a Linear 48 -> 32, org/second has one 64 -> 32{REMEDY}"
    )


def test_fewer_and_more_layers():
    assert refusal(trained(4, target_modules=["q_proj"]), tiny_llama()) == (
        f"{SAID}its model.layers.2.self_attn.q_proj is a Linear 32 -> 32, org/second has no Linear there{REMEDY}"
    )
    assert refusal(trained(2, target_modules=["q_proj"]), tiny_llama(num_hidden_layers=4)) == (
        f"{SAID}org/second has a model.layers.2.self_attn.q_proj to adapt, which it had not{REMEDY}"
    )


def test_layers_left_out_on_purpose_are_no_other_base():
    adapter = trained(4, target_modules=["q_proj"], layers_to_transform=[1])
    check_base(*adapter, linear_sizes(tiny_llama(num_hidden_layers=4)), "FOLDER", "org/first")


def test_the_same_name_with_other_weights():
    found = refusal(trained(target_modules=["down_proj"]), tiny_llama(intermediate_size=64), "org/first")
    assert found.startswith("FOLDER: this adapter was trained on another base: its model.layers.0.mlp.down_proj is")


@pytest.mark.parametrize("layers", [1, 4])
def test_inference_refuses_another_base(layers, tmp_path):
    config, tensors = trained()
    write_adapter(tensors, config, tmp_path / "adapter")
    tiny_llama(num_hidden_layers=layers).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"adapter: this adapter was trained on org/first: .*give the base that it was"):
        load_for_inference(tmp_path / "adapter", base=str(tmp_path / "base"))


@pytest.mark.parametrize("to", ["hf-exact", "vllm-lora"])
def test_exports_refuse_another_base(to, tmp_path):
    config, tensors = trained()
    write_adapter(tensors, config, tmp_path / "adapter")
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    words = ["--checkpoint", tmp_path / "adapter", "--format", to, "--output_dir", tmp_path / "out"]
    options = parse([str(word) for word in [*words, "--model_name_or_path", tmp_path / "base"]])
    with pytest.raises(UserError, match=r"trained on org/first: .* has a model.layers.2.self_attn.q_proj to adapt"):
        export(options)
    assert not (tmp_path / "out").exists()
