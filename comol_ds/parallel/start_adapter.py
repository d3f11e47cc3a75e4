"""Training that starts from an adapter folder instead of fresh values, on any layout."""

from collections.abc import Iterator

import torch
from peft import PeftModel

from comol_ds.adapters.adapter_folder import read_adapter, read_config
from comol_ds.adapters.base_fit import check_base, linear_sizes
from comol_ds.adapters.comol_layer import ADAPTER, CoMoLLinear
from comol_ds.config import AdapterSettings
from comol_ds.errors import UserError


def check_start_adapter(model: PeftModel, settings: AdapterSettings) -> None:
    """Refuse a folder whose tensors are not the ones that the run trains.

    Args:
        model: with the run's adapter attached; names and shapes are read, whole ones.
        settings: with adapter_name_or_path.

    Raises:
        UserError: an unreadable folder, another alpha or base, or the first tensor that is missing, too many or of
            other shape.
    """
    folder = settings.adapter_name_or_path
    config, tensors = read_config(folder), read_adapter(folder)[1]
    if config.lora_alpha != settings.lora_alpha:
        raise UserError(
            f"--adapter_name_or_path {folder} has lora_alpha {config.lora_alpha}, the run has {settings.lora_alpha};"
            f" give --lora_alpha {config.lora_alpha}"
        )
    base = model.get_base_model()
    check_base(config, tensors, linear_sizes(base), f"--adapter_name_or_path {folder}", base.name_or_path)
    expected = {name: list(parameter.shape) for name, parameter in _named_adapters(model)}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"--adapter_name_or_path {folder}: {name} has shape {found.get(name)} there and {expected.get(name)} in"
                " this run; give the adapter's own --r, --num_experts, --router and --target_modules"
            )


def load_start_adapter(model: PeftModel, folder: str) -> None:
    """Overwrite the adapter's values, before ZeRO partitions them, with this rank's slices of the folder's tensors."""
    tensors = read_adapter(folder)[1]
    for name, parameter in _named_adapters(model):
        whole, shard = tensors[name], getattr(parameter, "shard", None)
        local = whole if shard is None else shard.part_of(whole)
        with torch.no_grad():
            parameter.copy_(local)


def _named_adapters(model: PeftModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every adapter parameter under its key in an adapter folder."""
    for module_name, layer in model.named_modules():
        if isinstance(layer, CoMoLLinear):
            for row in layer.tables[ADAPTER]:
                yield f"{module_name}.{row.name}", getattr(layer, row.name)[ADAPTER]
