"""The nearest change that makes a run fit: as few changes as possible, and of those the least painful."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from comol_ds.config import RunConfig
from comol_ds.errors import UserError
from comol_ds.layout import divisors
from comol_ds.planner.plan import Plan, Planner
from comol_ds.planner.request import Request, resolve

# An allowance, not a measurement: CUDA's context, NCCL's buffers and the allocator's remainders are no tensors.
RESERVED_FRACTION = 0.1


@dataclass(frozen=True)
class Change:
    """One setting to change, in words that a user can follow, and what it does to flags and JSON."""

    words: str
    model: tuple[tuple[str, Any], ...] = ()
    optimizer: tuple[tuple[str, Any], ...] = ()
    parallel: tuple[tuple[str, Any], ...] = ()
    zero: tuple[tuple[str, Any], ...] = ()

    def apply(self, config: RunConfig, template: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
        template = copy.deepcopy(template)
        if self.parallel:
            template.pop("tensor_parallel", None)  # the flag says it now
        if self.zero:
            template.setdefault("zero_optimization", {}).update(self.zero)
        return (
            replace(
                config,
                model=replace(config.model, **dict(self.model)),
                optimizer=replace(config.optimizer, **dict(self.optimizer)),
                parallel=replace(config.parallel, **dict(self.parallel)),
            ),
            template,
        )


def available(device_memory: int) -> int:
    """Bytes of a device's memory that tensors can have."""
    return int(device_memory * (1 - RESERVED_FRACTION))


def nearest_fit(
    planner: Planner, request: Request, template: dict[str, Any], device_memory: int
) -> tuple[list[Change], Plan] | None:
    """The changes to a run after which a rank needs no more than what is `available`, and its plan then.

    Looked for in this order: activation checkpointing full; a smaller micro-batch, the global batch staying what it
    is; more tensor-parallel ranks, within a node; ZeRO-3; optimizer state, then weights in host memory. First single
    changes, then pairs, and so on. None if nothing of it suffices.

    Args:
        planner: keeps what the plans have in common.
        request: the run as it is, which does not fit.
        template: its DeepSpeed JSON as the user wrote it.
        device_memory: bytes.
    """
    nodes = request.grid.size // request.ranks_per_node
    for changes in _in_order(request):
        config, changed = request.config, template
        for change in changes:
            config, changed = change.apply(config, changed)
        try:
            candidate = resolve(config, changed, request.grid.size, nodes)
            if planner.floor(candidate, request) > available(device_memory):
                continue
            plan = planner.plan(candidate)
        except UserError:  # a combination that the run would refuse
            continue
        if plan.peak <= available(device_memory):
            return list(changes), plan
    return None


def _in_order(request: Request) -> Iterator[tuple[Change, ...]]:
    kinds = [kind for kind in _kinds(request) if kind]
    for number in range(1, len(kinds) + 1):
        for chosen in combinations(kinds, number):
            yield from product(*chosen)


def _kinds(request: Request) -> list[list[Change]]:
    """Every kind of change with its steps, the smallest first."""
    rows, ranks = request.batches.micro_batch, request.grid.tensor_parallel
    return [
        [Change("--activation_checkpointing full", model=(("activation_checkpointing", "full"),))]
        if request.config.model.checkpointed_every != 1
        else [],
        [
            Change(f"--per_device_train_batch_size {fewer}", optimizer=(("per_device_train_batch_size", fewer),))
            for fewer in reversed(divisors(rows)[:-1])
        ],
        [
            Change(f"--tensor_parallel_size {more}", parallel=(("tensor_parallel_size", more),))
            for more in divisors(request.ranks_per_node)
            if more > ranks
        ],
        [Change('"stage": 3 in zero_optimization', zero=(("stage", 3),))] if request.stage < 3 else [],
        _offload("optimizer", request),
        _offload("param", request),
    ]


def _offload(what: str, request: Request) -> list[Change]:
    if request.offload_device(what) != "none":
        return []
    block = {"device": "cpu", "pin_memory": True}
    return [Change(f'"offload_{what}": {{"device": "cpu"}} in zero_optimization', zero=((f"offload_{what}", block),))]
