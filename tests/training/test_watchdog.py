"""Ranks that hang end themselves, leave their stacks, and the first that lives says which of them it misses."""

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


def die(folder: Path, rank: int, step: int) -> None:
    """The kernel kills a process that takes too much memory, here after most of the limit."""
    with Watchdog(folder, World(rank, 2, rank), LIMIT, 0) as dog:
        with dog.paused(step):
            pass
        time.sleep(0.8 * LIMIT)
        os.kill(os.getpid(), signal.SIGKILL)


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


# name -> what ranks 0 and 1 do, with which step; their exit codes, None for one that does not end; what is said of them
HANGS = {
    "both hang": ([(hang, 7), (hang, 7)], [EXIT_HUNG, EXIT_HUNG], "every rank is alive and none is behind"),
    "one is behind": ([(hang, 7), (hang, 6)], [EXIT_HUNG, EXIT_HUNG], "a step behind the others: rank 1"),
    "one is frozen": ([(hang, 7), (freeze, 0)], [EXIT_HUNG, None], "no sign of life from rank 1"),
    "one has died": ([(hang, 7), (die, 7)], [EXIT_HUNG, -signal.SIGKILL], "no sign of life from rank 1"),
    "rank 0 has died": ([(die, 7), (hang, 7)], [-signal.SIGKILL, EXIT_HUNG], "no sign of life from rank 0"),
}
GETS_ON = ([(get_on, 6), (get_on, 6)], [0, 0], None)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, tuple[Path, list[int | None]]]:
    """Name of a case -> its folder and its ranks' exit codes. All cases run at the same time: they mostly sleep."""
    context, cases, started = get_context("fork"), HANGS | {"gets on": GETS_ON}, {}
    for name, (ranks, _, _) in cases.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        processes = [
            context.Process(target=run_rank, args=(action, folder, rank, step))
            for rank, (action, step) in enumerate(ranks)
        ]
        started[name] = folder, processes
        for process in processes:
            process.start()
    try:
        for name, (_, processes) in started.items():
            for process, code in zip(processes, cases[name][1], strict=True):
                process.join(0.1 if code is None else 60)
        return {name: (folder, [process.exitcode for process in ps]) for name, (folder, ps) in started.items()}
    finally:
        for _, processes in started.values():
            for process in processes:
                process.kill()


@pytest.mark.parametrize("name", HANGS)
def test_the_first_rank_that_lives_says_who_is_missing(name, ended):
    _, codes, found = HANGS[name]
    folder, exit_codes = ended[name]
    assert exit_codes == codes
    hung = [rank for rank, code in enumerate(codes) if code == EXIT_HUNG]
    said = f"hung: no step for 2 s after step 7; {found}; stacks of the ranks in {folder / 'stacks'}\n"
    assert [(folder / f"stderr_{rank}").read_text() for rank in range(2)] == [
        said * (rank == hung[0]) for rank in (0, 1)
    ]
    assert sorted(path.name for path in (folder / "stacks").iterdir()) == [f"rank_{rank}.txt" for rank in hung]
    assert all(" in hang\n" in (folder / "stacks" / f"rank_{rank}.txt").read_text() for rank in hung)


def test_a_run_that_gets_on_is_left_alone(ended):
    folder, exit_codes = ended["gets on"]
    assert exit_codes == [0, 0]
    assert not (folder / "stacks").exists()
    assert not (folder / "heartbeats").exists()


def test_stacks_of_an_earlier_run_are_no_sign_of_life(tmp_path):
    stacks = tmp_path / "stacks" / "rank_1.txt"
    stacks.parent.mkdir()
    stacks.touch()
    with Watchdog(tmp_path, World(1, 2, 1), LIMIT, 0):
        assert not stacks.exists()


@pytest.mark.parametrize("minutes", [1, 2, 5, 10, 30, 120])
def test_it_speaks_before_the_collectives_own_timeout(minutes, tmp_path):
    """From the last sign of a step on: the limit, a beat until it is noticed, and listening for the others."""
    with Watchdog(tmp_path, World(0, 2, 0), 60 * minutes, 0) as dog:
        listening = max(watchdog._SILENT_BEATS * dog._interval, watchdog._SHORTEST_SILENCE_SECONDS)
        assert dog._limit + dog._interval + listening + dog._interval < 60 * minutes
