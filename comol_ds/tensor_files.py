"""The safetensors files of a model: which tensor lies where, to the byte, and how such bytes are read.

A file is 8 little-endian bytes with the length of its header, the header, which is JSON of name -> dtype, shape and
data_offsets, and the tensors, row by row (https://huggingface.co/docs/safetensors/index#format).
"""

import errno
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from comol_ds.errors import UserError, one_line
from comol_ds.text_files import parse_json, read_json

# In which a number stands for itself; in the others it means nothing without the scales of its quantization.
PLAIN_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES = PLAIN_FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own reader
_LONGEST_NAME = 255  # bytes between two slashes; Linux's file systems have no longer ones
_NO_PERMISSIONS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS)  # what CIFS and FUSE say of chmod
_MOST_DIMENSIONS = 64  # of a tensor in torch
_WINDOW_BYTES = 128 << 10  # Linux's default limit of what one advice fetches


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
    def dtype(self) -> torch.dtype | None:
        """None for a code that is no dtype of torch."""
        return _DTYPES.get(self.code)


class TensorFiles:
    """One ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

    Attributes:
        path: the file, or the index.
    """

    def __init__(self, path: Path, fetch: Callable[[list[str]], object] = lambda files: None) -> None:
        """Read the index, if ``path`` is one; the headers are read when they are first asked for.

        Args:
            path: the file, or the index.
            fetch: called with the names of the index's files, to put those beside it that are not there.

        Raises:
            UserError: the index is damaged, or names a missing file or one outside its folder.
        """
        self.path = path
        promised = _read_index(path) if path.name == SAFE_WEIGHTS_INDEX_NAME else {}
        places = {file: _place_of(file, path) for file in sorted(set(promised.values()))}
        if places:
            fetch(list(places))
        for file, place in places.items():
            if not place.is_file():
                raise UserError(f"{path} names {file}, which is missing; copy or download it again")
        self._promised = {name: places[file] for name, file in promised.items()}

    @property
    def files(self) -> list[Path]:
        """The index, if there is one, and every file with tensors."""
        return [self.path, *sorted(set(self._promised.values()))]

    @cached_property
    def by_file(self) -> dict[Path, list[StoredTensor]]:
        """Every file's tensors by their place; a name stands in one file.

        Raises:
            UserError: a file cannot be read, is damaged or cut short, has a tensor that another one has, or lacks what
                the index promises of it.
        """
        if not self._promised:
            return {self.path: read_header(self.path)}
        headers = {file: read_header(file) for file in self.files[1:]}
        places: dict[str, Path] = {}
        for file, tensors in headers.items():
            for tensor in tensors:
                if (other := places.setdefault(tensor.name, file)) != file:
                    raise UserError(
                        f"{self.path.parent}: tensor {tensor.name!r} is in {other.name} and in {file.name};"
                        " copy or download the model again"
                    )
        for name, file in self._promised.items():
            if places.get(name) != file:
                raise UserError(
                    f"{file} has no tensor {name!r}, {self.path.name} says it has; copy or download both again"
                )
        return headers

    @cached_property
    def by_name(self) -> dict[str, StoredTensor]:
        """The tensors of all files; raises as ``by_file`` does."""
        return {tensor.name: tensor for tensors in self.by_file.values() for tensor in tensors}


def listed_file(folder: Path, name: str) -> Path:
    """The file in ``folder`` or below it that an index or a manifest lists under ``name``.

    Only the name is judged. Symbolic links in the folder are followed: the hub's cache is made of them.

    Raises:
        ValueError: the name leads out of the folder, or cannot be a file's.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise ValueError(f"{name!r:.200} does not lie in the folder")
    # backslashes separate folders for a reader on Windows, where the listed file would be another one
    if "\\" in name or not name.isprintable() or max(len(part.encode()) for part in parts) > _LONGEST_NAME:
        raise ValueError(f"{name!r:.200} is no file name")
    return folder / name


def _place_of(file: str, index: Path) -> Path:
    try:
        return listed_file(index.parent, file)
    except ValueError as error:
        raise UserError(f"{index} names a file that is not read: {error}; download the model again") from error


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> name of its file."""
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"{path} cannot be read as JSON, copy or download it again: {one_line(error)}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
        raise UserError(f"{path} has no weight_map of tensor names to file names; copy or download it again")
    return weight_map


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file by their place: every byte after the header belongs to one of them.

    Raises:
        UserError: the file is missing, damaged or cut short.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"it has {size} bytes, and a header of {length} is announced")
            header = parse_json(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        tensors = [_parse_entry(name, entry, file, 8 + length, size) for name, entry in header.items()]
        # The format's own reader finds the rest: gaps, overlaps, sizes of dtypes that torch does not have. It maps the
        # file for a moment and, asked for "np", touches the header only; for "pt" torch maps the file once more.
        with safe_open(file, "np"):
            pass
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: not UTF-8, not JSON, or raised here
        raise UserError(
            f"{file} cannot be read as safetensors, copy or download it again: {one_line(error, limit=300)}"
        ) from error
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop))


def _parse_entry(name: str, entry: Any, file: Path, data: int, size: int) -> StoredTensor:
    """One tensor of a header, whose bytes all lie in the file; ``data`` is where the tensors start."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if type(code) is not str or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise ValueError("no name, or a number that is negative, fractional or beyond any file")
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError("more dimensions than a tensor has")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r} has no dtype, shape and data_offsets in the header") from error
    if begin > end or data + end > size:
        raise ValueError(f"tensor {name!r} lies at bytes {data + begin} to {data + end} of a file of {size}")
    tensor = StoredTensor(name, file, code, shape, data + begin, data + end)
    if tensor.dtype is not None and math.prod(shape) * tensor.dtype.itemsize != end - begin:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} and dtype {code} has {end - begin} bytes")
    return tensor


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a new safetensors file with the permissions that the umask, or the folder's access list, gives.

    safetensors 0.8 renames a temporary file, which its owner alone may read, over the name. On a mount that keeps no
    permissions, or those of another owner, the file stands as the mount makes it.

    Raises:
        FileExistsError: there is a file of this name.
        OSError, SafetensorError: the disk is full or fails.
    """
    path.touch(exist_ok=False)
    given = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    if stat.S_IMODE(path.stat().st_mode) != given:
        try:
            path.chmod(given)
        except OSError as error:
            if error.errno not in _NO_PERMISSIONS:
                raise


def prefetch(file: int, start: int, stop: int) -> None:
    """Let the disk read bytes [start, stop) of an open file ahead of whoever wants them."""
    for place in range(start, stop, _WINDOW_BYTES):
        os.posix_fadvise(file, place, min(_WINDOW_BYTES, stop - place), os.POSIX_FADV_WILLNEED)


def read_at(file: int, place: int, memory: memoryview) -> None:
    """Fill ``memory`` with the bytes of an open file from ``place`` on.

    Raises:
        OSError: the disk fails.
        EOFError: the file ends before the memory is full.
    """
    while memory:
        got = os.preadv(file, [memory], place)
        if got == 0:
            raise EOFError(f"the file ends at byte {os.fstat(file).st_size}, before the tensor does")
        memory, place = memory[got:], place + got
