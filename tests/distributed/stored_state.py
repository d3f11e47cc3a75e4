"""What a checkpoint stores of the canonical state, beside what an engine holds."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from comol_ds.parallel import groups
from comol_ds.parallel.training_state import gather_training_state


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """<kind>:<parameter> -> tensor."""
    return load_file(checkpoint / "training_state" / "tensors.safetensors")


def assert_holds_what_is_stored(engine: Any, checkpoint: Path) -> None:
    """Before the next step, values, moments and step counts are those of the checkpoint, bit by bit. Collective."""
    state = gather_training_state(engine)
    if groups.read_world().rank == 0:
        found = {f"{kind}:{name}": tensor for kind, tensors in state.items() for name, tensor in tensors.items()}
        expected = stored_tensors(checkpoint)
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
