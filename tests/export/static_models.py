"""Exact models for the tests of static exports, and every token's h, gates and product computed again, literally."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from comol_ds import CoMoLConfig
from comol_ds.adapters.comol_layer import CoMoLLinear, comol_layers
from tests.tiny_models import FAMILIES, make_adapter_act, random_batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def exact_model(seed: int = 0, family: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> PeftModel:
    """A random model whose adapter routes and changes what it says; the adapter is fp32 or float64."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).to(dtype)
    values = {"r": 6, "lora_alpha": 9, "num_experts": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(base, CoMoLConfig(**values)).eval()
    make_adapter_act(model)
    return model


def adapter_of(model: PeftModel) -> tuple[CoMoLConfig, dict[str, torch.Tensor]]:
    """As read_adapter returns it."""
    return model.peft_config["default"], get_peft_model_state_dict(model)


def plain_batch(rows: int, seed: int, longest: int = 24) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the right, without labels."""
    batch = random_batch(rows, seed, longest)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Rows:
    """Every counted token of one module, in float64: h [N, R], gates [N, E], h M [N, R]."""

    h: torch.Tensor
    gates: torch.Tensor
    product: torch.Tensor


def literal_rows(model: PeftModel, batches: list[Mapping[str, torch.Tensor]]) -> dict[str, Rows]:
    """Module -> all its tokens that are no padding, from the inputs of its layer, one token at a time."""
    layers = comol_layers(model)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0].detach()))
        for name, layer in layers.items()
    ]
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for batch in batches:
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for name, seen in inputs.items():
            kept[name].append(seen.pop()[batch["attention_mask"].bool()].double())
    for hook in hooks:
        hook.remove()
    return {name: _rows(layer, torch.cat(kept[name])) for name, layer in layers.items()}


def _rows(layer: CoMoLLinear, x: torch.Tensor) -> Rows:
    down, cores, router = (
        getattr(layer, name)["default"].detach().double() for name in ("comol_A", "comol_cores", "comol_router")
    )
    found = []
    for token in x:
        h = down @ token
        p = torch.softmax(router @ (h if layer.router["default"] == "core" else token), dim=0)
        merged = sum(weight * core for weight, core in zip(p, cores, strict=True))
        found.append((h, p, h @ merged))
    return Rows(*(torch.stack(column) for column in zip(*found, strict=True)))


def literal_residual(rows: Rows, core: torch.Tensor) -> float:
    """||h M - h Mbar|| / ||h M|| from all tokens."""
    return float((rows.product - rows.h @ core).norm() / rows.product.norm())
