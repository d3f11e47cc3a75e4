"""Records the calls of torch's collectives, for workers that count them.

`record_collectives` comes before DeepSpeed is imported, which keeps its own references to them.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

# collective -> place and names of its largest tensor
COLLECTIVES = {
    "all_gather_into_tensor": (0, ("output_tensor",)),
    "reduce_scatter_tensor": (1, ("input", "input_tensor")),
    "all_reduce": (0, ("tensor",)),
    "broadcast": (0, ("tensor",)),
}


@dataclass(frozen=True)
class Call:
    """One call: the collective, its group, the size of its largest tensor."""

    name: str
    group: Any
    numel: int
    nbytes: int


CALLS: list[Call] = []


def record_collectives() -> None:
    """Replace torch's collectives by themselves plus a record of the call in CALLS."""
    for name in COLLECTIVES:
        _record(name)


def _record(name: str) -> None:
    original, (place, names) = getattr(dist, name), COLLECTIVES[name]

    def call(*args, **kwargs):
        tensor = args[place] if len(args) > place else next(kwargs[name] for name in names if name in kwargs)
        CALLS.append(Call(name, kwargs.get("group"), tensor.numel(), tensor.nbytes))
        return original(*args, **kwargs)

    setattr(dist, name, call)
