"""Runs that are asked to stop: they finish the step, save, and end with exit code 75, to be started again.

Who may ask: SIGTERM, SIGINT, SIGUSR1 and SIGHUP to any rank, a file STOP in the run folder, --max_hours, and the end of
the SLURM job. Each rank knows only what has reached it; `comol_ds.training.step.train_step` adds the requests up, so
that all ranks stop after the same step. SIGHUP means that the terminal is gone; under nohup a run ignores it.

Every rank ends with 75; what a user sees depends on the launcher (measured: deepspeed 0.19, torch 2.13). srun passes 75
on. `deepspeed` does so for the STOP file, the time limits and a signal to a rank. A SIGTERM to its child, the process
deepspeed/launcher/launch.py, goes to the ranks of that node, each of which is killed 30 seconds later, and `deepspeed`
ends with 1; a SIGTERM to the command `deepspeed` itself ends it alone, and the ranks train on. torchrun forwards
signals, kills after 30 seconds, ends with 1 in every case, and prints the ranks' 75.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from comol_ds.checkpoint_names import MARKER
from comol_ds.config import RunSettings
from comol_ds.files import remove_or_warn
from comol_ds.parallel.groups import World, barrier, gather_objects, job_end_time

_ENDS_AT_ONCE = (signal.SIGTERM, signal.SIGINT)  # as a second one
_SIGNALS = (*_ENDS_AT_ONCE, signal.SIGUSR1, signal.SIGHUP)
# A terminal's Ctrl-C reaches every rank and its launcher, which forwards it: one request, two signals.
_ONE_REQUEST_SECONDS = 2.0


class LastingOutput:
    """From now on what is printed after the terminal, or the command that a pipe leads to, has gone is lost in silence.

    Otherwise the next line printed would be an OSError, and the end of a run that was about to save.
    """

    def __init__(self) -> None:
        self._old = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Lasting(stream) for stream in self._old)

    def restore(self) -> None:
        """Give the streams back to whom they belonged."""
        sys.stdout, sys.stderr = self._old


class _Lasting:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class StopSignals:
    """Notes the first signal; a second SIGTERM or SIGINT ends the process at once, with 128 + its number.

    The handlers do nothing: Python calls them only when its main thread is back from what it does, which may be a
    collective that another rank never joins. A thread reads the numbers of the signals instead.

    Args:
        speaks: whether to say on stderr that a signal came.
    """

    def __init__(self, speaks: bool = False) -> None:
        self.first: str | None = None
        self._speaks = speaks
        self._last_end: float | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._numbers = [number for number in _SIGNALS if not (number == signal.SIGHUP and under_nohup)]
        self._old = {number: signal.signal(number, _note) for number in self._numbers}
        for number in self._numbers:
            signal.siginterrupt(number, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        _Installed.now = self
        threading.Thread(target=self._listen, daemon=True).start()

    def restore(self) -> None:
        """Give every signal back to whom it belonged."""
        self._end({number: old or signal.SIG_DFL for number, old in self._old.items()})

    def ignore(self) -> None:
        """From now on the process ends by itself: a launcher that ends its ranks must not change their exit code."""
        self._end(dict.fromkeys(self._numbers, signal.SIG_IGN))

    def _end(self, handlers: dict) -> None:
        if _Installed.now is not self:
            return
        _Installed.now = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write)  # ends the thread

    def _listen(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:
                if number in self._numbers:
                    self._take(signal.Signals(number))
        os.close(self._read)

    def _take(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if received in _ENDS_AT_ONCE:
            if self._last_end is not None and now - self._last_end > _ONE_REQUEST_SECONDS:
                os._exit(128 + received)
            self._last_end = self._last_end or now
        if self.first is None:
            self.first = received.name
            if self._speaks:
                print(
                    f"{received.name}: the run saves and stops after this step; another SIGTERM or SIGINT ends it now",
                    file=sys.stderr,
                    flush=True,
                )


def _note(number: int, frame: object) -> None:
    """A handler must exist for the signal's number to be written to the pipe."""


class _Installed:
    now: StopSignals | None = None


def _forget_in_child() -> None:
    """A forked process, such as one of a pool that tokenizes, must end on SIGTERM, and not tell its parent."""
    if _Installed.now is None:
        return
    numbers, _Installed.now = _Installed.now._numbers, None
    signal.set_wakeup_fd(-1)
    for number in numbers:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


class Clock:
    """The time that a run may take; asked between two steps.

    Args:
        max_hours: stop after so long; None: no limit.
        job_end: Unix time at which the job is killed; None: never.
        margin_seconds: to be left before ``job_end``, beside the longest save and the longest step so far.
        checkpoints: folder of the checkpoints, which shows when a save has ended.
    """

    def __init__(
        self, max_hours: float | None, job_end: float | None, margin_seconds: float, checkpoints: Path
    ) -> None:
        self._start = time.monotonic()
        self._max_hours, self._job_end, self._margin = max_hours, job_end, margin_seconds
        self._checkpoints = checkpoints
        self._looked: float | None = None
        self._longest_step = self._longest_save = 0.0
        self._saving: tuple[Path, float] | None = None

    def save_starts(self, step: int) -> None:
        """A checkpoint of this step is about to be written."""
        self._saving = self._checkpoints / f"step_{step}" / MARKER, time.monotonic()

    def verdict(self) -> str | None:
        """Why it is time to stop; None if it is not."""
        now = time.monotonic()
        if self._looked is not None:
            self._longest_step = max(self._longest_step, now - self._looked)
        self._looked = now
        if self._saving is not None and self._saving[0].exists():
            self._longest_save = max(self._longest_save, now - self._saving[1])
            self._saving = None
        if self._max_hours is not None and now - self._start >= self._max_hours * 3600:
            return f"--max_hours {self._max_hours} are over"
        reserve = self._margin + self._longest_save + self._longest_step
        if self._job_end is not None and time.time() + reserve >= self._job_end:
            return f"the SLURM job ends in {(self._job_end - time.time()) / 60:.1f} minutes"
        return None


class StopRequests:
    """Whether this rank was asked to stop. Rank 0 also looks for the STOP file and at the clock.

    A context: signals are taken over inside.
    """

    def __init__(self, folder: Path, checkpoints: Path, settings: RunSettings, world: World) -> None:
        self.reason: str | None = None
        self._world = world
        self._file = folder / "STOP"
        self._signals = StopSignals(speaks=world.rank == 0)
        self._output = LastingOutput()
        self.clock = Clock(settings.max_hours, job_end_time(), settings.stop_margin_minutes * 60, checkpoints)

    def __enter__(self) -> "StopRequests":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.restore()
        self._signals.restore()

    def came(self) -> bool:
        """Whether this rank got a signal; rank 0: or finds the STOP file. Once true it stays true."""
        if self.reason is None and self._signals.first is not None:
            self.reason = f"{self._signals.first} on rank {self._world.rank}"
        if self.reason is None and self._world.rank == 0 and self._file.exists():
            self.reason = f"file {self._file}"
        return self.reason is not None

    def came_or_time_is_up(self) -> bool:
        """`came`, or on rank 0 the time is over. Not asked before a run's first step, so that every start gets on."""
        if not self.came() and self._world.rank == 0:
            self.reason = self.clock.verdict()
        return self.reason is not None

    def agreed_reason(self) -> str | None:
        """The reason of the first rank that has one, on every rank. A collective call."""
        return next((reason for reason in gather_objects(self.reason, "agree to stop") if reason is not None), None)

    def forget_file(self) -> None:
        """Rank 0 deletes the STOP file, so that the next start trains on; one that stays ends no run that is done."""
        if self._world.rank == 0:
            remove_or_warn(self._file)

    def leave(self, why: str) -> None:
        """The last words of a run that is to be started again. A collective call.

        Every rank is here before one ends, which its launcher may take for a reason to end the others.
        """
        self.forget_file()
        if self._world.rank == 0:
            print(f"{why}; continue with --resume_from_checkpoint", flush=True)
        self._signals.ignore()
        barrier("leave the run")
