"""Tiny models with a head size that vLLM's attention on the CPU takes, and adapters on them."""

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from comol_ds import CoMoLConfig
from tests.data.data_helpers import tiny_tokenizer
from tests.tiny_models import FAMILIES, VOCABULARY, make_adapter_act

HEAD_DIM = 32  # the smallest that it has a kernel for


def save_servable_model(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """Write a random fp32 model with a tokenizer; returns the folder."""
    config = copy.deepcopy(FAMILIES[family])
    config.head_dim = HEAD_DIM
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(chat=False).save_pretrained(folder)
    return folder


def acting_adapter(base: Path, seed: int, **config) -> PeftModel:
    """The base with a CoMoL adapter that prefers some experts and changes the output."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), CoMoLConfig(**config)).eval()
    make_adapter_act(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "comol_B" in name:
                parameter.mul_(0.3)  # log-probabilities of the base's size, or their own rounding nears 1e-5
    return model


def random_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
