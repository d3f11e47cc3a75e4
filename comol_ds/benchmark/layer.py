"""Time and memory of one adapted Linear's adapter path, forward + backward, side by side in one process.

The contenders are those of `comol_ds.benchmark.contenders`, without the base Linear's own GEMM and with gradients for x
and every adapter parameter. No adapter at all would take no time here; what it is the floor of is the contender "base".
They take turns within every round, so that a change in the machine's load hits all of them.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from comol_ds.adapters.mixing import KERNEL_VARIABLE
from comol_ds.benchmark.contenders import CONTENDERS, DTYPES, Contender, LayerCase
from comol_ds.benchmark.figures import in_turns, median_ratio
from comol_ds.planner.counting import LiveBytes, SavedBytes

# A contender that has used its seconds of a case takes no more turns after this many.
FEWEST_ROUNDS = 3


def measure_layer(
    case: LayerCase, rounds: int, names: Sequence[str] = tuple(CONTENDERS), warmup: int = 3, seconds: float = 3.0
) -> dict:
    """Milliseconds per forward + backward, their spread, ratios within rounds, and what is counted of one such pass.

    Args:
        case: the sizes.
        rounds: timed turns of every contender.
        names: the contenders, "lora" among them.
        warmup: turns before them.
        seconds: what a contender may use up: a slow one has fewer turns, but at least `FEWEST_ROUNDS` timed ones.

    Returns:
        A dictionary that can be written as JSON. ratio_to_lora: the median over rounds of contender / lora;
        saved_bytes_per_token: what autograd keeps for backward, without x and parameters; flops: of matrix products;
        peak_bytes: of the tensors that the pass makes, gradients and output included, and its temporaries; on a CPU
        without what a kernel of torch uses inside.
    """
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    torch.manual_seed(0)
    x = torch.randn(case.tokens, case.in_features, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn(case.tokens, case.out_features, dtype=dtype, device=device)
    contenders = [CONTENDERS[name](case) for name in names]
    counts, used = {}, {}
    for contender in contenders:
        start = time.perf_counter()
        counts[contender.name] = _count(contender, x, upstream)
        used[contender.name] = time.perf_counter() - start
    times = {name: list[float]() for name in names}
    for contender, timed in in_turns(contenders, rounds, warmup):
        name = contender.name
        if used[name] > seconds and (not timed or len(times[name]) >= FEWEST_ROUNDS):
            continue
        elapsed = forward_backward(contender, x, upstream)
        used[name] += elapsed
        if timed:
            times[name].append(elapsed)
    return {
        "case": asdict(case),
        "rounds": {name: len(values) for name, values in times.items()},
        "milliseconds": {name: _summary(values) for name, values in times.items()},
        "ratio_to_lora": {name: _ratio(values, times["lora"]) for name, values in times.items()},
        **{what: {name: count[what] for name, count in counts.items()} for what in counts["lora"]},
    }


def table(result: dict) -> str:
    """One case's result as text, one line per contender."""
    case = result["case"]
    head = (
        f"{case['dtype']}  N={case['tokens']}  {case['in_features']} -> {case['out_features']}  R={case['r']}  "
        f"E={case['num_experts']}  milliseconds forward + backward"
    )
    rows = [
        f"{'':10}{'rounds':>7}{'best':>9}{'median':>9}{'quartiles':>18}{'x lora':>9}{'GFLOP':>9}{'peak MiB':>10}"
        f"{'bytes/token kept':>18}"
    ]
    for name, time_ in result["milliseconds"].items():
        quartiles = f"{time_['lower_quartile']:.1f} - {time_['upper_quartile']:.1f}"
        times = f"{result['rounds'][name]:7}{time_['minimum']:9.1f}{time_['median']:9.1f}{quartiles:>18}"
        counted = f"{result['flops'][name] / 1e9:9.2f}{result['peak_bytes'][name] / 2**20:10.1f}"
        kept = result["saved_bytes_per_token"][name]
        rows.append(f"{name:10}{times}{result['ratio_to_lora'][name]:9.2f}{counted}{kept:18,.0f}")
    return "\n".join([head, *rows])


def _count(contender: Contender, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, float]:
    """FLOPs and bytes of one pass. Triton's kernels hide their FLOPs, so they are torch's."""
    own = [x, upstream, *contender.parameters, *contender.frozen]
    saved = SavedBytes(own)
    torchs_kernels = patch.dict(os.environ, {KERNEL_VARIABLE: "torch"})
    with torchs_kernels, FlopCounterMode(display=False) as flops, LiveBytes(own) as live:
        with saved:
            y = contender.function(x)
        kept = sum(saved.storages)
        saved.release()
        y.backward(upstream)  # not autograd.grad, which the counter of FLOPs does not stand
    peak = live.highest
    del y
    for tensor in own:
        tensor.grad = None
    if x.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(contender, x, upstream)
        peak = torch.cuda.max_memory_allocated() - before
    return {
        "saved_bytes_per_token": kept / len(x),
        "flops": flops.get_total_flops(),
        "peak_bytes": peak,
    }


def forward_backward(contender: Contender, x: torch.Tensor, upstream: torch.Tensor) -> float:
    """Seconds of one pass, with the gradients of x and of all that the contender trains."""
    _synchronize(x.device)
    start = time.perf_counter()
    torch.autograd.grad(contender.function(x), [x, *contender.parameters], upstream)
    _synchronize(x.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _ratio(mine: Sequence[float], loras: Sequence[float]) -> float:
    """Over the rounds that both had."""
    return median_ratio(*zip(*zip(mine, loras, strict=False), strict=True))


def _summary(seconds: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles([1e3 * value for value in seconds], n=4, method="inclusive")
    return {
        "median": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "minimum": 1e3 * min(seconds),
        "maximum": 1e3 * max(seconds),
    }
