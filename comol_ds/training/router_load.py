"""How the routers spread tokens over the experts: per adapted layer, mean gate and share of the arg-max, per expert.

Counted on the device over valid tokens only, once per token, reduced over the ranks at logging steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from comol_ds.adapters.routing import Gates
from comol_ds.parallel.groups import sum_over_data_parallel


class RouterLoad:
    """Collects gates from every `Gates` module of a model while armed.

    Recomputation under activation checkpointing happens in backward, outside `counting`, and so is not counted.
    """

    def __init__(self, model: torch.nn.Module):
        self._mask: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}  # layer -> [2, E]: sums of gates, counts of arg-max
        self._tokens: torch.Tensor | None = None
        self._hooks = [
            module.register_forward_hook(self._hook(_layer_name(name)))
            for name, module in model.named_modules()
            if isinstance(module, Gates)
        ]

    @contextmanager
    def counting(self, valid: torch.Tensor) -> Iterator[None]:
        """Count the forward passes inside. valid: [B, T] bool, True where a real token stands."""
        self._mask = valid.flatten()  # N
        counted = self._mask.sum(dtype=torch.float64)
        self._tokens = counted if self._tokens is None else self._tokens + counted
        try:
            yield
        finally:
            self._mask = None

    def pop(self) -> dict[str, Any] | None:
        """Means over all ranks since the last call, and start anew; None if nothing was counted. A collective call.

        Returns:
            {"tokens": number, "layers": {name: {"mean_gate": [E], "argmax_share": [E]}}}
        """
        if self._tokens is None or not self._sums:
            return None
        names = list(self._sums)
        packed = torch.cat([self._tokens.view(1), *(self._sums[name].flatten() for name in names)])
        sum_over_data_parallel(packed)
        tokens, values = packed[0].item(), packed[1:].cpu() / packed[0].clamp(min=1).cpu()
        layers, start = {}, 0
        for name in names:
            experts = self._sums[name].shape[1]
            gate, argmax = values[start : start + 2 * experts].view(2, experts).tolist()
            layers[name] = {"mean_gate": gate, "argmax_share": argmax}
            start += 2 * experts
        self._sums, self._tokens = {}, None
        return {"tokens": int(tokens), "layers": layers}

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, layer: str):
        def count(module: Gates, args: tuple, gates: torch.Tensor) -> None:
            if self._mask is None:
                return
            with torch.no_grad():
                experts = gates.shape[-1]
                flat = gates.detach().reshape(-1, experts)  # N E
                weight = self._mask.to(flat.dtype)  # N
                argmax = torch.zeros(experts, dtype=torch.float64, device=flat.device)
                argmax.index_add_(0, flat.argmax(-1), self._mask.double())
                sums = torch.stack([(weight.float() @ flat.float()).double(), argmax])
                self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

        return count


def _layer_name(module_name: str) -> str:
    """base_model.model.model.layers.0.self_attn.q_proj.<gates> -> model.layers.0.self_attn.q_proj"""
    return module_name.rsplit(".", 1)[0].removeprefix("base_model.model.")
