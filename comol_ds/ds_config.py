"""Run settings + DeepSpeed JSON -> the resolved dictionary given to the engine. Contradictions are refused."""

import copy
import difflib
from typing import Any

from comol_ds.config import RunConfig
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout
from comol_ds.text_files import read_json_settings

# Blocks that another part of this project owns, or that DeepSpeed cannot honour in this set-up.
_REFUSED_BLOCKS = {
    "elasticity": "DeepSpeed's elastic batch sizes change the global batch; remove the block",
    "fp16": "float16 with loss scaling is not supported; use --bf16 true and remove the block",
    "amp": "apex mixed precision is not supported; use --bf16 true and remove the block",
    "scheduler": "the schedule belongs to the run; remove the block and set --lr_scheduler_type",
    "optimizer": "the optimizer belongs to the run; remove the block and set --optim, --learning_rate",
    "activation_checkpointing": "it belongs to the run; remove the block and set --activation_checkpointing",
}

# Top-level keys of DeepSpeed's JSON that a run honours. DeepSpeed itself ignores a misspelled one without a word.
_KNOWN_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "data_types",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger", "tensorboard", "wandb",
    "csv_monitor", "comet", "aio", "checkpoint",
    "tensor_parallel",
)  # fmt: skip

# Keys of zero_optimization that shard or compress in their own way: the value that leaves each one off, and why it must
# be off beside tensor parallelism.
_OFF_WITH_TENSOR_PARALLEL = {
    "zero_hpz_partition_size": (
        1,
        "its groups are consecutive ranks, which are tensor-parallel peers: their different weights would be mixed"
        " without an error",
    ),
    "zero_quantized_weights": (False, "the combination is not tested"),
    "zero_quantized_gradients": (False, "the combination is not tested"),
}


def load_ds_json(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        UserError: see `read_json_settings`; or not an object.
    """
    config = read_json_settings(path, "--ds_config", "ds_configs/ has working examples")
    if not isinstance(config, dict):
        raise UserError(f"--ds_config {path} must hold a JSON object, found a {type(config).__name__}")
    return config


def resolve_ds_config(template: dict[str, Any], config: RunConfig, batches: BatchLayout, bf16: bool) -> dict[str, Any]:
    """Fill every "auto" of the JSON from the run and refuse values that say something else.

    Args:
        template: the JSON as the user wrote it; not changed.
        config: the run's settings.
        batches: the batch arithmetic of this world size.
        bf16: the precision decided for this device.

    Raises:
        UserError: an unknown key (the nearest is named), a refused block, ZeRO stage or combination, a contradiction
            (both values named), an "auto" that nobody can fill.
    """
    resolved = copy.deepcopy(template)
    _refuse_unknown_keys(resolved)
    stage = zero_stage(resolved)
    if stage == 0 and bf16:
        raise UserError(
            "DeepSpeed JSON: zero_optimization.stage 0 with --bf16 true takes another optimizer of DeepSpeed, which is"
            " not tested; use stage 1: it computes the same, or --bf16 false"
        )
    resolved.setdefault("zero_optimization", {})["stage"] = stage
    if tensor_parallel_size(resolved, config.parallel.tensor_parallel_size) > 1:
        _check_zero_beside_tensor_parallel(resolved["zero_optimization"])
    resolved.pop("tensor_parallel", None)  # DeepSpeed gets our process groups instead of placing layers itself
    for block, reason in _REFUSED_BLOCKS.items():
        if block in resolved and not _is_disabled(resolved[block]):
            raise UserError(f"DeepSpeed JSON: {block!r} is refused: {reason}")
        resolved.pop(block, None)
    owned_by_run = {
        "train_batch_size": (batches.global_batch, "--global_batch_size"),
        "train_micro_batch_size_per_gpu": (batches.micro_batch, "--per_device_train_batch_size"),
        "gradient_accumulation_steps": (batches.accumulation, "accumulation of this run"),
        "gradient_clipping": (config.optimizer.max_grad_norm, "--max_grad_norm"),
        "bf16.enabled": (bf16, "--bf16"),
    }
    for key, (value, flag) in owned_by_run.items():
        _fill(resolved, key, value, flag)
    # SGD and torch's own AdamW are right under every stage (the equality tests), DeepSpeed merely does not list them.
    resolved["zero_allow_untested_optimizer"] = True
    resolved.setdefault("steps_per_print", 10**9)  # the training loop prints
    left = _find_auto(resolved)
    if left:
        raise UserError(f'DeepSpeed JSON: {left} is "auto" and the run does not set it; give a value')
    return resolved


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed JSON: 0, plain data parallelism and the default as in DeepSpeed, 1, 2 or 3.

    Raises:
        UserError: any other value.
    """
    block = ds_config.get("zero_optimization", {})
    if not isinstance(block, dict):
        raise UserError(f"DeepSpeed JSON: 'zero_optimization' must be an object, found {block!r}")
    stage = block.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"DeepSpeed JSON: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    return stage


def tensor_parallel_size(template: dict[str, Any], flag: int | None) -> int:
    """Ranks that share one copy of the model: --tensor_parallel_size, else the JSON's autotp_size, else 1.

    Args:
        template: the JSON as the user wrote it.
        flag: --tensor_parallel_size, None if it was not given.

    Raises:
        UserError: flag and JSON disagree (both values named), or the JSON asks for DeepSpeed's own placement.
    """
    block = template.get("tensor_parallel", {})
    if not isinstance(block, dict):
        raise UserError(f"DeepSpeed JSON: 'tensor_parallel' must be an object, found {block!r}")
    for key in block:
        if key != "autotp_size":
            raise UserError(
                f"DeepSpeed JSON: tensor_parallel.{key} is refused: DeepSpeed's own placement of layers is not used;"
                " remove it, and where the model's own plan does not serve, give one with --tp_plan FILE"
            )
    size = block.get("autotp_size", "auto")
    if size == "auto":
        return 1 if flag is None else flag
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f'DeepSpeed JSON: tensor_parallel.autotp_size is {size!r}; use a positive number or "auto"')
    if flag not in (None, size):
        raise UserError(
            f"DeepSpeed JSON says tensor_parallel.autotp_size = {size}, the run says --tensor_parallel_size = {flag};"
            ' write "auto" in the JSON or make them agree'
        )
    return size


def _check_zero_beside_tensor_parallel(block: dict[str, Any]) -> None:
    for key, (off, reason) in _OFF_WITH_TENSOR_PARALLEL.items():
        value = block.get(key, off)
        if value and value != off:  # hpZ is off at 0 too
            raise UserError(
                f"DeepSpeed JSON: zero_optimization.{key} = {value} is refused with tensor parallelism: {reason};"
                " remove it"
            )
    offload = block.get("offload_optimizer") or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else "none"  # DeepSpeed refuses what is no dict
    if block.get("cpu_offload"):  # its former name
        device = "cpu"
    if block["stage"] < 3 and device != "none":
        raise UserError(
            f"DeepSpeed JSON: zero_optimization.offload_optimizer to {device} at stage {block['stage']} is refused with"
            " tensor parallelism: gradients are summed over tensor-parallel ranks after the offload has taken their"
            " norm; use stage 3"
        )


def _refuse_unknown_keys(config: dict[str, Any]) -> None:
    known = [*_KNOWN_KEYS, *_REFUSED_BLOCKS]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            hint = f"the nearest known key is {near[0]!r}" if near else f"known are {', '.join(known)}"
            raise UserError(f"DeepSpeed JSON: unknown key {key!r}; {hint}")


def _is_disabled(block: Any) -> bool:
    return isinstance(block, dict) and block.get("enabled") is False


def _fill(config: dict[str, Any], dotted: str, value: Any, flag: str) -> None:
    *parents, key = dotted.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            raise UserError(f"DeepSpeed JSON: {parent!r} must be an object, found {config!r}")
    found = config.get(key, "auto")
    if found not in ("auto", value):
        raise UserError(
            f'DeepSpeed JSON says {dotted} = {found}, the run says {flag} = {value}; write "auto" in the JSON or'
            " make them agree"
        )
    config[key] = value


def _find_auto(config: Any, path: str = "") -> str | None:
    if config == "auto":
        return path
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    return next((hit for key, value in items if (hit := _find_auto(value, f"{path}.{key}".lstrip(".")))), None)
