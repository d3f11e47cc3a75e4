"""What one training step sends: calls and bytes per kind of collective, of CoMoL beside LoRA and the frozen base.

Under ZeRO-3 on 2 ranks, whose weights do not stay gathered between the passes, as those of a model of real size; and
under tensor parallelism over 2, where PEFT's LoRA cannot go.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comol_ds.benchmark.step import LAYOUTS, run_in_ranks
from comol_ds.benchmark.whole_models import ModelCase

CONTENDERS = {"zero3-2": ("comol", "lora", "frozen"), "tp2": ("comol", "frozen")}
_KINDS = {
    "all_gather_into_tensor": "gathers",
    "reduce_scatter_tensor": "reduces",
    "all_reduce": "all-reduces",
    "broadcast": "broadcasts",
}


def measure_collectives(case: ModelCase, layout_name: str, folder: Path) -> dict[str, Any]:
    """Count a settled step of every contender.

    Returns:
        A dictionary that can be written as JSON: contender -> kind -> calls and bytes, those of the call's largest
        tensor, on rank 0; all-reduces over tensor parallelism are a kind of their own.

    Raises:
        RuntimeError, subprocess.TimeoutExpired: as `run_ranks` does.
    """
    layout, contenders = LAYOUTS[layout_name], CONTENDERS[layout_name]
    job = {"case": asdict(case), "tensor_parallel": layout.tensor_parallel, "contenders": contenders}
    run_in_ranks("comol_ds.benchmark.collectives_rank", case, layout, folder, job)
    calls = json.loads((folder / "calls.json").read_text())
    return {
        "case": asdict(case),
        "layout": layout_name,
        "collectives": {name: _summed(of_contender) for name, of_contender in calls.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The result as text, one line per contender and kind."""
    case = result["case"]
    lines = [
        f"{result['layout']}: hidden {case['hidden']}, {case['layers']} layers, {case['tokens']} tokens per"
        f" data-parallel rank, r={case['r']}, E={case['num_experts']}; one step of rank 0",
        f"{'':10}{'':16}{'calls':>7}{'bytes':>14}",
    ]
    for name, kinds in result["collectives"].items():
        lines += [f"{name:10}{kind:16}{sums['calls']:7}{sums['bytes']:14,d}" for kind, sums in kinds.items()]
    return "\n".join(lines)


def _summed(calls: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    counts, sizes = Counter(), Counter()
    for call in calls:
        kind = ("TP " if call["tensor_parallel"] else "") + _KINDS[call["collective"]]
        counts[kind] += 1
        sizes[kind] += call["bytes"]
    return {kind: {"calls": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)}
