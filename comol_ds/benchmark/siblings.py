"""Adapter paths of layers that read the same tensor (q, k, v; gate, up), forward + backward, in one process.

    together   CoMoL, one product for all A (`comol_ds.adapters.shared_down`), as launch/train.py trains
    apart      CoMoL, each layer for itself
    lora       PEFT's LoRA, each layer for itself

Without the base Linears' own products. Glossary: N tokens, I in_features, O out_features, R rank, E experts.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from comol_ds.adapters.shared_down import SIBLINGS, share_down_projections
from comol_ds.benchmark.contenders import DTYPES, Contender, LayerCase, comol_layer, lora_contender
from comol_ds.benchmark.figures import in_turns, median_ratio, spread
from comol_ds.benchmark.layer import forward_backward

# Llama-3.1-70B's, by the names of SIBLINGS; their input has 8192 features
OUT_FEATURES = {"q_proj": 8192, "k_proj": 1024, "v_proj": 1024, "gate_proj": 28672, "up_proj": 28672}


@dataclass(frozen=True)
class SiblingsCase:
    """N tokens; I; names and O of the layers; R; E."""

    names: tuple[str, ...] = SIBLINGS[0]
    out_features: tuple[int, ...] = (8192, 1024, 1024)
    tokens: int = 512
    in_features: int = 8192
    r: int = 16
    num_experts: int = 8
    dtype: str = "fp32"
    device: str = "cpu"

    def layers(self) -> list[LayerCase]:
        """Each layer alone."""
        whole = LayerCase(self.tokens, self.in_features, 0, self.r, self.num_experts, self.dtype, self.device)
        return [replace(whole, out_features=out) for out in self.out_features]


def comol_contender(case: SiblingsCase, together: bool) -> Contender:
    """CoMoL on all layers."""
    parent = nn.Module()
    for name, layer_case in zip(case.names, case.layers(), strict=True):
        parent.add_module(name, comol_layer(layer_case))
    if together:
        share_down_projections(parent)
    layers = list(parent.children())
    return Contender(
        "together" if together else "apart",
        lambda x: torch.cat([layer.update(x, "default") for layer in layers], dim=-1),
        [parameter for parameter in parent.parameters() if parameter.requires_grad],
    )


def lora_contenders(case: SiblingsCase) -> Contender:
    """PEFT's LoRA on all layers."""
    layers = [lora_contender(layer) for layer in case.layers()]
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    return Contender("lora", lambda x: torch.cat([layer.function(x) for layer in layers], dim=-1), parameters)


CONTENDERS: dict[str, Callable[[SiblingsCase], Contender]] = {
    "together": lambda case: comol_contender(case, together=True),
    "apart": lambda case: comol_contender(case, together=False),
    "lora": lora_contenders,
}


def measure_siblings(case: SiblingsCase, rounds: int, warmup: int = 3) -> dict[str, Any]:
    """Time ``rounds`` turns of every contender.

    Returns:
        A dictionary that can be written as JSON: the seconds' spread, and the medians over rounds of
        together / apart, together / lora and apart / lora.
    """
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    torch.manual_seed(0)
    x = torch.randn(case.tokens, case.in_features, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn(case.tokens, sum(case.out_features), dtype=dtype, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for contender, counts in in_turns([make(case) for make in CONTENDERS.values()], rounds, warmup):
        taken = forward_backward(contender, x, upstream)
        if counts:
            seconds[contender.name].append(taken)
    pairs = (("together", "apart"), ("together", "lora"), ("apart", "lora"))
    return {
        "case": asdict(case),
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": {f"{mine} / {other}": median_ratio(seconds[mine], seconds[other]) for mine, other in pairs},
    }


def table(result: dict[str, Any]) -> str:
    """One case's result as text."""
    case = result["case"]
    names = ", ".join(name.removesuffix("_proj") for name in case["names"])
    milliseconds = ", ".join(f"{name} {1e3 * taken['median']:.1f} ms" for name, taken in result["seconds"].items())
    ratios = ", ".join(f"{what} {ratio:.2f}" for what, ratio in result["ratio"].items())
    return (
        f"{names:8}  {case['dtype']}  N={case['tokens']}  {case['in_features']} -> {sum(case['out_features'])}  "
        f"R={case['r']}  E={case['num_experts']}: {milliseconds}; {ratios}"
    )
