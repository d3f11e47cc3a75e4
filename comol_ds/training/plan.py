"""Everything about a run that can be decided, and refused, before a rank waits for another or weights are read."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from comol_ds.adapters.targets import missing_defaults
from comol_ds.base_config import build_base, read_generation_config, told
from comol_ds.config import ModelSettings, OptimizerSettings, RunConfig
from comol_ds.ds_config import load_ds_json
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout, RankGrid
from comol_ds.parallel.activations import check_activations
from comol_ds.parallel.adapter_check import check_adapters_work
from comol_ds.parallel.assemble import attach_adapter, build_schedule, read_training_config
from comol_ds.parallel.device import prefers_bf16, supports_bf16
from comol_ds.parallel.groups import World
from comol_ds.parallel.run_layout import resolve_layout
from comol_ds.parallel.start_adapter import check_start_adapter
from comol_ds.parallel.tp_plan import check_placement, place_linears
from comol_ds.parallel.tp_proof import prove_placement
from comol_ds.parallel.zero_config import check_quantized
from comol_ds.parallel.zero_partition import count_parameters
from comol_ds.training.base_checks import check_positions, check_tokenizer
from comol_ds.training.identity import RunIdentity, identify
from comol_ds.training.packing_check import check_packing
from comol_ds.training.resume import Resume, plan_resume
from comol_ds.training.run_folder import RunFolder


@dataclass(frozen=True)
class RunPlan:
    """The resolved run of one rank; precision, batch sizes and tensor-parallel size are decided in ``config``.

    Attributes:
        embedding_rows: where tokens of the data may lie beyond them, else None.
        position_table: number of positions that the base looks up, where rows or answers may need more, else None.
        notes: what is to be said of the base.
    """

    config: RunConfig
    world: World
    grid: RankGrid
    batches: BatchLayout
    ds_config: dict[str, Any]
    folder: RunFolder
    resume: Resume | None
    passed_over: list[str]
    trainable_parameters: int
    all_parameters: int
    identity: RunIdentity
    embedding_rows: int | None
    position_table: int | None
    notes: list[str]

    @property
    def start_step(self) -> int:
        """Optimizer steps that are done before this run starts."""
        return 0 if self.resume is None else self.resume.step


def plan_run(config: RunConfig, world: World) -> RunPlan:
    """Resolve and check the whole configuration. Reads files, writes nothing, waits for nobody.

    Args:
        config: settings with model_name_or_path and dataset filled in.

    Raises:
        UserError: the first thing that no run can use.
    """
    config = replace(config, model=replace(config.model, bf16=decide_bf16(config.model.bf16)))
    layout = resolve_layout(config, load_ds_json(config.run.ds_config), world)
    config, grid, ds_config = layout.config, layout.grid, layout.ds_config
    folder = RunFolder(config.run.output_dir)
    check_inputs(config, folder)
    check_quantized(ds_config)
    check_schedule(config.optimizer)
    check_report_to(config.run.report_to)
    check_attention(config.model)
    model = preview_model(config.model)
    check_tensor_parallel(model, config)
    check_packing(model.config, config)
    positions = check_positions(model.config, config)
    notes = [positions.note]
    if config.adapter.target_modules is None:
        notes.append(missing_defaults(model))
    tokenizer = load_tokenizer(config.model.tokenizer_path, config.model.trust_remote_code)
    embedding_rows = check_tokenizer(model, tokenizer, config)
    check_activations(model, config.model, grid.tensor_parallel)
    adapted = preview_adapter(model, config)
    notes.append(check_adapters_work(adapted, config.adapter, config.model.attn_implementation))
    notes.append(beside_text_note(adapted))
    trainable, everything = count_parameters(adapted)
    identity = identify(config, world, ds_config)
    folder.check_writable()
    resume, passed_over = None, []
    if config.run.resume_from_checkpoint:
        resume, passed_over = plan_resume(config.run.resume_from_checkpoint, folder, identity)
    else:
        folder.check_free(config.run.overwrite_output_dir)
    return RunPlan(
        config,
        world,
        grid,
        layout.batches,
        ds_config,
        folder,
        resume,
        passed_over,
        trainable,
        everything,
        identity,
        embedding_rows,
        positions.table,
        [note for note in notes if note is not None],
    )


def check_inputs(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a run folder in which the run would overwrite what it reads, or read what it writes.

    Raises:
        UserError: see `RunFolder.check_inputs`; or a folder of data is the run folder, whose logs look like records.
    """
    folder.check_inputs(inputs_of(config), bool(config.run.resume_from_checkpoint))
    for data in (*(config.data.dataset or ()), *(config.data.eval_dataset or ())):
        if Path(data).expanduser().resolve() == folder.path.resolve():
            raise UserError(
                f"--output_dir {folder.path} is a folder of data, where the run's logs would be read as records; choose"
                f" another folder, {folder.path / 'out'} for example"
            )


def inputs_of(config: RunConfig) -> list[str]:
    """Every file, folder or hub name that the run reads, but the checkpoint that it continues."""
    model, data, run = config.model, config.data, config.run
    named = [model.model_name_or_path, model.tokenizer_path, config.adapter.adapter_name_or_path]
    named += [config.parallel.tp_plan, run.config, run.ds_config]
    return [path for path in (*named, *(data.dataset or ()), *(data.eval_dataset or ())) if path is not None]


def decide_bf16(asked: bool | None) -> bool:
    """The compute precision: what was asked for, else bfloat16 on accelerators that have it.

    Raises:
        UserError: bfloat16 was asked for and the device has none.
    """
    if asked and not supports_bf16():
        raise UserError("--bf16 true: this device does not compute in bfloat16; use --bf16 false")
    return prefers_bf16() if asked is None else asked


def check_schedule(settings: OptimizerSettings) -> None:
    """Refuse a learning-rate schedule that cannot run, before the model is loaded.

    Raises:
        UserError: unknown name, one that needs further arguments, or one that follows a metric instead of the step.
    """
    schedule = build_schedule(torch.optim.SGD([torch.zeros(1)]), settings, total_steps=max(1, settings.max_steps))
    if not isinstance(schedule, LambdaLR):  # DeepSpeed's engine would step it with the batch size as its metric
        raise UserError(
            f"--lr_scheduler_type {settings.lr_scheduler_type} follows a metric, not the step; try linear or cosine"
        )


def check_attention(settings: ModelSettings) -> None:
    """Refuse an attention kernel that does not compute in the run's precision; it would say so in the first step.

    Raises:
        UserError: FlashAttention in float32.
    """
    if settings.attn_implementation == "flash_attention_2" and not settings.bf16:
        raise UserError(
            "--attn_implementation flash_attention_2 computes in bfloat16, this run in float32; use --bf16 true, or"
            " --attn_implementation sdpa"
        )


def check_report_to(report_to: list[str]) -> None:
    """Refuse a plotting service whose package is missing; rank 0 alone would find out, late.

    Raises:
        UserError: wandb was asked for and is not installed.
    """
    if "wandb" in report_to and find_spec("wandb") is None:
        raise UserError(f"--report_to {' '.join(report_to)}: wandb is not installed; pip install 'comol_ds[wandb]'")


def preview_model(settings: ModelSettings) -> PreTrainedModel:
    """The model without its weights, from its configuration alone, on the meta device.

    Raises:
        UserError: no such model, or one that cannot be built, trained or attend as the settings say.
    """
    path = settings.model_name_or_path
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).exists():
        raise UserError(f"--model_name_or_path {path}: no such folder; check the path")
    model_config = read_training_config(path, settings.trust_remote_code)
    where = f"--model_name_or_path {path}"
    read_generation_config(path, where)
    with torch.device("meta"):
        return build_base(model_config, settings.trust_remote_code, where, settings.attn_implementation)


def check_tensor_parallel(model: PreTrainedModel, config: RunConfig) -> None:
    """Refuse a model that the run's tensor parallelism cannot split; a plan file is read even where nothing is split.

    Raises:
        UserError: see `place_linears`, `check_placement` and `prove_placement`.
    """
    tensor_parallel = config.parallel.tensor_parallel_size
    if tensor_parallel > 1 or config.parallel.tp_plan is not None:
        placement = place_linears(model, config.parallel.tp_plan)
        if tensor_parallel > 1:
            check_placement(model, placement, tensor_parallel, config.adapter)
            attention = config.model.attn_implementation
            prove_placement(model, placement, tensor_parallel, attention, config.parallel.tp_plan)


def preview_adapter(model: PreTrainedModel, config: RunConfig) -> PeftModel:
    """The model with its adapter, which is attached here, as training would have it.

    Raises:
        UserError: target modules or modules to save that match nothing in the model, an adapter to start from that
            does not fit.
    """
    with torch.device("meta"):
        adapted = attach_adapter(model, config.adapter, config.run.seed)
    if config.adapter.adapter_name_or_path is not None:
        check_start_adapter(adapted, config.adapter)
    return adapted


def beside_text_note(adapted: PeftModel) -> str | None:
    """What is to be said where modules match the targets that no token passes through."""
    left = adapted.base_model.left_beside_text
    if not left:
        return None
    return (
        f"note: {len(left)} modules beside the text model match --target_modules and get no adapter, because no token"
        f" passes through them; the first is {left[0]}"
    )


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or under a hub name, with a padding token.

    Args:
        trust_remote_code: whether code that lies beside it may run.

    Raises:
        UserError: missing or unreadable tokenizer files, or no end-of-sequence token.
    """
    remedy = "copy its files (tokenizer.json or tokenizer.model, tokenizer_config.json) there"
    with told(f"the tokenizer of {path}", remedy):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no eos_token; set one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding carries label -100 and attention 0, never a loss
    return tokenizer
