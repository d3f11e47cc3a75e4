"""Counts bytes while a model runs: what autograd saves, and what is alive.

Both count storages, each once, however many tensors look at it.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """What backward will need, but for the model's own parameters and buffers. A context around a forward pass.

    Attributes:
        storages: bytes of each, in the order in which they were saved.
        views: bytes of each distinct view of them: what is copied if every saved tensor is copied.
    """

    def __init__(self, own: Iterable[torch.Tensor]) -> None:
        """``own``: tensors that exist anyway."""
        super().__init__(self._pack, lambda tensor: tensor)
        self.storages: list[int] = []
        self.views: list[int] = []
        # a storage that is freed could hand its address to another, so all are held
        self._own = {address(tensor): tensor.untyped_storage() for tensor in own}
        self._saved: dict[int, torch.UntypedStorage] = {}
        self._views: set[tuple] = set()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = address(tensor)
        if key in self._own:
            return tensor
        if key not in self._saved:
            self._saved[key] = tensor.untyped_storage()
            self.storages.append(self._saved[key].nbytes())
        view = (key, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if view not in self._views:
            self._views.add(view)
            self.views.append(tensor.nbytes)
        return tensor

    def release(self) -> None:
        """Hold no storage any longer: backward is to free them."""
        self._saved.clear()


class LiveBytes(TorchDispatchMode):
    """Memory of the tensors that operations inside this context made: now, and at the highest since `restart`."""

    def __init__(self, own: Iterable[torch.Tensor]) -> None:
        """``own``: tensors that exist anyway; views of them are no new memory."""
        super().__init__()
        self.now = self.highest = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in own)

    def restart(self) -> int:
        """Forget the highest; returns what is alive now."""
        self.highest = self.now
        return self.now

    def __torch_dispatch__(
        self, operation: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        nbytes = storage.nbytes()
        self.now += nbytes
        self.highest = max(self.highest, self.now)
        weakref.finalize(storage, self._drop, nbytes)

    def _drop(self, nbytes: int) -> None:
        self.now -= nbytes


def address(tensor: torch.Tensor) -> int:
    """The same for tensors that look at the same storage, as long as one of them lives."""
    return tensor.untyped_storage()._cdata
