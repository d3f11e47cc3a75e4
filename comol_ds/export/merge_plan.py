"""Which tensor of a base's files each update of a merge belongs to; everything that can be refused before writing."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from comol_ds.base_config import NO_OWN_CODE, read_base_config
from comol_ds.errors import UserError
from comol_ds.export.source import weights_in
from comol_ds.export.static_lora import StaticLora
from comol_ds.tensor_files import PLAIN_FLOATS, StoredTensor, TensorFiles

# Leading parts of a name with which transformers' classes differ from each other and from the files they save.
_WRAPPERS = ("model", "language_model", "text_model", "transformer")


@dataclass(frozen=True)
class MergePlan:
    """What changes in the files.

    Attributes:
        updates: name of a stored tensor -> module whose update is added to it.
        replacements: name of a stored tensor -> its new values.
    """

    files: TensorFiles
    updates: Mapping[str, str]
    replacements: Mapping[str, torch.Tensor]


def plan_merge(base: Path, static: StaticLora, replacements: Mapping[str, torch.Tensor]) -> MergePlan:
    """Find the tensor of every module and every replacement, by its own name or one that only differs in wrappers.

    Args:
        base: folder of the base model.
        replacements: parameter's name in the model -> values.

    Raises:
        UserError: the base is unreadable or quantized, a tensor is nowhere in the files, has another shape, is meant
            twice, or is tied to another one that would change with it.
    """
    config = _read_config(base)
    files = weights_in(base)
    names = _Names(base, files.by_name)
    takers: dict[str, str] = {}  # stored tensor -> what of the adapter changes it

    def take(name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = names.find(name)
        _check(tensor, shape, name)
        if tensor.name in takers:
            raise UserError(
                f"{tensor.file}: tensor {tensor.name!r} would be changed by the adapter's {takers[tensor.name]!r} and"
                f" by its {name!r}; give the base that the adapter was trained on"
            )
        takers[tensor.name] = name
        return tensor

    updates, values = {}, {}
    for module in static.down:
        name, shape = f"{module}.weight", (static.up[module].shape[0], static.down[module].shape[1])  # [O, I]
        _refuse_tied(config, base, name, shape)  # first: the files hold only one of two tied weights
        updates[take(name, shape).name] = module
    for name, value in _without_tied_copies(config, base, names, replacements).items():
        values[take(name, tuple(value.shape)).name] = value
    return MergePlan(files, updates, values)


class _Names:
    """The stored tensors, found by the names of a model."""

    def __init__(self, base: Path, stored: dict[str, StoredTensor]) -> None:
        self._base = base
        self._stored = stored
        self._by_core: dict[str, list[StoredTensor]] = defaultdict(list)
        for name, tensor in stored.items():
            self._by_core[_core(name)].append(tensor)

    def candidates(self, name: str) -> list[StoredTensor]:
        return [self._stored[name]] if name in self._stored else self._by_core.get(_core(name), [])

    def find(self, name: str) -> StoredTensor:
        found = self.candidates(name)
        if len(found) == 1:
            return found[0]
        if found:
            both = " and ".join(repr(tensor.name) for tensor in found)
            raise UserError(f"{self._base} has {both}, either may be the adapter's {name!r}; use another --format")
        near = difflib.get_close_matches(name, self._stored, n=1, cutoff=0.0)
        raise UserError(
            f"{self._base} has no tensor {name!r}, the nearest is {near[0] if near else None!r};"
            " give the base that the adapter was trained on"
        )


def _core(name: str) -> str:
    """ "model.language_model.layers.0.x" and "language_model.model.layers.0.x" -> "layers.0.x"."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def _check(tensor: StoredTensor, shape: tuple[int, ...], name: str) -> None:
    if tensor.code not in PLAIN_FLOATS:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name!r} is stored as {tensor.code}, a quantized model;"
            " use the model's float32, bfloat16 or float16 weights as the base"
        )
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, the adapter's {name!r} needs"
            f" {list(shape)}; give the base that the adapter was trained on"
        )


def _read_config(base: Path) -> PretrainedConfig:
    if not (base / "config.json").is_file():
        raise UserError(f"{base} has no config.json; give the folder of a model in transformers' format")
    config = read_base_config(str(base), False, f"base model {base}", own_code=NO_OWN_CODE)
    for part in (config, config.get_text_config()):
        if quantization := getattr(part, "quantization_config", None):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise UserError(
                f"{base} is quantized ({method or 'unnamed method'}, quantization_config in its config.json);"
                " use the model's float32, bfloat16 or float16 weights as the base"
            )
    return config


def _is_tied(config: PretrainedConfig, name: str, shape: Iterable[int]) -> bool:
    """Whether a tensor is one of the two that the model has once: the token embedding and the output layer."""
    text = config.get_text_config()
    if not (config.tie_word_embeddings or text.tie_word_embeddings):
        return False
    in_a_layer = any(part.isdigit() for part in name.split("."))
    return next(iter(shape), None) == text.vocab_size and not in_a_layer


def _refuse_tied(config: PretrainedConfig, base: Path, name: str, shape: tuple[int, ...]) -> None:
    if _is_tied(config, name, shape):
        raise UserError(
            f"{base} ties {name!r} to another weight (tie_word_embeddings in its config.json), and an update of"
            " one would change both; use another --format, or train without this module"
        )


def _without_tied_copies(
    config: PretrainedConfig, base: Path, names: _Names, replacements: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The replacements, of two tied and equal ones only what the files hold.

    Raises:
        UserError: only one of two tied weights is replaced, or they became different.
    """
    tied = [name for name, value in replacements.items() if _is_tied(config, name, value.shape)]
    first, *others = [replacements[name] for name in tied] or [None]
    if tied and (not others or not all(torch.equal(first, other) for other in others)):
        raise UserError(
            f"{base} ties {tied[0]!r} to another weight (tie_word_embeddings in its config.json), and the adapter holds"
            " only one of them, or two that differ; use another --format"
        )
    stored = [name for name in tied if names.candidates(name)] or tied
    return {name: value for name, value in replacements.items() if name not in tied or name in stored}
