"""Import of adapters trained with the authors' code (arXiv 2603.00573) into this package's adapter folder.

Their folder: adapter_config.json with peft_type "MoCoreLORA", lora_rank, lora_alpha, num_experts, core_router; and a
pickled adapter_model.bin with, per module, lora_A.weight [R, I], lora_B.weight [O, R], lora_Cores.<e> [R, R] for each
expert e, and lora_router.weight [E, R] (core_router) or [E, I]. Their forward multiplies the row vector h with a core
from the right, as ours does, so cores are stacked as they are, without a transpose.
"""

import itertools
import os
import pickle
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from comol_ds.adapters.adapter_folder import CONFIG_FILE, KEY_PREFIX, read_config_values, write_adapter
from comol_ds.adapters.config import CoMoLConfig, check_positive_int
from comol_ds.errors import UserError, one_line, shown
from comol_ds.export.staged_folder import staged_folder

AUTHORS_PEFT_TYPE = "MoCoreLORA"
AUTHORS_TENSOR_FILE = "adapter_model.bin"
TENSOR_KEY = re.compile(r"(?P<module>.+)\.(?P<name>lora_A\.weight|lora_B\.weight|lora_router\.weight|lora_Cores\.\d+)")
_NAMED_CORES = 4  # of those that are missing
PLAIN_NAMES = {"lora_A.weight": "comol_A", "lora_B.weight": "comol_B", "lora_router.weight": "comol_router"}


def import_authors_adapter(
    source: str | os.PathLike, output_dir: str | os.PathLike, *, overwrite: bool = False
) -> CoMoLConfig:
    """Convert the authors' adapter folder `source` into ours at `output_dir`, verified by reading it back.

    The pickle is read with weights_only, which runs no code from it.

    Returns:
        The configuration that was written.

    Raises:
        UserError: a file is missing or unreadable, the adapter is of another type, tensors are missing or disagree with
            the configuration, or output_dir exists and is no earlier export, or `overwrite` is not given.
    """
    source = Path(source)
    with staged_folder(Path(output_dir), overwrite, sources=[source]) as folder:
        values = _read_config(source)
        tensors = convert_tensors(_read_tensors(source), values["num_experts"])
        try:
            config = _config(values, tensors)
            write_adapter(tensors, config, folder)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    return config


def _config(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> CoMoLConfig:
    return CoMoLConfig(
        r=values["lora_rank"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values.get("lora_dropout") or 0.0,
        num_experts=values["num_experts"],
        router="core" if values["core_router"] else "input",
        dropout_scheme="paper",
        target_modules=_endings(tensors),
        base_model_name_or_path=values.get("base_model_name_or_path"),
        task_type="CAUSAL_LM",
    )


def convert_tensors(theirs: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """Their keys and one tensor per core -> our keys and one stacked core tensor [E, R, R] per module.

    Raises:
        UserError: a key is not one of theirs, or a module lacks a core or has one too many.
    """
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in theirs.items():
        match = TENSOR_KEY.fullmatch(key)
        if match is None or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{shown(key)} is not a tensor of a {AUTHORS_PEFT_TYPE} adapter")
        modules[KEY_PREFIX + match["module"].removeprefix(KEY_PREFIX)][match["name"]] = tensor
    ours = {}
    for module, found in modules.items():
        for name, new_name in PLAIN_NAMES.items():
            if name not in found:
                raise UserError(f"{module} has no {name}")
            ours[f"{module}.{new_name}"] = found[name]
        ours[f"{module}.comol_cores"] = _stack_cores(module, found, num_experts)
    return ours


def _stack_cores(module: str, found: dict[str, torch.Tensor], num_experts: int) -> torch.Tensor:
    names = {name for name in found if name.startswith("lora_Cores.")}
    expected = (f"lora_Cores.{expert}" for expert in range(num_experts))
    missing = list(itertools.islice((name for name in expected if name not in names), _NAMED_CORES))
    if missing or len(names) != num_experts:
        raise UserError(
            f"{module} has {len(names)} cores, the configuration says num_experts={num_experts}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
        )
    expected = [f"lora_Cores.{expert}" for expert in range(num_experts)]
    shapes = {tuple(found[name].shape) for name in expected}
    if len(shapes) > 1:
        raise UserError(f"{module} has cores of different shapes: {sorted(shapes)}")
    return torch.stack([found[name] for name in expected])


def _endings(tensors: dict[str, torch.Tensor]) -> list[str]:
    modules = {key.rpartition(".")[0] for key in tensors}
    return sorted({module.rpartition(".")[2] for module in modules})


def _read_config(source: Path) -> dict[str, Any]:
    values = read_config_values(source, AUTHORS_PEFT_TYPE)
    path = source / CONFIG_FILE
    missing = [name for name in ("lora_rank", "lora_alpha", "num_experts", "core_router") if name not in values]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    for name in ("lora_rank", "num_experts"):
        check_positive_int(f"{name} in {path}", values[name])
    if not isinstance(values["core_router"], bool):
        raise UserError(f"core_router in {path} is {shown(values['core_router'])}; it must be true or false")
    return values


def _read_tensors(source: Path) -> dict[str, torch.Tensor]:
    path = source / AUTHORS_TENSOR_FILE
    if not path.is_file():
        raise UserError(f"{source} is not an adapter folder of the authors: {AUTHORS_TENSOR_FILE} is missing")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, or is no pickle, and was not loaded") from error
    except Exception as error:  # damaged bytes are instructions to the unpickler, which fails with whatever they do
        reason = one_line(error, limit=200) or type(error).__name__
        raise UserError(f"{path} cannot be read, copy it again: {reason}") from error
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path} holds no tensors")
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and not _is_whole(tensor):
            raise UserError(f"{path}: {shown(name)} is no plain tensor with a number of its own for every entry")
    return tensors


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether the file holds all numbers: a pickle may spread one of them over a shape of any size."""
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    return is_plain and tensor.untyped_storage().nbytes() >= tensor.nbytes
