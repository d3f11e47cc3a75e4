"""Launched runs that must end before they train."""

import subprocess
from pathlib import Path

from tests.distributed.launching import REPOSITORY, run_deepspeed


def refused_run(model: Path, data: Path, out: Path, extensions: Path) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Start a run on two ranks that ends with exit code 2; returns it and what it told."""
    flags = {
        "ds_config": REPOSITORY / "ds_configs" / "zero3.json",
        "model_name_or_path": model,
        "dataset": data,
        "output_dir": out,
        "max_steps": 1,
    }
    arguments = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    run = run_deepspeed(2, REPOSITORY / "launch" / "train.py", arguments, extensions)
    assert run.returncode == 2, run.stderr[-3000:]
    return run, [line for line in (run.stdout + run.stderr).splitlines() if "train.py: error:" in line]
