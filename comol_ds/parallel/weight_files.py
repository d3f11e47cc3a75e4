"""Where the weights are that a model is loaded from: found on the disk or downloaded, and matched to its parameters."""

import difflib
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files

from comol_ds.errors import UserError, one_line
from comol_ds.tensor_files import PLAIN_FLOATS, StoredTensor, TensorFiles


class WeightFiles(TensorFiles):
    """The files that hold the parameters of a model."""

    def __init__(self, model_path: str) -> None:
        """Locate the files of a folder or hub name, downloading what the cache lacks.

        Raises:
            UserError: no safetensors weights, a damaged index, or one that names a missing file.
        """
        super().__init__(_locate(model_path), lambda files: _fetch(model_path, files))

    def find(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
        """The tensor for a whole parameter of the model.

        Raises:
            UserError: the files hold none of this name, one of another shape, or a quantized one where floating point
                is wanted: its codes mean nothing without their scales; or as ``by_name`` does.
        """
        if name not in self.by_name:
            near = difflib.get_close_matches(name, self.by_name, n=1, cutoff=0.0)
            raise UserError(
                f"{self.path} has no tensor {name!r}, the nearest is {near[0] if near else None!r};"
                " use the weights that belong to the model's config.json"
            )
        tensor = self.by_name[name]
        if tensor.dtype is None or (dtype.is_floating_point and tensor.code not in PLAIN_FLOATS):
            raise UserError(
                f"{tensor.file}: tensor {name!r} is stored as {tensor.code}, a quantized model;"
                " use the model's float32, bfloat16 or float16 weights"
            )
        if tensor.shape != tuple(shape):
            raise UserError(
                f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}, the model's config.json makes it"
                f" {list(shape)}; use the config.json that was saved with the weights"
            )
        return tensor


def _locate(model_path: str) -> Path:
    """The single file or else the index: the order of transformers' from_pretrained."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if found := _fetch(model_path, [name]):
            return found[0]
    if Path(model_path).is_dir():
        remedy = "load the model and write it there with transformers' save_pretrained"
    else:
        remedy = "check the connection to the hub, or give a folder that transformers' save_pretrained wrote"
    raise UserError(
        f"--model_name_or_path {model_path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; {remedy}"
    )


def _fetch(model_path: str, files: list[str]) -> list[Path]:
    """Those of the files that the folder or hub name has, downloaded into the hub's cache if need be."""
    try:
        found = cached_files(model_path, files, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_name_or_path {model_path} cannot be loaded; check the name and the connection to the hub, or give"
            f" a folder: {one_line(error, limit=300)}"
        ) from error
    return [Path(file) for file in found or []]
