"""What a plan costs: the command launch/plan.py on Llama-3.1-70B's geometry, in a process of its own each time."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from comol_ds.benchmark.figures import sizes, spread
from comol_ds.benchmark.geometry import LLAMA_3_1_70B
from comol_ds.benchmark.processes import REPOSITORY


@dataclass(frozen=True)
class PlanningCase:
    """A config.json of Llama-3.1-70B in ``folder``, planned for ``ranks`` ranks and rows of ``tokens`` tokens."""

    folder: Path
    ranks: int = 8
    tokens: int = 4096


def measure_planning(case: PlanningCase, rounds: int) -> dict:
    """Run the command ``rounds`` times.

    Returns:
        A dictionary that can be written as JSON, see `summary`.

    Raises:
        RuntimeError: the command failed.
    """
    return summary(case, [plan_once(case) for _ in range(rounds)])


def summary(case: PlanningCase, runs: list[dict]) -> dict:
    """Seconds of the clock and of the processor over all runs of `plan_once`, their largest peak of resident memory in
    bytes, and the planned peak of a rank in bytes."""
    return {
        "case": sizes(case),
        "rounds": len(runs),
        "seconds": {name: spread([run[name] for run in runs]) for name in ("clock", "processor")},
        "memory_bytes": max(run["memory_bytes"] for run in runs),
        "planned_peak_bytes": runs[0]["report"]["device_bytes"]["peak"],
    }


def plan_once(case: PlanningCase) -> dict:
    """Run the command once.

    Returns:
        Its ``report``, the seconds of the ``clock`` and of the ``processor``, and the peak of resident memory,
        ``memory_bytes``.

    Raises:
        RuntimeError: the command failed.
    """
    config = LLAMA_3_1_70B | {"num_hidden_layers": 80}
    (case.folder / "config.json").write_text(json.dumps(config))
    command = [
        *(sys.executable, "launch/plan.py", "--json", "--model_name_or_path", str(case.folder)),
        *("--world_size", str(case.ranks), "--ds_config", "ds_configs/zero3.json"),
        *("--per_device_train_batch_size", "1", "--max_length", str(case.tokens)),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"launch/plan.py failed with exit code {process.returncode}")
    return {
        "report": json.loads(said),
        "clock": taken,
        "processor": usage.ru_utime + usage.ru_stime,
        "memory_bytes": usage.ru_maxrss * 1024,
    }


def table(result: dict) -> str:
    """The result as text."""
    case, seconds = result["case"], result["seconds"]
    taken = ", ".join(
        f"{name} {values['median']:.2f} s ({values['minimum']:.2f} to {values['maximum']:.2f})"
        for name, values in seconds.items()
    )
    return (
        f"Llama-3.1-70B on {case['ranks']} ranks, rows of {case['tokens']} tokens, {result['rounds']} rounds: {taken};"
        f" peak memory {result['memory_bytes'] / 2**30:.2f} GiB"
    )
