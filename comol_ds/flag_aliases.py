"""What other programs call the settings of a run: the hints for a flag or a YAML key that is not known.

The names are those of transformers, PEFT, TRL, LlamaFactory, axolotl and DeepSpeed.
"""

import difflib
from collections.abc import Iterable

# Our flag -> the names under which the same value is given elsewhere.
_SAME = {
    "r": ("lora_r", "lora_rank", "rank", "adapter_rank"),
    "lora_alpha": ("alpha", "adapter_alpha"),
    "lora_dropout": ("dropout",),
    "num_experts": ("experts", "expert_num"),
    "target_modules": ("lora_target", "lora_target_modules", "lora_modules", "target_module"),
    "modules_to_save": ("additional_target", "lora_modules_to_save"),
    "adapter_name_or_path": ("lora_model_dir", "peft_model_id", "adapter_path", "lora_path", "lora_weights"),
    "model_name_or_path": ("model", "model_name", "model_path", "base_model", "model_id", "pretrained_model"),
    "tokenizer_name": ("tokenizer", "tokenizer_name_or_path", "tokenizer_path", "tokenizer_config"),
    "attn_implementation": ("flash_attn", "attn_impl", "use_flash_attention_2", "flash_attention"),
    "activation_checkpointing": ("gradient_checkpointing", "use_gradient_checkpointing"),
    "dataset": ("data", "datasets", "data_path", "dataset_name", "dataset_path", "train_file", "train_data",
                "train_dataset", "train_files"),
    "prompt_template": ("template", "chat_template", "prompt_style"),
    "dataset_weights": ("interleave_probs", "dataset_probs"),
    "eval_dataset": ("val_file", "validation_file", "test_datasets", "eval_file", "val_dataset", "validation_dataset"),
    "max_length": ("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "model_max_length", "block_size",
                   "seq_length", "context_length"),
    "packing": ("sample_packing", "neat_packing"),
    "train_on_prompt": ("train_on_inputs", "train_on_input"),
    "max_train_records": ("max_train_samples", "max_samples", "num_samples"),
    "max_eval_records": ("max_eval_samples", "max_val_samples"),
    "preprocessing_num_workers": ("dataset_num_proc", "dataset_processes", "num_proc"),
    "learning_rate": ("lr",),
    "optim": ("optimizer", "optimizer_type"),
    "lr_scheduler_type": ("lr_scheduler", "scheduler", "lr_schedule"),
    "warmup_steps": ("num_warmup_steps",),
    "num_train_epochs": ("epochs", "num_epochs", "epoch", "n_epochs"),
    "max_steps": ("max_train_steps", "num_train_steps", "train_iters", "total_steps", "steps"),
    "max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad", "max_norm"),
    "per_device_train_batch_size": ("micro_batch_size", "train_micro_batch_size_per_gpu", "per_gpu_train_batch_size",
                                    "micro_batch_size_per_gpu", "device_batch_size"),
    "per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size"),
    "global_batch_size": ("train_batch_size", "effective_batch_size", "total_batch_size"),
    "tensor_parallel_size": ("tp", "tp_size", "autotp_size", "tensor_parallel", "tensor_model_parallel_size"),
    "ds_config": ("deepspeed", "deepspeed_config", "deepspeed_config_file", "ds_config_file"),
    "output_dir": ("output", "out_dir", "output_path", "save_dir", "out"),
    "overwrite_output_dir": ("overwrite", "force"),
    "resume_from_checkpoint": ("resume", "auto_resume_from_checkpoints", "resume_from"),
    "max_new_tokens": ("max_completion_length", "generation_max_length"),
    "seed": ("data_seed", "random_seed"),
    "collective_timeout_minutes": ("ddp_timeout",),
}  # fmt: skip

_FLOAT16 = "float16 with loss scaling is not supported; use --bf16 true, or --bf16 false for float32"
_ONE_PRECISION = "the frozen base and the computation share one precision; set it with --bf16 true or --bf16 false"
_QUANTIZED = (
    "a quantized base is not supported; use the float32, bfloat16 or float16 weights, and shard them with ZeRO-3"
)
_STEPS_ONLY = "there is no strategy: {} is the number of steps between two, and the end of the run always has one"
_RUN_FOLDER = "logs lie in --output_dir; choose it there"
_ONE_PROCESS = "data are read in this process; drop it"
_ONE_METHOD = "CoMoL is the only method; drop it"

# Names without an equal here -> what to do instead.
_OTHER = {
    ("gradient_accumulation_steps", "gradient_accumulation", "accumulation_steps", "grad_accum"):
        "accumulation follows from --global_batch_size, the records per step over all ranks:"
        " per_device_train_batch_size x accumulation x data-parallel ranks",
    ("batch_size",): "give --per_device_train_batch_size per rank, and --global_batch_size over all ranks",
    ("warmup_ratio",): "give --warmup_steps, a number of optimizer steps",
    ("val_set_size", "val_size", "validation_ratio", "eval_ratio", "test_size"):
        "give --validation_split_percentage, in percent",
    ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization_method", "bnb_4bit_quant_type",
     "bnb_4bit_compute_dtype", "bits", "qlora", "use_qlora"): _QUANTIZED,
    ("fp16", "float16", "fp16_full_eval", "fp16_opt_level"): _FLOAT16,
    ("bf16_full_eval", "tf32", "pure_bf16", "torch_dtype", "dtype", "mixed_precision", "precision"): _ONE_PRECISION,
    ("evaluation_strategy", "eval_strategy"): _STEPS_ONLY.format("--eval_steps"),
    ("save_strategy",): _STEPS_ONLY.format("--save_steps"),
    ("logging_strategy",): "give --logging_steps, a number of optimizer steps",
    ("logging_dir", "tensorboard_log_dir", "log_dir"): _RUN_FOLDER,
    ("run_name", "wandb_project", "wandb_run_name", "wandb_name"):
        "set WANDB_PROJECT and WANDB_NAME in the environment, and --report_to wandb",
    ("dataset_dir",): "give paths of files or folders with --dataset",
    ("use_lora", "use_peft", "finetuning_type", "adapter", "peft_type", "peft", "stage"): _ONE_METHOD,
    ("do_train", "do_eval", "do_predict"): "every run trains and evaluates; drop it",
    ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "loraplus_lr_ratio", "pissa_init", "init_lora_weights"):
        "CoMoL has no such variant; drop it",
    ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_drop_last"): _ONE_PROCESS,
    ("remove_unused_columns",): "columns that the format does not need are ignored; drop it",
    ("pipeline_parallel_size", "pp_size", "expert_parallel_size", "sequence_parallel_size", "context_parallel_size",
     "fsdp", "fsdp_config"): "parallelism is ZeRO, in the JSON of --ds_config, times --tensor_parallel_size",
    ("zero_stage", "offload", "offload_optimizer", "offload_param", "cpu_offload"):
        "ZeRO is set in the JSON of --ds_config; ds_configs/ has examples",
    ("push_to_hub", "hub_model_id", "hub_token", "hf_token", "use_auth_token"):
        "nothing is sent anywhere; upload the folder adapter/ of --output_dir yourself",
    ("config",): "a YAML file cannot name another one; copy its lines",
}  # fmt: skip

_HINTS = {name: f"it is {{mark}}{flag} here" for flag, names in _SAME.items() for name in names} | {
    name: hint for names, hint in _OTHER.items() for name in names
}
# Of two names below it, the likeness is chance: epochs and eval_steps have 0.5, lr and r 0.67.
_LIKENESS = 0.8


def unknown_name(name: str, known: Iterable[str], mark: str = "--") -> str:
    """What to say after "unknown flag": what the name means elsewhere, else a known name that is nearly the same.

    Args:
        name: as the user wrote it, without dashes in front.
        known: what may be written.
        mark: what stands before a name where the user wrote it: "--", or "" in a YAML file.
    """
    if name in _HINTS:
        return _HINTS[name].format(mark=mark)
    names = set(known)
    near = difflib.get_close_matches(name, [*names, *_HINTS], n=1, cutoff=_LIKENESS)
    if not near:
        return "see --help"
    if near[0] in names:
        return f"the nearest known name is {mark}{near[0]}"
    return f"if {near[0]} is meant, {_HINTS[near[0]].format(mark=mark)}"
