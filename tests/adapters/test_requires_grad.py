"""Which adapters are trainable after which calls: CoMoL as the installed PEFT has it for LoRA."""

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from comol_ds import CoMoLConfig
from tests.adapters.models import tiny_llama

CONFIGS = {"comol": CoMoLConfig, "lora": LoraConfig}


def saved(folder, kind, modules_to_save):
    config = CONFIGS[kind](r=2, target_modules=["q_proj"], modules_to_save=modules_to_save)
    get_peft_model(tiny_llama(), config).save_pretrained(folder)
    return folder


def trainable(model):
    """(module, adapter) of the trainable parameters, without the names that only one method has."""
    found = set()
    for name, parameter in model.named_parameters():
        module, _, rest = name.partition(".comol_" if ".comol_" in name else ".lora_")
        if parameter.requires_grad:
            found.add(
                (module, next(part for part in rest.split(".") if part in ("default", "other"))) if rest else name
            )
    return found


def load_frozen_second(model, folder):
    model.load_adapter(folder, "other", is_trainable=False)


def load_trainable_second(model, folder):
    model.load_adapter(folder, "other", is_trainable=True)


def switch(model, folder):
    load_trainable_second(model, folder)
    model.set_adapter("other")


def switch_in_inference_mode(model, folder):
    load_trainable_second(model, folder)
    model.set_adapter("other", inference_mode=True)


def delete_the_active_one(model, folder):
    load_frozen_second(model, folder)
    model.delete_adapter("default")


def delete_the_other_one(model, folder):
    load_trainable_second(model, folder)
    model.delete_adapter("other")


def freeze_by_name(model, folder):
    load_trainable_second(model, folder)
    model.set_requires_grad(["default", "other"], requires_grad=False)


def add_a_fresh_one(model, folder):
    model.add_adapter("other", type(model.peft_config["default"])(r=3, target_modules=["q_proj", "up_proj"]))


CALLS = [load_frozen_second, load_trainable_second, switch, switch_in_inference_mode, delete_the_active_one,
         delete_the_other_one, freeze_by_name, add_a_fresh_one]  # fmt: skip


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["adapters", "with a whole module"])
def test_trainable_as_lora_is(tmp_path, modules_to_save):
    folders = {kind: saved(tmp_path / kind, kind, modules_to_save) for kind in CONFIGS}
    for is_trainable in (True, False):
        for calls in CALLS:
            found = {}
            for kind, folder in folders.items():
                model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=is_trainable)
                calls(model, folder)
                found[kind] = trainable(model)
            assert found["comol"] == found["lora"], (is_trainable, calls.__name__)


def test_an_inactive_adapter_that_was_asked_to_be_trainable(tmp_path):
    """PEFT below 0.21 left it frozen until it was activated."""
    folder = saved(tmp_path, "comol", None)
    model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=False)
    load_trainable_second(model, folder)
    assert model.active_adapter == "default"
    assert {adapter for _, adapter in trainable(model)} == {"other"}
