"""Private names of DeepSpeed, PEFT, transformers and torch: each exists, and is what our code takes it for.

An upgrade that moves one would otherwise show as a crash after the weights are loaded, or as nothing but other numbers.
Names that only instances have are looked for in the source of what sets or reads them.
"""

import ast
import importlib.metadata
from collections.abc import Callable
from types import BuiltinFunctionType, ModuleType

import pytest
from torch import nn
from transformers import LlamaConfig

import comol_ds  # noqa: F401 - adds to PEFT's enum
from tests.adapters.require_triton import require_triton
from tests.upstream import probes
from tests.upstream.checks import (
    Row,
    a,
    abstract,
    assigned,
    called,
    entry,
    equal,
    holding,
    parameter,
    read,
    subclass_of,
    taking,
    that,
)
from tests.upstream.private_uses import files_with, private_uses, resolve, uses_of

INIT = "deepspeed.zero.Init"
CONVERT = f"{INIT}._convert_to_deepspeed_param"
ENGINE = "deepspeed.DeepSpeedEngine"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
LINKAGE = "deepspeed.utils.mixed_precision_linkage"
WRITER = "deepspeed.runtime.checkpoint_engine.checkpoint_engine"
TUNER = "peft.tuners.tuners_utils.BaseTuner"
LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
ENUM = "peft.utils.PeftType"
MODEL = "transformers.PreTrainedModel"
LOADING = "transformers.core_model_loading"
MAPPING = "transformers.conversion_mapping"

DEEPSPEED = (
    Row(INIT, "_convert_to_deepspeed_param", called(2)),
    *(
        Row(CONVERT, name, assigned)
        for name in (
            "ds_shape", "ds_numel", "ds_tensor", "ds_secondary_tensor", "ds_process_group",
            "ds_zero_param_process_group", "partition",
        )
    ),
    # ignored, it would leave replicated weights on the wrong ranks without a word
    Row(CONVERT, "ds_zero_partition_process_group", read),
    Row("deepspeed.utils", "lazy_init_hp_params_optimizer_state", called(3)),
    Row("deepspeed.utils", "safe_get_full_fp32_param", called(1)),
    Row("deepspeed.utils", "safe_get_full_optimizer_state", called(2)),
    Row("deepspeed.utils", "safe_get_local_grad", called(1)),
    Row("deepspeed.utils", "safe_set_full_fp32_param", called(2)),
    Row("deepspeed.utils", "safe_set_full_optimizer_state", called(3)),
    Row("deepspeed.utils", "safe_set_local_fp32_param", called(2)),
    Row("deepspeed.utils", "safe_set_local_grad", called(2)),
    Row("deepspeed.utils", "safe_set_local_optimizer_state", called(3)),
    Row("deepspeed.utils", "set_z3_leaf_modules", called(2)),
    Row(LINKAGE, "_hp_mapping", assigned),
    Row(LINKAGE, "_index_in_param_group", assigned),
    Row("deepspeed.utils.tensor_fragment.tensor_fragment", "get_lp_grad_fragment", called(2)),
    Row(STAGE_3, "fp32_partitioned_groups_flat", assigned),
    Row(STAGE_3, "fp16_groups", assigned),
    Row(STAGE_3, "checkpoint_event_prologue", called(1)),
    Row(STAGE_3, "checkpoint_event_epilogue", called(1)),
    Row(STAGE_1_2, "single_partition_of_fp32_groups", assigned),
    Row(STAGE_1_2, "bit16_groups", assigned),
    *(
        Row(ENGINE, name, assigned)
        for name in ("basic_optimizer", "checkpoint_engine", "global_steps", "global_samples", "micro_steps")
    ),
    Row(ENGINE, "_copy_recovery_script", called(2)),
    Row(ENGINE, "save_checkpoint", called(2, "tag", "save_latest", "exclude_frozen_parameters")),
    Row(ENGINE, "load_checkpoint", called(2, "tag", "load_module_strict")),
    Row(ENGINE, "get_global_grad_norm", called(1)),
    Row("deepspeed.runtime.utils.is_model_parallel_parameter", "tensor_model_parallel", read),
    Row(WRITER, "CheckpointCommitInfo", a(type)),
    Row(WRITER, "CheckpointEngine", abstract("create", "save", "load", "commit")),
    Row(f"{WRITER}.CheckpointEngine", "create", taking("self", "info")),
    Row(f"{WRITER}.CheckpointEngine", "makedirs", taking("self", "path", "exist_ok")),
    Row(f"{WRITER}.CheckpointEngine", "save", taking("self", "state_dict", "path")),
    Row(f"{WRITER}.CheckpointEngine", "load", taking("self", "path", "map_location")),
    Row(f"{WRITER}.CheckpointEngine", "commit", taking("self", "info")),
    Row("deepspeed.checkpoint.utils", "clone_tensors_for_torch_save", called(2)),
    Row("deepspeed.runtime.zero.linear", "zero3_linear_wrap", called(3)),
    Row("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", a(type)),
    *(
        Row("deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields", name, entry)
        for name in (
            "memory_efficient_linear", "param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters",
            "max_reuse_distance", "reduce_bucket_size", "contiguous_gradients", "overlap_comm",
            "zero_hpz_partition_size",
        )
    ),
    Row("deepspeed.module_inject.tp_plan_converter", "TPPlanConverter", that(probes.converts_plans)),
    Row("deepspeed.module_inject.autotp_config", "PartitionType", that(probes.converts_plans)),
    Row("deepspeed.monitor.config", "get_monitor_config", called(1)),
    Row("deepspeed.monitor.monitor", "MonitorMaster", called(1)),
    Row("deepspeed.monitor.monitor.MonitorMaster", "tb_monitor", assigned),
    Row("deepspeed.monitor.monitor.MonitorMaster", "wandb_monitor", assigned),
    Row("deepspeed.monitor.monitor.MonitorMaster", "write_events", called(2)),
    Row("deepspeed.monitor.tensorboard.TensorBoardMonitor", "summary_writer", assigned),
    Row("deepspeed.monitor.wandb.WandbMonitor", "log", called(2, "step")),
    Row("deepspeed.accelerator", "get_accelerator", called(0)),
)  # fmt: skip

PEFT = (
    Row("peft.tuners.tuners_utils", "BaseTuner", a(type)),
    Row("peft.tuners.tuners_utils", "BaseTunerLayer", a(type)),
    Row(TUNER, "_prepare_adapter_config", taking("self", "peft_config", "model_config")),
    Row(TUNER, "_create_and_replace", taking("self", "peft_config", "adapter_name", "target", "target_name", "parent",
                                             "current_key", "parameter_name")),
    Row(TUNER, "_replace_module", taking("self", "parent", "child_name", "new_module", "child")),
    Row(TUNER, "_cast_adapter_dtype", taking("self", "adapter_name", "autocast_adapter_dtype")),
    Row(TUNER, "_check_merge_allowed", taking("self")),
    Row(TUNER, "_get_adapter_state_dict", taking("model", "config", "adapter_name", "state_dict",
                                                 "unwanted_adapter_names")),
    Row(TUNER, "inject_adapter", called(3, "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict")),
    Row(LAYER, "_disable_adapters", equal(False)),
    Row(LAYER, "_get_base_layer_device_and_dtype", that(probes.knows_the_base_layer)),
    Row(LAYER, "_move_adapter_to_device_of_base_layer", taking("self", "adapter_name", "device")),
    Row(LAYER, "_cast_input_dtype", taking("self", "x", "dtype")),
    Row(LAYER, "adapter_layer_names", a(tuple)),
    Row(LAYER, "other_param_names", a(tuple)),
    Row(LAYER, "merged_adapters", a(list)),
    Row("peft.utils", "PeftType", subclass_of(str)),
    Row("peft.utils", "register_peft_method", called(0, "name", "config_cls", "model_cls", "prefix")),
    Row(ENUM, "_member_map_", a(dict)),
    Row(ENUM, "_value2member_map_", a(dict)),
    Row(ENUM, "_member_names_", a(list)),
    Row(f"{ENUM}.LORA", "_name_", equal("LORA")),
    Row(f"{ENUM}.LORA", "_value_", equal("LORA")),
    Row(f"{ENUM}.LORA", "_sort_order_", a(int)),
    Row("peft.utils.error", "NoMatchingPeftModuleError", subclass_of(ValueError)),
    Row("peft.config", "PeftConfig", a(type)),
    Row("peft.utils", "ModulesToSaveWrapper", subclass_of(nn.Module)),
    Row("peft.utils.ModulesToSaveWrapper.forward", "adapter_names", read),
    Row("peft.utils.ModulesToSaveWrapper", "modules_to_save", assigned),
    Row("peft.tuners.tuners_utils", "check_target_module_exists", that(probes.matches_endings)),
    Row("peft.utils.other", "get_pattern_key", that(probes.matches_endings)),
    Row("peft.tuners.lora.layer", "Linear", subclass_of(nn.Module)),
    Row("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers", that(probes.finds_all_linears)),
    Row("peft.PeftModel", "_enable_peft_forward_hooks", called(1)),
    Row("peft.PeftConfig", "peft_version", that(probes.saved_configurations_name_a_version)),
)  # fmt: skip

TRANSFORMERS = (
    Row("transformers.modeling_layers", "GradientCheckpointingLayer", subclass_of(nn.Module)),
    Row("transformers.modeling_layers.GradientCheckpointingLayer", "gradient_checkpointing", equal(False)),
    Row("transformers.modeling_layers.GradientCheckpointingLayer", "_gradient_checkpointing_func", read),
    # without it each Linear is gathered alone, and no siblings read together
    Row(MODEL, "_no_split_modules", equal(None)),
    Row("transformers.LlamaForCausalLM", "_no_split_modules", equal(["LlamaDecoderLayer"])),
    Row(MODEL, "_init_weights", called(2)),
    Row(MODEL, "_keep_in_fp32_modules_strict", equal(None)),
    Row(MODEL, "_keys_to_ignore_on_load_unexpected", equal(None)),
    Row("transformers.PretrainedConfig", "_attn_implementation", a(property)),
    Row("transformers.initialization", "no_init_weights", called(0)),
    Row("transformers.integrations", "HfDeepSpeedConfig", called(1)),
    Row("transformers.integrations", "is_deepspeed_zero3_enabled", called(0)),
    Row("transformers.integrations.sdpa_attention", "sdpa_attention_forward", called(5, "dropout", "scaling")),
    Row(LOADING, "rename_source_key", that(probes.renames)),
    Row(LOADING, "WeightConverter", a(type)),
    Row(LOADING, "WeightRenaming", called(2)),
    Row(MAPPING, "get_model_conversion_mapping", called(1)),
    Row(MAPPING, "get_checkpoint_conversion_mapping", called(1)),
    Row(MAPPING, "register_checkpoint_conversion_mapping", called(2, "overwrite")),
    Row("transformers.utils.hub", "cached_files", called(2)),
    Row("transformers.utils.hub.cached_files", "_raise_exceptions_for_missing_entries", parameter),
    Row("transformers.utils", "SAFE_WEIGHTS_NAME", equal("model.safetensors")),
    Row("transformers.utils", "SAFE_WEIGHTS_INDEX_NAME", equal("model.safetensors.index.json")),
    Row("transformers.utils.chat_template_utils", "render_jinja_template",
        called(1, "tools", "chat_template", "return_assistant_tokens_mask")),
    Row("transformers.utils", "CHAT_TEMPLATE_DIR", equal("additional_chat_templates")),
    Row("transformers.models.auto.configuration_auto", "CONFIG_MAPPING", holding("llama", "qwen2")),
    Row("transformers.models.auto.modeling_auto", "MODEL_MAPPING", holding(LlamaConfig)),
    Row("transformers.models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING", holding(LlamaConfig)),
)  # fmt: skip

TORCH = (
    Row("torch.Tensor", "_version", that(probes.counts_versions)),
    Row("torch.Tensor", "_base", that(probes.knows_bases)),
    Row("torch.UntypedStorage", "_cdata", that(probes.tells_storages_apart)),
    Row("torch.multiprocessing.reductions", "StorageWeakRef", called(1)),
    Row("torch.nn.Module", "_parameters", that(probes.keeps_own_tensors)),
    Row("torch.nn.Module", "_buffers", that(probes.keeps_own_tensors)),
    Row("torch", "_C", a(ModuleType)),
    Row("torch._C", "_nn", a(ModuleType)),
    Row("torch._C._nn", "linear", that(probes.multiplies)),
    Row("torch._subclasses.fake_tensor", "FakeTensorMode", called(0)),
    Row("torch.utils._python_dispatch", "TorchDispatchMode", called(0)),
    Row("torch.utils._pytree", "tree_leaves", that(probes.flattens)),
)

OTHERS = (
    Row("argparse.ArgumentParser", "_actions", that(probes.lists_flags)),
    Row("atexit", "_run_exitfuncs", a(BuiltinFunctionType)),
    Row("datasets.Dataset", "_fingerprint", that(probes.fingerprints_rows)),
    Row("triton.language.standard", "_sum_combine", a(Callable)),
)

TABLE = (*DEEPSPEED, *PEFT, *TRANSFORMERS, *TORCH, *OTHERS)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_private_name_is_what_we_rely_on(row):
    if row.owner.startswith("triton"):
        require_triton()
    assert fault_of(row) is None


def test_every_private_name_that_the_code_uses_is_in_the_table():
    missing = {name: files for name, files in private_uses().items() if name not in {row.name for row in TABLE}}
    assert not missing, f"add rows for what these files rely on: {missing}"


def test_every_row_is_of_a_name_that_the_code_uses():
    assert [str(row) for row in TABLE if not users(row)] == []


def test_a_name_that_disappears_is_told_with_the_files_that_use_it(monkeypatch):
    monkeypatch.delattr(f"{TUNER}._check_merge_allowed")
    row = next(row for row in TABLE if row.name == "_check_merge_allowed")
    told = fault_of(row)
    assert told.startswith(f"{TUNER}._check_merge_allowed does not exist: ")
    assert told.endswith(f" (peft {importlib.metadata.version('peft')}); used in comol_ds/adapters/tuner.py")


@pytest.mark.parametrize(
    ("code", "used"),
    [
        ("engine._flag", {"_flag"}),
        ("engine._flag = 1", {"_flag"}),
        ("del engine._flag", {"_flag"}),
        ("hasattr(engine, '_flag')", {"_flag"}),
        ("load(_quietly=True)", {"_quietly"}),
        ("from torch._inner import thing", {"thing"}),
        ("from torch import _thing", {"_thing"}),
        ("from deepspeed.runtime.engine import Engine", {"Engine"}),
        ("from torch.utils.checkpoint import checkpoint", set()),
        ("from peft.tuners.tuners_utils import BaseTuner\nclass T(BaseTuner):\n def _replace_module(self): ...",
         {"BaseTuner", "_replace_module"}),
        ("from torch import nn\nclass M(nn.Module):\n def f(self): self._buffers = {}", {"_buffers"}),
        ("from torch import nn\nclass M(nn.Module):\n def f(self): self._mine = 1; return self._mine", set()),
        ("class A:\n def _mine(self): return super()._theirs()", {"_theirs"}),
        ("class A:\n def _mine(self): return super()._mine()", {"_mine"}),
        ("import os\nos._exit(1)", set()),
    ],
)  # fmt: skip
def test_uses_are_found_in_the_syntax_tree(code, used):
    assert set(uses_of(ast.parse(code))) == used


def fault_of(row: Row) -> str | None:
    """One line about what is wrong, and for whom."""
    try:
        fault = row.check(resolve(row.owner), row.name)
    except (ImportError, AttributeError) as error:
        fault = f"does not exist: {error}"
    return fault and f"{row} {fault} ({version_of(row.owner)}); used in {', '.join(users(row))}"


def users(row: Row) -> list[str]:
    return sorted(private_uses().get(row.name, files_with(row.name)))


def version_of(owner: str) -> str:
    library = owner.partition(".")[0]
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{library} of Python"
