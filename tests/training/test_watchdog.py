"""Ranks that hang end themselves, leave their stacks, and rank 0 says which of them it misses."""

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from comol_ds.parallel import watchdog
from comol_ds.parallel.groups import World
from comol_ds.parallel.watchdog import EXIT_HUNG, Watchdog

LIMIT = 2.0


def hang(folder: Path, rank: int, step: int) -> None:
    with Watchdog(folder, World(rank, 2, rank), LIMIT, 0) as dog:
        with dog.paused(step):
            pass
        time.sleep(60)


def freeze(folder: Path, rank: int, step: int) -> None:
    with Watchdog(folder, World(rank, 2, rank), LIMIT, 0):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGSTOP)


def get_on(folder: Path, rank: int, step: int) -> None:
    """Steps that together, and a pause that alone, take longer than the limit."""
    with Watchdog(folder, World(rank, 2, rank), LIMIT, 0) as dog:
        for number in range(step):
            time.sleep(LIMIT / 4)
            with dog.paused(number + 1):
                time.sleep(1.5 * LIMIT if number == 0 else 0)


def run_rank(action: Callable, folder: Path, rank: int, step: int) -> None:
    watchdog._HEAD_START_SECONDS = 0.3
    sys.stderr = (folder / f"stderr_{rank}").open("w")
    action(folder, rank, step)


def exit_codes(folder: Path, *ranks: tuple[Callable, int]) -> list[int | None]:
    """Of forked processes that do this, with that step; None for one that has not ended after the others."""
    context = get_context("fork")
    processes = [
        context.Process(target=run_rank, args=(action, folder, rank, step)) for rank, (action, step) in enumerate(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process, (action, _) in zip(processes, ranks, strict=True):
            process.join(0.1 if action is freeze else 20)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("ranks", "codes", "found"),
    [
        ([(hang, 7), (hang, 7)], [EXIT_HUNG, EXIT_HUNG], "every rank is alive and none is behind"),
        ([(hang, 7), (hang, 6)], [EXIT_HUNG, EXIT_HUNG], "a step behind the others: rank 1"),
        ([(hang, 7), (freeze, 0)], [EXIT_HUNG, None], "no sign of life from rank 1"),
    ],
)
def test_rank_0_says_who_is_missing(ranks, codes, found, tmp_path):
    assert exit_codes(tmp_path, *ranks) == codes
    assert (tmp_path / "stderr_0").read_text() == (
        f"hung: no step for 2 s after step 7; {found}; stacks of the ranks in {tmp_path / 'stacks'}\n"
    )
    hung = [rank for rank, code in enumerate(codes) if code == EXIT_HUNG]
    assert sorted(path.name for path in (tmp_path / "stacks").iterdir()) == [f"rank_{rank}.txt" for rank in hung]
    assert all(" in hang\n" in (tmp_path / "stacks" / f"rank_{rank}.txt").read_text() for rank in hung)


def test_a_run_that_gets_on_is_left_alone(tmp_path):
    assert exit_codes(tmp_path, (get_on, 6), (get_on, 6)) == [0, 0]
    assert not (tmp_path / "stacks").exists()
    assert not (tmp_path / "heartbeats").exists()
