"""Which values of a run's settings no run can use, alone and together; see `comol_ds.config`."""

import math
import re

import regex

from comol_ds.config import RunConfig, RunSettings
from comol_ds.errors import UserError


def check_config(config: RunConfig) -> None:
    """Refuse values that no run can use.

    Raises:
        UserError: naming the flag, the value and the accepted range.
    """
    values = config.flat()
    for name, accepts, requirement in _RANGES:
        value = values[name]
        if value is not None and not accepts(value):
            raise UserError(f"--{name} {value}: {requirement}")
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if name not in _MAY_BE_INFINITE and not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
            raise UserError(f"--{name} {value}: must be a finite number")
    _check_combinations(config)


def _check_evaluation(config: RunConfig) -> None:
    """Refuse an evaluation that is asked for and has no records."""
    if config.data.has_validation:
        return
    defaults = RunSettings()
    for name in ("eval_steps", "eval_on_start", "answer_pattern"):
        value = getattr(config.run, name)
        if value != getattr(defaults, name):
            raise UserError(
                f"--{name} {value} with --validation_split_percentage 0: there are no records to evaluate; give"
                " --eval_dataset, hold some out, or drop it"
            )


def _is_pattern(text: str) -> bool:
    try:
        regex.compile(text)
    except (regex.error, RecursionError):
        return False
    return True


_YEAR_MINUTES = 525_600
# 0 does not clip, and neither does infinity.
_MAY_BE_INFINITE = ("max_grad_norm",)

_RANGES = [
    *(
        (name, lambda v: v > 0, "must be a positive whole number")
        for name in (
            "r",
            "num_experts",
            "lora_alpha",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "global_batch_size",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "max_new_tokens",
            "max_train_records",
            "max_eval_records",
            "preprocessing_num_workers",
            "tensor_parallel_size",
            "consistency_check_steps",
            "router_load_steps",
            "router_alarm_steps",
        )
    ),
    *(
        (name, lambda v: v >= 0, "must not be negative")
        for name in (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "max_generate_records",
            "adam_epsilon",
            "router_aux_loss_coef",
            "router_z_loss_coef",
            "core_diversity_loss_coef",
            "stop_margin_minutes",
        )
    ),
    *(
        (name, lambda v: 0 <= v < 1, "must lie in [0, 1)")
        for name in (
            "lora_dropout",
            "adam_beta1",
            "adam_beta2",
            "sgd_momentum",
            "max_dropped_fraction",
        )
    ),
    ("validation_split_percentage", lambda v: 0 <= v < 100, "must lie in [0, 100); 0 holds nothing out"),
    ("max_length", lambda v: v > 1, "must be at least 2: the first token of a record has no loss"),
    ("num_train_epochs", lambda v: v > 0, "must be positive"),
    ("collective_timeout_minutes", lambda v: 0 < v <= _YEAR_MINUTES, f"must be positive and at most {_YEAR_MINUTES}"),
    # torch and numpy share this range
    ("seed", lambda v: 0 <= v < 2**63, "must not be negative, and less than 2^63"),
    # more than any machine has cores; datasets would start as many as there are records
    ("preprocessing_num_workers", lambda v: v <= 1024, "must be at most 1024"),
    ("max_hours", lambda v: v > 0, "must be positive"),
    (
        "activation_checkpointing",
        lambda v: re.fullmatch(r"none|full|selective:([2-9]|[1-9]\d+)", v, re.ASCII),
        "must be none, full, or selective:N with a whole number N of at least 2",
    ),
    ("answer_pattern", _is_pattern, "not a regular expression; quote it for the shell and see Python's re"),
    ("report_to", lambda v: not set(v) - {"tensorboard", "wandb", "none"}, "choose from tensorboard, wandb, none"),
]


def _check_combinations(config: RunConfig) -> None:
    data, run = config.data, config.run
    if run.ds_config is None:
        raise UserError("--ds_config is missing; give a DeepSpeed JSON, for example ds_configs/zero3.json")
    if data.dataset is None and config.model.model_name_or_path is not None:
        raise UserError("--dataset is missing; --model_name_or_path without it has nothing to train on")
    if data.dataset_weights is not None:
        if len(data.dataset_weights) != len(data.dataset or []):
            raise UserError(
                f"--dataset_weights has {len(data.dataset_weights)} values for {len(data.dataset or [])} data sets;"
                " give one per data set"
            )
        if min(data.dataset_weights) <= 0:
            raise UserError(f"--dataset_weights {data.dataset_weights}: every weight must be positive")
    if data.streaming and config.optimizer.max_steps <= 0:
        raise UserError("--streaming needs --max_steps: a stream has no known length")
    if data.streaming and data.group_by_length:
        raise UserError("--group_by_length needs the lengths of all records; drop it or drop --streaming")
    if data.streaming and data.eval_dataset is None and data.has_validation:
        raise UserError(
            "--streaming needs --eval_dataset: nothing can be held out of a stream of unknown length; without"
            " validation give --validation_split_percentage 0"
        )
    if run.answer_pattern is not None and run.max_generate_records == 0:
        raise UserError("--answer_pattern with --max_generate_records 0: no answer is generated; drop one of them")
    _check_evaluation(config)
    if data.packing and data.group_by_length:
        raise UserError("--packing and --group_by_length exclude each other; packed rows are all equally long")
    if config.adapter.adapter_name_or_path is not None and config.adapter.modules_to_save:
        raise UserError(
            "--adapter_name_or_path with --modules_to_save: modules trained whole cannot start from a folder; drop one"
        )
    if config.model.partition_activations and config.model.activation_checkpointing != "full":
        raise UserError(
            f"--partition_activations with --activation_checkpointing {config.model.activation_checkpointing}: it"
            " divides the layers' inputs, which is what full keeps; set --activation_checkpointing full"
        )
    if run.overwrite_output_dir and run.resume_from_checkpoint:
        raise UserError("--overwrite_output_dir deletes what --resume_from_checkpoint would read; give one of them")
