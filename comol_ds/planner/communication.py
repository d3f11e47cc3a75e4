"""What a rank communicates in one optimizer step, by kind.

Counted are tensors. Not counted: norms, losses, checks of consistency, and the messages of a few numbers around them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from comol_ds.planner.activations import Part
from comol_ds.planner.gathering import Collective
from comol_ds.planner.local_model import LocalParameter
from comol_ds.planner.request import Request
from comol_ds.planner.weights import partition_numel, trained_numel

_ALL_REDUCE = 2  # a ring passes every element twice: once to be summed, once as the sum
_FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """One kind of communication.

    Attributes:
        collectives: number per step.
        nbytes: sum of the tensors that are gathered, reduced or summed.
        sent: bytes that a rank sends, by a ring: (P - 1) / P of a gathered or reduced tensor, twice of a summed one.
    """

    kind: str
    collectives: int
    nbytes: int
    sent: int


def traffic(
    request: Request,
    parameters: Sequence[LocalParameter],
    gathers: Sequence[Collective],
    layers: Sequence[Part],
    ends: Part,
) -> list[Traffic]:
    """All kinds that the layout has.

    Args:
        request: the resolved run.
        parameters: what rank 0 holds before ZeRO.
        gathers: ZeRO-3's of one micro-batch.
        layers, ends: the passes of one row, as they are checkpointed.
    """
    passes, rows = request.batches.accumulation, request.batches.micro_batch
    tensor_parallel = request.grid.tensor_parallel
    trainable = [parameter for parameter in parameters if parameter.trainable]
    forward = [size * rows for part in (*layers, ends) for size in part.forward_sums]
    backward = [size * rows for part in (*layers, ends) for size in part.backward_sums]
    kinds = [
        _gathers(gathers, passes),
        *_data_parallel(request, trainable),
        _sums("tensor parallelism: activations, forward", forward * passes, tensor_parallel),
        _sums("tensor parallelism: gradients, backward", backward * passes, tensor_parallel),
        _sums("tensor parallelism: partial adapter gradients", _partial(request, trainable), tensor_parallel),
    ]
    return [kind for kind in kinds if kind.collectives]


def _gathers(gathers: Sequence[Collective], passes: int) -> Traffic:
    sent = sum(gather.nbytes * (gather.ranks - 1) // gather.ranks for gather in gathers)
    nbytes = sum(gather.nbytes for gather in gathers)
    return Traffic("ZeRO-3: weights, forward and backward", len(gathers) * passes, nbytes * passes, sent * passes)


def _data_parallel(request: Request, trainable: list[LocalParameter]) -> list[Traffic]:
    ranks, stage = request.grid.data_parallel, request.stage
    if ranks == 1:
        return []
    # stages 2 and 3 partition the gradients of every micro-batch, the others reduce their sum
    passes = request.batches.accumulation if stage >= 2 else 1
    buckets = bucket_sizes([p.numel for p in reversed(trainable)], request)
    sizes = [numel * request.reduced_dtype.itemsize for numel in buckets] * passes
    reduced = _traffic("data parallelism: adapter gradients", sizes, ranks, 1 if stage == 3 else _ALL_REDUCE)
    updated = [trained_numel(trainable, request) * request.dtype.itemsize] if stage in (1, 2) else []
    return [reduced, _traffic("data parallelism: updated adapter", updated, ranks, 1)]


def bucket_sizes(numels: Iterable[int], request: Request) -> list[int]:
    """Elements of each bucket that DeepSpeed reduces at once; a bucket is sent before it would overflow."""
    limit = request.zero.reduce_bucket_size if request.stage else 500_000_000
    buckets = [0]
    for numel in numels:
        if buckets[-1] and buckets[-1] + numel > limit:
            buckets.append(0)
        buckets[-1] += numel
    return [bucket for bucket in buckets if bucket]


def _partial(request: Request, trainable: list[LocalParameter]) -> list[int]:
    """Each rank sums what ZeRO left it of the partial gradients, in one collective."""
    partial = [parameter for parameter in trainable if parameter.partial]
    if request.stage == 3:
        return [sum(partition_numel(parameter, request) for parameter in partial) * _FP32] if partial else []
    ranks = request.grid.data_parallel if request.stage else 1
    numel = -(-sum(parameter.numel for parameter in partial) // ranks)
    return [numel * request.gradient_dtype.itemsize] if numel else []


def _sums(kind: str, sizes: list[int], ranks: int) -> Traffic:
    return _traffic(kind, sizes, ranks, _ALL_REDUCE)


def _traffic(kind: str, sizes: list[int], ranks: int, rounds: int) -> Traffic:
    return Traffic(kind, len(sizes), sum(sizes), sum(rounds * size * (ranks - 1) // ranks for size in sizes))
