"""PEFT's mixed batches: `adapter_names` sends every row of one batch through an adapter of its own.

PEFT hands `adapter_names` to the tuner, not to the model's layers; forward pre-hooks carry it to the adapted Linears
and to PEFT's own wrappers of modules_to_save, which take the same keyword.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from comol_ds.adapters.comol_layer import BASE_ROW, CoMoLLinear


@contextmanager
def mixed_batch(tuner: BaseTuner, adapter_names: Sequence[str], inputs: int | None) -> Iterator[None]:
    """Inside, row b of a batch goes through the adapter `adapter_names[b]`, whichever adapters are active.

    Args:
        tuner: in evaluation mode.
        adapter_names: for each input its one adapter, or "__base__" for none. A module trained whole by other adapters
            only is the base's for its rows.
        inputs: their number. Generation makes several rows in a row of each, for beams or answers: the model's calls
            show how many. The encoder of an encoder-decoder model runs before and sees each once. None: one row each.

    Raises:
        ValueError: the model is in training mode, or there is no adapter of such a name.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    takers = [module for module in tuner.modules() if isinstance(module, CoMoLLinear | ModulesToSaveWrapper)]
    known = {name for module in takers if isinstance(module, CoMoLLinear) for name in module.tables}
    unknown = set(adapter_names) - known - {BASE_ROW}
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; there are"
            f" {', '.join(sorted(known))} and {BASE_ROW}"
        )
    of_rows = list(adapter_names)

    def repeat(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows = rows_of(model, args, kwargs)
        if rows and inputs:
            of_rows[:] = [name for name in adapter_names for _ in range(rows // inputs)]

    hooks = []
    try:
        hooks.append(tuner.model.register_forward_pre_hook(repeat, with_kwargs=True))
        for module in takers:
            hooks.append(module.register_forward_pre_hook(partial(_carry, of_rows), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int | None:
    """The rows of a batch, as a model's forward or its generate takes it; None where nothing in it is known as one."""
    own = getattr(model, "main_input_name", "input_ids")
    batches = (*map(kwargs.get, ("decoder_input_ids", "input_ids", own, "inputs", "inputs_embeds")), *args)
    return next((len(batch) for batch in batches if isinstance(batch, torch.Tensor)), None)


def _carry(of_rows: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    names = list(of_rows)
    if isinstance(module, ModulesToSaveWrapper):  # which has an entry for its own adapters only
        names = [name if name in module.modules_to_save else BASE_ROW for name in names]
    return args, kwargs | {"adapter_names": names}
