"""Routing: from a token's features to its gates over the experts.

Glossary: E experts; the leading dimensions are whatever the layer was called with.
"""

import torch
from torch import nn

ROUTERS = ("core", "input")


class Gates(nn.Module):
    """logits [..., E] -> gates p [..., E], softmax over the experts.

    A module without parameters so that whoever wants router statistics, or a loss on them, can register a forward hook
    on it and read logits, adapter and p, or replace p; the layer itself knows no such listener. The softmax is computed
    in at least fp32 and returned in `dtype`.
    """

    def forward(self, logits: torch.Tensor, dtype: torch.dtype, adapter_name: str = "default") -> torch.Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return torch.softmax(logits, dim=-1, dtype=wide).to(dtype)


# What the down-projection leaves for routing: h [..., R], and the logits [..., E] where they are formed from x.
Routed = tuple[torch.Tensor, torch.Tensor | None]


class PartialSums(nn.Module):
    """Seam for a row-parallel base: what turns this rank's partial sums into whole ones, all in one collective.

    In one process everything is whole already and passes unchanged. The logits are None for the core router, whose
    logits are computed from the whole h afterwards: softmax is not linear, so partial sums may not go further.
    """

    def forward(self, y: torch.Tensor, routed: list[Routed]) -> tuple[torch.Tensor, list[Routed]]:
        """y [..., O] of the base, and one pair per active adapter."""
        return y, routed


class CoreOutput(nn.Module):
    """Seam behind the cores, for whoever measures the update s * (h M) B^T without forming it: o = s * h M passes."""

    def forward(self, o: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """o [..., R] of the adapter of this name."""
        return o


class InputDropout(nn.Module):
    """Seam for a row-parallel base: dropout on the layer's input x, of which each rank then holds other columns."""

    def forward(self, x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
        return dropout(x)
