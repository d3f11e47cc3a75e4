"""Faults of an adapter folder's files and of its adapter_config.json."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comol_ds.adapters.adapter_folder import TENSOR_FILE
from comol_ds.adapters.config import MAX_ALPHA, MAX_SIZE
from comol_ds.export.servers import Fault

PICKLE_FILE = "adapter_model.bin"
MAX_RANK_VLLM = 512
# Values of init_lora_weights for which PEFT changes the base's weights when it loads the adapter.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq")


def file_faults(folder: Path) -> Iterator[Fault]:
    """Which tensor files are there."""
    tensors, pickled = folder / TENSOR_FILE, folder / PICKLE_FILE
    if pickled.is_file() and tensors.is_file():
        what = f"lies beside {TENSOR_FILE} and may hold other values"
        yield Fault("pickle beside", str(pickled), what, "delete it")
    elif pickled.is_file():
        yield Fault(
            "pickle only",
            str(pickled),
            f"is a pickle, which can run code, and there is no {TENSOR_FILE}",
            "load it with torch.load(weights_only=True) and write it with safetensors",
        )
    elif not tensors.is_file():
        yield Fault("no tensor file", str(folder), f"{TENSOR_FILE} is missing", "export or copy the adapter again")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != TENSOR_FILE:
            yield Fault("second tensor file", str(path), f"lies beside {TENSOR_FILE}", "move it to another folder")


def config_faults(config: dict[str, Any], path: Path) -> Iterator[Fault]:
    """What adapter_config.json says, apart from peft_type."""
    yield from _rank_faults(config, str(path))
    yield from _scaling_faults(config, str(path))
    yield from _target_faults(config, str(path))
    yield from _feature_faults(config, str(path))


def rank_of(config: dict[str, Any]) -> int | None:
    """r, if it is one."""
    r = config.get("r")
    return r if type(r) is int and 0 < r <= MAX_SIZE else None


def pattern_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """rank_pattern or alpha_pattern: module name or pattern -> value, empty if there is none."""
    pattern = config.get(name)
    return pattern if isinstance(pattern, dict) else {}


def _rank_faults(config: dict[str, Any], where: str) -> Iterator[Fault]:
    rank = rank_of(config)
    if "r" not in config:
        yield Fault("no r", where, "r is missing", "write the number of rows of lora_A")
        return
    if rank is None:
        remedy = "write the number of rows of lora_A, a whole number"
        yield Fault("r is no rank", where, f"r is {config['r']!r}", remedy)
        return
    highest = max([rank, *(value for value in pattern_of(config, "rank_pattern").values() if type(value) is int)])
    if highest > MAX_RANK_VLLM:
        yield Fault("rank too high", where, f"the rank is {highest}", "train with a lower r or serve a merged model")
    if rank != 8 and rank % 16:
        padded = 8 if rank < 8 else -(-rank // 16) * 16
        remedy = f"pad lora_A and lora_B with zeros to rank {padded}, with lora_alpha = r = {padded}"
        yield Fault("rank padded", where, f"r is {rank}", remedy)


def _scaling_faults(config: dict[str, Any], where: str) -> Iterator[Fault]:
    alpha, rank = config.get("lora_alpha"), rank_of(config) or 1
    if alpha is None:
        yield Fault("no lora_alpha", where, "lora_alpha is missing", "write it; lora_alpha = r scales by 1")
    elif isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
        yield Fault("lora_alpha is no number", where, f"lora_alpha is {alpha!r}", "write a number; r scales by 1")
    elif alpha == 0:
        yield Fault("lora_alpha is 0", where, "lora_alpha is 0", "write a positive number; r scales by 1")
    elif config.get("use_rslora"):
        yield Fault(
            "rsLoRA",
            where,
            f"use_rslora is true, a scaling of {alpha / math.sqrt(rank):.6g} where lora_alpha/r is {alpha / rank:.6g}",
            "multiply lora_B by the scaling, set lora_alpha = r and use_rslora false",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if pattern := pattern_of(config, name):
            yield Fault(
                name,
                where,
                f"{name} sets {', '.join(f'{module} {value}' for module, value in pattern.items())}",
                "pad all modules to one rank, multiply lora_B by its scaling and remove the patterns",
            )


def _target_faults(config: dict[str, Any], where: str) -> Iterator[Fault]:
    targets = config.get("target_modules")
    remedy = "list the endings of the adapted modules' names"
    if "target_modules" not in config:
        yield Fault("no target_modules", where, "target_modules is missing", remedy)
    elif not targets:
        yield Fault("target_modules empty", where, f"target_modules is {targets!r}", remedy)
    elif isinstance(targets, str):
        yield Fault("target_modules is a pattern", where, f"target_modules is the pattern {targets!r}", remedy)


def _feature_faults(config: dict[str, Any], where: str) -> Iterator[Fault]:
    without = "train without it or serve a merged model"
    init = config.get("init_lora_weights")
    if config.get("use_dora"):
        yield Fault("DoRA", where, "use_dora is true", without)
    if config.get("bias", "none") != "none":
        yield Fault("bias", where, f"bias is {config['bias']!r}", without)
    elif config.get("lora_bias"):
        yield Fault("bias", where, "lora_bias is true", without)
    if config.get("modules_to_save"):
        yield Fault("modules_to_save", where, f"modules_to_save is {config['modules_to_save']}", without)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        yield Fault(
            "initialization changes the base",
            where,
            f"init_lora_weights is {init!r}, for which PEFT changes the base when it loads the adapter",
            "convert it with PEFT's path_initial_model_for_weight_conversion",
        )
    if config.get("layer_replication"):
        yield Fault("layer_replication", where, f"layer_replication is {config['layer_replication']}", without)
    if config.get("alora_invocation_tokens"):
        yield Fault("alora", where, "alora_invocation_tokens make it an activated LoRA", without)
