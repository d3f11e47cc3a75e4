"""Where a contender of the layer benchmark spends its time: torch's profiler over its forward + backward passes."""

import torch
from torch.profiler import ProfilerActivity, profile

from comol_ds.benchmark.contenders import CONTENDERS, DTYPES, LayerCase

PASSES = 3


def profile_layer(case: LayerCase, name: str, most: int = 12) -> list[dict[str, float | int | str]]:
    """The operations with the most time of their own.

    Returns:
        Up to ``most`` dictionaries, longest first: operation with its inputs' shapes, calls and milliseconds per pass
        (of the CPU, of the GPU where there is one), and share of all operations' time.
    """
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    torch.manual_seed(0)
    x = torch.randn(case.tokens, case.in_features, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn(case.tokens, case.out_features, dtype=dtype, device=device)
    contender = CONTENDERS[name](case)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu

    def passes(count: int) -> None:
        for _ in range(count):
            torch.autograd.grad(contender.function(x), [x, *contender.parameters], upstream)
        if on_gpu:
            torch.cuda.synchronize()

    passes(2)
    with profile(activities=activities, record_shapes=True) as profiler:
        passes(PASSES)
    events = profiler.key_averages(group_by_input_shape=True)
    own = {id(event): event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    total = sum(own.values())
    longest = sorted(events, key=lambda event: own[id(event)], reverse=True)[:most]
    return [
        {
            "operation": f"{event.key} {' '.join(str(shape) for shape in event.input_shapes if shape)}".strip(),
            "calls": event.count // PASSES,
            "milliseconds": own[id(event)] / 1e3 / PASSES,
            "share": own[id(event)] / total,
        }
        for event in longest
    ]


def table(name: str, operations: list[dict]) -> str:
    """One contender's operations as text."""
    lines = [f"{name}: {'operation':60}{'calls':>6}{'ms':>9}{'share':>8}"]
    lines += [
        f"{'':{len(name) + 2}}{row['operation'][:60]:60}{row['calls']:6}{row['milliseconds']:9.2f}{row['share']:8.1%}"
        for row in operations
    ]
    return "\n".join(lines)
