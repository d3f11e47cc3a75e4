"""Everything about a run that can be decided, and refused, before a rank waits for another or weights are read."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from comol_ds.config import RunConfig
from comol_ds.ds_config import load_ds_json, resolve_ds_config, zero_stage
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout, plan_batches
from comol_ds.parallel.assemble import attach_adapter
from comol_ds.parallel.device import prefers_bf16, supports_bf16
from comol_ds.parallel.groups import World
from comol_ds.parallel.zero_partition import count_parameters
from comol_ds.training.checkpoint import RunIdentity, find_checkpoint, read_step
from comol_ds.training.run_folder import RunFolder


@dataclass(frozen=True)
class RunPlan:
    """The resolved run of one rank."""

    config: RunConfig
    world: World
    batches: BatchLayout
    ds_config: dict[str, Any]
    bf16: bool
    folder: RunFolder
    checkpoint: Path | None
    passed_over: list[str]
    start_step: int
    trainable_parameters: int
    all_parameters: int
    identity: RunIdentity


def plan_run(config: RunConfig, world: World) -> RunPlan:
    """Resolve and check the whole configuration. Reads files, writes nothing, waits for nobody.

    Args:
        config: settings with model_name_or_path and dataset filled in.

    Raises:
        UserError: the first thing that no run can use.
    """
    batches = plan_batches(world.size, config.optimizer.per_device_train_batch_size, config.optimizer.global_batch_size)
    bf16 = decide_bf16(config.model.bf16)
    config = replace(
        config,
        model=replace(config.model, bf16=bf16),
        optimizer=replace(config.optimizer, global_batch_size=batches.global_batch),
    )
    ds_config = resolve_ds_config(load_ds_json(config.run.ds_config), config, batches, bf16)
    trainable, everything = preview_parameters(config)
    identity = RunIdentity(
        world_size=world.size,
        zero_stage=zero_stage(ds_config),
        bf16=bf16,
        global_batch=batches.global_batch,
        micro_batch=batches.micro_batch,
        seed=config.run.seed,
        optim=config.optimizer.optim,
        model=config.model.model_name_or_path,
        data=" ".join(config.data.dataset),
        adapter=asdict(config.adapter),
    )
    folder = RunFolder(config.run.output_dir)
    checkpoint, passed_over = None, []
    if config.run.resume_from_checkpoint:
        checkpoint, passed_over = find_checkpoint(config.run.resume_from_checkpoint, folder.checkpoints)
    elif not config.run.dry_run:
        folder.check_free(config.run.overwrite_output_dir)
    start_step = read_step(checkpoint, identity) if checkpoint else 0
    return RunPlan(
        config,
        world,
        batches,
        ds_config,
        bf16,
        folder,
        checkpoint,
        passed_over,
        start_step,
        trainable,
        everything,
        identity,
    )


def decide_bf16(asked: bool | None) -> bool:
    """The compute precision: what was asked for, else bfloat16 on accelerators that have it.

    Raises:
        UserError: bfloat16 was asked for and the device has none.
    """
    if asked and not supports_bf16():
        raise UserError("--bf16 true: this device does not compute in bfloat16; use --bf16 false")
    return prefers_bf16() if asked is None else asked


def preview_parameters(config: RunConfig) -> tuple[int, int]:
    """(trainable, all) parameters of the adapted model, from its configuration alone, on the meta device.

    Raises:
        UserError: no such model, or target modules that match nothing in it.
    """
    path = config.model.model_name_or_path
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise UserError(f"--model_name_or_path {path}: no such folder")
    try:
        model_config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--model_name_or_path {path} cannot be read: {reason}") from error
    with torch.device("meta"):
        adapted = attach_adapter(model, config.adapter, config.run.seed, bf16=False)
    return count_parameters(adapted)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        UserError: missing or unreadable tokenizer files, or no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"tokenizer of --model_name_or_path {path} cannot be loaded: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no eos_token; set one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding carries label -100 and attention 0, never a loss
    return tokenizer
