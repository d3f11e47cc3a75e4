"""The gradients of one step between the last backward and the update: completed over tensor parallelism, measured.

Beside a column-parallel base, A, the router and the cores are replicated, but a rank sees the loss only through its own
slice of the outputs. Backward is linear in the gradient from above, so the terms may travel through the cores and the
router, pile up over the micro-batches, and be added at the end, in one all-reduce for the whole model.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from torch import nn

from comol_ds.parallel.mesh import Mesh


class Gradients:
    """The trainable parameters' gradients of one engine."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._mesh = mesh
        self._engine = engine
        self._stage = engine.zero_optimization_stage()
        self._trainable = [p for p in engine.module.parameters() if p.requires_grad]
        self._partial = [p for p in self._trainable if getattr(p, "gradient_is_partial", False)]

    def update(self) -> float:
        """Complete the gradients and let the engine take its step; the global norm before clipping. Collective."""
        self._sum_partial()
        norm = self._plain_norm() if self._stage == 0 else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _sum_partial(self) -> None:
        """One all-reduce over tensor parallelism, after ZeRO has reduced over data parallelism.

        Each rank sends only what ZeRO left it: data-parallel peers hold other parts, tensor-parallel peers the same.
        """
        if not self._partial:
            return
        parts = [(p, part) for p in self._partial if (part := self._part(p)) is not None]
        if not parts:  # ZeRO's partition of this rank holds none of them, nor do those of its tensor-parallel peers
            return
        flat = torch.cat([part.flatten() for _, part in parts])
        dist.all_reduce(flat, group=self._mesh.tensor_group)
        for (parameter, part), summed in zip(parts, flat.split([part.numel() for _, part in parts]), strict=True):
            if self._stage == 3:
                safe_set_local_grad(parameter, summed)
            else:
                part.copy_(summed.view_as(part))

    def _plain_norm(self) -> float:
        """At stage 0, where DeepSpeed does not tell: replicated parameters count once, sharded ones on every rank."""
        counted = [p for p in self._trainable if self._mesh.grid.tp_rank == 0 or hasattr(p, "shard")]
        total = torch.stack([p.grad.float().square().sum() for p in counted]).sum()
        if self._mesh.grid.tensor_parallel > 1:
            dist.all_reduce(total, group=self._mesh.tensor_group)
        return total.sqrt().item()

    def _part(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """What this rank holds of the gradient: all of it at stage 0, else what lies in its partition."""
        if self._stage == 0:
            return parameter.grad
        if self._stage == 3:
            return safe_get_local_grad(parameter)
        if parameter._hp_mapping is None:
            return None
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
