"""A static LoRA as the adapter folder that every server reads.

The portable form: all scaling in B, so that lora_alpha = r; one rank; no rsLoRA and no patterns, which SGLang and
llama.cpp ignore without a word; explicit module endings; and a zero-filled pair for every Linear that a server fuses
with an adapted one (q/k/v, gate/up) or that is adapted in another layer, since TGI drops a kind of module that any
layer lacks. The rank is filled up with zeros to 8 or a multiple of 16: TGI 3.3 pads others itself and then scales them
by the padded rank. Under W-fold tensor parallelism TGI is right at rank 8 W and at multiples of 16 above it.

Glossary: I in_features, O out_features, R rank.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from comol_ds.adapters.adapter_folder import CONFIG_FILE, KEY_PREFIX, TENSOR_FILE
from comol_ds.errors import UserError
from comol_ds.export.base_modules import read_base_modules
from comol_ds.export.staged_folder import staged_folder
from comol_ds.export.static_lora import StaticLora
from comol_ds.export.tensor_faults import FUSED
from comol_ds.files import sync, write_new
from comol_ds.tensor_files import save_tensors


def write_lora(
    static: StaticLora,
    base: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a LoRA folder, verified by reading it back.

    The folder appears whole or not at all, see `staged_folder`.

    Args:
        static: the LoRA.
        base: folder or hub name of its base model; the folder names it as it is given.
        folder: where to write; its parents are created.
        overwrite: replace an earlier export there.
        dtype: of the tensors. fp32 loses nothing; servers cast to their own.

    Raises:
        UserError: `folder` holds something and overwrite is not given, the base cannot be read or has no such Linears,
            or a value is not finite in `dtype`. Nothing is written then.
    """
    tensors = lora_tensors(static, read_base_modules(base).sizes, dtype)
    endings = sorted({key.removesuffix(".lora_A.weight").rpartition(".")[2] for key in tensors if "lora_A" in key})
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staged_folder(Path(folder), overwrite, size) as staging:
        _write_files(staging, tensors, lora_config(padded_rank(static.rank), endings, os.fspath(base)))


def padded_rank(rank: int) -> int:
    """The rank that a LoRA of this rank is written with."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def lora_config(rank: int, endings: list[str], base: str) -> dict[str, Any]:
    """adapter_config.json of the portable form: what servers read of it, and nothing whose absence means the same."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": endings,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def lora_tensors(
    static: StaticLora, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The folder's tensors: a pair for every adapted Linear, and the zero-filled ones.

    Args:
        static: the LoRA.
        shapes: (I, O) of every Linear of the base, as `read_base_modules` finds them.
        dtype: of the tensors.

    Returns:
        base_model.model.<module>.lora_A.weight [R, I] and .lora_B.weight [O, R], in the base's order of modules, with
        R the `padded_rank`.

    Raises:
        UserError: the base has no such Linear, or one of another size, or a value is not finite in `dtype`.
    """
    for module, down in static.down.items():
        found, wanted = shapes.get(module), (down.shape[1], static.up[module].shape[0])
        if found != wanted:
            what = f"a Linear {found[0]} -> {found[1]}" if found else "no Linear"
            raise UserError(
                f"the base has {what} at {module}, the adapter was trained on one {wanted[0]} -> {wanted[1]};"
                " give the base it was trained on with --model_name_or_path"
            )
    tensors, filler = {}, padded_rank(static.rank) - static.rank
    for module in _paired(static.down, shapes):
        adapted, (inputs, outputs) = module in static.down, shapes[module]
        down = static.down[module] if adapted else torch.zeros(static.rank, inputs)
        up = static.up[module] if adapted else torch.zeros(outputs, static.rank)
        for name, tensor in (("lora_A", F.pad(down, (0, 0, 0, filler))), ("lora_B", F.pad(up, (0, filler)))):
            written = tensor.to(dtype).contiguous()
            if not torch.isfinite(written).all():
                raise UserError(f"{name} of {module} holds values that are not finite in {dtype}; write it in float32")
            tensors[f"{KEY_PREFIX}{module}.{name}.weight"] = written
    return tensors


def _paired(adapted: Iterable[str], shapes: Mapping[str, Any]) -> list[str]:
    """The Linears of the base that need a pair: all of a kind that is adapted anywhere, or fused with such a kind."""
    kinds = {fused for module in adapted for fused in _fused_kinds(*_kind(module))}
    return [module for module in shapes if _kind(module) in kinds]


def _kind(module: str) -> tuple[str, str]:
    """model.layers.3.mlp.up_proj -> ("model.layers.#.mlp", "up_proj"): the same in all layers."""
    parent, _, name = module.rpartition(".")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", parent), name


def _fused_kinds(parent: str, name: str) -> set[tuple[str, str]]:
    fused = next((group for group in FUSED.values() if name in group), (name,))
    return {(parent, sibling) for sibling in fused}


def _write_files(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    write_new(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_tensors(tensors, folder / TENSOR_FILE)
    for name in (CONFIG_FILE, TENSOR_FILE):
        sync(folder / name)
    read = load_file(folder / TENSOR_FILE)
    differing = [key for key in tensors if key not in read or not torch.equal(read[key], tensors[key])]
    if differing or len(read) != len(tensors):
        raise OSError(f"{TENSOR_FILE} reads back differently from what was written, first at {differing[:1]}")
