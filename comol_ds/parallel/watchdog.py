"""A rank that hangs must not hold a job for ever: past a limit every rank writes its stacks and ends.

A hung rank cannot be asked, and no thread may use a collective beside the main thread's. Each rank's thread therefore
counts in a file, which rank 0's thread reads: a count that stands still is a process that is stopped or dead, or a
machine that is lost. Only rank 0's own clock is used.
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
_LOOKS = 20  # within the limit
_SILENT_LOOKS = 4  # a count that stood still for so long
_HEAD_START_SECONDS = 5.0  # for rank 0 to speak, before a launcher sees another rank end and kills it


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
        self._since: float | None = time.monotonic()
        self._closed = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}  # rank -> its last words, when they were new
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
        count = 0
        while not self._closed.wait(self._limit / _LOOKS):
            count += 1
            self._beat(count)
            if self._world.rank == 0:
                self._listen()
            since = self._since
            if since is not None and time.monotonic() - since > self._limit:
                self._end()

    def _beat(self, count: int) -> None:
        with contextlib.suppress(OSError):  # a full disk is the main thread's to report
            self._beats.mkdir(exist_ok=True)
            partial = self._beats / f"rank_{self._world.rank}.partial"
            partial.write_text(f"{self._step} {count} {os.getpid()}")
            partial.rename(partial.with_suffix(""))

    def _listen(self) -> None:
        for rank in range(self._world.size):
            with contextlib.suppress(OSError):
                words = (self._beats / f"rank_{rank}").read_text()
                if self._heard.get(rank, ("", 0.0))[0] != words:
                    self._heard[rank] = words, time.monotonic()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._stacks.mkdir(exist_ok=True)
            with (self._stacks / f"rank_{self._world.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        if self._world.rank == 0:
            print(self._diagnosis(), file=sys.stderr, flush=True)
        time.sleep(_HEAD_START_SECONDS)
        os._exit(EXIT_HUNG)

    def _diagnosis(self) -> str:
        """One line: which ranks say nothing any more, which are behind, and where the stacks are."""
        silence = time.monotonic() - self._limit / _LOOKS * _SILENT_LOOKS
        silent = [rank for rank in range(self._world.size) if self._heard.get(rank, ("", 0.0))[1] < silence]
        steps = {rank: int(words.split()[0]) for rank, (words, _) in self._heard.items()}
        behind = [rank for rank, step in steps.items() if step < max(steps.values()) and rank not in silent]
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
