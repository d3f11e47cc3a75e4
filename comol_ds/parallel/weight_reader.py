"""Reads runs of bytes of tensor files straight into tensors: exact, in parallel, with bounded memory of its own.

By pread and not by memory map: a disk that fails, or a file that becomes shorter, is an exception and not SIGBUS; the
file's pages do not count as memory of this process; and no byte that is not asked for is copied.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from comol_ds.errors import UserError
from comol_ds.layout import Shard
from comol_ds.tensor_files import StoredTensor, prefetch, read_at

READERS = 4  # threads of a rank; pread releases the interpreter lock
PIECE_BYTES = 32 << 20  # what one thread reads at a time, and the size of its buffer if it needs one


@dataclass(frozen=True)
class Read:
    """Elements [start, start + target.numel()) of the flattened part ``shard`` of a stored tensor, and their place.

    Attributes:
        target: 1-D and contiguous, of any dtype, on any device.
    """

    tensor: StoredTensor
    shard: Shard | None
    start: int
    target: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.tensor.dtype.itemsize

    @property
    def is_direct(self) -> bool:
        """Whether the file's bytes are the target's."""
        return self.target.device.type == "cpu" and self.target.dtype == self.tensor.dtype

    def runs(self) -> Iterator[tuple[int, int]]:
        """Where the elements lie: (byte of the file, bytes).

        One run where the part is contiguous, as it is for None and along dimension 0; otherwise one per row.
        """
        tensor, shard = self.tensor, self.shard
        width = row = math.prod(tensor.shape)  # elements that follow each other, and to the next such run
        skipped = 0  # elements of a row before the part
        if shard is not None and shard.size < tensor.shape[shard.dim]:
            inner = math.prod(tensor.shape[shard.dim + 1 :])
            row, width = tensor.shape[shard.dim] * inner, shard.size * inner
            skipped = shard.start * inner
        itemsize, position, stop = tensor.dtype.itemsize, self.start, self.start + self.target.numel()
        while position < stop:
            number, column = divmod(position, width)
            length = min(width - column, stop - position)
            yield tensor.start + itemsize * (number * row + skipped + column), itemsize * length
            position += length

    def pieces(self) -> Iterator["Read"]:
        """The same in parts of at most PIECE_BYTES."""
        step = PIECE_BYTES // self.tensor.dtype.itemsize
        for first in range(0, self.target.numel(), step):
            yield Read(self.tensor, self.shard, self.start + first, self.target[first : first + step])


def read_all(reads: Sequence[Read], show_progress: bool) -> None:
    """Fill every target, file by file from front to back.

    Raises:
        UserError: a file that cannot be read or ends too early; the other targets are left as they are.
    """
    pieces = sorted(
        (piece for read in reads for piece in read.pieces()), key=lambda piece: (piece.tensor.file, next(piece.runs()))
    )
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for buffer in _allocate_buffers(pieces):
        buffers.put(buffer)
    bar = tqdm(
        total=sum(piece.nbytes for piece in pieces), desc="loading weights", disable=not show_progress,
        unit="B", unit_scale=True, unit_divisor=1024,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        try:
            for future in as_completed([pool.submit(_read, piece, buffers) for piece in pieces]):
                bar.update(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _allocate_buffers(pieces: Iterable[Read]) -> list[torch.Tensor]:
    """One per thread if any piece needs one; page-locked for an accelerator, made here: a thread's own current device
    is the first one, on which page-locking would build a context of this process.
    """
    indirect = [piece for piece in pieces if not piece.is_direct]
    if not indirect:
        return []
    buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8) for _ in range(READERS)]
    if any(piece.target.device.type != "cpu" for piece in indirect):
        buffers = [get_accelerator().pin_memory(buffer) for buffer in buffers]
    return buffers


def _read(piece: Read, buffers: SimpleQueue[torch.Tensor]) -> int:
    """Fill one target; returns the bytes read. The file is closed again: no handle outlives its last tensor."""
    try:
        with piece.tensor.file.open("rb", buffering=0) as stream:
            _fill(stream.fileno(), piece, buffers)
    except (OSError, EOFError) as error:
        raise UserError(
            f"{piece.tensor.file}: tensor {piece.tensor.name!r} cannot be read: {error};"
            " check the disk, copy or download the file again"
        ) from error
    return piece.nbytes


def _fill(file: int, piece: Read, buffers: SimpleQueue[torch.Tensor]) -> None:
    runs = list(piece.runs())
    _advise(file, runs)
    if piece.is_direct:
        _read_runs(file, runs, piece.target)
        return
    buffer = buffers.get()
    try:
        stored = buffer[: piece.nbytes]
        _read_runs(file, runs, stored)
        piece.target.copy_(stored.view(piece.tensor.dtype))
    finally:
        buffers.put(buffer)


def _advise(file: int, runs: Sequence[tuple[int, int]]) -> None:
    """No readahead by guess, for what lies behind a part is another rank's; but all rows of which parts are wanted.

    These are a few KiB each, and a cold disk delivers 0.12 GiB/s of them one after the other, 0.5 when it knows of them
    (virtual disk, 2 KiB of every 4 and 8 of every 16). Tensor-parallel peers stand on one node and share its page
    cache, so the whole rows are read once for all of them.
    """
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    if len(runs) > 1:
        prefetch(file, runs[0][0], sum(runs[-1]))


def _read_runs(file: int, runs: Iterable[tuple[int, int]], target: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor with the runs, one after the other."""
    memory = memoryview(target.view(torch.uint8).numpy())
    for place, length in runs:
        read_at(file, place, memory[:length])
        memory = memory[length:]
