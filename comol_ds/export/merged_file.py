"""One safetensors file written again with some of its tensors changed, in blocks, by several threads.

Dtypes and shapes stay, so the header does too: every byte that belongs to no changed tensor is copied to its place.

A merged weight is cast(W + B A), with one fp32 product, one fp32 sum and one cast. A block of rows has the bits of the
whole product as long as BLAS sums over R in the same order for both. MKL does from 4 rows on (AVX-512, R <= 1000,
I >= 8); blocks are far larger, and of nearly equal size, so that none is left with few rows.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from comol_ds.errors import UserError
from comol_ds.layout import Shard, shard_of
from comol_ds.tensor_files import StoredTensor, prefetch, read_at

T = TypeVar("T")

BLOCK_ELEMENTS = 1 << 19  # with its fp32 copies in a core's cache: 1.2 CPU seconds per GiB of bf16; 2 at 1 << 21
MIN_BLOCK_ROWS = 64  # of a weight with very long rows
FLUSH_BYTES = 64 << 20  # after which the disk starts to write them, while the next are computed
AHEAD_BYTES = 64 << 20  # that the disk reads behind what is being computed


@dataclass(frozen=True)
class RoundingLoss:
    """What the cast to the stored dtype took from one module's update.

    Attributes:
        dtype: such as "bfloat16".
        ratio: ||delta|| / ||W||, Frobenius norms.
        lost: ||cast(W + delta) - W - delta|| / ||delta||; 0 for an update of zeros.
    """

    dtype: str
    ratio: float
    lost: float


@dataclass(frozen=True)
class Update:
    """``up @ down`` is to be added to ``tensor``, the weight [O, I] of ``module``; down [R, I], up [O, R], fp32."""

    tensor: StoredTensor
    module: str
    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Replacement:
    """``values`` take the place of those of ``tensor``."""

    tensor: StoredTensor
    values: torch.Tensor


def write_merged_file(
    source: Path, target: Path, changes: Sequence[Update | Replacement], progress: Callable[[int], object]
) -> dict[str, RoundingLoss]:
    """Write ``source`` with its changes to the new file ``target`` and flush it to the disk.

    Args:
        progress: is called with the bytes that were written since the last call.

    Returns:
        Module of every update -> its rounding loss.

    Raises:
        UserError: ``source`` cannot be read, or a value is not finite after its cast.
        OSError: ``target`` cannot be written.
    """
    losses: dict[str, RoundingLoss] = {}
    with (
        source.open("rb", buffering=0) as stored,
        target.open("xb", buffering=0) as written,
        _workers() as pool,
        ThreadPoolExecutor(1, "flush") as flusher,
        ThreadPoolExecutor(1, "prefetch") as prefetcher,
    ):
        files, flushes, dirty = _Files(source, stored.fileno(), written.fileno(), pool, _Scratch()), [], 0
        # several threads' reads look random to the kernel, which then reads late
        prefetcher.submit(prefetch, files.stored, 0, AHEAD_BYTES)
        for start, stop, change in _parts(changes, os.fstat(files.stored).st_size):
            prefetcher.submit(prefetch, files.stored, start + AHEAD_BYTES, stop + AHEAD_BYTES)
            if isinstance(change, Update):
                losses[change.module] = files.merge(change)
            elif isinstance(change, Replacement):
                files.replace(change)
            else:
                files.copy(start, stop)
            progress(stop - start)
            dirty += stop - start
            if dirty >= FLUSH_BYTES:
                flushes.append(flusher.submit(os.fdatasync, files.written))
                dirty = 0
        for flush in flushes:
            flush.result()
        os.fsync(files.written)
    return losses


def _parts(
    changes: Sequence[Update | Replacement], size: int
) -> Iterator[tuple[int, int, Update | Replacement | None]]:
    """The file's bytes from front to back: [start, stop) and what changes there."""
    position = 0
    for change in sorted(changes, key=lambda change: change.tensor.start):
        yield position, change.tensor.start, None
        yield change.tensor.start, change.tensor.stop, change
        position = change.tensor.stop
    yield position, size, None


@dataclass(frozen=True)
class _Files:
    """The file that is read, the one that is written, and the threads that do both, block by block, at any place."""

    source: Path
    stored: int
    written: int
    pool: Executor
    scratch: "_Scratch"

    def copy(self, start: int, stop: int) -> None:
        """Bytes [start, stop) as they are."""

        def copy_block(block: Shard) -> None:
            self._write(start + block.start, self._read(start + block.start, (block.size,), torch.uint8))

        self._for_blocks(copy_block, stop - start, BLOCK_ELEMENTS)

    def merge(self, update: Update) -> RoundingLoss:
        tensor, (outputs, inputs) = update.tensor, update.tensor.shape
        precise = torch.promote_types(tensor.dtype, torch.float32)  # a float64 base stays one

        def merge_rows(rows: Shard) -> tuple[float, float, float]:
            """Squared norms of W, of delta and of what the cast took."""
            shape, place = (rows.size, inputs), tensor.start + rows.start * inputs * tensor.dtype.itemsize
            stored = self._read(place, shape, tensor.dtype)
            weight = self.scratch.take("weight", shape, precise).copy_(stored)
            delta = self.scratch.take("delta", shape, torch.float32)
            delta = torch.mm(rows.part_of(update.up), update.down, out=delta).to(precise)
            merged = torch.add(weight, delta, out=self.scratch.take("merged", shape, precise))
            self._write(place, stored.copy_(merged))
            lost = merged.copy_(stored).sub_(weight).sub_(delta)
            return tuple(torch.dot(values.flatten(), values.flatten()).item() for values in (weight, delta, lost))

        sums = self._for_blocks(merge_rows, outputs, max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // max(1, inputs)))
        weight, delta, lost = (math.sqrt(math.fsum(squares)) for squares in zip(*sums, strict=True))
        if not math.isfinite(lost):
            raise self._not_finite(tensor)
        return RoundingLoss(_dtype_name(tensor), delta / weight if weight else math.inf, lost / delta if delta else 0.0)

    def replace(self, replacement: Replacement) -> None:
        tensor, values = replacement.tensor, replacement.values.detach().flatten()

        def replace_block(block: Shard) -> None:
            cast = block.part_of(values).to("cpu", tensor.dtype)
            if not torch.isfinite(cast).all():
                raise self._not_finite(tensor)
            self._write(tensor.start + block.start * tensor.dtype.itemsize, cast)

        self._for_blocks(replace_block, values.numel(), BLOCK_ELEMENTS)

    def _not_finite(self, tensor: StoredTensor) -> UserError:
        return UserError(
            f"{self.source}: the new values of {tensor.name!r} are not finite in its {_dtype_name(tensor)};"
            " check the adapter and the base, or use a float32 copy of the base"
        )

    def _for_blocks(self, work: Callable[[Shard], T], total: int, size: int) -> list[T]:
        """The results for [0, total) in blocks of nearly equal size, at most ``size``, in order."""
        blocks = math.ceil(total / size)
        return list(self.pool.map(work, (shard_of(total, 0, blocks, number) for number in range(blocks))))

    def _read(self, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Into this thread's memory, which holds until its next call."""
        values = self.scratch.take("stored", shape, dtype)
        try:
            read_at(self.stored, place, _memory(values))
        except OSError as error:
            raise UserError(f"{self.source} cannot be read: {error}; check the disk") from error
        except EOFError as error:
            raise UserError(
                f"{self.source} became shorter while it was read; do not change the base meanwhile"
            ) from error
        return values

    def _write(self, place: int, values: torch.Tensor) -> None:
        memory = _memory(values)
        while memory:
            done = os.pwrite(self.written, memory, place)
            memory, place = memory[done:], place + done


class _Scratch(threading.local):
    """Memory that a thread uses for one block after the other: fresh pages would cost more time than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if use not in self._buffers or self._buffers[use].numel() < size:
            self._buffers[use] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[use][:size].view(dtype).view(shape)


def _dtype_name(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _memory(values: torch.Tensor) -> memoryview:
    return memoryview(values.flatten().view(torch.uint8).numpy())


@contextmanager
def _workers() -> Iterator[Executor]:
    """A thread for each core that torch may use: at least two, for one waits for the disk, and at most eight, for each
    holds 10 MB.

    Each computes alone: torch's own threads would wait for each other at every small operation.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(min(max(2, threads), 8), "merge", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # before the files are closed
            torch.set_num_threads(threads)  # the number of a new thread is the last that any thread set
