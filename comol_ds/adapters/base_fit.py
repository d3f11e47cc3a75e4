"""Whether an adapter was trained on this base: the Linears that its tensors stand beside, compared by path and size."""

import re
from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from comol_ds.adapters.adapter_folder import split_tensors
from comol_ds.adapters.comol_layer import KEY_PREFIX, CoMoLLinear
from comol_ds.adapters.config import CoMoLConfig
from comol_ds.errors import UserError

Sizes = Mapping[str, tuple[int, int]]  # path of a Linear in the base -> (I, O)


def linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(I, O) of every Linear of a model, adapted or not, by its path in the base; no weight is read."""
    return {
        name.removeprefix(KEY_PREFIX).removesuffix(".base_layer"): (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | CoMoLLinear)
    }


def check_base(config: CoMoLConfig, tensors: Mapping[str, torch.Tensor], sizes: Sizes, adapter: str, base: str) -> None:
    """Refuse a base that lacks a Linear beside which the adapter has tensors, has another one, or has more of them.

    Args:
        config, tensors: the adapter, as `read_adapter` returns it.
        sizes: the base's, see `linear_sizes`.
        adapter: what the message begins with.
        base: the name of the base that was given.

    Raises:
        UserError: naming the base that the adapter was trained on, and the first Linear that differs.
    """
    trained = {name: _size(found) for name, found in split_tensors(dict(tensors), config)[0].items()}
    for name, size in trained.items():
        if sizes.get(name) != size:
            has = "no Linear there" if name not in sizes else f"one {_arrow(sizes[name])}"
            _refuse(config, adapter, base, f"its {name} is a Linear {_arrow(size)}, {base} has {has}")
    kinds = {_kind(name) for name in trained}
    for name in sizes:
        if name not in trained and _kind(name) in kinds and check_target_module_exists(config, name):
            _refuse(config, adapter, base, f"{base} has a {name} to adapt, which it had not")


def _refuse(config: CoMoLConfig, adapter: str, base: str, difference: str) -> None:
    trained_on = config.base_model_name_or_path
    known = f" on {trained_on}" if trained_on and trained_on != base else " on another base"
    raise UserError(f"{adapter}: this adapter was trained{known}: {difference}; give the base that it was trained on")


def _size(found: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    return found["comol_A"].shape[1], found["comol_B"].shape[0]


def _arrow(size: tuple[int, int]) -> str:
    return f"{size[0]} -> {size[1]}"


def _kind(module: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.#.mlp.up_proj, the same in all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", module)
