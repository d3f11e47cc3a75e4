"""The typed settings of a run: every flag, its unit and its default.

A flag can stand on the command line or in the YAML file given with ``--config``; the command line wins.
`comol_ds.config_parser` reads them, `comol_ds.config_checks` refuses values that no run can use; no torch here.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

# The five projections of the paper's Qwen recipe (arXiv 2603.00573), adapted where nothing else is said.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


def option(default: Any, help: str, **argparse_options: Any) -> Any:
    """A dataclass field with what argparse needs to know of it; mutable defaults are copied per instance."""
    metadata = {"help": help, **argparse_options}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelSettings:
    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "Model folder or hub name. None: the embedded default.")
    tokenizer_name: str | None = option(None, "Folder or hub name of the tokenizer. None: the model's.")
    trust_remote_code: bool = option(
        False, "Run the Python code that model and tokenizer bring along. Without it, such a model is refused."
    )
    init_random: bool = option(
        False, "Draw the base's weights instead of reading them: --model_name_or_path needs a config.json only."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = option("sdpa", "Attention kernel.")
    bf16: bool | None = option(
        None, "Compute and store the frozen base in bfloat16 (true|false). None: true on a GPU that has it."
    )
    activation_checkpointing: str = option(
        "none",
        "full: keep only each decoder layer's input and recompute the rest in backward. selective:N: so for every N-th"
        " layer. none: keep all.",
    )
    activation_offload: Literal["none", "cpu"] = option(
        "none",
        "cpu: what the decoder layers keep for backward waits in host memory: their inputs with"
        " --activation_checkpointing full, all they save with none.",
    )
    partition_activations: bool = option(
        False,
        "Each tensor-parallel rank keeps its part of the layers' inputs only; needs --activation_checkpointing full.",
    )

    @property
    def tokenizer_path(self) -> str | None:
        """Where the tokenizer is read from."""
        return self.tokenizer_name or self.model_name_or_path

    @property
    def checkpointed_every(self) -> int:
        """Every how many decoder layers one is checkpointed: 0 for none, 1 for full, N for selective:N."""
        mode, _, interval = self.activation_checkpointing.partition(":")
        return int(interval) if mode == "selective" else {"none": 0, "full": 1}[mode]


@dataclass
class AdapterSettings:
    _argument_group_name: ClassVar[str] = "adapter"

    r: int = option(16, "Rank of the shared pair (A, B) and side of every core.")
    lora_alpha: int = option(16, "The update is scaled by lora_alpha / r.")
    lora_dropout: float = option(0.0, "Dropout probability on the adapter's input, in [0, 1).")
    num_experts: int = option(8, "Number of r x r core experts per adapted Linear.")
    router: Literal["core", "input"] = option("core", "Route on the r-dimensional h, or on the layer's input.")
    core_init: Literal["paper", "orthogonal", "identity"] = option("paper", "Initial cores.")
    dropout_scheme: Literal["input", "paper"] = option(
        "input", "Dropout on the input only, or in the paper's three places (slower: one r x r core per token)."
    )
    target_modules: list[str] | None = option(
        None,
        "Names of the Linear modules to adapt, each of which must exist, or all-linear: of the text model, unless a"
        " whole name or one regular expression says so. None: what the text model has of"
        f" {', '.join(DEFAULT_TARGETS)}.",
    )
    modules_to_save: list[str] | None = option(None, "Further modules trained whole and saved with the adapter.")
    adapter_name_or_path: str | None = option(
        None, "Adapter folder whose values the training starts from. None: fresh values drawn from --seed."
    )


@dataclass
class RouterSettings:
    _argument_group_name: ClassVar[str] = "router"

    router_load: bool = option(True, "Count router statistics and write router_load.jsonl (true|false).")
    router_load_steps: int | None = option(
        None, "Optimizer steps between lines of router_load.jsonl. None: --logging_steps."
    )
    router_tokens: Literal["all", "completion"] = option(
        "all", "Tokens that count in router statistics and losses: all but padding, or the completions' only."
    )
    router_alarm_steps: int = option(
        5, "Say so when an expert is dead, or routing collapsed, in this many lines of router_load.jsonl running."
    )
    router_aux_loss_coef: float = option(
        0.0, "Coefficient of the load balance loss, a mean over valid tokens and layers; it keeps experts equally used."
    )
    router_z_loss_coef: float = option(
        0.0, "Coefficient of the router z-loss, a mean over valid tokens and layers; it keeps router logits small."
    )
    core_diversity_loss_coef: float = option(
        0.0, "Coefficient of the core diversity loss, a sum over layers; it keeps cores apart. The authors use 1e-3."
    )


@dataclass
class DataSettings:
    _argument_group_name: ClassVar[str] = "data"

    dataset: list[str] | None = option(
        None,
        "Training data: .json, .jsonl or .parquet files, folders of them, or hub names (name or name:config)."
        " None: the embedded default.",
    )
    dataset_weights: list[float] | None = option(None, "Mixing weight per data set. None: concatenate.")
    dataset_format: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "question_answer", "text"
    ] = option("auto", "How a record is written; auto looks at the columns.")
    columns: str | None = option(
        None,
        "Other names of columns, such as prompt=question,completion=answer; NAME= leaves the column NAME out.",
    )
    prompt_template: str | None = option(
        None,
        "How prompts are written: chat (the tokenizer's chat template), alpaca, none (the columns as they are), or a"
        " chat template's file in Jinja. None: chat where the tokenizer has one; else alpaca for instructions and"
        " questions, none for prompts.",
    )
    dataset_split: str = option("train", "Split to read of a hub data set.")
    eval_dataset: list[str] | None = option(None, "Validation data. None: held out of --dataset.")
    validation_split_percentage: float = option(
        5.0, "Percent of the records held out when --eval_dataset is absent; 0: no validation."
    )
    max_train_records: int | None = option(None, "Use at most this many training records.")
    max_eval_records: int | None = option(1000, "Use at most this many validation records.")
    max_length: int = option(1024, "Longest sequence, in tokens.")
    packing: bool = option(False, "Pack short records into rows of max_length tokens, no attention across records.")
    group_by_length: bool = option(False, "Build batches of records of similar length.")
    train_on_prompt: bool = option(False, "Count the prompt's tokens in the loss too.")
    max_dropped_fraction: float = option(0.05, "Largest share of records without any label before the run refuses.")
    streaming: bool = option(False, "Read and tokenize on the fly; needs --max_steps.")
    preprocessing_num_workers: int | None = option(None, "Processes that tokenize. None: one.")
    overwrite_cache: bool = option(False, "Tokenize again even if a cached result exists.")

    @property
    def has_validation(self) -> bool:
        """Whether there are records to evaluate."""
        return bool(self.eval_dataset) or self.validation_split_percentage > 0


@dataclass
class OptimizerSettings:
    _argument_group_name: ClassVar[str] = "optimization"

    learning_rate: float = option(1e-4, "Peak learning rate.")
    optim: Literal["adamw_torch", "sgd"] = option("adamw_torch", "Optimizer.")
    adam_beta1: float = option(0.9, "AdamW's first decay.")
    adam_beta2: float = option(0.999, "AdamW's second decay.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    sgd_momentum: float = option(0.9, "Momentum of sgd.")
    weight_decay: float = option(0.0, "Decoupled weight decay.")
    max_grad_norm: float = option(1.0, "Clip the global gradient norm at this value; 0 does not clip.")
    lr_scheduler_type: str = option("constant_with_warmup", "A schedule of transformers.get_scheduler.")
    warmup_steps: int = option(0, "Optimizer steps of linear warm-up.")
    num_train_epochs: float = option(3.0, "Passes over the training data, if --max_steps is not given.")
    max_steps: int = option(-1, "Optimizer steps; overrides --num_train_epochs when positive.")
    per_device_train_batch_size: int = option(8, "Records per rank and forward pass.")
    per_device_eval_batch_size: int = option(8, "The same, in evaluation and generation.")
    global_batch_size: int | None = option(
        None, "Records per optimizer step over all ranks; accumulation follows. None: one micro-batch per rank."
    )


@dataclass
class ParallelSettings:
    _argument_group_name: ClassVar[str] = "parallelism"

    tensor_parallel_size: int | None = option(
        None, "Ranks that share one copy of the model. None: tensor_parallel.autotp_size of the JSON, else 1."
    )
    tp_plan: str | None = option(
        None,
        "JSON file, module name pattern -> colwise or rowwise, in place of the model's own tensor-parallel plan,"
        " for models that have none.",
    )
    allow_cross_node_tp: bool = option(False, "Allow tensor-parallel ranks on different nodes, over slower links.")
    consistency_check_steps: int = option(
        100,
        "Optimizer steps between checks that tensor-parallel ranks see the same batch and hold the same replicated"
        " adapter parameters; the first step is always checked.",
    )


@dataclass
class RunSettings:
    _argument_group_name: ClassVar[str] = "run"

    ds_config: str | None = option(None, "DeepSpeed JSON, for example ds_configs/zero3.json. Required.")
    config: str | None = option(None, "YAML file of flags; a flag on the command line beats it.")
    output_dir: str = option("out", "Run folder: metrics, checkpoints, the final adapter.")
    overwrite_output_dir: bool = option(False, "Delete an earlier run found in --output_dir.")
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint folder to continue from; without a value: the latest committed one.",
        nargs="?",
        const="latest",
    )
    seed: int = option(42, "Seed of initial weights, data order and dropout.")
    logging_steps: int = option(10, "Optimizer steps between log lines.")
    eval_steps: int | None = option(None, "Optimizer steps between evaluations. None: only at the end.")
    eval_on_start: bool = option(False, "Evaluate before the first step too, and print both side by side.")
    max_generate_records: int = option(
        32, "Records of the evaluation answered by greedy generation, for exact match; 0: none."
    )
    max_new_tokens: int = option(64, "Longest generated answer, in tokens.")
    answer_pattern: str | None = option(
        None,
        "Regular expression: exact match compares what its last match finds (its first group, if it has one) in answer"
        " and reference, numbers as numbers. None: the whole texts.",
    )
    save_steps: int = option(500, "Optimizer steps between checkpoints; one is always saved at the end.")
    save_total_limit: int | None = option(None, "Keep at most this many checkpoints. None: all.")
    report_to: list[str] = option(("tensorboard",), "Where to plot: tensorboard, wandb, none.")
    max_hours: float | None = option(
        None, "Save and stop, with exit code 75, at the end of the step in which this time is over. None: no limit."
    )
    stop_margin_minutes: float = option(
        5.0,
        "Do so this long before the SLURM job ends (SLURM_JOB_END_TIME), and earlier by the longest step and save so"
        " far.",
    )
    collective_timeout_minutes: float = option(30.0, "Longest wait for another rank.")
    dry_run: bool = option(False, "Print the resolved run and one tokenized example, then exit.")
    local_rank: int = option(-1, "Set by the DeepSpeed launcher.")


GROUPS = (
    ModelSettings,
    AdapterSettings,
    RouterSettings,
    DataSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
)


@dataclass
class RunConfig:
    """All settings of one run, by group."""

    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def flat(self) -> dict[str, Any]:
        """Flag name -> value over all groups, without the two that say where the others come from."""
        values = {name: value for group in asdict(self).values() for name, value in group.items()}
        del values["config"], values["local_rank"]
        return values
