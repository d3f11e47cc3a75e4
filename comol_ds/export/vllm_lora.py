"""CoMoL in the form that vLLM's multi-LoRA path computes exactly, with the plugin in `vllm_plugin` installed.

CoMoL (arXiv 2603.00573) is a LoRA of rank E*R with a gate between its two products. From

    h = x A^T      p = softmax(h Router^T)      update = s * (h sum_e p_e C_e) B^T

follow, with every token-independent product multiplied out,

    lora_A = [A; Router A; 0]  [E*R, I]      x lora_A^T = [h | logits | 0]
    gate: [h | logits | 0] -> z = p (x) h    [E*R], z at e*R + i is p_e h_i
    lora_B = s * [B C_1^T ... B C_E^T]       [O, E*R], z lora_B^T = update

and [A; Router; 0] for a router that reads x. Without the gate the same tensors are a LoRA that means nothing, so the
folder holds a guard tensor: a vLLM without the plugin refuses the whole folder because of it.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from comol_ds.adapters.adapter_folder import CONFIG_FILE, KEY_PREFIX, TENSOR_FILE, split_tensors, verify_tensors
from comol_ds.adapters.comol_layer import comol_table
from comol_ds.adapters.config import CoMoLConfig
from comol_ds.adapters.table import parameter_names
from comol_ds.errors import UserError
from comol_ds.files import write_new
from comol_ds.tensor_files import save_tensors

# Stock vLLM's error is this name followed by "is unsupported LoRA weight".
GUARD = "comol_guard.needs_the_vllm_plugin_of_comol_ds"
CONFIG_KEY = "comol"
FORMAT_VERSION = 1
# vLLM ignores peft_type; everything that knows LORA only refuses this one.
PEFT_TYPE = "COMOL_VLLM"
# What vLLM 0.32 accepts as --max-lora-rank.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_vllm_lora(
    tensors: dict[str, torch.Tensor], config: CoMoLConfig, base: str | os.PathLike, folder: str | os.PathLike
) -> int:
    """Write an adapter as a LoRA folder for vLLM with our plugin; experimental, for vLLM 0.32.

    Args:
        tensors, config: an adapter, as `read_adapter` returns it.
        base: base model folder or hub name, to be named in the configuration.
        folder: where to write both files; created if it is missing.

    Returns:
        The smallest --max-lora-rank with which vLLM takes the folder.

    Raises:
        UserError: the adapter has no such form. Nothing is written then.
    """
    expanded = expand_adapter(tensors, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(expanded | {GUARD: torch.zeros(1)}, folder / TENSOR_FILE)
    values = json.dumps(_config_values(expanded, config, base), indent=2, sort_keys=True)
    write_new(folder / CONFIG_FILE, values + "\n")
    return min(rank for rank in MAX_LORA_RANKS if rank >= config.r * config.num_experts)


def expand_adapter(tensors: dict[str, torch.Tensor], config: CoMoLConfig) -> dict[str, torch.Tensor]:
    """An adapter's tensors, under their folder keys -> lora_A [E*R, I] and lora_B [O, E*R] of each module, fp32.

    Products are formed in float64 and rounded once.

    Raises:
        UserError: the adapter has no form of this kind that vLLM serves; the line says why and what does.
    """
    verify_tensors(tensors, config)
    _check_rank(config)
    modules, others = split_tensors(tensors, config)
    _check_names(modules)
    saved = {path.rpartition(".")[0].rpartition(".")[2] for path in others}
    if whole := sorted(saved.union(config.modules_to_save or ())):
        raise UserError(
            f"modules_to_save {', '.join(whole)}: a LoRA in vLLM holds no whole modules; use --format hf-exact"
        )
    scaling = config.lora_alpha / config.r
    expanded = {}
    for module, found in modules.items():
        lora_a, lora_b = _expand(found, scaling, config.router)
        expanded[f"{KEY_PREFIX}{module}.lora_A.weight"] = lora_a
        expanded[f"{KEY_PREFIX}{module}.lora_B.weight"] = lora_b
    return expanded


def _expand(found: dict[str, torch.Tensor], scaling: float, router: str) -> tuple[torch.Tensor, torch.Tensor]:
    down, up, cores, route = (found[name].double() for name in parameter_names(comol_table(router)))
    logit_rows = route @ down if router == "core" else route  # [E, I]
    lora_a = down.new_zeros(cores.shape[0] * cores.shape[1], down.shape[1])  # [E*R, I]
    rows = torch.cat([down, logit_rows])
    lora_a[: rows.shape[0]] = rows
    # [E, R, R] x [R, O] -> [E*R, O]: row e*R + i is what p_e h_i adds
    lora_b = scaling * (cores @ up.T).flatten(0, 1).T
    return lora_a.float().contiguous(), lora_b.float().contiguous()


def _check_rank(config: CoMoLConfig) -> None:
    r, experts = config.r, config.num_experts
    if experts * r > MAX_LORA_RANKS[-1]:
        raise UserError(
            f"r={r} with num_experts={experts} is a LoRA of rank {experts * r} in vLLM, whose largest max_lora_rank is "
            f"{MAX_LORA_RANKS[-1]}; use --format hf-exact"
        )
    if experts * r < r + experts:
        remedy = "--format lora, which is exact with one expert" if experts == 1 else "--format hf-exact"
        raise UserError(
            f"r={r} with num_experts={experts}: a LoRA of rank {experts * r} has no room for the {r} + {experts} rows "
            f"of the down-projection and the router; use {remedy}"
        )


def _check_names(modules: dict[str, Any]) -> None:
    """vLLM has other code for the LoRA of an output head and of fused experts, where there is no place for the gate."""
    for module in modules:
        if module.rpartition(".")[2] == "lm_head" or ".experts." in module:
            raise UserError(f"{module} is adapted; vLLM gates Linears of decoder layers only; use --format hf-exact")


def _config_values(expanded: dict[str, torch.Tensor], config: CoMoLConfig, base: str | os.PathLike) -> dict[str, Any]:
    rank = config.r * config.num_experts
    endings = {key.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2] for key in expanded}
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(endings),
        "inference_mode": True,
        CONFIG_KEY: {
            "version": FORMAT_VERSION,
            "r": config.r,
            "num_experts": config.num_experts,
            "router": config.router,
        },
    }
