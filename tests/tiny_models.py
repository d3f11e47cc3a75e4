"""Tiny random models and batches that the tests build from configurations."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from comol_ds.data.collate import packed_batch
from tests.data.data_helpers import tiny_tokenizer

VOCABULARY = 400  # of the tests' tokenizer

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_FOUR_KV_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
_EIGHT_KV_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "llama_tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama_gqa4": LlamaConfig(**_SIZES | _FOUR_KV_HEADS),
    "llama_gqa8": LlamaConfig(**_SIZES | _EIGHT_KV_HEADS),
    "llama_bias": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama_odd_vocabulary": LlamaConfig(**_SIZES | {"vocab_size": VOCABULARY + 1}),
    "qwen2": Qwen2Config(**{name: size for name, size in _SIZES.items() if name != "head_dim"}),
    "qwen3": Qwen3Config(**_SIZES),
    "qwen3_gqa4": Qwen3Config(**_SIZES | _FOUR_KV_HEADS),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "gemma3": Gemma3TextConfig(**_SIZES, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
}


def save_tiny_model(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """Write a random fp32 model of a family with a tokenizer; returns the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)  # transformers starts them at zero, where nothing shows that one is lost
    model.save_pretrained(folder)
    tiny_tokenizer(chat=False).save_pretrained(folder)
    return folder


def save_attention_plan(folder: Path) -> None:
    """Write attention_only.json, a tensor-parallel plan that leaves the MLP whole."""
    plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"} | {"layers.*.self_attn.o_proj": "rowwise"}
    (folder / "attention_only.json").write_text(json.dumps(plan))


def make_adapter_act(model: torch.nn.Module) -> None:
    """Routers that prefer some experts, and updates that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "comol_router" in name:
                parameter.mul_(20)
            if "comol_B" in name:
                parameter.normal_()


def random_batch(rows: int, seed: int, longest: int = 24) -> dict:
    """Rows of different lengths, right-padded, with the first third of each without a label."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, longest + 1, (rows,), generator=generator)
    input_ids = torch.randint(3, VOCABULARY, (rows, longest), generator=generator)
    positions = torch.arange(longest)
    attention_mask = (positions < lengths[:, None]).long()
    with_label = (positions >= lengths[:, None] // 3) & attention_mask.bool()
    return {
        "input_ids": torch.where(attention_mask.bool(), input_ids, 0),
        "labels": torch.where(with_label, input_ids, -100),
        "attention_mask": attention_mask,
        "record_index": torch.where(attention_mask.bool(), torch.arange(rows).unsqueeze(1), -1),
        "record_ids": [f"random:{seed}:{row}" for row in range(rows)],
        "tasks": [("even", "odd")[row % 2] for row in range(rows)],
    }


def left_padded(batch: dict) -> dict:
    """The same rows with their padding in front."""
    lengths = (batch["record_index"] >= 0).sum(1)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(len(row) - int(n)) for row, n in zip(tensor, lengths, strict=True)])

    return {name: moved(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def random_packed_batch(rows: int, seed: int, longest: int = 24) -> dict:
    """As many packed rows, of two records each."""
    generator = torch.Generator().manual_seed(seed)

    def record(number: int) -> dict:
        length = int(torch.randint(4, longest // 2 + 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        return {
            "input_ids": ids,
            "labels": labels,
            "record_id": f"random:{seed}:{number}",
            "task": ("even", "odd")[number % 2],
        }

    return packed_batch([[record(2 * row), record(2 * row + 1)] for row in range(rows)], pad_token_id=0)


def slice_batch(batch: dict, rows: slice) -> dict:
    """Some rows of a batch whose every row holds a record, padded as they were."""
    part = {name: value[rows] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    owner = part["record_index"]
    first, last = int(owner[owner >= 0].min()), int(owner.max())
    part["record_index"] = torch.where(owner >= 0, owner - first, owner)
    return part | {name: batch[name][first : last + 1] for name in ("record_ids", "tasks")}
