"""The adapter folder: PEFT's layout, written whole or not at all, and verified on the way in and out.

adapter_config.json: the configuration, with peft_type COMOL.
adapter_model.safetensors: base_model.model.<module>.comol_A, .comol_B, .comol_cores and .comol_router for every adapted
module, whole and without an adapter's name, and the tensors of modules_to_save beside them.
tokenizer.json and its like: the tokenizer that the adapter was trained with, where it is known (`kept_tokenizer`).
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file

from comol_ds.adapters.comol_layer import KEY_PREFIX, comol_table
from comol_ds.adapters.config import CoMoLConfig
from comol_ds.adapters.expressions import check_matching_ends
from comol_ds.adapters.kept_tokenizer import write_tokenizer_files
from comol_ds.adapters.table import infer_sizes, parameter_names
from comol_ds.errors import UserError, one_line, shown
from comol_ds.files import hidden_beside, remove_or_warn, sync, write_new
from comol_ds.tensor_files import save_tensors
from comol_ds.text_files import read_json

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_adapter(
    tensors: dict[str, torch.Tensor],
    config: CoMoLConfig,
    folder: str | os.PathLike,
    tokenizer: Mapping[str, bytes] | None = None,
) -> None:
    """Write a verified adapter folder and read it back.

    Both files are written and verified in a hidden folder beside `folder`, which is then renamed to it. Where `folder`
    exists, the files are replaced one after the other and everything else in it is left alone.

    Args:
        tensors: whole tensors under their keys in the folder, e.g. from peft.get_peft_model_state_dict.
        config: the adapter's configuration with resolved target_modules, as a PEFT model holds it after attaching.
        folder: where to write; its parents are created.
        tokenizer: files of the tokenizer that the adapter was trained with, see `kept_tokenizer.tokenizer_files`.

    Raises:
        UserError: the tensors do not fit the configuration, are empty or not finite. Nothing is written then.
    """
    verify_tensors(tensors, config)
    folder = Path(folder).resolve()
    staging = hidden_beside(folder, "writing")
    staging.mkdir(parents=True)
    try:
        write_new(staging / CONFIG_FILE, _config_json(config))
        # Tensors that share memory (tied modules_to_save) may not share it in the file, hence clone.
        whole = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        save_tensors(whole, staging / TENSOR_FILE)
        for name in (CONFIG_FILE, TENSOR_FILE):
            sync(staging / name)
        _check_same(read_adapter(staging)[1], whole)
        if folder.exists():
            write_tokenizer_files(tokenizer or {}, folder)
            for name in (TENSOR_FILE, CONFIG_FILE):
                os.replace(staging / name, folder / name)
            sync(folder)
        else:
            write_tokenizer_files(tokenizer or {}, staging)
            sync(staging)
            os.replace(staging, folder)
        sync(folder.parent)
    finally:
        remove_or_warn(staging)


def read_adapter(folder: str | os.PathLike) -> tuple[CoMoLConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors (on the CPU) of an adapter folder.

    Raises:
        UserError: a file is missing or unreadable, it holds another adapter type, or the tensors fail verify_tensors.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not an adapter folder: {TENSOR_FILE} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    try:
        verify_tensors(tensors, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, tensors


def read_config(folder: str | os.PathLike) -> CoMoLConfig:
    """Configuration of an adapter folder.

    Raises:
        UserError: the file is missing, is not JSON, is of another type, or holds values out of range.
    """
    read_config_values(folder, "COMOL")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise UserError(f"{Path(folder) / CONFIG_FILE}: {one_line(error, limit=500)}") from error


def read_config_values(folder: str | os.PathLike, peft_type: str) -> dict[str, Any]:
    """The values of an adapter_config.json as they are written.

    Raises:
        UserError: the file is missing, is not JSON, or is of another type than `peft_type`.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not an adapter folder: {CONFIG_FILE} is missing")
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    found = values.get("peft_type") if isinstance(values, dict) else None
    if found != peft_type:
        raise UserError(f"{path} has peft_type {shown(found)}, expected {peft_type!r}")
    return values


def verify_tensors(tensors: dict[str, torch.Tensor], config: CoMoLConfig) -> None:
    """Check tensors, under their folder keys, against a configuration.

    Every adapted module must have exactly the method's tensors, with shapes that agree with each other and with r and
    num_experts, and must be one that target_modules reach. Every tensor must be finite and not empty: ZeRO-3 leaves
    shape (0,) where a parameter was not gathered.

    Raises:
        UserError: naming the first key that fails and why.
    """
    if not isinstance(config.target_modules, str | list | set) or not config.target_modules:
        raise UserError("target_modules is not resolved; take the configuration from the model after attaching")
    if not tensors:
        raise UserError("the adapter has no tensors")
    table = comol_table(config.router)
    for key, tensor in tensors.items():
        _check_values(key, tensor)
    modules, others = split_tensors(tensors, config)
    for name in others:
        if any(part.startswith("comol_") for part in name.split(".")):
            raise UserError(
                f"{KEY_PREFIX}{name}: unknown adapter tensor; a module has {', '.join(parameter_names(table))}"
            )
    if not modules:
        raise UserError("the adapter has no comol_ tensors")
    check_matching_ends(config, modules)
    for module, found in modules.items():
        try:
            sizes = infer_sizes(table, {name: tuple(tensor.shape) for name, tensor in found.items()})
        except UserError as error:
            raise UserError(f"{module}: {error}") from error
        if (config.r, config.num_experts) != (sizes.R, sizes.E):
            raise UserError(
                f"{module} has rank {sizes.R} and {sizes.E} experts, the configuration says r={config.r} and "
                f"num_experts={config.num_experts}"
            )
        if not check_target_module_exists(config, module):
            raise UserError(f"{module} has adapter tensors, but target_modules do not reach it")


def split_tensors(
    tensors: dict[str, torch.Tensor], config: CoMoLConfig
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Folder keys, without their prefix: module path -> the method's tensors by name; and all others, which belong to
    modules_to_save, by parameter path."""
    names = parameter_names(comol_table(config.router))
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    others = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(KEY_PREFIX)
        module, _, name = path.rpartition(".")
        if name in names:
            modules[module][name] = tensor
        else:
            others[path] = tensor
    return dict(modules), others


def _check_values(key: str, tensor: torch.Tensor) -> None:
    if not key.startswith(KEY_PREFIX):
        raise UserError(f"{key}: a key starts with {KEY_PREFIX}")
    if tensor.numel() == 0:
        raise UserError(f"{key} is empty, shape {list(tensor.shape)}: it was saved without being gathered")
    if tensor.dtype in _DTYPES:
        if not torch.isfinite(tensor).all():
            raise UserError(f"{key} holds values that are not finite")
    # a module trained whole may have buffers of integers
    elif tensor.is_floating_point() or tensor.is_complex() or key.rpartition(".")[2].startswith("comol_"):
        raise UserError(f"{key} is stored as {tensor.dtype}; use float32, bfloat16, float16 or float64")


def _config_json(config: CoMoLConfig) -> str:
    values = replace(config, inference_mode=True).to_dict()
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return json.dumps(ordered, indent=2, sort_keys=True) + "\n"


def _check_same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    differing = [key for key in written if key not in read or not torch.equal(read[key], written[key])]
    if differing or len(read) != len(written):
        raise OSError(f"{TENSOR_FILE} reads back differently from what was written, first at {differing[:1]}")
