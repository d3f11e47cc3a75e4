"""Whole training steps (forward, backward, update) of CoMoL, LoRA, MoLoRA and the frozen base, taking turns.

Layouts: DeepSpeed ZeRO-3 on 1 and on 2 ranks, and tensor parallelism over 2, where PEFT's LoRA cannot go. Every layout
is one group of fresh processes that holds all contenders.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comol_ds.benchmark.figures import median_ratio, spread
from comol_ds.benchmark.geometry import LLAMA_3_1_70B
from comol_ds.benchmark.processes import run_ranks
from comol_ds.benchmark.whole_models import ATTACH, ModelCase, write_model

_LIMIT_SECONDS = 3600


@dataclass(frozen=True)
class Layout:
    """How many ranks, of which how many share one copy of the model, and who can train so."""

    ranks: int
    tensor_parallel: int = 1
    contenders: tuple[str, ...] = tuple(ATTACH)


LAYOUTS = {"zero3-1": Layout(1), "zero3-2": Layout(2), "tp2": Layout(2, 2, ("comol", "frozen"))}
GEOMETRIES = {
    "tiny": ModelCase(),
    "70b": ModelCase(
        hidden=LLAMA_3_1_70B["hidden_size"],
        intermediate=LLAMA_3_1_70B["intermediate_size"],
        heads=LLAMA_3_1_70B["num_attention_heads"],
        key_value_heads=LLAMA_3_1_70B["num_key_value_heads"],
        layers=1,
        tokens=256,
        bf16=True,
    ),
}


def measure_step(
    case: ModelCase, layout_name: str, folder: Path, names: Sequence[str], rounds: int, warmup: int = 1
) -> dict[str, Any]:
    """Time ``rounds`` steps of every contender that the layout has.

    Args:
        case: the model and its batch.
        layout_name: one of LAYOUTS.
        folder: an empty one, for the configuration and the result.
        names: the contenders.
        rounds: timed steps of each.
        warmup: steps before them; in the first, ZeRO-3 learns the order of the modules.

    Returns:
        A dictionary that can be written as JSON. ratio: the median over rounds of contender / reference,
        LoRA where the layout has it, else the frozen base; peak_bytes: of rank 0, all contenders together.

    Raises:
        RuntimeError, subprocess.TimeoutExpired: as `run_ranks` does.
    """
    layout = LAYOUTS[layout_name]
    contenders = [name for name in names if name in layout.contenders]
    reference = "lora" if "lora" in contenders else "frozen"
    job = {
        "case": asdict(case), "tensor_parallel": layout.tensor_parallel, "contenders": contenders, "rounds": rounds,
        "warmup": warmup,
    }  # fmt: skip
    run_in_ranks("comol_ds.benchmark.step_rank", case, layout, folder, job)
    report = json.loads((folder / "seconds.json").read_text())
    seconds = report.pop("seconds")
    return {
        "case": asdict(case),
        "layout": layout_name,
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "reference": reference,
        "ratio": {name: median_ratio(values, seconds[reference]) for name, values in seconds.items()},
        **report,
    }


def run_in_ranks(module: str, case: ModelCase, layout: Layout, folder: Path, job: dict[str, Any]) -> None:
    """Run a module on the layout's ranks, the processor's cores divided between them, with its job in ``folder``."""
    write_model(case, folder)
    (folder / "job.json").write_text(json.dumps(job))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // layout.ranks)))
    words = ["--module", module, str(folder)]
    run_ranks(layout.ranks, words, module, _LIMIT_SECONDS, {"OMP_NUM_THREADS": threads})


def table(result: dict[str, Any]) -> str:
    """The result as text, one line per contender."""
    case = result["case"]
    lines = [
        f"{result['layout']}: hidden {case['hidden']}, {case['layers']} layers, {case['tokens']} tokens per"
        f" data-parallel rank, {'bf16' if case['bf16'] else 'fp32'}, r={case['r']}, E={case['num_experts']};"
        f" {result['rounds']} rounds, {result['threads']} threads per rank",
        f"{'':10}{'seconds':>9}{'min':>9}{'max':>9}{'/ ' + result['reference']:>10}",
    ]
    lines += [
        f"{name:10}{taken['median']:9.3f}{taken['minimum']:9.3f}{taken['maximum']:9.3f}{result['ratio'][name]:10.3f}"
        for name, taken in result["seconds"].items()
    ]
    return "\n".join(lines)
