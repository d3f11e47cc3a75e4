"""Adapter folders of a tiny Llama: the portable LoRA, and edits that plant a fault in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

SIZES = {  # module -> (I, O)
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 16), "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32),
}  # fmt: skip
NAMES = sorted(module.rpartition(".")[2] for module in SIZES)
LAYERS = 2
RANK = 8
LAYER_0 = "base_model.model.model.layers.0"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
O1 = "base_model.model.model.layers.1.self_attn.o_proj"
HEAD = "base_model.model.lm_head"


def save_base(folder: Path, **changes: Any) -> Path:
    """The configuration of a tiny Llama."""
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    LlamaConfig(**settings | changes).save_pretrained(folder)
    return folder


def portable_config(base: Path) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none",
        "r": RANK, "lora_alpha": RANK, "use_rslora": False, "target_modules": list(NAMES), "modules_to_save": None,
    }  # fmt: skip


def portable_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for module, (features_in, features_out) in SIZES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, features_in, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(features_out, RANK, generator=generator)
    return tensors


def write(folder: Path, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor] | None) -> Path:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def config_edit(*removed: str, **changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))

    return plant


def tensor_edit(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        changed = edit(load_file(path))
        save_file({key: tensor.contiguous() for key, tensor in changed.items()}, path)

    return plant


def put(key: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return tensor_edit(lambda tensors: {**tensors, key: tensor(tensors.get(key))})


def drop(*fragments: str) -> Callable[[Path], None]:
    return tensor_edit(
        lambda tensors: {k: v for k, v in tensors.items() if not any(fragment in k for fragment in fragments)}
    )


def rename(old: str, new: str) -> Callable[[Path], None]:
    return tensor_edit(lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()})


def both(*plants: Callable[[Path], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for one in plants:
            one(folder)

    return plant


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change


def fuse(parts: list[str], name: str) -> Callable[[Path], None]:
    """All modules become one fused module in every layer."""

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        fused = {}
        for key, tensor in tensors.items():
            if f".{parts[0]}." not in key:
                if not any(f".{part}." in key for part in parts):
                    fused[key] = tensor
                continue
            rows = torch.cat([tensors[key.replace(parts[0], part)] for part in parts])
            fused[key.replace(parts[0], name)] = rows if "lora_B" in key else tensor
        return fused

    targets = [*(other for other in NAMES if other not in parts), name]
    return both(tensor_edit(edit), config_edit(target_modules=targets))


def adapt_head(vocabulary: int = 64, **base_changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        save_base(folder.parent / "base", vocab_size=vocabulary, **base_changes)
        config_edit(target_modules=[*NAMES, "lm_head"])(folder)
        tensor_edit(
            lambda tensors: {
                **tensors,
                f"{HEAD}.lora_A.weight": torch.zeros(RANK, 32, dtype=torch.half),
                f"{HEAD}.lora_B.weight": torch.zeros(vocabulary, RANK, dtype=torch.half),
            }
        )(folder)

    return plant


def resize(old: int, new: int) -> Callable[[Path], None]:
    """All pairs get another rank, the configuration does not."""
    return tensor_edit(
        lambda tensors: {
            key: (tensor.repeat(new // old, 1) if "lora_A" in key else tensor.repeat(1, new // old))
            for key, tensor in tensors.items()
        }
    )


def other_base(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: save_base(folder.parent / "base", **changes) and None
