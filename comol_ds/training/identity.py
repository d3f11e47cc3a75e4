"""What makes a run the run that a checkpoint comes from, and what it may change when it continues.

Every setting of `comol_ds.config` stands in one of four lists. Where the content of a file can change under its name,
the content is compared, by a stamp: of the records, and of the base's weights.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from comol_ds.config import DEFAULT_TARGETS, RunConfig
from comol_ds.ds_config import zero_stage
from comol_ds.errors import UserError
from comol_ds.parallel.groups import World
from comol_ds.parallel.weight_files import WeightFiles
from comol_ds.text_files import read_json_settings

# With another value what was trained so far would be another run's: refused.
SAME_RUN = (
    "model_name_or_path", "tokenizer_name", "init_random", "bf16",
    "r", "lora_alpha", "lora_dropout", "num_experts", "router", "core_init", "dropout_scheme", "target_modules",
    "modules_to_save", "adapter_name_or_path",
    "router_tokens", "router_aux_loss_coef", "router_z_loss_coef", "core_diversity_loss_coef",
    "dataset", "dataset_weights", "dataset_format", "columns", "prompt_template", "dataset_split", "eval_dataset",
    "validation_split_percentage", "max_train_records", "max_length", "packing", "group_by_length", "train_on_prompt",
    "streaming",
    "optim", "global_batch_size", "seed",
)  # fmt: skip
# How the same run lies on its ranks: another value takes the route over the canonical state.
LAYOUT = ("per_device_train_batch_size", "tensor_parallel_size", "tp_plan")
# Another value takes effect from the checkpoint on, and the run says so.
FROM_HERE_ON = (
    "attn_implementation", "activation_checkpointing", "activation_offload", "partition_activations",
    "router_load", "router_load_steps", "router_alarm_steps",
    "max_eval_records", "max_dropped_fraction",
    "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "sgd_momentum", "weight_decay", "max_grad_norm",
    "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "per_device_eval_batch_size",
    "consistency_check_steps",
    "logging_steps", "eval_steps", "max_generate_records", "max_new_tokens", "answer_pattern", "save_steps",
    "save_total_limit", "report_to",
)  # fmt: skip
# Where one start finds and writes what, and for how long: nothing of the run itself.
OF_ONE_START = (
    "trust_remote_code", "preprocessing_num_workers", "overwrite_cache", "allow_cross_node_tp",
    "ds_config", "config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "eval_on_start", "max_hours",
    "stop_margin_minutes", "collective_timeout_minutes", "dry_run", "local_rank",
)  # fmt: skip

# Of the DeepSpeed JSON, what the settings and the world say already.
_DS_KEYS_OF_THE_RUN = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "zero_allow_untested_optimizer",
)  # fmt: skip
_STAMPED_BYTES = 2**16  # of the end of every weight file: training changes every tensor, and a file may have 50 GB


@dataclass(frozen=True)
class Difference:
    """How a run that may continue a checkpoint differs from the one that wrote it, as "zero_stage 3 -> 2".

    Attributes:
        moved: of the layout; empty if this run can be bit-equal to the one before.
        changed: settings whose new value counts from the checkpoint on.
        unknown: what the checkpoint does not say, so that nobody can tell whether it is the same.
    """

    moved: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunIdentity:
    """What two runs must have in common for one to continue the other, and what may differ.

    ``data_content`` and ``base_weights`` are None until the data are prepared and the base's files located.
    """

    world_size: int
    tensor_parallel: int
    zero_stage: int
    bf16: bool
    global_batch: int
    micro_batch: int
    seed: int
    optim: str
    model: str
    adapter: dict[str, Any]
    data: dict[str, Any]
    router_losses: dict[str, Any] = field(default_factory=dict)
    tp_plan: str | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    data_content: dict[str, str] | None = None
    base_weights: str | None = None

    LAYOUT: ClassVar[tuple[str, ...]] = ("world_size", "tensor_parallel", "zero_stage", "micro_batch", "tp_plan")
    LATER: ClassVar[tuple[str, ...]] = ("data_content", "base_weights")

    def compare(self, found: dict[str, Any], where: Path) -> Difference:
        """Compare with the identity stored in a checkpoint.

        Raises:
            UserError: naming the first setting that differs and may not, and both values.
        """
        difference = Difference()
        for name, theirs, mine in self._pairs(found, difference.unknown):
            if theirs == mine:
                continue
            if name.startswith("deepspeed.zero_optimization."):
                # another stage has another block, which needs no words
                difference.moved.extend([f"{name} {theirs} -> {mine}"] * (found.get("zero_stage") == self.zero_stage))
            elif name in self.LAYOUT:
                difference.moved.append(f"{name} {theirs} -> {mine}")
            elif name.startswith(("settings.", "deepspeed.")):
                difference.changed.append(f"{name.removeprefix('settings.')} {theirs} -> {mine}")
            else:
                remedy = "resume with the same setting"
                if name.startswith("data_content.") or name == "base_weights":
                    remedy = "the content has changed under the same name: restore it"
                raise UserError(
                    f"checkpoint {where} was written with {name} = {theirs!s:.200}, this run has {mine!s:.200};"
                    f" {remedy} or choose another --output_dir"
                )
        return difference

    def _pairs(self, found: dict[str, Any], unknown: list[str]) -> Iterator[tuple[str, Any, Any]]:
        """(name, stored value, this run's value) of what both say; names of the rest go to ``unknown``."""
        for name, mine in asdict(self).items():
            if name in self.LATER and mine is None:
                continue
            if name not in found or (name in self.LATER and found[name] is None):
                unknown.append(name)
            elif not isinstance(mine, dict):
                yield name, found[name], mine
            else:
                theirs, mine = _flatten(found[name]), _flatten(mine)
                is_open = name in ("deepspeed", "data_content")  # a key that is absent has a meaning there
                for key in mine | theirs if is_open else mine:
                    if key in theirs or is_open:
                        yield f"{name}.{key}", theirs.get(key), mine.get(key)
                    else:
                        unknown.append(f"{name}.{key}")


def identify(config: RunConfig, world: World, ds_config: dict[str, Any]) -> RunIdentity:
    """The identity of a run; ``config`` is resolved."""
    router, data = asdict(config.router), asdict(config.data) | {"tokenizer_name": config.model.tokenizer_name}
    zero = {key: value for key, value in ds_config["zero_optimization"].items() if key != "stage"}
    others = {key: value for key, value in ds_config.items() if key not in _DS_KEYS_OF_THE_RUN}
    return RunIdentity(
        world_size=world.size,
        tensor_parallel=config.parallel.tensor_parallel_size,
        zero_stage=zero_stage(ds_config),
        bf16=config.model.bf16,
        global_batch=config.optimizer.global_batch_size,
        micro_batch=config.optimizer.per_device_train_batch_size,
        seed=config.run.seed,
        optim=config.optimizer.optim,
        model=f"{config.model.model_name_or_path}{', random weights' if config.model.init_random else ''}",
        adapter=asdict(config.adapter) | {"target_modules": config.adapter.target_modules or list(DEFAULT_TARGETS)},
        data={name: value for name, value in data.items() if name in SAME_RUN},
        router_losses={name: value for name, value in router.items() if name in SAME_RUN},
        tp_plan=_stamp_of_plan(config.parallel.tp_plan),
        deepspeed=others | {"zero_optimization": zero},
        settings={name: value for name, value in config.flat().items() if name in FROM_HERE_ON},
    )


def _stamp_of_plan(plan_file: str | None) -> str | None:
    """The name and a checksum of a plan file: its content decides which rank holds which slice."""
    if plan_file is None:
        return None
    styles = read_json_settings(plan_file, "--tp_plan", "check the path")
    checksum = hashlib.blake2b(json.dumps(styles, sort_keys=True).encode(), digest_size=8)
    return f"{Path(plan_file).name} {checksum.hexdigest()}"


def stamp_of_weights(model_path: str) -> str:
    """What changes with the base's weights and configuration: total bytes, and a checksum of the end of every file.

    Raises:
        UserError: see `WeightFiles`.
    """
    weights = WeightFiles(model_path)
    total, checksum = 0, hashlib.blake2b(digest_size=8)
    for path in [*weights.files, *weights.path.parent.glob("config.json")]:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _STAMPED_BYTES))
            checksum.update(f"{path.name} {size} ".encode() + file.read())
        total += size
    return f"{total} bytes, {checksum.hexdigest()}"


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
