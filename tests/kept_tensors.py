"""Which tensors an operation makes, and which of them are still alive afterwards, whoever keeps them and however.

What autograd saves is only a part of it: torch's checkpoint keeps keyword arguments in a closure, DeepSpeed's keeps its
arguments in attributes. Memory is what counts here: a storage once, however many tensors look at it.
"""

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Made:
    """A storage that an operation filled first, seen as the tensor that came out of it."""

    source: StorageWeakRef
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class MadeTensors(TorchDispatchMode):
    """Inside, every new storage is noted; operations on meta tensors count as well, at the size they would have."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Made] = {}
        self._older: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self._older |= inputs - self.made.keys()
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and _address(tensor) not in self._older:
                storage = tensor.untyped_storage()
                made = Made(StorageWeakRef(storage), tuple(tensor.shape), tensor.dtype, storage.nbytes())
                self.made.setdefault(_address(tensor), made)  # the weak reference keeps the address from being reused
        return outputs

    def alive(self) -> list[Made]:
        """Those that something still holds."""
        gc.collect()
        return [made for made in self.made.values() if not made.source.expired()]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def total_bytes(tensors: list[Made]) -> int:
    return sum(made.nbytes for made in tensors)
