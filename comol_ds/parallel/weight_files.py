"""The safetensors weights of a model, read by name and by slice: a rank reads the part it holds and no more."""

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files

from comol_ds.errors import UserError, one_line
from comol_ds.layout import Shard

_PLAIN_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class WeightFiles:
    """One ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

    A file is opened at its first read and stays open until ``close()``. All of them are memory-mapped: a disk that
    fails, or a file that is cut short, under an open handle ends the process with SIGBUS and not with an exception.
    """

    def __init__(self, model_path: str) -> None:
        """Locate the files of a folder or hub name, downloading what the cache lacks.

        Raises:
            UserError: no safetensors weights, a damaged index, or one that names a missing file.
        """
        self._handles: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        self.path = _locate(model_path)
        if self.path.name == SAFE_WEIGHTS_INDEX_NAME:
            self._file_of = _read_index(model_path, self.path)
        else:
            self._file_of = dict.fromkeys(self._handle(self.path).keys(), self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files; a later read opens them again."""
        self._handles.clear()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def find(self, parameter_name: str) -> str:
        """The name in the files of a parameter of the model: the same name.

        Raises:
            UserError: the files hold no such tensor.
        """
        if parameter_name not in self._file_of:
            near = difflib.get_close_matches(parameter_name, self._file_of, n=1, cutoff=0.0)
            raise UserError(
                f"{self.path} has no tensor {parameter_name!r}, the nearest is {near[0] if near else None!r};"
                " use the weights that belong to the model's config.json"
            )
        return parameter_name

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape; raises as ``read`` does."""
        return tuple(self._slices(name).get_shape())

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Compare the whole tensor's shape with the one that follows from the model's configuration.

        Raises:
            UserError: they differ; or as ``read`` does.
        """
        found = self.shape(name)
        if found != tuple(expected):
            raise UserError(
                f"{self._file_of[name]}: tensor {name!r} has shape {list(found)}, the model's config.json makes it"
                f" {list(expected)}; use the config.json that was saved with the weights"
            )

    def read(self, name: str, shard: Shard | None, dtype: torch.dtype) -> torch.Tensor:
        """One tensor, or the part of it that ``shard`` names, as a contiguous CPU tensor with memory of its own.

        Raises:
            UserError: no such tensor, a file that cannot be opened or read, or a quantized tensor where floating
                point is wanted: its codes mean nothing without their scales.
        """
        slices = self._slices(name)
        index: tuple[Any, ...] = (...,)
        if shard is not None:
            # safetensors cuts a range that is too long without a word
            assert 0 <= shard.start <= shard.stop <= slices.get_shape()[shard.dim], (name, shard)
            index = (slice(None),) * shard.dim + (slice(shard.start, shard.stop),)
        with _user_error(self._file_of[name]):
            mapped = slices[index]
        if dtype.is_floating_point and mapped.dtype not in _PLAIN_FLOATS:
            raise UserError(
                f"{self._file_of[name]}: tensor {name!r} is stored as {mapped.dtype}, a quantized model;"
                " use the model's float32, bfloat16 or float16 weights"
            )
        # a slice is a view of the mapping, and what is written to it would come back in every later read
        return mapped.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def _slices(self, name: str) -> Any:
        file = self._file_of[self.find(name)]
        handle = self._handle(file)
        with _user_error(file):
            return handle.get_slice(name)

    def _handle(self, file: Path) -> Any:
        """The open file, which holds every tensor that the index promises of it."""
        if file not in self._handles:
            with _user_error(file):
                handle = safe_open(file, framework="pt", device="cpu")
            held = set(handle.keys())
            missing = [name for name, promised in self._file_of.items() if promised == file and name not in held]
            if missing:
                raise UserError(
                    f"{file} has no tensor {missing[0]!r}, {self.path.name} says it has; copy or download both again"
                )
            self._handles[file] = handle
        return self._handles[file]


@contextmanager
def _user_error(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} cannot be read as safetensors, copy or download it again: {one_line(error, limit=300)}"
        ) from error


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


def _read_index(model_path: str, path: Path) -> dict[str, Path]:
    """The file of every tensor that the index names; all of them are there."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"{path} cannot be read as JSON, copy or download it again: {one_line(error)}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not {type(file) for file in weight_map.values()} == {str}:
        raise UserError(f"{path} has no weight_map of tensor names to file names; copy or download it again")
    files = sorted(set(weight_map.values()))
    _fetch(model_path, files)
    for file in files:
        if not (path.parent / file).is_file():
            raise UserError(f"{path} names {file}, which is missing; copy or download it again")
    return {name: path.parent / file for name, file in weight_map.items()}


def _fetch(model_path: str, files: list[str]) -> list[Path]:
    """Those of the files that the folder or hub name has, downloaded into the hub's cache if need be."""
    try:
        found = cached_files(model_path, files, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {model_path} cannot be loaded: {one_line(error, limit=300)}") from error
    return [Path(file) for file in found or []]
