"""Proves that a model's code computes on slices what it computes on the whole, before a rank starts.

A plan says which Linear gives slices and which takes them back. What the model does in between is its own code, and it
may do something else with less: reshape with a remainder that swallows heads, or normalize over all of them. So the
ranks of a tensor-parallel group are tried as threads of this process, on a small copy of the model, by the function
that shards the real one.
"""

import copy
from dataclasses import dataclass, field
from threading import BrokenBarrierError
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from comol_ds.adapters.table import BaseKind
from comol_ds.errors import one_line
from comol_ds.parallel.mesh import Mesh
from comol_ds.parallel.shrunken import VOCABULARY, NotShrinkable, logits_of, shrunken_copy, without_numbers
from comol_ds.parallel.tensor_parallel import shard_base
from comol_ds.parallel.thread_ranks import run_ranks, thread_meshes
from comol_ds.parallel.tp_plan import divided_sizes, plan_error

_SAME = 1e-4  # of the largest number: rounding in fp32, and far below what other arithmetic gives


def prove_placement(
    model: PreTrainedModel,
    placement: dict[str, BaseKind],
    tensor_parallel: int,
    attn_implementation: str,
    plan_file: str | None,
) -> None:
    """Refuse a placement under which ``tensor_parallel`` ranks compute something else than one.

    Args:
        model: only its configuration is read.
        placement: answer of `place_linears`; `check_placement` has accepted it.
        tensor_parallel: ranks, more than 1.
        attn_implementation: the run's.
        plan_file: where the plan came from, for the message.

    Raises:
        UserError: naming the first module whose output differs, or that fails; or no small copy of the model runs.
    """
    fault = placement_fault(model.config, placement, tensor_parallel, attn_implementation)
    if fault is not None:
        raise plan_error(model, plan_file, f" does not serve {tensor_parallel} ranks: {fault}")


def placement_fault(
    config: PreTrainedConfig, placement: dict[str, BaseKind], tensor_parallel: int, attn_implementation: str = "sdpa"
) -> str | None:
    """What goes wrong; None if every rank computes what the whole model does. Arguments as of `prove_placement`."""
    kinds = {without_numbers(name): kind for name, kind in placement.items()}

    def placed(small: PreTrainedModel) -> dict[str, BaseKind]:
        linears = (name for name, module in small.named_modules() if isinstance(module, nn.Linear))
        return {name: kinds[without_numbers(name)] for name in linears if without_numbers(name) in kinds}

    def divides(small: PreTrainedModel) -> bool:
        return all(size % tensor_parallel == 0 for size in divided_sizes(small, placed(small)).values())

    try:
        whole = shrunken_copy(config, attn_implementation, accepts=divides)
    except NotShrinkable as error:
        return f"it cannot be tried on a small copy of the model: {error}"
    meshes, placement, inputs = thread_meshes(tensor_parallel), placed(whole), _padded_rows()
    parts = [_Part(whole, placement, mesh) for mesh in meshes]
    expected = _Trace(whole)
    logits_of(whole, **inputs)
    raised = run_ranks(meshes, lambda rank: parts[rank].run(inputs))
    for part, error in zip(parts, raised, strict=True):
        if error is not None and not isinstance(error, BrokenBarrierError):
            return f"{part.trace.inside()} fails on slices: {one_line(error, limit=200)}"
    name = _first_difference(expected, [part.trace for part in parts], placement)
    return name and f"the output of {name} is not the whole model's"


def _padded_rows() -> dict[str, torch.Tensor]:
    """Two rows of an odd number of tokens, the second shorter."""
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@dataclass
class _Trace:
    """What the modules of a model return, watched from its creation on.

    Attributes:
        outputs: module name -> its last output, in the order in which they end.
        entered: names of the modules that run now, the innermost last.
    """

    model: nn.Module
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    entered: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(lambda module, args, name=name: self.entered.append(name))
            module.register_forward_hook(lambda module, args, output, name=name: self._ended(name, output))

    def _ended(self, name: str, output: Any) -> None:
        self.entered.pop()
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, torch.Tensor):
            self.outputs[name] = first.clone()

    def inside(self) -> str:
        """The innermost module whose forward pass did not end."""
        return next((name for name in reversed(self.entered) if name), type(self.model).__name__)


class _Part:
    """What one rank holds of a model: tensors of the whole, and slices of them."""

    def __init__(self, whole: PreTrainedModel, placement: dict[str, BaseKind], mesh: Mesh) -> None:
        parameters = dict(whole.named_parameters(remove_duplicate=False))
        self.model = copy.deepcopy(whole, {id(parameter): parameter for parameter in parameters.values()})
        self.vocabulary = shard_base(self.model, placement, mesh)
        for name, parameter in self.model.named_parameters():
            if hasattr(parameter, "shard"):
                parameter.copy_(parameter.shard.part_of(parameters[name]))
        self.trace = _Trace(self.model)

    def run(self, inputs: dict[str, torch.Tensor]) -> None:
        with self.vocabulary.whole_logits():
            logits_of(self.model, **inputs)


def _first_difference(expected: _Trace, parts: list[_Trace], placement: dict[str, BaseKind]) -> str | None:
    """The first module whose output is not the whole one's. What lies between sharded layers, and is a slice, shows in
    the layer that takes it back."""
    for name, whole in expected.outputs.items():
        found = [part.outputs.get(name) for part in parts]
        if any(output is None for output in found):
            return name
        if placement.get(name) == "column":
            found = [torch.cat(found, dim=-1)]
        if any(output.shape == whole.shape and not _same(output, whole) for output in found):
            return name
    return None


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= _SAME * expected.abs().max())
