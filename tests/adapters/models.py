"""Tiny models for the adapter tests."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from comol_ds import CoMoLConfig
from comol_ds.adapters.comol_layer import CoMoLLinear


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """Two layers, hidden 32, grouped attention, vocabulary 64, in fp32."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def comol_config(**overrides) -> CoMoLConfig:
    """r=4, E=3 on all five default targets, with a B that is not zero."""
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "num_experts": 3,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        "init_adapter_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return CoMoLConfig(**{**settings, **overrides})


def layer(in_features=10, out_features=7, dtype=torch.float64, bias=False, **settings) -> CoMoLLinear:
    """A wrapped Linear with an active adapter called default."""
    wrapped = CoMoLLinear(nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False))
    wrapped.add_adapter("default", **{"r": 4, "lora_alpha": 6, "num_experts": 3, **settings})
    wrapped.set_adapter("default")
    return wrapped
