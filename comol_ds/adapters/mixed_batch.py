"""PEFT's mixed batches: `adapter_names` sends every row of one batch through an adapter of its own.

PEFT hands `adapter_names` to the tuner, not to the model's layers; forward pre-hooks carry it to the adapted Linears
and to PEFT's own wrappers of modules_to_save, which take the same keyword.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from comol_ds.adapters.comol_layer import BASE_ROW, CoMoLLinear


@contextmanager
def mixed_batch(tuner: BaseTuner, adapter_names: Sequence[str], rows_per_input: int = 1) -> Iterator[None]:
    """Inside, row b of a batch goes through the adapter `adapter_names[b]`, whichever adapters are active.

    Args:
        tuner: in evaluation mode.
        adapter_names: for each input its one adapter, or "__base__" for none.
        rows_per_input: how many rows in a row generation makes of each input. The encoder of an encoder-decoder model
            runs before that and sees each once.

    Raises:
        ValueError: the model is in training mode, or there is no adapter of such a name.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    takers = [module for module in tuner.modules() if isinstance(module, CoMoLLinear | AuxiliaryTrainingWrapper)]
    known = {name for module in takers if isinstance(module, CoMoLLinear) for name in module.tables}
    unknown = set(adapter_names) - known - {BASE_ROW}
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; there are"
            f" {', '.join(sorted(known))} and {BASE_ROW}"
        )
    encoder = tuner.model.get_encoder() if hasattr(tuner.model, "get_encoder") else tuner.model
    before = set() if encoder is tuner.model else set(encoder.modules())
    repeated = [name for name in adapter_names for _ in range(rows_per_input)]
    hooks = []
    try:
        for module in takers:
            carry = partial(_carry, list(adapter_names) if module in before else repeated)
            hooks.append(module.register_forward_pre_hook(carry, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rows_per_input(generation_options: dict[str, Any]) -> int:
    """How many rows model.generate makes of each input: one per beam, or per answer where these are more.

    Read from the keywords and the generation_config among them; a forward pass has neither.
    """
    config = generation_options.get("generation_config")
    counts = [
        generation_options.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    ]
    return max(counts)


def _carry(adapter_names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return args, kwargs | {"adapter_names": adapter_names}
