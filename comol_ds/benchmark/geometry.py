"""Llama-3.1-70B's geometry with few layers and random weights, trained by launch/train.py under ZeRO-3 and under TP.

Both layouts have all ranks of one machine, on its GPUs if it has some. Every row is ``tokens`` long and a micro-batch
is one row; ZeRO-3 trains one row per rank and step, tensor parallelism one in all.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from comol_ds.benchmark.figures import sizes
from comol_ds.benchmark.processes import REPOSITORY, run_ranks
from comol_ds.config_parser import parse_run_config
from comol_ds.ds_config import load_ds_json
from comol_ds.parallel.device import device
from comol_ds.parallel.groups import quiet_libraries
from comol_ds.planner.plan import Plan, Planner
from comol_ds.planner.request import resolve

LLAMA_3_1_70B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
# over gloo on 2 CPU cores a ZeRO-3 step of 2 layers takes 60 s, and seconds grow with the layers
_LIMIT_SECONDS = 4 * 3600


@dataclass(frozen=True)
class GeometryCase:
    """What both layouts train; ``folder`` takes the configuration, the data and the run folders."""

    folder: Path
    layers: int = 2
    ranks: int = 2
    steps: int = 3
    tokens: int = 64
    checkpointing: str = "none"


def measure_geometry(case: GeometryCase) -> dict[str, Any]:
    """Train the case under ZeRO-3, then tensor-parallel over all ranks; one rank has nothing to split.

    Returns:
        A dictionary that can be written as JSON: per layout the seconds of every step and their median, tokens per
        step, each rank's peak memory (bytes; allocated on a GPU, the process's resident size on a CPU), and the
        planner's peak of a rank's tensors.

    Raises:
        RuntimeError, subprocess.TimeoutExpired: as `run_ranks` does.
    """
    layouts = {"zero3": 1} | ({f"tp{case.ranks}": case.ranks} if case.ranks > 1 else {})
    runs = {}
    for name, tensor_parallel in layouts.items():
        plan = plan_layout(case, name, tensor_parallel)
        runs[name] = train_layout(case, name, tensor_parallel) | {"planned_peak_bytes": plan.peak}
    return {
        "case": sizes(case) | {"parameters": plan.everything - plan.trainable},
        "memory": "resident memory of the process" if device().type == "cpu" else "allocated device memory",
        "layouts": runs,
    }


def plan_layout(case: GeometryCase, layout: str = "zero3", tensor_parallel: int = 1) -> Plan:
    """The planner's word on a layout. Writes the model's configuration, which the run reads too."""
    quiet_libraries()
    (case.folder / "config.json").write_text(json.dumps(LLAMA_3_1_70B | {"num_hidden_layers": case.layers}))
    config = parse_run_config(_flags(case, layout, tensor_parallel))
    return Planner().plan(resolve(config, load_ds_json(config.run.ds_config), case.ranks, nodes=1))


def train_layout(
    case: GeometryCase, layout: str = "zero3", tensor_parallel: int = 1, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What metrics.jsonl says of a run, which `plan_layout` has planned, in fresh processes.

    Args:
        environment: of these processes, besides what they inherit.

    Raises:
        RuntimeError, subprocess.TimeoutExpired: as `run_ranks` does.
    """
    _write_records(case)
    words = [str(REPOSITORY / "launch" / "train.py"), *_flags(case, layout, tensor_parallel)]
    cache = {"HF_DATASETS_CACHE": str(case.folder / "datasets_cache")}
    run_ranks(case.ranks, words, layout, _LIMIT_SECONDS, cache | dict(environment or {}))
    lines = [json.loads(line) for line in (case.folder / layout / "metrics.jsonl").read_text().splitlines()]
    ends = [0.0, *(line["seconds"] for line in lines)]
    seconds = [end - start for start, end in pairwise(ends)]
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "tokens_per_step": lines[-1]["tokens"],
        "peak_bytes": lines[-1]["memory_per_rank"],
    }


def table(result: dict[str, Any]) -> str:
    """The result as text, one line per layout and rank."""
    case = result["case"]
    lines = [
        f"Llama-3.1-70B's geometry, {case['layers']} layers, {case['parameters'] / 1e9:.2f} B random bf16 parameters"
        f" on {case['ranks']} ranks; {case['steps']} steps of rows of {case['tokens']} tokens; GiB; peak:"
        f" {result['memory']}; planned: tensors alone",
        f"{'':10}{'rank':>5}{'seconds/step':>14}{'tokens/step':>13}{'peak':>9}{'planned':>9}",
    ]
    for name, run in result["layouts"].items():
        figures = f"{run['median_seconds']:14.2f}{run['tokens_per_step']:13,d}"
        for rank, nbytes in enumerate(run["peak_bytes"]):
            lines.append(f"{name:10}{rank:5}{figures}{nbytes / 2**30:9.2f}{run['planned_peak_bytes'] / 2**30:9.2f}")
    return "\n".join(lines)


def _write_records(case: GeometryCase) -> None:
    """One record for every row of every step, each longer than a row."""
    text = " ".join(str(number) for number in range(case.tokens))
    records = [{"prompt": f"{row} {text}", "completion": text} for row in range(case.steps * case.ranks)]
    (case.folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _flags(case: GeometryCase, layout: str, tensor_parallel: int) -> list[str]:
    """The run as flags of launch/train.py; it evaluates one row per rank at its end, which no figure counts."""
    flags = {
        "ds_config": REPOSITORY / "ds_configs" / "zero3.json", "tensor_parallel_size": tensor_parallel,
        "model_name_or_path": case.folder / "config.json", "init_random": "true", "bf16": "true",
        "tokenizer_name": REPOSITORY / "comol_ds" / "demo" / "model", "dataset": case.folder / "records.jsonl",
        "eval_dataset": case.folder / "records.jsonl", "max_eval_records": case.ranks, "max_generate_records": 0,
        "per_device_eval_batch_size": 1, "per_device_train_batch_size": 1, "max_length": case.tokens,
        "train_on_prompt": "true", "max_steps": case.steps, "logging_steps": 1, "report_to": "none",
        "activation_checkpointing": case.checkpointing, "r": 16, "num_experts": 8, "output_dir": case.folder / layout,
    }  # fmt: skip
    targets = ["--target_modules", *(f"{name}_proj" for name in ("q", "k", "v", "o", "up", "down"))]
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)] + targets
