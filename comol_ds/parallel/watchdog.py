"""A rank that hangs must not hold a job for ever: past a limit every rank writes its stacks and ends.

A hung rank cannot be asked, and no thread may use a collective beside the main thread's. Each rank's thread therefore
counts in a file. When a rank finds that the run hangs it looks whose count still moves: one that stands still is a
process that is stopped or dead, or a machine that is lost. What was counted before proves nothing: a process may have
been killed in the last minute. No two clocks are compared.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from comol_ds.parallel.groups import World

EXIT_HUNG = 1
_SHARE = 0.9  # of the limit: before the collectives' own timeout makes the hang one rank's error
_BEATS = 100  # within the limit: listening for four of them must end before the collectives' own timeout
_LONGEST_BEAT_SECONDS = 10.0
_SILENT_BEATS = 4  # a count that stood still for so long
_SHORTEST_SILENCE_SECONDS = 1.0  # a thread on a busy machine
_HEAD_START_SECONDS = 5.0  # for one rank to speak, before a launcher sees another rank end and kills it


class Watchdog:
    """Ends the process when no step comes to its end, except while `paused`. A context: watches inside.

    Args:
        folder: the run folder, on a file system that all ranks share.
        world: this process among all.
        limit_seconds: longest wait for another rank; a step that takes 9 tenths of it counts as hung.
        step: number of the step that the run starts after.
    """

    def __init__(self, folder: Path, world: World, limit_seconds: float, step: int) -> None:
        self._beats, self._stacks = folder / "heartbeats", folder / "stacks"
        self._world, self._limit, self._step = world, _SHARE * limit_seconds, step
        self._interval, self._count = min(self._limit / _BEATS, _LONGEST_BEAT_SECONDS), 0
        self._since: float | None = time.monotonic()
        self._closed = threading.Event()
        with contextlib.suppress(OSError):  # of an earlier run that hung
            self._stack_file(world.rank).unlink()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def paused(self, step: int) -> Iterator[None]:
        """A step is done, and what follows may take longer than a step: an evaluation, a save."""
        self._step, self._since = step, None
        yield
        self._since = time.monotonic()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the folder goes with the last one
            (self._beats / f"rank_{self._world.rank}").unlink()
            self._beats.rmdir()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            self._beat()
            since = self._since
            if since is not None and time.monotonic() - since > self._limit:
                self._end()

    def _beat(self) -> None:
        self._count += 1
        with contextlib.suppress(OSError):  # a full disk is the main thread's to report
            self._beats.mkdir(exist_ok=True)
            partial = self._beats / f"rank_{self._world.rank}.partial"
            partial.write_text(f"{self._step} {self._count} {os.getpid()}")
            partial.rename(partial.with_suffix(""))

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._stacks.mkdir(exist_ok=True)
            with self._stack_file(self._world.rank).open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        steps, silent = self._listen()
        if self._world.rank == min(set(range(self._world.size)) - set(silent)):
            print(self._diagnosis(steps, silent), file=sys.stderr, flush=True)
        time.sleep(_HEAD_START_SECONDS)
        os._exit(EXIT_HUNG)

    def _listen(self) -> tuple[dict[int, int], list[int]]:
        """The last step of every rank that ever spoke, and the ranks that say nothing while this one waits for it."""
        before, end = self._words(), time.monotonic() + max(_SILENT_BEATS * self._interval, _SHORTEST_SILENCE_SECONDS)
        while time.monotonic() < end:
            self._beat()
            time.sleep(self._interval)
        words = self._words()
        # a rank that found the hang first wrote its stacks, and may have ended itself since
        heard = {rank for rank, said in words.items() if said != before.get(rank) or self._stack_file(rank).exists()}
        silent = [rank for rank in range(self._world.size) if rank not in heard | {self._world.rank}]
        return {rank: int(said.split()[0]) for rank, said in words.items()}, silent

    def _words(self) -> dict[int, str]:
        words = {}
        for rank in range(self._world.size):
            with contextlib.suppress(OSError):
                words[rank] = (self._beats / f"rank_{rank}").read_text()
        return words

    def _stack_file(self, rank: int) -> Path:
        return self._stacks / f"rank_{rank}.txt"

    def _diagnosis(self, steps: dict[int, int], silent: list[int]) -> str:
        """One line: which ranks say nothing any more, which are behind, and where the stacks are."""
        latest = max(steps.values(), default=self._step)
        behind = [rank for rank, step in steps.items() if step < latest and rank not in silent]
        found = [
            f"{what} {_ranks(ranks)}"
            for what, ranks in (("no sign of life from", silent), ("a step behind the others:", behind))
            if ranks
        ]
        return (
            f"hung: no step for {self._limit:.0f} s after step {self._step};"
            f" {'; '.join(found) or 'every rank is alive and none is behind'}; stacks of the ranks in {self._stacks}"
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
