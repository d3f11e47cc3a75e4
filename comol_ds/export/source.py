"""What an export starts from: an adapter folder, wherever it lies, and the base model it was trained on."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from comol_ds.adapters.adapter_folder import CONFIG_FILE, TENSOR_FILE, read_adapter
from comol_ds.adapters.config import CoMoLConfig
from comol_ds.adapters.kept_tokenizer import has_tokenizer
from comol_ds.checkpoint_names import MARKER, by_step
from comol_ds.errors import UserError, one_line, shown
from comol_ds.output_folder import RUN_MARK
from comol_ds.tensor_files import TensorFiles
from comol_ds.text_files import read_yaml

# Of a hub repository: weights in the one format that is read here, and the small files beside them.
_HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class AdapterSource:
    """A trained adapter.

    Attributes:
        folder: the adapter folder.
        run: settings of the run that trained it, flag -> value, as its config.yaml has them; None if unknown.
        base: the base model's folder or hub name.
        config, tensors: the adapter, as `read_adapter` returns it.
    """

    folder: Path
    run: dict[str, Any] | None
    base: str
    config: CoMoLConfig
    tensors: dict[str, torch.Tensor]

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is read from: the adapter's folder if it lies there, the run's --tokenizer_name, or the
        base."""
        if has_tokenizer(self.folder):
            return str(self.folder)
        return (self.run or {}).get("tokenizer_name") or self.base


def find_adapter(checkpoint: str | os.PathLike, base: str | None = None) -> AdapterSource:
    """The adapter of a run folder, of one of its checkpoints, or of an adapter folder.

    A run gives its final adapter, or that of its newest committed checkpoint if it has not ended.

    Args:
        checkpoint: the folder.
        base: base model folder or hub name, instead of the one that the adapter names.

    Raises:
        UserError: nothing of the kind is there, or it cannot be read.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run's --output_dir or an adapter folder")
    folder = next((found for found in _candidates(path) if _is_adapter(found)), None)
    if folder is None:
        raise UserError(
            f"{path} holds no adapter: neither {CONFIG_FILE} and {TENSOR_FILE}, nor adapter/, nor a committed"
            " checkpoint"
        )
    config, tensors = read_adapter(folder)
    base = base or config.base_model_name_or_path
    if not base:
        raise UserError(f"{folder / CONFIG_FILE} names no base model; give --model_name_or_path")
    return AdapterSource(folder, _settings(folder), base, config, tensors)


def base_folder(base: str) -> Path:
    """The base model's files on this machine: a folder as it is, a hub repository downloaded (or cached).

    Raises:
        UserError: it is neither.
    """
    if os.path.isdir(base):  # which answers no to a name that no disk can hold
        return Path(base)
    try:
        return Path(snapshot_download(base, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"base model {base!r} is neither a folder nor available from the hub; give --model_name_or_path:"
            f" {one_line(error)}"
        ) from error


def weights_in(folder: Path) -> TensorFiles:
    """The files of a folder that transformers' from_pretrained would load; only headers are read.

    Raises:
        UserError: there are none, or as `TensorFiles` does.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            return TensorFiles(folder / name)
    raise UserError(
        f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME};"
        " load the model and write it with transformers' save_pretrained"
    )


def _candidates(path: Path) -> Iterable[Path]:
    yield path
    yield path / "adapter"
    for checkpoint in by_step(path / "checkpoints"):
        if (checkpoint / MARKER).exists():
            yield checkpoint / "adapter"


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _settings(folder: Path) -> dict[str, Any] | None:
    """Of the run whose folder this adapter folder lies in: RUN/adapter or RUN/checkpoints/step_<n>/adapter."""
    for run in list(folder.absolute().parents)[:3]:
        path = run / "config.yaml"
        # other programs write files of this name too
        if path.is_file() and any((run / name).exists() for name in (RUN_MARK, "ds_config.json")):
            try:
                return _checked_settings(read_yaml(path))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read as a run's settings: {one_line(error)}") from error
    return None


def _checked_settings(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("it holds no 'flag: value' lines")
    if not isinstance(values.get("tokenizer_name"), str | None):
        raise ValueError(f"tokenizer_name is {shown(values['tokenizer_name'])}, no folder or hub name")
    return values
