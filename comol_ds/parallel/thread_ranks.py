"""The ranks of one tensor-parallel group as threads of one process: collectives without a process group."""

import threading
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from comol_ds.layout import RankGrid
from comol_ds.parallel.mesh import Mesh

_SECONDS = 60.0  # a rank waits for the others


class _Sum:
    """Adds one tensor of every rank."""

    def __init__(self, ranks: int) -> None:
        self.parts: list[torch.Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=_SECONDS)

    def __call__(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self.parts[rank] = tensor
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait()  # nobody changes a part that another still adds
        return total


class _Group(dist.ProcessGroup):
    def __init__(self, rank: int, add: _Sum) -> None:
        super().__init__(rank, len(add.parts))
        self.number, self.add = rank, add

    def allreduce(self, tensors: list[torch.Tensor], options: object = None) -> None:
        for tensor in tensors:
            tensor.copy_(self.add(self.number, tensor))


class ThreadMesh(Mesh):
    """The mesh of one such rank; nothing but all-reduces in its tensor group."""

    def __init__(self, rank: int, add: _Sum) -> None:
        ranks = len(add.parts)
        self.grid = RankGrid(rank, ranks, ranks)
        self.tensor_group, self.data_group = _Group(rank, add), None


def thread_meshes(ranks: int) -> list[ThreadMesh]:
    """One mesh per rank of a group."""
    add = _Sum(ranks)
    return [ThreadMesh(rank, add) for rank in range(ranks)]


def run_ranks(meshes: Sequence[ThreadMesh], work: Callable[[int], object]) -> list[Exception | None]:
    """Run ``work(rank)`` on every rank's thread at once.

    Returns:
        what each rank raised; those that only waited in vain for another raised threading.BrokenBarrierError.
    """
    raised: list[Exception | None] = [None] * len(meshes)

    def run(rank: int) -> None:
        try:
            work(rank)
        except Exception as error:
            raised[rank] = error
            meshes[rank].tensor_group.add.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(meshes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised
