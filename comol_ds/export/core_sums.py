"""Sums over calibration tokens from which a constant core is computed, and the hooks that take them.

A calibrated module keeps [R, R] numbers, however many tokens are counted.

Glossary: N tokens of a batch, n of them counted, R rank, E experts, s = lora_alpha / r.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from comol_ds.adapters.comol_layer import ADAPTER, CoMoLLinear, comol_layers
from comol_ds.errors import UserError

Batch = Mapping[str, torch.Tensor]  # input_ids and attention_mask [B, T], 1 = a token, 0 = padding


@dataclass(frozen=True)
class CoreSums:
    """What N tokens leave of one module, in float64 on the CPU.

    Attributes:
        tokens: N.
        inputs: sum of h^T h, [R, R].
        products: sum of h^T (h M), [R, R].
        squares: sum of ||h M||^2.
        mean_core: sum_e mean(p_e) C_e, [R, R].
    """

    tokens: int
    inputs: torch.Tensor
    products: torch.Tensor
    squares: float
    mean_core: torch.Tensor


@dataclass(frozen=True)
class Calibration:
    """Sums over the same tokens for every adapted module, by its path in the base model.

    Attributes:
        tokens: how many tokens the batches held, without padding.
        modules: module path, such as "model.layers.0.self_attn.q_proj" -> its sums.
    """

    tokens: int
    modules: Mapping[str, CoreSums]


def calibrate(
    model: PeftModel, batches: Iterable[Batch], adapter_name: str = ADAPTER, min_tokens: int = 1
) -> Calibration:
    """Run the exact model over tokens and add up what the static cores, and their residuals, are computed from.

    Args:
        model: a PeftModel in evaluation mode with this CoMoL adapter active, and no other.
        batches: input_ids and attention_mask [B, T] (1 = counted), optionally position_ids; read once.
        adapter_name: PEFT's name of the adapter.
        min_tokens: how many tokens there have to be.

    Raises:
        UserError: there is no such adapter, it is not the only active one, the batches hold fewer than min_tokens, an
            adapted module does not see every token of a batch, or its values are not finite.
        ValueError: the model is in training mode.
    """
    layers = comol_layers(model, adapter_name)
    check_only_active(model, adapter_name)
    sums = {name: _RunningSums(name, layer, adapter_name) for name, layer in layers.items()}
    head = model.get_base_model().get_output_embeddings()
    # Logits are not needed: those of 4 x 512 tokens over 128k words would be 1 GB in fp32.
    options = {} if isinstance(head, CoMoLLinear) else {"logits_to_keep": 1}
    tokens = 0
    with hooked(sums.values()):
        for batch in batches:
            valid = batch["attention_mask"].flatten().bool()
            for module in sums.values():
                module.valid = valid
            run(model, batch, **options)
            tokens += int(valid.sum())
    wanted = max(min_tokens, 1)
    if tokens < wanted:
        raise UserError(
            f"the calibration data has {tokens} tokens, at least {wanted} are needed; give more --calibration data"
        )
    return Calibration(tokens, {name: module.finish() for name, module in sums.items()})


def run(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """Forward pass over a batch of tokens on the model's device, without gradients or a cache.

    Raises:
        ValueError: the model is in training mode, where dropout is on.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    device = next(model.parameters()).device
    names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in batch]
    with torch.no_grad():
        return model(**{name: batch[name].to(device) for name in names}, use_cache=False, **options)


class LayerHooks:
    """Hooks on the seams of one layer, whose h they keep from the down-projection until the cores are through."""

    def __init__(self, layer: CoMoLLinear, adapter_name: str) -> None:
        self.layer = layer
        self.scaling = layer.scaling[adapter_name]
        self._h: torch.Tensor | None = None  # [..., R]

    def install(self) -> list[Any]:
        return [
            self.layer.partial_sums.register_forward_hook(self._keep_h),
            self.layer.core_output.register_forward_hook(self._at_core_output),
        ]

    def _keep_h(self, module: nn.Module, args: tuple, output: tuple) -> None:
        _, routed = output
        self._h = routed[0][0] if routed else None  # none while adapters are disabled

    def _at_core_output(self, module: nn.Module, args: tuple, o: torch.Tensor) -> torch.Tensor | None:
        h, self._h = self._h, None
        return self.see(h, o)

    def see(self, h: torch.Tensor, o: torch.Tensor) -> torch.Tensor | None:
        """h and o = s h M, both [..., R]; what is returned, if anything, takes the place of o."""
        raise NotImplementedError


class _RunningSums(LayerHooks):
    """CoreSums in the making, on the layer's device."""

    def __init__(self, name: str, layer: CoMoLLinear, adapter_name: str) -> None:
        super().__init__(layer, adapter_name)
        self.valid: torch.Tensor | None = None  # [N] bool, set before each pass
        self._name = name
        self._cores = layer.comol_cores[adapter_name].detach()  # [E, R, R]
        experts, rank, _ = self._cores.shape
        wide = {"dtype": torch.float64, "device": self._cores.device}
        self._inputs, self._products = torch.zeros(2, rank, rank, **wide)
        self._gates = torch.zeros(experts, **wide)
        self._squares = torch.zeros((), **wide)
        self._tokens = 0

    def install(self) -> list[Any]:
        return [*super().install(), self.layer.gates.register_forward_hook(self._add_gates)]

    def _add_gates(self, module: nn.Module, args: tuple, p: torch.Tensor) -> None:
        self._gates += self._counted(p).sum(0)

    def see(self, h: torch.Tensor, o: torch.Tensor) -> None:
        h, product = self._counted(h), self._counted(o) / self.scaling  # [n, R]
        self._inputs += h.t() @ h
        self._products += h.t() @ product
        self._squares += product.square().sum()
        self._tokens += len(h)

    def _counted(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., X] -> [n, X] in float64, without padding, which may hold anything."""
        rows = rows.detach().flatten(0, -2)
        if len(rows) != len(self.valid):
            raise UserError(
                f"{self._name} sees {len(rows)} of a batch's {len(self.valid)} tokens; a static core is computed for"
                " modules that see every token, drop it from target_modules"
            )
        return rows[self.valid.to(rows.device)].double()

    def finish(self) -> CoreSums:
        if self._tokens == 0:
            raise UserError(f"{self._name} saw no token: the adapter is switched off, or the model does not use it")
        mean_core = torch.einsum("e,ers->rs", self._gates / self._tokens, self._cores.double())
        sums = CoreSums(self._tokens, self._inputs.cpu(), self._products.cpu(), float(self._squares), mean_core.cpu())
        if not all(torch.isfinite(torch.as_tensor(value)).all() for value in vars(sums).values()):
            raise UserError(f"{self._name} has values that are not finite on the calibration tokens")
        return sums


@contextmanager
def hooked(layers: Iterable[LayerHooks]) -> Iterator[None]:
    """Inside, these hooks are installed."""
    hooks = [hook for layer in layers for hook in layer.install()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_only_active(model: PeftModel, adapter_name: str) -> None:
    """Raise UserError unless this adapter is active, and no other."""
    active = list(model.active_adapters)
    if active != [adapter_name]:
        raise UserError(
            f"the active adapters are {', '.join(active) or 'none'}; a static core is computed with"
            f" {adapter_name!r} alone, call model.set_adapter({adapter_name!r})"
        )
