"""The random state of one rank: torch on the host, torch on the accelerator, Python."""

import random
from typing import Any

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
