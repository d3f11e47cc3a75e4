"""Bases in shards, updates and what a merge in memory makes of them, for the tests of the streamed merge."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from comol_ds.errors import UserError
from comol_ds.export.dense_merge import merge_into_base
from comol_ds.export.static_lora import StaticLora
from tests.tiny_models import FAMILIES

PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
MODULES = [f"model.layers.{layer}.{name}" for layer in range(2) for name in PROJECTIONS]
Q_PROJ = "model.layers.0.self_attn.q_proj"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def save_base(folder: Path, dtype: torch.dtype = torch.bfloat16, family: str = "llama", shards: bool = True) -> Path:
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])  # saving writes the dtype into it
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """In memory, not mapped: tests write into the files."""
    return {name: tensor.clone() for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def random_update(
    weights: Mapping[str, torch.Tensor], ratio: float = 0.1, modules: Sequence[str] = MODULES, rank: int = 4
) -> StaticLora:
    """||B A|| is ``ratio`` of the norm of its weight."""
    generator, down, up = torch.Generator().manual_seed(1), {}, {}
    for module in modules:
        weight = weights[f"{module}.weight"].float()
        down[module] = torch.randn(rank, weight.shape[1], generator=generator)
        up[module] = torch.randn(weight.shape[0], rank, generator=generator)
        up[module] *= ratio * weight.norm() / (up[module] @ down[module]).norm()
    return StaticLora(down, up, rank)


def merged_in_memory(weights: Mapping[str, torch.Tensor], static: StaticLora) -> dict[str, torch.Tensor]:
    """One fp32 product of the whole module, one fp32 sum, one cast."""
    merged = dict(weights)
    for module, down in static.down.items():
        weight = weights[f"{module}.weight"]
        merged[f"{module}.weight"] = (weight.float() + static.up[module] @ down).to(weight.dtype)
    return merged


def assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Save the tensors of a file again, changed."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def refusal(*arguments, **options) -> str:
    """The one line with which a merge is refused."""
    with pytest.raises(UserError) as raised:
        merge_into_base(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def shards_in_folders(base: Path, *names: str) -> dict[Path, bytes]:
    """Put the weights of a folder into two shards of these names, and the index after them; the new files' bytes."""
    names = names or ("w.safetensors", "sub/w.safetensors")
    weights = tensors_of(base)
    for path in base.glob("*.safetensors*"):
        path.unlink()
    keys = sorted(weights)
    shares = dict(zip(names, (keys[::2], keys[1::2]), strict=True))
    for name, share in shares.items():
        (base / name).parent.mkdir(exist_ok=True)
        save_file({key: weights[key] for key in share}, base / name, metadata={"format": "pt"})
    weight_map = {key: name for name, share in shares.items() for key in share}
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {path: path.read_bytes() for path in (index, *(base / name for name in names))}
