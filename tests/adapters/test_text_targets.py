"""Default targets of a multimodal model stay inside its text model; what is named in full is adapted anywhere."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from comol_ds import CoMoLConfig
from comol_ds.adapters.comol_layer import comol_layers
from comol_ds.errors import UserError
from tests.tiny_models import FAMILIES

VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
IN_TOWER = "model.vision_tower.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def build():
    """A tiny multimodal Gemma 3, and how to adapt it."""
    config = Gemma3Config(text_config=FAMILIES["gemma3"].to_dict(), vision_config=VISION, mm_tokens_per_image=4)

    def adapted(targets, **changes) -> PeftModel:
        torch.manual_seed(0)
        base = Gemma3ForConditionalGeneration(config)
        return get_peft_model(base, CoMoLConfig(r=2, num_experts=2, target_modules=targets, **changes))

    return adapted


def places(model: PeftModel) -> dict[str, int]:
    """How many adapters each part of the model has."""
    found = {}
    for name in comol_layers(model):
        part = ".".join(name.split(".")[:2])
        found[part] = found.get(part, 0) + 1
    return found


@pytest.mark.parametrize(
    ("targets", "expected", "left"),
    [
        (None, {"model.language_model": 10}, 3),
        (["q_proj", "v_proj"], {"model.language_model": 4}, 2),
        ("all-linear", {"model.language_model": 14}, 9),
        (["q_proj", IN_TOWER], {"model.language_model": 2, "model.vision_tower": 1}, 0),
        (r".*\.q_proj", {"model.language_model": 2, "model.vision_tower": 1}, 0),
        (["v_proj", "lm_head"], {"model.language_model": 2, "lm_head": 1}, 1),
    ],
    ids=str,
)
def test_where_adapters_are(targets, expected, left, build):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = build(targets)
    assert places(model) == expected
    assert len(model.base_model.left_beside_text) == left
    told = [str(warning.message) for warning in told if "beside the text model" in str(warning.message)]
    assert [line.split()[0] for line in told] == ([str(left)] if left else [])
    assert all("vision" in name for name in model.base_model.left_beside_text)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["v_proj", IN_TOWER]], ids=str)
def test_a_saved_adapter_comes_back_where_it_was(targets, build, tmp_path):
    model = build(targets)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Gemma3ForConditionalGeneration(model.get_base_model().config), tmp_path)
    assert list(comol_layers(again)) == list(comol_layers(model))


def test_a_tower_that_an_earlier_adapter_has_is_kept(build, tmp_path):
    """Saved by a program that adapts whatever ends in the names."""
    model = build(r".*\.(q|v)_proj")
    model.save_pretrained(tmp_path)
    saved = tmp_path / "adapter_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"target_modules": ["q_proj", "v_proj"]}))
    again = PeftModel.from_pretrained(Gemma3ForConditionalGeneration(model.get_base_model().config), tmp_path)
    assert places(again) == {"model.language_model": 4, "model.vision_tower": 2}


@pytest.mark.parametrize("excluded", [["layers.0.self_attn.v_proj"], r".*\.0\.self_attn\.v_proj|.*\.k_proj"], ids=str)
def test_what_is_left_out_joins_what_the_user_excludes(excluded, build, tmp_path):
    model = build(["q_proj", "v_proj"], exclude_modules=excluded)
    assert places(model) == {"model.language_model": 3}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Gemma3ForConditionalGeneration(model.get_base_model().config), tmp_path)
    assert list(comol_layers(again)) == list(comol_layers(model))


def test_an_encoder_that_reads_text_is_no_tower():
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    model = get_peft_model(base, CoMoLConfig(r=2, num_experts=2, target_modules=["q"]))
    assert {name.split(".")[0] for name in comol_layers(model)} == {"encoder", "decoder"}


def test_a_name_that_only_the_tower_has_is_no_name_of_the_text_model(build):
    with pytest.raises(UserError, match=r"^target_modules fc1 match no module of the text model; what lies beside it"):
        build(["q_proj", "fc1"])
