"""Hooks that count what the routers do: sums per adapted layer, on the device, without waiting for it.

What is kept does not grow with the number of tokens: one buffer per split, about 3 E numbers per layer and task.

Glossary: N tokens of a forward pass, E experts, R rank, O out_features, G groups of tokens: all, the tasks, the rest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from comol_ds.adapters.comol_layer import ADAPTER, CoMoLLinear, comol_layers
from comol_ds.adapters.router_losses import unit_cores
from comol_ds.router_load.statistics import layer_statistics
from comol_ds.router_load.sums import Sums

NOT_COUNTED = -1  # in an index of groups: padding, or a prompt's token
ALL, OTHER = "all", "other"
TRAIN, VALIDATION = "train", "validation"  # the splits of router_load.jsonl

SumOverRanks = Callable[[torch.Tensor], Any]  # sums a tensor over the ranks, in place


class RouterCounts:
    """Counts the routers of one adapter while armed.

    Args:
        model: any model with CoMoL layers.
        adapter_name: PEFT's name of the adapter.
        tasks: labels counted separately; with any, tokens of no such label are counted as ``other``.
        counts_replicated: False on ranks that see the same tokens as another one; they add only what is theirs alone.
        holds_slice: says of a layer whether this rank holds a slice of its output only.

    Raises:
        UserError: the model has no layer with such an adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str = ADAPTER,
        tasks: Sequence[str] = (),
        counts_replicated: bool = True,
        holds_slice: Callable[[CoMoLLinear], bool] = lambda layer: False,
    ) -> None:
        self.groups = (ALL, *tasks, OTHER) if tasks else (ALL,)
        self._task_group = {task: number for number, task in enumerate(self.groups) if number > 0}
        self._adapter = adapter_name
        self._replicated = counts_replicated
        self._holds_slice = holds_slice
        self._layers = comol_layers(model, adapter_name)
        self._splits: dict[str, Sums] = {}
        self._into: Sums | None = None
        self._detail = False
        self._weights: torch.Tensor | None = None  # [G, N]
        self._counted: torch.Tensor | None = None  # [G], the tokens of this pass
        self._hooks = [hook for name, layer in self._layers.items() for hook in self._watch(name, layer)]

    def group_of(self, task: str | None) -> int:
        """The number of the group, beside ``all``, in which a token of this label counts; 0 without any tasks."""
        return self._task_group.get(task, len(self.groups) - 1)

    @contextmanager
    def counting(self, split: str, index: torch.Tensor, detail: bool = True) -> Iterator[None]:
        """Count the forward passes inside; each of them has N tokens.

        Recomputation under activation checkpointing happens in backward: outside, and so it is not counted.

        Args:
            split: where the counts go, "train" or "validation" for example; see `pop`.
            index: [N] int64 on the model's device, each token's `group_of`, or NOT_COUNTED.
            detail: also measure the updates' size and the cores' cosine.
        """
        sums = self._splits.get(split)
        if sums is None:
            sums = self._splits[split] = Sums(self._layers, self._adapter, len(self.groups), index.device)
        self._weights = (index == torch.arange(len(self.groups), device=index.device).unsqueeze(1)).float()
        self._weights[0] = index >= 0
        self._counted = self._weights.sum(1, dtype=torch.float64)
        self._into, self._detail = sums, detail
        try:
            yield
        finally:
            self._into = self._weights = None

    def pop(self, split: str, sum_over_ranks: SumOverRanks = lambda flat: None) -> dict[str, Any] | None:
        """The statistics since the last call, and start anew; None if nothing was counted. Waits for the device.

        Args:
            split: as given to `counting`.
            sum_over_ranks: adds up a tensor over all ranks, in place: one call for all layers.

        Returns:
            {"tokens": {group: number}, "layers": {name: statistics}}, see `layer_statistics`; groups without tokens and
            layers whose adapter was not active are left out. A pass with adapters disabled counts no tokens.
        """
        sums = self._splits.get(split)
        if sums is None:
            return None
        sum_over_ranks(sums.flat)
        host = Sums(self._layers, self._adapter, len(self.groups), torch.device("cpu"))
        host.flat.copy_(sums.flat)
        sums.flat.zero_()
        counted = {name: gates[:, -1].tolist() for name, gates in host.gates.items() if gates[0, -1]}
        if not counted:
            return None
        most = max(counted.values())  # layers differ only where some have the adapter switched off at times
        tokens = {group: int(number) for group, number in zip(self.groups, most, strict=True) if number}
        return {"tokens": tokens, "layers": {name: layer_statistics(host, name, self.groups) for name in counted}}

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, layer: CoMoLLinear) -> list[Any]:
        hooks = [layer.partial_sums.register_forward_hook(self._base_squares(name, layer))]
        hooks.append(layer.core_output.register_forward_hook(self._update_squares(name, layer)))
        if self._replicated:
            hooks.append(layer.gates.register_forward_hook(self._gates(name, layer)))
        return hooks

    def _gates(self, name: str, layer: CoMoLLinear) -> Callable:
        def count(module: nn.Module, args: tuple, p: torch.Tensor) -> None:
            if self._into is None or args[-1] != self._adapter:
                return
            with torch.no_grad():
                weights, counted = self._weights_of(layer)
                p = self._counted_rows(p.detach().flatten(0, -2), weights, name)  # N E
                experts = p.shape[1]
                wins = torch.zeros_like(p).scatter_(1, p.argmax(1, keepdim=True), 1)
                entropy = torch.special.entr(p).sum(1, keepdim=True) / math.log(max(experts, 2))
                # fp32 sums the distances from an equal share, for cv is a small difference of large sums where gates
                # are nearly equal: of 2048 tokens with 3 gates, 3 % apart, it was wrong by up to 2e-3, now by 1e-6.
                share = torch.full((), 1 / experts, dtype=p.dtype, device=p.device)
                features = torch.cat([p - share, wins, p > 0.5, entropy], dim=1)  # N 3E+1
                sums = self._into.gates[name]
                sums[:, :-1] += weights.to(features.dtype) @ features
                sums[:, :experts] += counted.unsqueeze(1) * share
                sums[:, -1] += counted

        return count

    def _base_squares(self, name: str, layer: CoMoLLinear) -> Callable:
        mine = self._replicated or self._holds_slice(layer)

        def count(module: nn.Module, args: tuple, output: tuple) -> None:
            y, _ = output
            if self._into is None or not (self._detail and mine) or not self._passes_through(layer):
                return
            with torch.no_grad():
                if layer.mixed_names is not None:
                    y = y[self._own_rows(layer.mixed_names, y.device)]
                # no copy of [N, O]: the norm accumulates in the wider type
                norms = torch.linalg.vector_norm(y.detach(), dim=-1, dtype=_at_least_fp32(y)).flatten()
                self._into.squares[name][:, 1] += self._total(norms.square(), layer, name)

        return count

    def _update_squares(self, name: str, layer: CoMoLLinear) -> Callable:
        mine = self._replicated or self._holds_slice(layer)

        def count(module: nn.Module, args: tuple, o: torch.Tensor) -> None:
            if self._into is None or not (self._detail and mine) or args[-1] != self._adapter:
                return
            with torch.no_grad():
                # ||o B^T||^2 = o (B^T B) o^T: [R, R] instead of a second look at [N, O]
                o = o.detach().flatten(0, -2).to(_at_least_fp32(o))
                up = layer.comol_B[self._adapter].detach().to(o.dtype)
                squares = ((o @ (up.t() @ up)) * o).sum(1)
                self._into.squares[name][:, 0] += self._total(squares, layer, name)
                if self._replicated:
                    cosine = mean_cosine(layer.comol_cores[self._adapter].detach())
                    self._into.cosine[name] += torch.stack([cosine, torch.ones_like(cosine)])

        return count

    def _passes_through(self, layer: CoMoLLinear) -> bool:
        """Whether a row of this forward of the layer goes through the adapter that is counted."""
        return not layer.disable_adapters and self._adapter in (layer.mixed_names or layer.active_adapters)

    def _own_rows(self, mixed_names: Sequence[str], device: torch.device) -> torch.Tensor:
        """[B] bool: the rows of a mixed batch that go through the adapter."""
        return torch.tensor([name == self._adapter for name in mixed_names], device=device)

    def _weights_of(self, layer: CoMoLLinear) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [G, n] of the n tokens that go through the adapter here, and their sum [G]."""
        if layer.mixed_names is None:
            return self._weights, self._counted
        by_row = self._weights.unflatten(1, (len(layer.mixed_names), -1))  # G B T
        weights = by_row[:, self._own_rows(layer.mixed_names, by_row.device)].flatten(1)
        return weights, weights.sum(1, dtype=torch.float64)

    def _counted_rows(self, rows: torch.Tensor, weights: torch.Tensor, name: str) -> torch.Tensor:
        """[n, ...] in at least fp32, zero where nothing is counted: padding may hold anything, even NaN."""
        if rows.shape[0] != weights.shape[1]:
            raise ValueError(
                f"{name} was called with {rows.shape[0]} tokens while {weights.shape[1]} were to be counted;"
                " count whole forward passes of a model that runs every adapted layer on all tokens"
            )
        ignored = (weights[0] == 0).view(-1, *[1] * (rows.dim() - 1))
        return rows.to(_at_least_fp32(rows)).masked_fill(ignored, 0)

    def _total(self, values: torch.Tensor, layer: CoMoLLinear, name: str) -> torch.Tensor:
        """values [n] -> [G], their sums over the groups."""
        weights, _ = self._weights_of(layer)
        return weights.to(values.dtype) @ self._counted_rows(values, weights, name).to(values.dtype)


def mean_cosine(cores: torch.Tensor) -> torch.Tensor:
    """cores [E, R, R] -> mean cosine over all pairs of different cores, 0 for a single core.

    From the sum s of the unit vectors: sum over i != j of u_i u_j = ||s||^2 - E.
    """
    units = unit_cores(cores)
    experts = cores.shape[0]
    return (units.sum(0).square().sum() - units.square().sum()) / max(experts * (experts - 1), 1)


def _at_least_fp32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
