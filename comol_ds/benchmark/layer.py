"""Time and memory of one adapted Linear's adapter path, forward + backward, side by side in one process.

The contenders, all without the base Linear's own GEMM and with gradients for x and every adapter parameter:
    comol     this package's layer
    lora      the adapter modules of PEFT's LoRA layer, applied as its forward applies them
    authors   CoMoL with the merged core of every token materialised, [E, N, R, R] summed to [N, R, R]
They take turns within every round, so that a change in the machine's load hits all of them.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from comol_ds.adapters.comol_layer import CoMoLLinear, comol_table
from comol_ds.adapters.table import AxisSizes
from comol_ds.benchmark.figures import in_turns, median_ratio

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LayerCase:
    """Sizes of the measured layer: N tokens, I -> O, rank R, E experts."""

    tokens: int = 2048
    in_features: int = 8192
    out_features: int = 8192
    r: int = 64
    num_experts: int = 8
    dtype: str = "fp32"
    device: str = "cpu"


@dataclass(frozen=True)
class Contender:
    """A function of x [N, I] -> [N, O] and the parameters that it trains."""

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    parameters: list[torch.Tensor]


def measure_layer(case: LayerCase, rounds: int, warmup: int = 3) -> dict:
    """Milliseconds per forward + backward, their spread, ratios within rounds, and bytes kept for backward.

    Returns:
        A dictionary that can be written as JSON; ratios are the median over rounds of contender / lora.
    """
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    torch.manual_seed(0)
    x = torch.randn(case.tokens, case.in_features, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn(case.tokens, case.out_features, dtype=dtype, device=device)
    contenders = [build(case) for build in (comol_contender, lora_contender, authors_contender)]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender, counts in in_turns(contenders, rounds, warmup):
        elapsed = _forward_backward(contender, x, upstream)
        if counts:
            seconds[contender.name].append(elapsed)
    return {
        "case": asdict(case),
        "rounds": rounds,
        "milliseconds": {name: _summary(values) for name, values in seconds.items()},
        "ratio_to_lora": {name: median_ratio(values, seconds["lora"]) for name, values in seconds.items()},
        "saved_bytes_per_token": {
            contender.name: saved_bytes(lambda c=contender: c.function(x), x, *contender.parameters) / case.tokens
            for contender in contenders
        },
    }


def comol_contender(case: LayerCase) -> Contender:
    layer = CoMoLLinear(_base(case))
    layer.add_adapter("default", r=case.r, lora_alpha=case.r, num_experts=case.num_experts, init_adapter_weights=False)
    layer.to(DTYPES[case.dtype]).set_adapter("default")
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


def saved_bytes(function: Callable[[], torch.Tensor], *exclude: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, without those of the excluded tensors."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(sizes.values())


def table(result: dict) -> str:
    """One case's result as text, one line per contender."""
    case = result["case"]
    head = (
        f"{case['dtype']}  N={case['tokens']}  {case['in_features']} -> {case['out_features']}  R={case['r']}  "
        f"E={case['num_experts']}  {result['rounds']} rounds, milliseconds forward + backward"
    )
    rows = [f"{'':10}{'best':>9}{'median':>9}{'quartiles':>18}{'x lora':>9}{'bytes/token kept':>19}"]
    for name, time_ in result["milliseconds"].items():
        quartiles = f"{time_['lower_quartile']:.1f} - {time_['upper_quartile']:.1f}"
        ratio, kept = result["ratio_to_lora"][name], result["saved_bytes_per_token"][name]
        times = f"{time_['minimum']:9.1f}{time_['median']:9.1f}{quartiles:>18}"
        rows.append(f"{name:10}{times}{ratio:9.2f}{kept:19,.0f}")
    return "\n".join([head, *rows])


def _base(case: LayerCase) -> nn.Linear:
    """Never multiplied: the adapter path is measured alone."""
    return torch.nn.utils.skip_init(nn.Linear, case.in_features, case.out_features, bias=False, device=case.device)


def _forward_backward(contender: Contender, x: torch.Tensor, upstream: torch.Tensor) -> float:
    _synchronize(x.device)
    start = time.perf_counter()
    torch.autograd.grad(contender.function(x), [x, *contender.parameters], upstream)
    _synchronize(x.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _summary(seconds: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles([1e3 * value for value in seconds], n=4, method="inclusive")
    return {
        "median": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "minimum": 1e3 * min(seconds),
        "maximum": 1e3 * max(seconds),
    }
