"""A placement tried without process groups: K slices of a model on K threads, which add their partial sums."""

import copy
import threading

import torch
import torch.nn.functional as F
from torch import nn


class _Sum:
    """Adds one tensor of every thread and gives the sum to all."""

    def __init__(self, parts: int) -> None:
        self.parts = [None] * parts
        self.barrier = threading.Barrier(parts, timeout=30)

    def __call__(self, index: int, x: torch.Tensor) -> torch.Tensor:
        self.parts[index] = x
        self.barrier.wait()
        total = sum(self.parts)
        self.barrier.wait()  # nobody overwrites a part that another still adds
        return total


class _RowSlice(nn.Module):
    def __init__(self, linear: nn.Linear, index: int, add: _Sum) -> None:
        super().__init__()
        self.linear, self.index, self.add = linear, index, add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.add(self.index, F.linear(x, self.linear.weight))
        return y if self.linear.bias is None else y + self.linear.bias


def _slice(model: nn.Module, placement: dict[str, str], index: int, add: _Sum) -> nn.Module:
    model, parts = copy.deepcopy(model), len(add.parts)
    for name, kind in placement.items():
        linear = model.get_submodule(name)
        linear.weight.data = linear.weight.data.chunk(parts, dim=0 if kind == "column" else 1)[index]
        if kind == "row":
            model.set_submodule(name, _RowSlice(linear, index, add))
        elif linear.bias is not None:
            linear.bias.data = linear.bias.data.chunk(parts)[index]
    return model


def logits_of_slices(model: nn.Module, placement: dict[str, str], parts: int, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each of ``parts`` slices of the model answers to [B, T] ids."""
    add, answers = _Sum(parts), [None] * parts

    def run(index: int) -> None:
        try:
            with torch.no_grad():
                answers[index] = _slice(model, placement, index, add)(input_ids=ids, use_cache=False).logits
        except Exception:
            add.barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(index,)) for index in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
