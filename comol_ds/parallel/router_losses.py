"""The losses on routers and cores in a distributed run: each equal to one process's on the whole global batch.

The load balance loss needs the experts' load over the whole global batch, which is known only after its last
micro-batch. It takes the load of the step before: the loss is then a sum over tokens, which accumulation and data
parallelism leave as it is, and costs no collective in the forward pass. The first step's load is even, at which the
loss has no gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from comol_ds.adapters.comol_layer import ADAPTER, CoMoLLinear
from comol_ds.adapters.router_losses import attach_loss, core_diversity_loss, load_balance_loss, router_z_loss
from comol_ds.config import RouterSettings
from comol_ds.errors import UserError
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.tensor_parallel import base_kind

LOSSES = ("router_aux_loss", "router_z_loss", "core_diversity_loss")


class RouterLosses:
    """Attaches the losses whose coefficient is not 0 to every adapted layer; without any it does nothing.

    aux and z losses are means over valid tokens and over layers, the core diversity loss is a sum over layers.

    Args:
        model: adapted and sharded.
        settings: the coefficients.
        mesh: the ranks.
    """

    def __init__(self, model: PeftModel, settings: RouterSettings, mesh: Mesh) -> None:
        coefficients = (
            settings.router_aux_loss_coef,
            settings.router_z_loss_coef,
            settings.core_diversity_loss_coef,
        )
        self._mesh = mesh
        self._used = [number for number, coefficient in enumerate(coefficients) if coefficient]
        layers = [layer for layer in model.modules() if isinstance(layer, CoMoLLinear)] if self._used else []
        over_layers = 1 / max(len(layers), 1)
        self._factors = [c * mean for c, mean in zip(coefficients, (over_layers, over_layers, 1), strict=True)]
        self._to_mean = (over_layers, over_layers, 1)
        self._weights: torch.Tensor | None = None  # [N], 1 / valid tokens of the global batch, or 0
        self._load: torch.Tensor | None = None  # [L, E], the last step's mean gates
        self._sums: torch.Tensor | None = None  # this step's: the losses, then the gates of all layers
        self._layers = len(layers)
        self._experts = layers[0].num_experts[ADAPTER] if layers else 0
        self._done: set[int] = set()
        for number, layer in enumerate(layers):
            layer.gates.register_forward_hook(self._attach(number, layer))

    @property
    def names(self) -> list[str]:
        """The losses in use."""
        return [LOSSES[number] for number in self._used]

    @contextmanager
    def attached(self, valid: torch.Tensor, tokens: float, device: torch.device) -> Iterator[None]:
        """Around forward and backward of one micro-batch.

        Args:
            valid: [B, T] bool, on the host: the tokens that count.
            tokens: how many count in the whole global batch.
            device: the model's.
        """
        if not self._used:
            yield
            return
        self._weights = valid.flatten().to(device).float() / max(tokens, 1)
        self._done.clear()
        self._allocate(device)
        try:
            yield
        finally:
            self._weights = None

    def step_sums(self, device: torch.device) -> torch.Tensor:
        """This rank's sums of the step, float64: to be added over data parallelism and given to `finish_step`."""
        if self._sums is None:
            return torch.zeros(0, dtype=torch.float64, device=device)
        return self._sums

    def finish_step(self, sums: torch.Tensor) -> dict[str, float]:
        """Take the global sums of a step: its losses by name, without coefficients; the load serves the next step."""
        if self._sums is None:
            return {}
        self._load = sums[len(LOSSES) :].view(self._layers, self._experts).float()
        self._sums = None
        values = [value * mean for value, mean in zip(sums[: len(LOSSES)].tolist(), self._to_mean, strict=True)]
        return {LOSSES[number]: values[number] for number in self._used}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"load": None if self._load is None else self._load.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state_dict`.

        Raises:
            UserError: the state is not of a model with as many adapted layers and experts.
        """
        if state.get("load") is None:
            return
        try:
            self._load = torch.tensor(state["load"], dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            self._load = None
        if self._load is None or self._load.shape != (self._layers, self._experts) or not self._load.isfinite().all():
            raise UserError(
                f"the checkpoint's router_losses do not hold the load of {self._layers} layers with {self._experts}"
                " experts; resume from another checkpoint"
            )

    def _allocate(self, device: torch.device) -> None:
        if self._sums is None:
            size = len(LOSSES) + self._layers * self._experts
            self._sums = torch.zeros(size, dtype=torch.float64, device=device)
        if self._load is None:
            self._load = torch.full((self._layers, self._experts), 1 / self._experts)
        self._load = self._load.to(device)

    def _attach(self, number: int, layer: CoMoLLinear) -> Callable:
        # beside a column-parallel base every tensor-parallel rank adds its part of these gradients, see Gradients
        parts = self._mesh.grid.tensor_parallel if base_kind(layer) == "column" else 1
        # DeepSpeed averages over the data-parallel ranks
        scale = self._mesh.grid.data_parallel / parts

        def attach(module: torch.nn.Module, args: tuple, p: torch.Tensor) -> torch.Tensor | None:
            if self._weights is None:
                return None
            losses = self._losses(number, layer, args[0].flatten(0, -2), p.flatten(0, -2))
            if number not in self._done:  # a second time is recomputation
                self._done.add(number)
                with torch.no_grad():
                    for which, loss in losses.items():
                        self._sums[which] += loss
                    start = len(LOSSES) + number * self._experts
                    self._sums[start : start + self._experts] += self._weights @ p.flatten(0, -2).float()
            total = sum(self._factors[which] * loss for which, loss in losses.items())
            return attach_loss(p, total * scale)

        return attach

    def _losses(
        self, number: int, layer: CoMoLLinear, logits: torch.Tensor, p: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """The losses in use of one layer and micro-batch: its share of the global batch's. logits, p [N, E]."""
        weights = self._weights
        # padding may hold anything, even NaN, which a weight of 0 would not stop
        ignored = (weights == 0).unsqueeze(1)
        losses = {}
        if 0 in self._used:
            losses[0] = load_balance_loss(p.masked_fill(ignored, 0), weights, self._load[number])
        if 1 in self._used:
            losses[1] = router_z_loss(logits.masked_fill(ignored, 0), weights)
        if 2 in self._used:
            losses[2] = core_diversity_loss(layer.comol_cores[ADAPTER]) * weights.sum()
        return losses
