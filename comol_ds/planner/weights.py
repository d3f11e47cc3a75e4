"""What a rank holds of weights, gradients and optimizer state, and where, as DeepSpeed 0.19 lays them out.

    stage 0, 1, 2  every weight whole (of the tensor-parallel slice)
    stage 3        of every weight ceil(numel / P) elements, over its P ranks
    stage 1, 2     the trainable ones flat, padded to 2 dp elements; each rank the optimizer state of 1 / dp of it
    stage 3        the optimizer state of the trainable partitions
Optimizer state: an fp32 master copy, in an fp32 run too, but not at stage 0; and the moments, fp32. Frozen weights have
neither gradient nor optimizer state.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from comol_ds.planner.local_model import LocalParameter
from comol_ds.planner.request import Request

Device = Literal["none", "cpu", "nvme"]  # DeepSpeed's words; none is the accelerator
_FP32 = 4


@dataclass
class Held:
    """Bytes of one rank by what they are and where they lie."""

    frozen: Counter[Device] = field(default_factory=Counter)
    adapter: Counter[Device] = field(default_factory=Counter)
    gradients: Counter[Device] = field(default_factory=Counter)
    master: Counter[Device] = field(default_factory=Counter)
    moments: Counter[Device] = field(default_factory=Counter)

    def on(self, device: Device) -> int:
        kinds = (self.frozen, self.adapter, self.gradients, self.master, self.moments)
        return sum(kind[device] for kind in kinds)


def held_weights(parameters: Iterable[LocalParameter], request: Request) -> Held:
    """What rank 0 holds between two steps, and of gradients between backward and update."""
    frozen = [parameter for parameter in parameters if not parameter.trainable]
    trainable = [parameter for parameter in parameters if parameter.trainable]
    held = Held()
    if request.stage == 3:
        _partitioned_weights(held, frozen, trainable, request)
    else:
        held.frozen["none"] = sum(parameter.nbytes for parameter in frozen)
        held.adapter["none"] = trained_numel(trainable, request) * request.dtype.itemsize
    _training_state(held, trainable, request)
    return held


def partition_ranks(parameter: LocalParameter, request: Request) -> int:
    """Over how many ranks ZeRO-3 partitions a parameter.

    Tensor-parallel slices over the data-parallel ranks; replicated frozen matrices over all ranks.
    """
    grid = request.grid
    everywhere = not parameter.sharded and not parameter.trainable and parameter.dims > 1
    return grid.size if everywhere else grid.data_parallel


def partition_numel(parameter: LocalParameter, request: Request) -> int:
    """Elements of ZeRO-3's partition, padding included."""
    return -(-parameter.numel // partition_ranks(parameter, request))


def gathered_over(parameter: LocalParameter, request: Request) -> int:
    """Over how many ranks the weight is gathered: with hpZ within the node, which has a second copy of everything."""
    within_node = request.zero.zero_hpz_partition_size
    return within_node if within_node > 1 else partition_ranks(parameter, request)


def persists(parameter: LocalParameter, request: Request) -> bool:
    """Whether ZeRO-3 leaves a parameter gathered: as small as stage3_param_persistence_threshold."""
    return parameter.numel <= request.zero.param_persistence_threshold


def trained_numel(trainable: Iterable[LocalParameter], request: Request) -> int:
    """Trainable elements of the flat buffer of stages 1 and 2, padding included; at stage 0 the plain number."""
    numel = sum(parameter.numel for parameter in trainable)
    unit = 2 * request.grid.data_parallel if request.stage in (1, 2) else 1
    return -(-numel // unit) * unit


def updated_numel(trainable: Iterable[LocalParameter], request: Request) -> int:
    """Trainable elements whose optimizer state this rank has."""
    if request.stage == 3:
        return sum(partition_numel(parameter, request) for parameter in trainable)
    ranks = request.grid.data_parallel if request.stage else 1
    return trained_numel(trainable, request) // ranks


def _partitioned_weights(
    held: Held, frozen: list[LocalParameter], trainable: list[LocalParameter], request: Request
) -> None:
    device = request.offload_device("param")
    within_node = request.zero.zero_hpz_partition_size
    for kind, parameters in ((held.frozen, frozen), (held.adapter, trainable)):
        for parameter in parameters:
            numel = partition_numel(parameter, request)
            if within_node > 1:
                numel += -(-parameter.numel // within_node)
            kind[device] += numel * parameter.itemsize
            if persists(parameter, request):
                kind["none"] += parameter.nbytes


def _training_state(held: Held, trainable: list[LocalParameter], request: Request) -> None:
    numel, device = updated_numel(trainable, request), request.offload_device("optimizer")
    settings, stage = request.config.optimizer, request.stage
    held.master[device] = numel * _FP32 if stage else 0
    states = 2 if settings.optim == "adamw_torch" else int(settings.sgd_momentum > 0)
    held.moments[device] = states * numel * _FP32
    size = request.gradient_dtype.itemsize
    whole = sum(parameter.numel for parameter in trainable) * size
    if stage == 0:
        held.gradients["none"] = whole
    elif stage == 1:  # whole until the last micro-batch, then the reduced part beside them
        held.gradients["none"] = whole + numel * size
    elif stage == 2:  # the part of this micro-batch, and the sum of the earlier ones
        held.gradients["none"] = numel * size * min(2, request.batches.accumulation)
    else:
        held.gradients[device] = numel * size
    if device != "none":
        held.gradients[device] += numel * _FP32  # the update reads fp32 gradients beside the fp32 weights


def step_temporaries(trainable: list[LocalParameter], request: Request) -> int:
    """Device memory that the update takes beside what is held: fp32 gradients, and torch's multi-tensor update."""
    if request.offload_device("optimizer") != "none":
        return 0
    numel = updated_numel(trainable, request)
    gradients = 0 if request.stage == 0 else numel * (_FP32 + request.gradient_dtype.itemsize)
    return gradients + numel * _FP32
