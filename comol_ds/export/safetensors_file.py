"""The safetensors files of a model on this machine: which they are, and at which byte each tensor lies.

A file is 8 little-endian bytes with the length of its header, the header, which is JSON of name -> dtype, shape and
data_offsets, and the tensors, row by row (https://huggingface.co/docs/safetensors/index#format).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from comol_ds.errors import UserError, one_line

# In which a number stands for itself; in the others it means nothing without the scales of its quantization.
PLAIN_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        code: the format's name of the dtype, such as "BF16".
        start, stop: bytes [start, stop) of the file.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """Of a tensor that is not quantized."""
        return PLAIN_FLOATS[self.code]

    @property
    def row(self) -> int:
        """Elements per entry of dimension 0."""
        return math.prod(self.shape[1:])

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class WeightFiles:
    """A model's weights.

    Attributes:
        tensors: file -> its tensors by their place; every name stands in one file.
        index: the JSON file that says which tensor lies where; None where one file holds all.
    """

    tensors: dict[Path, list[StoredTensor]]
    index: Path | None

    @property
    def by_name(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensors in self.tensors.values() for tensor in tensors}


def read_weight_files(folder: Path) -> WeightFiles:
    """The files that transformers' from_pretrained would load; only headers are read.

    Raises:
        UserError: there are none, or a file or the index is missing, damaged or disagrees with the others.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return WeightFiles({single: read_header(single)}, None)
    if not index.is_file():
        raise UserError(
            f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME};"
            " load the model and write it with transformers' save_pretrained"
        )
    promised = _read_index(index)
    files = {file: read_header(folder / file) for file in sorted(set(promised.values()))}
    places: dict[str, str] = {}
    for file, tensors in files.items():
        for tensor in tensors:
            if tensor.name in places:
                raise UserError(
                    f"{folder}: tensor {tensor.name!r} is in {places[tensor.name]} and in {file};"
                    " download the model again"
                )
            places[tensor.name] = file
    for name, file in promised.items():
        if places.get(name) != file:
            raise UserError(f"{folder / file} has no tensor {name!r}, {index.name} says it has; download both again")
    return WeightFiles({folder / file: tensors for file, tensors in files.items()}, index)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file by their place.

    Raises:
        UserError: the file is missing, damaged or cut short.
    """
    try:
        with safe_open(file, "pt"):  # checks all that is relied on below: every byte belongs to one tensor
            pass
        with file.open("rb") as stream:
            data = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(data - 8))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read, copy or download it again: {one_line(error, limit=300)}") from error
    header.pop("__metadata__", None)
    tensors = [
        StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), *(data + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    ]
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop))


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> name of its file."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"{path} cannot be read, copy or download it again: {one_line(error)}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
        raise UserError(f"{path} has no weight_map of tensor names to file names; copy or download it again")
    return weight_map
