"""What a device reaches, and what the adapters' kernels reach of that: memory bandwidth and rate of bf16 products.

The yardsticks are measured, not read from a data sheet: a copy of memory, and cuBLAS (a CPU's library on a CPU)
multiplying two large square matrices. A kernel's bytes and FLOPs are those that the equation needs at least, so a
fraction says how far a kernel is from the best possible one. At 8192 tokens the mixture's tensors lie in the L2 cache,
where a training step finds them too, and the fraction of the memory's bandwidth can exceed 1; at 2^20 they do not.
Whole layers are timed as the layer suite times them, with what Python takes to start their kernels.

Glossary: N tokens, I in_features, O out_features, R rank, E experts.
"""

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch

from comol_ds.adapters.mixing import KERNEL_VARIABLE, mix_cores, takes_triton
from comol_ds.benchmark.contenders import LayerCase
from comol_ds.benchmark.figures import in_turns, median_ratio, spread
from comol_ds.benchmark.layer import measure_layer
from comol_ds.errors import UserError

_BF16_BYTES = 2
_PASSES = ("forward", "forward + backward")
LAYER_CONTENDERS = ("comol", "lora", "authors")


@dataclass(frozen=True)
class RatesCase:
    """What is measured where; ``square`` is the side of the yardstick's matrices, ``calls`` those of a timed turn."""

    device: str = "cuda"
    copied_bytes: int = 4 << 30
    square: int = 8192
    mixed_tokens: tuple[int, ...] = (8192, 1 << 20)
    layer_tokens: int = 8192
    in_features: int = 8192
    out_features: tuple[int, ...] = (8192, 28672)
    ranks: tuple[int, ...] = (16, 64)
    experts: tuple[int, ...] = (8, 32)
    rounds: int = 10
    calls: int = 10


def check_cuda() -> None:
    """Refuse to measure a GPU where there is none.

    Raises:
        UserError: torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "gpu needs a CUDA device and torch sees none: run it on a machine with a GPU, or run layer, step and"
            " collectives, which also run on a CPU"
        )


def say(text: str) -> None:
    """Tell how far the suite is."""
    print(text, flush=True)


def measure_rates(case: RatesCase) -> dict[str, Any]:
    """The yardsticks, the mixture and the layers, told as they come.

    Returns:
        A dictionary that can be written as JSON: device; bytes_per_second, read and written; flops_per_second; mixing
        and layers, the results of `measure_mixing` and `measure_layer_fractions`.
    """
    device = torch.device(case.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rates = {"device": name, "bytes_per_second": _bandwidth(case), "flops_per_second": _product_rate(case)}
    say(
        f"{name}: copies {rates['bytes_per_second'] / 1e9:,.0f} GB/s (read + written), multiplies"
        f" {rates['flops_per_second'] / 1e12:,.1f} TFLOP/s (bf16, {case.square} x {case.square})\n\n{_MIXING_HEAD}"
    )
    mixing = []
    for sizes in itertools.product(case.mixed_tokens, case.ranks, case.experts):
        mixing += measure_mixing(case, *sizes, rates)
        say("\n".join(_mixing_row(row) for row in mixing if tuple(row["sizes"]) == sizes))
    layers = []
    say(f"\n{_LAYER_HEAD}")
    for sizes in itertools.product(case.out_features, case.ranks, case.experts):
        layers.append(measure_layer_fractions(case, *sizes, rates))
        say(_layer_rows(layers[-1]))
    return {**rates, "case": asdict(case), "mixing": mixing, "layers": layers}


def measure_mixing(case: RatesCase, n: int, r: int, num_experts: int, rates: dict[str, Any]) -> list[dict[str, Any]]:
    """The mixture of N bf16 tokens by every kernel that the device has, forward and with backward, in turns.

    Returns:
        A row per kernel and pass: seconds per call; to_torch, median over the rounds of its time / the torch kernel's;
        of_bandwidth and of_products, fractions of the yardsticks by `mixing_bytes` and `mixing_flops`.
    """
    kernels = kernels_of(case)
    operands = _mixing_operands(case.device, n, r, num_experts)
    turns = {
        (kernel, name): timed(call, case.device, case.calls)
        for kernel in kernels
        for name, call in zip(_PASSES, _mixing_calls(kernel, *operands), strict=True)
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
    for key, counts in in_turns(list(turns), case.rounds, warmup=1):
        taken = turns[key]()
        if counts:
            seconds[key].append(taken)
    rows = []
    for (kernel, name), taken in seconds.items():
        backward, median = name != "forward", spread(taken)["median"]
        rows.append({
            "sizes": [n, r, num_experts], "kernel": kernel, "pass": name, "seconds": spread(taken),
            "to_torch": median_ratio(taken, seconds["torch", name]),
            "of_bandwidth": mixing_bytes(n, r, num_experts, backward) / median / rates["bytes_per_second"],
            "of_products": mixing_flops(n, r, num_experts, backward) / median / rates["flops_per_second"],
        })  # fmt: skip
    return rows


def mixing_bytes(n: int, r: int, num_experts: int, backward: bool) -> int:
    """The least traffic in bf16: what is read and written, each once per pass.

    Forward reads h [N, R], p [N, E] and the cores [E, R, R], and writes o [N, R]. Backward reads the same three and
    grad_o [N, R], and writes the gradients of the three.
    """
    tokens, gates, cores = n * r, n * num_experts, num_experts * r * r
    forward = 2 * tokens + gates + cores
    return _BF16_BYTES * (forward + (3 * tokens + 2 * gates + 2 * cores if backward else 0))


def mixing_flops(n: int, r: int, num_experts: int, backward: bool) -> int:
    """FLOPs of the products with R x R matrices: h C_e forward, 2 N E R^2; backward grad_o C_e^T and (p_e h)^T grad_o,
    as many each. Of grad_o C_e^T the sums that give the gradients of h and p, 2 N E R each, are not counted."""
    return 2 * n * num_experts * r * r * (3 if backward else 1)


def measure_layer_fractions(
    case: RatesCase, out_features: int, r: int, num_experts: int, rates: dict[str, Any]
) -> dict[str, Any]:
    """`measure_layer` of CoMoL, LoRA and the literal form in bf16, and how far each is from the yardsticks.

    of_products: the counted FLOPs; of_bandwidth: by `layer_bytes`, the same for all.
    """
    sizes = (case.layer_tokens, case.in_features, out_features, r, num_experts)
    result = measure_layer(LayerCase(*sizes, "bf16", case.device), case.rounds, LAYER_CONTENDERS)
    seconds = {name: taken["median"] / 1e3 for name, taken in result["milliseconds"].items()}
    least = layer_bytes(*sizes[:4])
    return result | {
        "of_bandwidth": {name: least / taken / rates["bytes_per_second"] for name, taken in seconds.items()},
        "of_products": {
            name: result["flops"][name] / taken / rates["flops_per_second"] for name, taken in seconds.items()
        },
    }


def layer_bytes(n: int, in_features: int, out_features: int, r: int) -> int:
    """The least traffic of an adapter path, forward and backward, in bf16; h and what is narrower is left out.

    Forward reads x and writes the update; backward reads x, for A's gradient, and the update's gradient, and writes
    that of x. A and B are read in both passes, and their gradients written.
    """
    return _BF16_BYTES * (n * (3 * in_features + 2 * out_features) + 3 * r * (in_features + out_features))


def kernels_of(case: RatesCase) -> tuple[str, ...]:
    """Triton's, where it is what a run would take, and torch's beside it."""
    return ("triton", "torch") if takes_triton(case.device, (torch.bfloat16,) * 2, max(case.ranks)) else ("torch",)


def timed(call: Callable[[], object], device: str, calls: int) -> Callable[[], float]:
    """A function that makes ``calls`` calls and returns the seconds of one.

    On a GPU the calls are recorded as a CUDA graph and replayed, so that what is timed is the device: the smallest
    kernels last less than Python takes to start them.
    """
    return (_timed_graph if device == "cuda" else _timed_calls)(call, calls)


def _timed_calls(call: Callable[[], object], calls: int) -> Callable[[], float]:
    def turn() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return turn


def _timed_graph(call: Callable[[], object], calls: int) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, checks, chooses tiles and makes cuBLAS's handles, none of which can be recorded
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def turn() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return turn


def _bandwidth(case: RatesCase) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = torch.zeros(case.copied_bytes, dtype=torch.uint8, device=case.device)
    destination = torch.empty_like(source)
    return 2 * case.copied_bytes / _median_seconds(lambda: destination.copy_(source), case)


def _product_rate(case: RatesCase) -> float:
    """FLOP/s of a product of two square bf16 matrices."""
    a, b = (torch.randn(case.square, case.square, device=case.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * case.square**3 / _median_seconds(lambda: torch.mm(a, b, out=out), case)


def _median_seconds(call: Callable[[], object], case: RatesCase) -> float:
    turn = timed(call, case.device, case.calls)
    turn()
    return spread([turn() for _ in range(case.rounds)])["median"]


def _mixing_operands(device: str, n: int, r: int, num_experts: int) -> tuple[torch.Tensor, ...]:
    """h, p, cores and grad_o."""
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    p = torch.softmax(normal(n, num_experts), dim=-1)
    leaves = [tensor.requires_grad_() for tensor in (normal(n, r), p, normal(num_experts, r, r) / r**0.5)]
    return *leaves, normal(n, r)


def _mixing_calls(
    kernel: str, h: torch.Tensor, p: torch.Tensor, cores: torch.Tensor, grad_o: torch.Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward, and forward with backward."""

    def forward() -> None:
        with patch.dict(os.environ, {KERNEL_VARIABLE: kernel}), torch.no_grad():
            mix_cores(h, p, cores, 1.0)

    def both() -> None:
        with patch.dict(os.environ, {KERNEL_VARIABLE: kernel}):
            torch.autograd.grad(mix_cores(h, p, cores, 1.0), [h, p, cores], grad_o)

    return forward, both


_MIXING_HEAD = (
    f"{'mixture, bf16':>20}{'R':>5}{'E':>4}  {'pass':20}{'kernel':8}{'microseconds':>13}{'x torch':>9}{'bandwidth':>11}"
    f"{'products':>10}"
)
_LAYER_HEAD = (
    f"{'layer, bf16':>20}{'R':>5}{'E':>4}  {'forward + backward':20}{'ms':>8}{'x lora':>9}{'bandwidth':>11}"
    f"{'products':>10}"
)


def _mixing_row(row: dict[str, Any]) -> str:
    n, r, num_experts = row["sizes"]
    return (
        f"{f'N={n}':>20}{r:5}{num_experts:4}  {row['pass']:20}{row['kernel']:8}{row['seconds']['median'] * 1e6:13,.1f}"
        f"{row['to_torch']:9.2f}{row['of_bandwidth']:11.1%}{row['of_products']:10.1%}"
    )


def _layer_rows(result: dict[str, Any]) -> str:
    case = result["case"]
    where = f"{case['in_features']} -> {case['out_features']}"
    return "\n".join(
        f"{where:>20}{case['r']:5}{case['num_experts']:4}  {name:20}{taken['median']:8.2f}"
        f"{result['ratio_to_lora'][name]:9.2f}{result['of_bandwidth'][name]:11.1%}{result['of_products'][name]:10.1%}"
        for name, taken in result["milliseconds"].items()
    )
