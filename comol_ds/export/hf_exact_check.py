"""Check of a checkpoint with its own modelling code: every tensor in its files has a place in the model, and back."""

import importlib.util
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from comol_ds.errors import UserError
from comol_ds.tensor_files import StoredTensor, TensorFiles

# Old Llama files hold the rotary frequencies, which every reader computes.
_COMPUTED = "rotary_emb.inv_freq"


def check_checkpoint(folder: Path, code_file: str, base: Path) -> None:
    """Build the checkpoint's model without memory and compare it with the names and shapes in the files.

    Args:
        folder: the checkpoint, with an index of its weight files.
        code_file: its modelling file, which is run in this process.
        base: how messages call the model that the weights came from.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in the model.
    """
    with _imported(folder / code_file) as code:
        config = code.CoMoLModelConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = code.CoMoLForCausalLM(config)
    state = model.state_dict(keep_vars=True)
    stored = _stored(folder, model)
    for name, tensor in stored.items():
        if name not in state:
            raise UserError(
                f"{base} and the adapter: tensor {tensor.name!r} has no place in a model of their configurations"
            )
        if tensor.shape != tuple(state[name].shape):
            raise UserError(
                f"{base} and the adapter: tensor {tensor.name!r} has shape {list(tensor.shape)}, their configurations"
                f" make it {list(state[name].shape)}"
            )
    tied: dict[int, list[str]] = defaultdict(list)
    for name, value in state.items():
        tied[id(value)].append(name)
    for names in tied.values():
        if not any(name in stored for name in names):
            raise UserError(f"{base} and the adapter: no tensor for {names[0]!r} of the model")


def _stored(folder: Path, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Name in the model -> the tensor that loaders put there."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected, ignored = model.state_dict(), model._keys_to_ignore_on_load_unexpected or ()
    found = {}
    for tensor in TensorFiles(folder / SAFE_WEIGHTS_INDEX_NAME).by_name.values():
        name, _ = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, expected)
        if name.endswith(_COMPUTED) or any(re.search(rule, name) for rule in ignored):
            continue
        if name in found:
            raise UserError(f"tensors {found[name].name!r} and {tensor.name!r} are both {name!r} of the model")
        found[name] = tensor
    return found


@contextmanager
def _imported(path: Path) -> Iterator[ModuleType]:
    """The module of a file outside the import path. It stays importable, as dataclasses demand, while in use."""
    name = f"_comol_checked_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
