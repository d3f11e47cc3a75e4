"""The adapters that are compared, each as a layer's adapter path, and as a module where whole models are built of it.

    comol      this package's layer
    lora       the adapter modules of PEFT's LoRA layer, applied as its forward applies them
    authors    CoMoL with the merged core of every token materialised, [E, N, R, R] summed to [N, R, R]
    molora     sum_e p_e (x A_e^T) B_e^T, p = softmax(x R^T): E LoRAs and a router on x
    hydralora  sum_e p_e (x A^T) B_e^T: as molora with one A
    base       no adapter, but the frozen Linear beside which adapters stand: x W^T, and the gradient of x

molora and hydralora are in their plain form, one expert after the other; the gate multiplies the r-vector, which is
less work than multiplying each expert's output.

Glossary: N tokens, I in_features, O out_features, R rank, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from comol_ds.adapters.comol_layer import CoMoLLinear, comol_table
from comol_ds.adapters.table import AxisSizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LayerCase:
    """Sizes of the measured layer: N tokens, I -> O, rank R, E experts."""

    tokens: int = 512
    in_features: int = 8192
    out_features: int = 8192
    r: int = 64
    num_experts: int = 8
    dtype: str = "fp32"
    device: str = "cpu"


@dataclass(frozen=True)
class Contender:
    """A function of x [N, I] -> [N, O], the parameters that it trains, and those that it does not."""

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    parameters: list[torch.Tensor]
    frozen: tuple[torch.Tensor, ...] = ()


class MixtureOfLoras(nn.Module):
    """x [..., I] -> sum_e p_e (x A_e^T) B_e^T, [..., O], with p = softmax(x R^T) computed in fp32.

    Args:
        in_features, out_features, r, num_experts: I, O, R, E.
        shared_down: one A for all experts (HydraLoRA) in the place of E (MoLoRA).
        device: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        num_experts: int,
        shared_down: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device)

        self.router = linear(in_features, num_experts)
        self.down = nn.ModuleList(linear(in_features, r) for _ in range(1 if shared_down else num_experts))
        self.up = nn.ModuleList(linear(r, out_features) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(self.router(x), dim=-1, dtype=torch.float32).to(x.dtype)  # [..., E]
        h = [down(x) for down in self.down]
        update = None
        for e, up in enumerate(self.up):
            term = up(p[..., e : e + 1] * h[e % len(h)])
            update = term if update is None else update + term
        return update


class MixtureOfLorasLinear(nn.Module):
    """A frozen Linear with a MixtureOfLoras beside it: x [..., I] -> [..., O]."""

    def __init__(self, base_layer: nn.Linear, r: int, num_experts: int, shared_down: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        sizes = (base_layer.in_features, base_layer.out_features)
        self.update = MixtureOfLoras(*sizes, r, num_experts, shared_down, base_layer.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.update(x)


def comol_layer(case: LayerCase) -> CoMoLLinear:
    """This package's layer, with an adapter called default."""
    layer = CoMoLLinear(_base(case).requires_grad_(False))
    layer.add_adapter("default", r=case.r, lora_alpha=case.r, num_experts=case.num_experts, init_adapter_weights=False)
    layer.to(DTYPES[case.dtype]).set_adapter("default")
    return layer


def comol_contender(case: LayerCase) -> Contender:
    layer = comol_layer(case)
    parameters = [getattr(layer, name)["default"] for name in layer.adapter_layer_names]
    return Contender("comol", lambda x: layer.update(x, "default"), parameters)


def lora_contender(case: LayerCase) -> Contender:
    config = peft.LoraConfig(r=case.r, lora_alpha=case.r, init_lora_weights=False)
    layer = LoraLinear(_base(case), "default", config, r=case.r, lora_alpha=case.r)
    layer.to(DTYPES[case.dtype])
    down, up, dropout = layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]
    scaling = layer.scaling["default"]
    return Contender("lora", lambda x: up(down(dropout(x))) * scaling, [down.weight, up.weight])


def authors_contender(case: LayerCase) -> Contender:
    """h M with M = sum_e p_e C_e formed for every token (arXiv 2603.00573), as the equation is written."""
    sizes = AxisSizes(case.in_features, case.out_features, case.r, case.num_experts)
    parameters = []
    for parameter in comol_table(init_adapter_weights=False):
        tensor = torch.empty(parameter.shape(sizes))
        parameter.initialize(tensor)
        parameters.append(tensor.to(case.device, DTYPES[case.dtype]).requires_grad_())
    down, up, cores, router = parameters

    def function(x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, down)  # [N, R]
        p = torch.softmax(F.linear(h, router), dim=-1)  # [N, E]
        weighted = torch.stack([p[:, e, None, None] * cores[e] for e in range(case.num_experts)])  # [E, N, R, R]
        merged = weighted.sum(0)  # [N, R, R]
        return F.linear((h.unsqueeze(1) @ merged).squeeze(1), up) * 1.0

    return Contender("authors", function, parameters)


def molora_contender(case: LayerCase) -> Contender:
    return _mixture(case, "molora", shared_down=False)


def hydralora_contender(case: LayerCase) -> Contender:
    return _mixture(case, "hydralora", shared_down=True)


def base_contender(case: LayerCase) -> Contender:
    weight = _base(case).to(DTYPES[case.dtype]).weight.detach().normal_(0, 0.02)
    return Contender("base", lambda x: F.linear(x, weight), [], (weight,))


CONTENDERS: dict[str, Callable[[LayerCase], Contender]] = {
    "comol": comol_contender,
    "lora": lora_contender,
    "authors": authors_contender,
    "molora": molora_contender,
    "hydralora": hydralora_contender,
    "base": base_contender,
}


def _mixture(case: LayerCase, name: str, shared_down: bool) -> Contender:
    sizes = (case.in_features, case.out_features, case.r, case.num_experts)
    module = MixtureOfLoras(*sizes, shared_down, case.device).to(DTYPES[case.dtype])
    return Contender(name, module, list(module.parameters()))


def _base(case: LayerCase) -> nn.Linear:
    """Without values: only the contender "base" multiplies with it."""
    return nn.utils.skip_init(nn.Linear, case.in_features, case.out_features, bias=False, device=case.device)
