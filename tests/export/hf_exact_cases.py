"""Bases with trained adapters for the tests of hf-exact."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from comol_ds.adapters.adapter_folder import read_adapter, write_adapter
from comol_ds.export.hf_exact import HfExactReport, write_hf_exact
from tests.tiny_models import save_tiny_model
from tests.trained_adapters import save_trained_adapter


@dataclass(frozen=True)
class Case:
    family: str = "llama"
    adapter: dict[str, Any] = field(default_factory=dict)
    shards: bool = False
    dtype: torch.dtype = torch.float32


ONE_LAYER = {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
WHOLE = {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"], "target_modules": ["v_proj"]}
CASES = {
    "llama": Case(),
    "llama, router input": Case(adapter={"router": "input"}),
    "llama, tied": Case("llama_tied"),
    "llama, biases and one layer": Case("llama_bias", {"router": "input"} | ONE_LAYER),
    "llama, shards": Case(shards=True),
    "llama, shards and one layer": Case("llama_tied", ONE_LAYER, shards=True),
    "llama, bfloat16": Case(dtype=torch.bfloat16),
    "llama, modules trained whole": Case(adapter=WHOLE),
    "qwen2": Case("qwen2", {"router": "input"}),
    "qwen3": Case("qwen3"),
    "mistral": Case("mistral"),
    "gemma3": Case("gemma3", {"target_modules": "all-linear"}),
}


def train(folder: Path, case: Case = CASES["llama"]) -> torch.nn.Module:
    """A base in folder/base and an adapter in folder/adapter; returns the trained model."""
    base = save_tiny_model(folder / "base", case.family)
    if case.shards or case.dtype != torch.float32:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=case.dtype)
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size="60KB" if case.shards else "1GB")
    model = save_trained_adapter(folder / "adapter", base, **case.adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) / 10)
    write_adapter(get_peft_model_state_dict(model), model.peft_config["default"], folder / "adapter")
    return model


def export(folder: Path, **options) -> HfExactReport:
    return write_hf_exact(folder / "base", *read_adapter(folder / "adapter"), folder / "served", **options)
