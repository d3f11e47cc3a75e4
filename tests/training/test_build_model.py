"""Building in one process: what is refused before anything is read, and what is read besides parameters."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from comol_ds.config import ModelSettings
from comol_ds.errors import UserError
from comol_ds.layout import RankGrid
from comol_ds.parallel.assemble import build_skeleton, locate_weights
from comol_ds.parallel.loading import load_weights, plain_name
from comol_ds.parallel.mesh import Mesh
from tests.tiny_models import save_tiny_model

ONE_RANK = Mesh(RankGrid(0, 1))
PLAIN = {"zero_optimization": {"stage": 0}}


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model")


def test_a_quantized_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError) as raised:
        build_skeleton(ModelSettings(), str(folder), bf16=False)
    assert str(raised.value) == (
        f"--model_name_or_path {folder} is quantized (quantization_config in its config.json); use the model's float32,"
        " bfloat16 or float16 weights"
    )


def test_buffers_that_the_files_hold_are_read_and_the_others_kept(folder):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.scale": torch.arange(3.0)}, file)
    model = build_skeleton(ModelSettings(), str(folder), bf16=False)
    model.model.register_buffer("scale", torch.zeros(3))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    load_weights(model, locate_weights(model, str(folder)), PLAIN, ONE_RANK)
    assert torch.equal(model.model.scale, torch.arange(3.0))
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_generation_settings_of_the_folder_are_kept(folder):
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25}')
    assert build_skeleton(ModelSettings(), str(folder), bf16=False).generation_config.temperature == 0.25


@pytest.mark.parametrize(
    ("adapted", "plain"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_names_of_the_adapted_model_are_led_back(adapted, plain):
    assert plain_name(adapted) == plain
