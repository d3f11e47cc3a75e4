"""The safetensors files of a model: which tensor lies where, to the byte. Only headers are read here.

A file is 8 little-endian bytes with the length of its header, the header, which is JSON of name -> dtype, shape and
data_offsets, and the tensors, row by row (https://huggingface.co/docs/safetensors/index#format).
"""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files

from comol_ds.errors import UserError, one_line
from comol_ds.layout import Shard

_PLAIN_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own reader


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        code: the format's name of the dtype, such as "BF16".
        offset: byte of the file at which the first element starts.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a code that is no dtype of torch."""
        return _DTYPES.get(self.code)

    def runs(self, shard: Shard | None, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Where elements [start, start + count) of the flattened part ``shard`` lie: (byte of the file, bytes).

        One run where the part is contiguous, as it is for None and along dimension 0; otherwise one per row.
        """
        width = row = math.prod(self.shape)  # elements that follow each other, and to the next such run
        skipped = 0  # elements of a row before the part
        if shard is not None and shard.size < self.shape[shard.dim]:
            inner = math.prod(self.shape[shard.dim + 1 :])
            row, width = self.shape[shard.dim] * inner, shard.size * inner
            skipped = shard.start * inner
        itemsize, position, stop = self.dtype.itemsize, start, start + count
        while position < stop:
            number, column = divmod(position, width)
            length = min(width - column, stop - position)
            yield self.offset + itemsize * (number * row + skipped + column), itemsize * length
            position += length


class WeightFiles:
    """One ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names."""

    def __init__(self, model_path: str) -> None:
        """Locate the files of a folder or hub name, downloading what the cache lacks.

        Raises:
            UserError: no safetensors weights, a damaged index, or one that names a missing file.
        """
        self.path = _locate(model_path)
        is_index = self.path.name == SAFE_WEIGHTS_INDEX_NAME
        self._promised = _read_index(model_path, self.path) if is_index else {}

    @property
    def files(self) -> list[Path]:
        """The index, if there is one, and every file with tensors."""
        return [self.path, *sorted(set(self._promised.values()))]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name, from the headers of all files.

        Raises:
            UserError: a file that cannot be read, is damaged or cut short, or lacks what the index promises of it.
        """
        if not self._promised:
            return _read_header(self.path)
        headers = {file: _read_header(file) for file in sorted(set(self._promised.values()))}
        for name, file in self._promised.items():
            if name not in headers[file]:
                raise UserError(
                    f"{file} has no tensor {name!r}, {self.path.name} says it has; copy or download both again"
                )
        return {name: headers[file][name] for name, file in self._promised.items()}

    def find(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
        """The tensor for a whole parameter of the model.

        Raises:
            UserError: the files hold none of this name, one of another shape, or a quantized one where floating point
                is wanted: its codes mean nothing without their scales; or as ``tensors`` does.
        """
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=1, cutoff=0.0)
            raise UserError(
                f"{self.path} has no tensor {name!r}, the nearest is {near[0] if near else None!r};"
                " use the weights that belong to the model's config.json"
            )
        tensor = self.tensors[name]
        if tensor.dtype is None or (dtype.is_floating_point and tensor.dtype not in _PLAIN_FLOATS):
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


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"it has {size} bytes, and a header of {length} is announced")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        return {name: _parse_entry(name, entry, file, 8 + length, size) for name, entry in header.items()}
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or raised here
        raise UserError(
            f"{file} cannot be read as safetensors, copy or download it again: {one_line(error, limit=300)}"
        ) from error


def _parse_entry(name: str, entry: Any, file: Path, data: int, size: int) -> StoredTensor:
    """One tensor of a header, whose bytes all lie in the file; ``data`` is where the tensors start."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError("a negative or fractional number")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r} has no dtype, shape and data_offsets in the header") from error
    if begin > end or data + end > size:
        raise ValueError(f"tensor {name!r} lies at bytes {data + begin} to {data + end} of a file of {size}")
    tensor = StoredTensor(name, file, code, shape, data + begin)
    if tensor.dtype is not None and math.prod(shape) * tensor.dtype.itemsize != end - begin:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} and dtype {code} has {end - begin} bytes")
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
