"""What every node must be able to do before a long run starts: write the output folder, and reach the other ranks."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from comol_ds.errors import UserError
from comol_ds.parallel import groups
from comol_ds.parallel.device import device

T = TypeVar("T")


def check_nodes(world: groups.World, node: str, output_dir: str, seconds: float) -> list[str]:
    """Write ``output_dir`` on every node, then sum over all ranks. A collective call; it has its own process group.

    Args:
        world: this process among all.
        node: this node's name.
        output_dir: created if it is missing.
        seconds: time limit of the write; summing has twice as long, as a rank may wait for the other's write.

    Returns:
        What this rank has to tell, a line per fault: rank 0 what any node cannot write, every node's first rank that it
        cannot reach the others.
    """
    groups.quiet_libraries()
    mine = []
    if world.local_rank == 0:
        try:
            within(seconds, f"writing --output_dir {output_dir}", lambda: write_and_read(Path(output_dir), node))
        except UserError as error:
            mine.append(f"node {node}: {error}")
    try:
        # one thread for all of it: CUDA's current device belongs to a thread
        found = within(2 * seconds, f"an all-reduce over {world.size} ranks", lambda: reach_all(world, mine, seconds))
    except UserError as error:
        return [*mine, f"node {node}: {error}"] if world.local_rank == 0 else []
    return found if world.rank == 0 else []


def reach_all(world: groups.World, mine: list[str], seconds: float) -> list[str]:
    """Sum ones on the ranks' devices, and exchange their lines.

    Raises:
        RuntimeError: a rank is missing, or the sum is wrong.
    """
    groups.initialize(world, 3 * seconds / 60)
    total = groups.sum_over_world(torch.ones(1, device=device())).item()
    if total != world.size:
        raise RuntimeError(f"the sum of ones is {total:g}")
    lines = groups.gather_objects(mine, "compare the nodes")
    groups.shut_down()
    return [line for of_rank in lines for line in of_rank]


def write_and_read(folder: Path, node: str) -> None:
    """Write a small file into ``folder``, through to the disk, read it back and delete it.

    Raises:
        OSError: one of them does not work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe, content = folder / f".preflight-{node}-{os.getpid()}", os.urandom(4096)
    try:
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if probe.read_bytes() != content:
            raise OSError(f"{probe} reads back as something else")
    finally:
        probe.unlink(missing_ok=True)


def within(seconds: float, what: str, action: Callable[[], T]) -> T:
    """The result of ``action``, which is given up after ``seconds``: it may hang in the kernel or in a collective.

    Raises:
        UserError: ``what`` fails or does not end, in one line.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)  # one that hangs must not keep the process alive
    thread.start()
    thread.join(seconds)
    if errors:
        reason = str(errors[0]).splitlines() or [type(errors[0]).__name__]
        raise UserError(f"{what} fails: {reason[0]}") from errors[0]
    if not results:
        raise UserError(f"{what} does not end within {seconds:g} s")
    return results[0]
