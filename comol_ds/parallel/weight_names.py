"""Under which name the files hold each parameter of a model, by transformers' own renaming."""

from collections import defaultdict

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from comol_ds.errors import UserError
from comol_ds.parallel.weight_files import WeightFiles
from comol_ds.tensor_files import StoredTensor


def find_weights(model: PreTrainedModel, files: WeightFiles) -> dict[str, StoredTensor]:
    """The tensor for every parameter and persistent buffer of a model; only headers are read.

    Args:
        model: whole and without adapters, on any device; names, shapes and dtypes are read.
        files: the checkpoint.

    Returns:
        Name in the model -> tensor. Tied parameters have one tensor, under whichever of their names it is stored.

    Raises:
        UserError: a tensor is missing, has another shape, is quantized, or would have to be merged or split.
    """
    stored = _stored_names(model, files)
    tied: dict[int, list[str]] = defaultdict(list)
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        tied[id(value)].append(name)
    found = {}
    for names in tied.values():
        name, value = next((name for name in names if name in stored), names[0]), state[names[0]]
        found |= dict.fromkeys(names, files.find(stored.get(name, name), tuple(value.shape), value.dtype))
    return found


def _stored_names(model: PreTrainedModel, files: WeightFiles) -> dict[str, str]:
    """Name in the model -> name in the files: the base model's prefix may be missing or too much, old names differ."""
    expected: dict[str, torch.Tensor] = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found = {}
    for stored in files.by_name:
        name, merged = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and stored in expected:  # renamed by a rule that is meant for other models
            name, merged = stored, None
        if name not in expected:
            continue
        if merged is not None:
            raise UserError(
                f"{files.path}: tensor {stored!r} is one that transformers merges or splits for model type"
                f" {model.config.model_type!r}, which is not supported; use a model whose weights are used as stored"
            )
        if name not in found or stored == name:
            found[name] = stored
    return found
