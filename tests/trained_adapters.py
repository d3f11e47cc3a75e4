"""Adapters as a training run leaves them, without a run: random, but such that they change what the model says."""

import json
from pathlib import Path

import torch
import yaml
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from comol_ds import CoMoLConfig
from comol_ds.adapters.adapter_folder import write_adapter
from tests.tiny_models import make_adapter_act, save_tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def save_trained_adapter(
    folder: Path, base: Path, seed: int = 3, tokenizer: dict[str, bytes] | None = None, **changes
) -> PeftModel:
    """Write the adapter folder; returns the model whose adapter it is, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    values = {"r": 4, "lora_alpha": 8, "num_experts": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes
    adapted = get_peft_model(model, CoMoLConfig(**values)).eval()
    make_adapter_act(adapted)
    write_adapter(get_peft_model_state_dict(adapted), adapted.peft_config["default"], folder, tokenizer)
    return adapted


def save_run(folder: Path, family: str = "llama", records: int = 12) -> PeftModel:
    """Write a run folder with its base in ``model`` and its validation data in ``validation.jsonl`` beside it."""
    base, data = save_tiny_model(folder.parent / "model", family), folder.parent / "validation.jsonl"
    lines = [{"prompt": f"{number} plus {number} is", "completion": f" {2 * number}."} for number in range(records)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = save_trained_adapter(folder / "adapter", base)
    settings = {
        "model_name_or_path": str(base), "tokenizer_name": None, "dataset": [str(data)], "eval_dataset": [str(data)],
        "max_length": 64, "seed": 1,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "ds_config.json").write_text("{}")
    return model
