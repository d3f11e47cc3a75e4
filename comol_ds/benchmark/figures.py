"""What every suite does with its contenders and their times, and what it says of the machine."""

import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def in_turns(contenders: Sequence[T], rounds: int, warmup: int = 0) -> Iterator[tuple[T, bool]]:
    """Every contender once per round, each round beginning with another one, and whether the round counts.

    A change in the machine's load then hits all of them.
    """
    for turn in range(warmup + rounds):
        for shift in range(len(contenders)):
            yield contenders[(turn + shift) % len(contenders)], turn >= warmup


def median_ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of mine / other."""
    return statistics.median(own / other for own, other in zip(mine, others, strict=True))


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(seconds), "minimum": min(seconds), "maximum": max(seconds)}


def sizes(case: Any) -> dict[str, Any]:
    """What a case's dataclass says, but for its folder, a temporary one."""
    return {name: value for name, value in asdict(case).items() if name != "folder"}


def machine(device: str) -> dict[str, str | int]:
    """What the figures were measured on."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine()
    )
    return {
        "cpu": cpu,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in ("peft", "transformers", "deepspeed")},
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
