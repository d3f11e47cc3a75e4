"""The random state of one rank: torch on the host, torch on the accelerator, Python."""

import random
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def rng_state() -> dict[str, Any]:
    """What `set_rng_state` needs, in types that torch.load(weights_only=True) reads."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if get_accelerator().device_name() != "cpu":
        state["accelerator"] = get_accelerator().get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned on a rank with the same kind of device."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "accelerator" in state:
        get_accelerator().set_rng_state(state["accelerator"])


def derive_rng_state(seed: int, step: int, dp_rank: int) -> None:
    """A random state for the steps after ``step`` where no stored one fits: on a layout that did not write one.

    The same three numbers give the same state. Ranks with other records draw other numbers, tensor-parallel peers the
    same, and no step repeats the numbers of the run's start.
    """
    derived = int(np.random.SeedSequence((seed, step, dp_rank)).generate_state(1, np.uint64)[0])
    torch.manual_seed(derived)  # accelerators too
    random.seed(derived)
